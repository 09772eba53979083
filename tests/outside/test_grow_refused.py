"""What must not be taken for growth: ids of other rows, files that only look longer, an export of another dataset."""

import gzip
import json
import shutil

import pyarrow.parquet as pq
import pytest
from PIL import Image

HASTY = '''
from pathlib import Path

from latentmill.sources.prompts import Prompts


class Hasty(Prompts):
    """Somebody changes the order of the rows just when they have been planned, once."""

    def fragments(self):
        found, file = super().fragments(), Path(self.path) / "b.jsonl"
        if not (done := Path(self.path) / "done").exists():
            done.touch()
            file.write_text("".join(reversed(file.open().readlines())))
        return found
'''


@pytest.fixture
def run(latentmill, patches, pictures, tmp_path):
    """``run(*SETTINGS)``: rows of files beside the pictures, encoded into ``out``; returns prompt, id and seed of each."""

    def run(*more, code=0, source="prompts", output=tmp_path / "out"):
        told = [f"source={source}", f"source.path={pictures}", f"output={output}", "rows_per_shard=3"]
        assert latentmill("run", "encode", *patches, *told, *more) == code, latentmill.said
        assert "Traceback" not in latentmill.said
        found = [row for path in sorted(output.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]
        return [tuple(row[key] for key in ("prompt", "id", "seed") if key in row) for row in found]

    return run


def lines(*names):
    return "".join(json.dumps({"image": f"{at}.png", "name": name}) + "\n" for at, name in enumerate(names))


# ---------------------------------------------------------------------------------------------------- ids that are kept


def test_ids_of_a_file_that_changed_when_it_was_planned_are_not_kept(latentmill, install, run, pictures, tmp_path):
    install("hasty", "[latentmill.sources]\nhasty = hasty:Hasty\n", hasty=HASTY)
    (pictures / "b.jsonl").write_text(lines("a", "b"))
    assert run("source.id_column=name", source="hasty", code=2) == []
    assert "b.jsonl has changed since it was planned: the same command plans anew" in latentmill.err
    assert not [*tmp_path.glob("out/.rows/*.gz")] and not (tmp_path / "out" / "plan.json").exists()
    assert [id for _, id, _ in run("source.id_column=name", source="hasty")] == ["b", "a"]


@pytest.mark.parametrize(("ids", "said"), [(["b"], "1 row, and 2 were planned"), (["a", "b", "c"], "3 rows, and 2")])
def test_ids_of_too_few_or_many_rows_are_not_gone_by(ids, said, latentmill, run, pictures, tmp_path):
    (pictures / "b.jsonl").write_text(lines("a", "b"))
    before = run("source.id_column=name")
    [kept] = (tmp_path / "out" / ".rows").iterdir()
    kept.write_bytes(gzip.compress("".join(f'"{id}"\n' for id in ids).encode()))
    (pictures / "b.jsonl").write_text(lines("b", "a", "c"))
    assert run("source.id_column=name", "--grow", code=2) == before
    assert f".rows/{kept.name} can't be read: it says of {said}" in latentmill.err


def test_a_row_without_an_id_is_no_hindrance_where_its_file_got_longer(run, pictures):
    (pictures / "a.csv").write_text("image,name,prompt\n3.png,d,w\n")
    (pictures / "b.csv").write_text("image,name,prompt\n0.png,a,x\n1.png,,y\n")
    before = run("source.id_column=name")
    (pictures / "a.csv").unlink()
    (pictures / "b.csv").write_text("image,name,prompt\n0.png,a,x\n1.png,,y\n2.png,c,z\n3.png,d,w\n")
    assert [id for _, id, _ in before] == ["d", "a"]
    assert [id for _, id, _ in run("source.id_column=name", "--grow")] == ["d", "a", "c"], "d moved, and is not new"


def test_a_plan_that_was_lost_after_growing_is_said(latentmill, run, pictures, tmp_path):
    before = run(source="images")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(pictures / "x.png")
    assert len(run("--grow", source="images")) == len(before) + 1
    (tmp_path / "out" / "plan.json").unlink()
    for told in [], ["--grow"]:
        run(*told, source="images", code=2)
        assert "plan.json is gone, and can't be made again" in latentmill.err
    assert latentmill("status", tmp_path / "out") == 2 and "it must come from a backup" in latentmill.err


# ----------------------------------------------------------------------------------------- what is at the end of a file


@pytest.mark.parametrize("more", ["t", "ts", "t\n", "ts\r\n", "t\n2.png,a dog\n"])
def test_a_last_row_that_got_longer_is_another(more, latentmill, run, pictures):
    first = "image,prompt\n0.png,a dog\n1.png,a red ca"
    (pictures / "b.csv").write_text(first)
    before = run()
    (pictures / "b.csv").write_text(first + more)
    assert run("--grow", code=2) == before
    assert "b.csv is not what it was, with more rows at its end" in latentmill.err


def test_a_file_in_another_encoding_for_what_came_is_another(latentmill, run, pictures):
    first = "image,prompt\n0.png,un caf\xe9\n".encode("cp1252")
    (pictures / "b.csv").write_bytes(first)
    before = run()
    assert before[0][0] == "un caf\xe9"
    (pictures / "b.csv").write_bytes(first + "1.png,l'\xe9t\xe9\n".encode())
    assert run("--grow", code=2) == before and "b.csv is not what it was" in latentmill.err


def test_a_file_in_utf_8_has_grown(run, pictures):
    (pictures / "b.csv").write_text("image,prompt\n0.png,un caf\xe9\n", encoding="utf-8")
    before = run()
    (pictures / "b.csv").write_text("image,prompt\n0.png,un caf\xe9\n1.png,l'\xe9t\xe9\n", encoding="utf-8")
    after = run("--grow")
    assert after[:1] == before and [prompt for prompt, *_ in after[1:]] == ["l'\xe9t\xe9"]


# -------------------------------------------------------------------------------------------------------------- exports


def test_two_datasets_of_one_beginning_are_not_exported_into_one_folder(latentmill, run, pictures, tmp_path):
    told = ("flow=[read, write]", "source.keep=[file]")
    run(*told, source="images")
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    for name, output in (("x", "out"), ("y", "other")):
        Image.new("RGB", (4, 4), (len(name), ord(name), 9)).save(pictures / f"{name}.png")
        run(*told, "--grow", source="images", output=tmp_path / output)
        (pictures / f"{name}.png").unlink()
    export = tmp_path / "export"
    assert latentmill("export", tmp_path / "old", export, "--to", "folder") == 0, latentmill.said
    assert latentmill("export", tmp_path / "out", export, "--to", "folder") == 0, latentmill.said
    there = {path.name: path.read_bytes() for path in export.iterdir() if path.is_file()}
    assert "x.png" in there
    for output, said in (("other", "a dataset that has grown otherwise"), ("old", "when it had grown further")):
        assert latentmill("export", tmp_path / output, export, "--to", "folder") == 2
        assert said in latentmill.err and "choose another folder" in latentmill.err
        assert {path.name: path.read_bytes() for path in export.iterdir() if path.is_file()} == there


TAKER = """
from latentmill.sinks.parquet import Parquet

class Taker(Parquet):
    def finish(self, shards):
        return {"plan-1.json": b"{}"}
"""


def test_no_sink_takes_a_plan_s_name(latentmill, install, run, tmp_path):
    install("taker", "[latentmill.sinks]\ntaker = taker:Taker\n", taker=TAKER)
    run("sink=taker", source="images", code=1)
    assert "finish made a file 'plan-1.json'" in latentmill.err and not (tmp_path / "out" / "plan-1.json").exists()

"""A source that grew: new rows get shards of their own, and what is there stays as it is, to the last byte."""

import json

import pytest
from PIL import Image

from latentmill import dataset, verify
from latentmill.storage import at

ROOM = ("rows_per_shard=3", "source.keep=[file]")


def picture(path, colour):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def shards(output):
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


def by(key, rows):
    """Rows without what numbers them, by a column."""
    return {row[key]: {name: value for name, value in row.items() if name != "row_id"} for row in rows}


@pytest.fixture
def encode(latentmill, patches, pictures, tmp_path):
    """``encode(*SETTINGS)``: the pictures' latents in ``tmp_path / "out"``; returns its shards."""

    def encode(*settings, code=0, output=tmp_path / "out", job=(*ROOM, f"source.path={pictures}")):
        assert latentmill("run", "encode", *patches, f"output={output}", *job, *settings) == code, latentmill.said
        return shards(output) if output.exists() else {}

    return encode


@pytest.fixture
def table(encode, pictures, tmp_path):
    """``table(NAME, LINES)``: a file of rows, beside the pictures that they name; ``table.encode()``: their latents."""

    class Table:
        folder = pictures

        def __call__(self, name, text):
            (self.folder / name).write_text(text)

        def encode(self, *settings, **how):
            job = ("rows_per_shard=3", "source=prompts", f"source.path={self.folder}")
            return encode(*settings, job=job, **how)

    return Table()


def whole(latentmill, output):
    """That it is complete and sound; its numbers of rows and shards."""
    assert latentmill("verify", output) == 0, latentmill.said
    assert latentmill("status", output, "--json") == 0
    now = json.loads(latentmill.out)
    assert now["success"] and not now["foreign"] and now["ok"] == now["planned"]
    return now["planned"], now["shards_done"]


# --------------------------------------------------------------------------------------------------------- pictures


def test_pictures_that_came_between_others_get_shards_of_their_own(latentmill, encode, pictures, rows, tmp_path):
    output = tmp_path / "out"
    before = encode()
    plan = (output / "plan.json").read_bytes()
    picture(pictures / "00.png", (9, 9, 9))
    picture(pictures / "a" / "x.png", (1, 2, 3))
    after = encode("--grow")
    assert after.keys() - before.keys() == {"00002.parquet"} and after.items() >= before.items()
    assert (output / "plan.json").read_bytes() == plan
    assert whole(latentmill, output) == (6, 3)
    assert [(row["file"], row["row_id"]) for row in rows(output)][4:] == [
        ("00.png", "000000004-000"),
        ("a/x.png", "000000005-000"),
    ]
    encode(output=tmp_path / "fresh")
    grown, fresh = by("file", rows(output)), by("file", rows(tmp_path / "fresh"))
    assert {file: row["latents"] for file, row in grown.items()} == {
        file: row["latents"] for file, row in fresh.items()
    }
    assert encode() == after, "the same command finds nothing to do"
    assert "nothing to do, all 6 rows were finished before" in latentmill.out


def test_it_grows_again_and_says_so_when_nothing_came(latentmill, encode, pictures, tmp_path):
    before = encode()
    for number, names in enumerate([["0a.png"], ["0b.png", "9.png"]], start=1):
        for name in names:
            picture(pictures / name, (number, 50, 7))
        after = encode("--grow")
        assert after.items() >= before.items() and len(after) == len(before) + 1
        before = after
    assert {path.name for path in (tmp_path / "out").glob("plan*")} == {"plan.json", "plan-1.json", "plan-2.json"}
    assert whole(latentmill, tmp_path / "out") == (7, 4)
    plans = [json.loads((tmp_path / "out" / f"plan{which}.json").read_text()) for which in ("", "-1", "-2")]
    assert [plan["after"] for plan in plans[1:]] == [plan["hash"] for plan in plans[:2]]
    assert encode("--grow") == before
    assert "nothing has come to" in latentmill.err and "plan-3.json" not in {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_what_is_not_done_yet_of_the_old_is_done_beside_the_new(latentmill, encode, pictures, tmp_path):
    before = encode()
    for name in ("data/00001.parquet", "_SUCCESS"):
        (tmp_path / "out" / name).unlink()
    picture(pictures / "00.png", (9, 9, 9))
    assert encode("--grow").items() > before.items()
    assert whole(latentmill, tmp_path / "out") == (5, 3)


def test_ids_that_were_lost_or_damaged_are_said(latentmill, encode, pictures, tmp_path):
    before = encode()
    picture(pictures / "00.png", (9, 9, 9))
    [kept] = (tmp_path / "out" / ".rows").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert encode("--grow", code=2) == before
    assert f".rows/{kept.name} can't be read" in latentmill.err and latentmill.err.count("\n") == 1
    kept.unlink()
    assert encode("--grow", code=2) == before and "(.rows doesn't say which rows there were)" in latentmill.err
    (pictures / "00.png").rename(pictures / "x.png")
    assert encode("--grow", code=2) == before, "of 0.png and those behind it there are more now"


def test_with_ids_a_grown_dataset_has_the_rows_of_a_fresh_one(latentmill, encode, pictures, rows, tmp_path):
    told = ("source.id_column=path", "samples_per_row=2")
    encode(*told)
    picture(pictures / "00.png", (9, 9, 9))
    encode(*told, "--grow")
    encode(*told, output=tmp_path / "fresh")

    def known(output):
        return {(row["id"], row["row_id"][-3:]): {**row, "row_id": ""} for row in rows(output)}

    assert known(tmp_path / "out") == known(tmp_path / "fresh") and len(rows(tmp_path / "out")) == 10
    assert whole(latentmill, tmp_path / "out") == (10, 4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda folder: (folder / "1.png").unlink(), "1.png is gone"),
        (lambda folder: picture(folder / "2.png", (0, 0, 0)), "a row of 0.png+4@"),
        (lambda folder: (folder / "3.txt").write_text("a caption"), "a row of 0.png+4@"),
    ],
)
def test_pictures_that_went_or_changed_are_refused(how, said, latentmill, encode, pictures, tmp_path):
    before = encode()
    picture(pictures / "00.png", (9, 9, 9))
    how(pictures)
    assert encode("--grow", code=2) == before and said in latentmill.err
    assert "Traceback" not in latentmill.said and not (tmp_path / "out" / "plan-1.json").exists()


def test_without_grow_what_came_is_refused_and_grow_is_named(latentmill, encode, pictures):
    encode()
    picture(pictures / "00.png", (9, 9, 9))
    encode(code=2)
    assert "--grow takes in rows that have come" in latentmill.err
    encode("--grow")
    picture(pictures / "01.png", (9, 9, 9))
    encode(code=2)
    assert "--grow takes in rows that have come" in latentmill.err


def test_another_job_is_no_growth(latentmill, encode, pictures):
    before = encode()
    picture(pictures / "00.png", (9, 9, 9))
    assert encode("--grow", "seed=5", code=2) == before
    assert "holds another job's dataset: seed: 0 -> 5. Choose another output" in latentmill.err


def test_the_plan_says_what_would_come_and_writes_nothing(latentmill, encode, patches, pictures, tmp_path):
    encode()
    picture(pictures / "00.png", (9, 9, 9))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    told = ["plan", "encode", *patches, *ROOM, f"source.path={pictures}", f"output={tmp_path / 'out'}"]
    assert latentmill(*told, "--grow") == 0
    assert (
        "5 rows in 3 shards of 3, of which 2 are done" in latentmill.out and "1 row of source images" in latentmill.err
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_failed_rows_of_an_old_generation_are_done_again_where_they_are_now(
    latentmill, encode, pictures, rows, tmp_path
):
    good = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(good[:20])
    encode()
    picture(pictures / "00.png", (9, 9, 9))
    encode("--grow")
    assert {row["file"] for row in rows(tmp_path / "out")} == {"0.png", "2.png", "3.png", "00.png"}
    again = encode("--retry-failed")
    assert latentmill("verify", tmp_path / "out") == 0 and len(again) == 3
    assert {row["file"] for row in rows(tmp_path / "out")} == {"0.png", "2.png", "3.png", "00.png"}


# ---------------------------------------------------------------------------------------------------- files of rows


def lines(*names, **more):
    return "".join(json.dumps({"image": f"{name}.png", **more}) + "\n" for name in names)


def test_rows_at_the_end_of_a_file_and_files_before_it(latentmill, table, rows, tmp_path):
    table("b.jsonl", lines(0, 1))
    table("c.csv", "image,prompt\n2.png,a fox\n")
    before = table.encode()
    table("b.jsonl", lines(0, 1, 3))
    table("a.jsonl", lines(2))
    table("c.csv", 'image,prompt\n2.png,a fox\n0.png,"a\nline"\n')
    after = table.encode("--grow")
    assert after.items() >= before.items() and len(after) == 2
    assert whole(latentmill, tmp_path / "out") == (6, 2)
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["", "", "a fox", "", "", "a\nline"]
    [old, new] = [[row["latents"] for row in rows(tmp_path / "out")][part] for part in (slice(3), slice(3, 6))]
    assert old[0] == new[2] and new[0] == old[2], "a.jsonl's is picture 2, and b.jsonl's last picture 3"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
def test_a_file_may_have_ended_in_any_way(end, table, tmp_path):
    first = lines(0, 1)[:-1]
    table("b.jsonl", first + end)
    before = table.encode()
    table("b.jsonl", first + (end or "\n") + lines(2))
    assert table.encode("--grow").items() >= before.items()


@pytest.mark.parametrize(
    ("name", "text", "then"),
    [
        ("b.jsonl", lines(0, 1), lines(1, 0, 2)),
        ("b.jsonl", lines(0, 1), lines(0)),
        ("b.csv", "image\n0.png\n", "image\n1.png\n0.png\n"),
        (
            "b.json",
            f"[{lines(0, 1).strip().replace(chr(10), ',')}]",
            f"[{lines(0, 1, 2).strip().replace(chr(10), ',')}]",
        ),
    ],
)
def test_what_can_not_be_shown_to_be_the_same_is_refused(name, text, then, latentmill, table):
    table(name, text)
    before = table.encode()
    table(name, then)
    assert table.encode("--grow", code=2) == before
    assert f"{name} is not what it was, with more rows at its end" in latentmill.err
    assert "new rows in files of their own" in latentmill.err
    (table.folder / name).unlink()
    table("z.jsonl", lines(3))
    assert table.encode("--grow", code=2) == before and f"{name} is gone" in latentmill.err


def test_rows_that_moved_are_not_new_where_they_have_ids(latentmill, table, rows, tmp_path):
    told = ("source.id_column=name",)
    rows_of = {name: json.dumps({"image": f"{at}.png", "name": name}) for at, name in enumerate("abcd")}
    table("1.jsonl", "\n".join(rows_of[name] for name in "abc"))
    before = table.encode(*told)
    table("1.jsonl", "\n".join(rows_of[name] for name in "db"))
    table("2.jsonl", "\n".join(rows_of[name] for name in "ca"))
    after = table.encode(*told, "--grow")
    assert after.items() >= before.items() and len(after) == 2
    assert [row["id"] for row in rows(tmp_path / "out")] == ["a", "b", "c", "d"]
    assert "1.jsonl are there by their ids; whether they are as they were was not compared" in latentmill.err
    fresh = table.encode(*told, output=tmp_path / "fresh")
    assert by("id", rows(tmp_path / "out")) == by("id", rows(tmp_path / "fresh")) and fresh
    table("2.jsonl", rows_of["c"])
    assert table.encode(*told, "--grow", code=2) == after and "a is gone" in latentmill.err


def test_rows_that_only_moved_bring_a_plan_and_no_rows(latentmill, table, tmp_path):
    told = ("source.id_column=name",)
    rows_of = [json.dumps({"image": f"{at}.png", "name": name}) for at, name in enumerate("ab")]
    table("1.jsonl", "\n".join(rows_of))
    before = table.encode(*told)
    table("1.jsonl", "\n".join(reversed(rows_of)))
    assert table.encode(*told, "--grow") == before
    assert "nothing has come" in latentmill.err and whole(latentmill, tmp_path / "out") == (2, 1)
    assert table.encode(*told) == before, "the plan knows where they are now"
    rows_of.append(json.dumps({"image": "2.png", "name": "c"}))
    table("1.jsonl", "\n".join(rows_of))
    assert len(table.encode(*told, "--grow")) == 2 and whole(latentmill, tmp_path / "out") == (3, 2)


# ------------------------------------------------------------------------------------------- who reads a grown dataset


def test_a_grown_dataset_is_read_and_grows_what_is_made_of_it(latentmill, encode, patches, pictures, rows, tmp_path):
    encode()
    decode = [
        "run",
        "decode",
        *patches,
        "source=latents",
        f"source.path={tmp_path / 'out'}",
        f"output={tmp_path / 'made'}",
    ]
    decode += ["rows_per_shard=3", "source.keep=[file]"]
    assert latentmill(*decode) == 0, latentmill.said
    before = shards(tmp_path / "made")
    picture(pictures / "00.png", (9, 9, 9))
    encode("--grow")
    assert latentmill(*decode) == 2
    assert latentmill(*decode, "--grow") == 0, latentmill.said
    assert shards(tmp_path / "made").items() >= before.items()
    assert [row["file"] for row in rows(tmp_path / "made")] == ["0.png", "1.png", "2.png", "3.png", "00.png"]
    assert whole(latentmill, tmp_path / "made") == (5, 3)


def test_an_export_goes_on_with_what_came(latentmill, encode, pictures, tmp_path):
    flow = ("flow=[read, write]",)
    encode(*flow)
    export = ["export", tmp_path / "out", tmp_path / "export", "--to", "folder"]
    assert latentmill(*export) == 0, latentmill.said
    picture(pictures / "00.png", (9, 9, 9))
    encode(*flow, "--grow")
    assert latentmill(*export) == 0, latentmill.said
    assert "folder: 2 files written, 4 were there" in latentmill.out
    told = [json.loads(line) for line in (tmp_path / "export" / "metadata.jsonl").open()]
    assert [row["file_name"] for row in told] == ["0.png", "1.png", "2.png", "3.png", "00.png"]


def test_a_generation_that_was_changed_is_seen(latentmill, encode, pictures, tmp_path):
    encode()
    picture(pictures / "00.png", (9, 9, 9))
    encode("--grow")
    path = tmp_path / "out" / "plan-1.json"
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 2'))
    assert latentmill("status", tmp_path / "out") == 2
    assert "plan-1.json was changed, or is of another dataset" in latentmill.err


def test_a_shard_of_another_generation_in_a_place_is_damage(encode, pictures, tmp_path):
    encode()
    picture(pictures / "00.png", (9, 9, 9))
    encode("--grow")
    data = tmp_path / "out" / "data"
    (data / "00001.parquet").write_bytes((data / "00002.parquet").read_bytes())
    found = verify.verify(at(str(tmp_path / "out")))
    assert list(found.damaged) == [1] and "another plan" in found.damaged[1]


def test_whoever_read_the_plan_before_takes_none_of_what_came_for_foreign(encode, pictures, tmp_path):
    """Else a repair, or an older driver's end, would take away what another driver makes at that moment."""
    encode()
    there = dataset.load(at(str(tmp_path / "out")))
    picture(pictures / "00.png", (9, 9, 9))
    after = encode("--grow")
    (tmp_path / "out" / "files").mkdir()
    (tmp_path / "out" / "files" / "00002-0123456789ab-x.bin").write_bytes(b"of the shard that came")
    (tmp_path / "out" / "files" / "00000-0123456789ab-x.bin").write_bytes(b"nobody's")
    assert there.foreign() == [] and [old for old, _ in there.take_out_foreign()] == ["files/00000-0123456789ab-x.bin"]
    assert shards(tmp_path / "out") == after

"""Whose the files in a dataset's folder are: ours, planned, or somebody else's; and what each command makes of them."""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def job(patches, pictures, tmp_path):
    """Four pictures to latents, one a shard."""
    return ("encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'out'}", "rows_per_shard=1")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def content(out, *but):
    """Every file's hash by name."""
    files = [path for path in Path(out).rglob("*") if path.is_file() and path.name not in but]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_someone_s_parquet_is_no_shard_of_ours(latentmill, job, out):
    (out / "data").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), out / "data" / "00000.parquet")
    before = content(out)
    for command in ("run", "plan"):
        assert latentmill(command, *job) == 2
        assert latentmill.err.strip().splitlines() == [
            f"latentmill: {out}/data/00000.parquet is no shard of ours: choose another output, or move it away "
            "(latentmill verify OUT --repair does)"
        ]
    assert content(out) == before


def test_shards_of_a_changed_job_are_refused_though_plan_json_is_gone(latentmill, job, out):
    assert latentmill("run", *job) == 0
    for name in ("plan.json", "_SUCCESS", "data/00002.parquet", "data/00003.parquet"):
        (out / name).unlink()
    before = content(out)
    assert latentmill("run", *job, "vae.side=2") == 2
    assert re.fullmatch(
        rf"latentmill: {out}/data/00000.parquet is a shard of another plan, [0-9a-f]{{32}}: choose another output.*\n",
        latentmill.err,
    )
    assert content(out) == before


def test_the_same_job_puts_a_lost_plan_json_back(latentmill, job, out, rows):
    assert latentmill("run", *job) == 0
    before = content(out, "report.html")
    (out / "plan.json").unlink()
    assert latentmill("status", out) == 2
    assert latentmill.err.strip() == (
        f"latentmill: {out} holds no dataset of ours: it has no plan.json; data/00000.parquet may be a shard of ours: "
        "the job that it is of, run again, puts plan.json back"
    )
    (out / "data" / "00001.parquet").unlink()
    assert latentmill("run", *job) == 0
    assert f"{out} has 3 shards of this very job, and no plan.json: it is put back" in latentmill.err
    assert content(out, "report.html") == before and latentmill("verify", out) == 0


def test_latents_of_an_unfinished_dataset_are_read_with_a_word(latentmill, job, out, patches, tmp_path):
    assert latentmill("run", *job) == 0
    decode = ("plan", "decode", *patches, f"source.path={out}", f"output={tmp_path / 'pictures'}")
    assert latentmill(*decode) == 0 and "notice" not in latentmill.out
    shutil.copy(out / "data" / "00001.parquet", out / "data" / "00001 (1).parquet")  # as tools that share folders do
    (out / "data" / "00002.parquet").unlink()
    assert latentmill(*decode) == 0
    assert "source   3 rows in 3 files" in latentmill.out
    assert f"notice   {out} is not finished: 3 of its 4 shards are there\n" in latentmill.out
    assert f"notice   {out}/data/00001 (1).parquet is no shard of it, and is passed over\n" in latentmill.out


STRAY = {
    "2.png": "foreign",
    "00.png": "foreign",
    "notes.txt": "foreign",
    "00001.parquet.partial": "foreign",
    "._00000.parquet": "hidden",
    "_metadata": "hidden",
    "00000 (1).parquet": "alien",
    "00007.parquet": "alien",
    "train-00000.parquet": "alien",
    "0.parquet": "alien",
}
"""Files that people and their tools leave in data/. An alien one would be read as rows of the dataset."""


@pytest.mark.parametrize("name", STRAY)
def test_stray_files(name, latentmill, job, out, rows):
    """One folder, all commands: nobody counts what isn't a shard, nobody is stopped by what does no harm."""
    assert latentmill("run", *job) == 0
    whole = content(out, "report.html")
    (out / "_SUCCESS").unlink()
    (out / "data" / "00001.parquet").unlink()
    stray = out / "data" / name
    stray.write_bytes((out / "data" / "00000.parquet").read_bytes() if STRAY[name] == "alien" else b"\0\5\26\7")

    assert latentmill("status", out) == 0
    assert "3 of 4 rows: 3 ok, 0 failed\n3 of 4 shards\n" in latentmill.out
    assert (f"data/{name} is no shard of this dataset" in latentmill.out) == (STRAY[name] != "hidden")
    assert latentmill("verify", out) == (0 if STRAY[name] == "hidden" else 1)
    assert (f"data/{name} is no shard of this dataset" in latentmill.out) == (STRAY[name] != "hidden")

    if STRAY[name] == "alien":
        assert latentmill("run", *job) == 2
        assert latentmill.err.strip().count("\n") == 0 and name in latentmill.err
    else:
        assert latentmill("run", *job) == 0
        assert "encode: 4 of 4 rows, 1 of them now" in latentmill.out
        assert "4</b>rows" in (out / "report.html").read_text() and stray.exists()
    assert latentmill("verify", out, "--repair") == (0 if STRAY[name] == "hidden" else 1)
    assert stray.exists() == (STRAY[name] == "hidden")
    assert latentmill("run", *job) == 0
    stray.unlink(missing_ok=True)
    shutil.rmtree(out / "quarantine", ignore_errors=True)
    assert content(out, "report.html") == whole


def test_a_foreign_shard_among_ours_ends_no_run_in_a_traceback(latentmill, job, out):
    """Under a planned name, while plan.json is ours: one line, and --repair takes it out."""
    assert latentmill("run", *job) == 0
    whole = content(out, "report.html")
    pq.write_table(pa.table({"a": [1]}), out / "data" / "00002.parquet")
    (out / "data" / "00003.parquet").write_bytes(b"\0\5\26\7")
    assert latentmill("run", *job) == 2 and latentmill.err.count("\n") == 1
    assert latentmill("verify", out, "--repair") == 1
    assert latentmill("run", *job) == 0
    shutil.rmtree(out / "quarantine")
    assert content(out, "report.html") == whole


def test_a_dataset_that_lost_a_shard_is_not_complete(latentmill, job, out):
    assert latentmill("run", *job) == 0
    (out / "data" / "00002.parquet").unlink()
    assert latentmill("status", out) == 0
    assert latentmill.out.splitlines()[0] == (
        f"{out}: job encode, was complete, and has lost 1 shards; the same command does them again"
    )
    assert latentmill("status", out, "--json") == 0
    assert json.loads(latentmill.out)["success"] is False
    assert latentmill("run", *job) == 0 and "4 of 4 rows, 1 of them now" in latentmill.out


def test_success_is_not_said_of_rows_that_the_driver_does_not_see(latentmill, forks, job, out, tmp_path):
    """Of a shard that was there, while the others are made."""
    assert latentmill("run", *job) == 0
    (out / "data" / "00003.parquet").unlink()
    run = forks.begin(["run", *job], tmp_path / "log", LATENTMILL_FAILPOINT=f"encode:pause:{tmp_path}")
    while not (tmp_path / "encode").exists() and forks.runs(run):
        time.sleep(0.01)
    (out / "data" / "00000.parquet").unlink()
    (tmp_path / "go").touch()
    code, said = forks.end(run), (tmp_path / "log").read_text()
    assert code == 3, said
    last = said.strip().splitlines()[-1]
    assert "1 of 4 shards were committed and are not to be seen from here" in last and "00000.parquet" in last
    assert not (out / "_SUCCESS").exists()
    assert latentmill("run", *job) == 0 and latentmill("verify", out) == 0


def test_what_is_not_ours_stays(latentmill, job, out):
    """output=. in a project's folder: its README.md and report.html are the project's."""
    out.mkdir()
    theirs = {"README.md": "# My project\n", "report.html": "<html>mine</html>"}
    for name, text in theirs.items():
        (out / name).write_text(text)
    assert latentmill("run", *job) == 0
    for name, text in theirs.items():
        assert (out / name).read_text() == text
        assert f"{out}/{name} was not made by latentmill, and stays as it is" in latentmill.err
    (out / "README.md").unlink()
    (out / "_SUCCESS").unlink()
    assert latentmill("run", *job) == 0 and "# encode" in (out / "README.md").read_text()
    (out / "_SUCCESS").unlink()
    (out / "data" / "00000.parquet").unlink()
    assert latentmill("run", *job) == 0 and "stays as it is" in latentmill.err  # report.html alone


@pytest.mark.parametrize("where", ["out", ".", "out/deeper"])
def test_an_output_inside_the_source_is_refused(where, latentmill, patches, pictures, tmp_path):
    before = content(pictures)
    output = os.path.normpath(pictures / where)
    for command in ("plan", "run"):
        assert latentmill(command, "reconstruct", *patches, f"source.path={pictures}", f"output={output}") == 2
        assert latentmill.err.strip() == (
            f"latentmill: output {output} lies in what the source reads, so that it would read what is made: choose another"
        )
    assert content(pictures) == before
    link = tmp_path / "link"
    link.symlink_to(pictures)
    assert latentmill("plan", "reconstruct", *patches, f"source.path={link}", f"output={pictures}/out") == 2


@pytest.mark.parametrize("way", ["link", "folder"])
def test_what_stands_in_the_way_of_a_file_is_named(way, latentmill, job, out):
    shard = out / "data" / "00002.parquet"
    shard.parent.mkdir(parents=True)
    shard.symlink_to("nowhere") if way == "link" else shard.mkdir()
    assert latentmill("run", *job) == 3
    what = "link to nothing" if way == "link" else "folder"
    assert f"{shard} is in the way: a {what}, where a file is to be made" in latentmill.err.splitlines()[-1]


def test_an_output_that_is_a_link_to_nothing_is_named(latentmill, job, out):
    out.symlink_to("nowhere")
    assert latentmill("run", *job) == 3
    assert latentmill.err.splitlines()[-1].endswith("is in the way: a link to nothing, where a folder is to be made")


def test_what_killed_drivers_left_is_swept(latentmill, job, out, forks, tmp_path):
    assert forks.run(["run", *job], tmp_path / "log", LATENTMILL_FAILPOINT=f"published:kill:{tmp_path}") == -9
    assert list((out / "leases").glob("*.alive"))
    assert latentmill("run", *job) == 0
    assert list((out / "leases").iterdir()) == []


# ------------------------------------------------------------------------------------------ --retry-failed


@pytest.fixture
def half(latentmill, patches, tmp_path):
    """Six rows in three shards, of which three lack their picture; and the command."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"image": f"{n}.png"}) + "\n" for n in range(6)))
    job = ("encode", *patches, "source=prompts", f"source.path={folder}/rows.jsonl", "rows_per_shard=2")
    assert latentmill("run", *job, f"output={tmp_path / 'whole'}") == 0
    for number in (0, 4, 5):
        (folder / f"{number}.png").rename(tmp_path / f"{number}.png")
    job = (*job, f"output={tmp_path / 'out'}", "max_error_rate=1")
    assert latentmill("run", *job) == 0 and "(3 rows, each with its reason)" in latentmill.out
    return job


def mend(tmp_path):
    for number in (0, 4, 5):
        (tmp_path / f"{number}.png").rename(tmp_path / "in" / f"{number}.png")


def test_failed_rows_are_done_again_when_asked(half, latentmill, out, rows, failed, tmp_path):
    untouched = (out / "data" / "00001.parquet").stat().st_mtime_ns
    mend(tmp_path)
    assert latentmill("run", *half) == 0 and "nothing to do" in latentmill.out
    assert latentmill("run", *half, "--retry-failed") == 0
    assert failed(out) == [] and rows(out) == rows(tmp_path / "whole")
    assert (out / "data" / "00001.parquet").stat().st_mtime_ns == untouched
    assert latentmill("verify", out) == 0 and list((out / "quarantine").iterdir()) == []
    assert latentmill("run", *half, "--retry-failed") == 0 and "nothing to do" in latentmill.out


def test_only_rows_that_failed_so(half, latentmill, out, failed, tmp_path):
    mend(tmp_path)
    for choice in (["--stage", "write"], ["--reason", "full disk"], ["--stage", "read", "--reason", "full disk"]):
        assert latentmill("run", *half, "--retry-failed", *choice) == 0
        assert len(failed(out)) == 3
    assert latentmill("run", *half, "--retry-failed", "--stage", "read", "--reason", "4.png") == 0
    assert [error["row_id"] for error in failed(out)] == ["000000000-000"]
    assert latentmill("run", *half, "--stage", "read") == 2 and "--retry-failed" in latentmill.err
    for more in ([], ["-m", "seed=0,1", f"output={tmp_path}/${{seed}}"]):
        assert latentmill("run", *half, *more, "--retry-failed", "--stage", "reed") == 2
        assert "--stage reed: the job has no such stage (did you mean 'read'?); it has: read" in latentmill.err


def test_a_retry_that_is_killed_loses_nothing(half, latentmill, forks, out, rows, failed, tmp_path):
    mend(tmp_path)
    told, kill = ["run", *half, "--retry-failed"], f"data synced:kill:{tmp_path}"
    assert forks.run(told, tmp_path / "log", LATENTMILL_FAILPOINT=kill) == -9 and not (out / "_SUCCESS").exists()
    assert latentmill("run", *half) == 0  # what it took out is missing, and is done
    assert failed(out) == [] and rows(out) == rows(tmp_path / "whole") and latentmill("verify", out) == 0
    assert list((out / "quarantine").iterdir()) == []


def test_a_retry_beside_another_driver(half, latentmill, forks, out, rows, failed, tmp_path):
    """One is under way and believes shard 0 to be done; another takes it out meanwhile: each row is there once at the end."""
    mend(tmp_path)
    (out / "_SUCCESS").unlink()
    (out / "data" / "00001.parquet").unlink()
    first = forks.begin(["run", *half], tmp_path / "first", LATENTMILL_FAILPOINT=f"published:pause:{tmp_path}")
    while not (tmp_path / "published").exists() and forks.runs(first):
        time.sleep(0.01)
    told, kill = ["run", *half, "--retry-failed"], f"encode:kill:{tmp_path}"
    assert forks.run(told, tmp_path / "log", LATENTMILL_FAILPOINT=kill) == -9
    assert not (out / "data" / "00000.parquet").exists()
    (tmp_path / "go").touch()
    assert forks.end(first) == 0, (tmp_path / "first").read_text()
    assert failed(out) == [] and rows(out) == rows(tmp_path / "whole") and latentmill("verify", out) == 0

"""A row is accepted, filtered or failed: what each is, and that together they are what was planned, wherever rows are counted."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from latentmill.sinks.parquet import Parquet

SIEVE = '''
import math, os
import pyarrow as pa
from latentmill.plugin import Filtered, Stage


class Sieve(Stage):
    """Filters, fails and raises by the last digit of a row's number. ``words`` and ``score`` are what it says of the filtered."""

    contract = 2
    adds = (pa.field("tens", pa.float64()),)

    def __init__(self, filters=(), fails=(), raises=(), words="its last digit", score=None):
        self.filters, self.fails, self.raises, self.words, self.score = filters, fails, raises, words, score

    def __call__(self, batch, reject):
        filters = json.loads(os.environ["DIGITS"]) if "DIGITS" in os.environ else self.filters
        kept = []
        for i, row in enumerate(batch.column("row").to_pylist()):
            if row % 10 in self.raises:
                raise ValueError(f"row {row} breaks it")
            if row % 10 in self.fails:
                reject(i, "unfit")
            elif row % 10 in filters:
                scores = {"tens": row // 10, "half": row / 2, "none": math.nan} if self.score is None else self.score
                reject(i, Filtered(self.words, scores))
            else:
                kept.append(i)
        batch = batch.take(pa.array(kept, pa.int64()))
        if "tens" in batch.column_names:  # the stage may stand twice in a job
            batch = batch.drop_columns(["tens"])
        tens = [float(row // 10) for row in batch.column("row").to_pylist()]
        return batch.append_column("tens", pa.array(tens, pa.float64()))
'''


@pytest.fixture
def make(latentmill, install, patches, pictures, tmp_path):
    """``make(OUT, key=value ...)``: twenty rows of four pictures, in shards of eight, through the stage of above."""
    install("sieve", "[latentmill.stages]\nsieve = sieve:Sieve", sieve="import json" + SIEVE)

    def make(name, *settings, job="reconstruct", flow="read,encode,decode,sieve,write", shard=8, options=()):
        told = (f"source.path={pictures}", "samples_per_row=5", f"rows_per_shard={shard}", f"output={tmp_path / name}")
        given = [f"stages.sieve.settings.{setting}" for setting in settings]
        return latentmill("run", job, *patches, *told, f"flow=[{flow}]", *given, *options)

    return make


def line(row, sample, picture, stage="sieve"):
    """What is told of a row that was filtered, of a picture's samples."""
    scores = {"tens": float(row // 10), "half": row / 2, "none": None}
    return {
        "row": row,
        "row_id": f"{picture:09d}-{sample:03d}",
        "stage": stage,
        "reason": "its last digit",
        "scores": scores,
    }


def test_each_planned_row_is_ok_filtered_or_failed_wherever_they_are_counted(
    make, latentmill, rows, failed, filtered, tmp_path
):
    out = tmp_path / "out"
    assert make("out", "filters=[1,2,3]", "fails=[7]", options=["max_error_rate=0.5"]) == 0, latentmill.said
    assert "20 of 20 rows" in latentmill.out and f"{out}/data (12 rows)" in latentmill.out
    assert f"  failed        {out}/errors (2 rows, each with its reason)\n" in latentmill.out
    assert f"  filtered      {out}/filtered (6 rows, each with its reason)\n" in latentmill.out
    assert filtered(out) == [
        line(1, 1, 0),
        line(2, 2, 0),
        line(3, 3, 0),
        line(11, 1, 2),
        line(12, 2, 2),
        line(13, 3, 2),
    ]
    assert [error["row"] for error in failed(out)] == [7, 17] and len(rows(out)) == 12
    assert [row["tens"] for row in rows(out)] == [0.0] * 6 + [1.0] * 6
    about = [pq.read_schema(path).metadata for path in sorted((out / "data").iterdir())]
    assert [b"latentmill.filtered" in each for each in about] == [True, True, False]
    assert [path.name for path in sorted((out / "filtered").iterdir())] == ["00000.jsonl", "00001.jsonl"]
    assert json.loads(about[0][b"latentmill.filtered"]) == filtered(out)[:3]

    assert latentmill("status", out) == 0
    assert "20 of 20 rows: 12 ok, 2 failed, 6 filtered\n" in latentmill.out
    assert latentmill("status", out, "--json") == 0
    now = json.loads(latentmill.out)
    assert (now["planned"], now["ok"], now["failed"], now["filtered"]) == (20, 12, 2, 6)
    assert latentmill("verify", out) == 0
    assert "12 rows ok, 2 failed with a reason, 6 filtered with one, each once\n" in latentmill.out
    assert (
        "12 rows, made by latentmill; 2 more failed, with their reasons in `errors/`; 6 more were filtered, with"
        in (out / "README.md").read_text()
    )
    report = (out / "report.html").read_text()
    assert "<b>6</b>filtered" in report and "<td>000000002-001</td><td>sieve</td><td>its last digit</td>" in report
    assert "tens 1.0, half 5.5, none None" in report
    (out / "data" / "00001.parquet").unlink()
    assert latentmill("status", out) == 0
    assert "12 of 20 rows: 7 ok, 2 failed, 3 filtered\n" in latentmill.out


def test_where_none_is_filtered_nothing_tells_of_it(make, latentmill, tmp_path):
    assert make("out", "fails=[7]") == 0
    said = latentmill.out
    for command in ("status", "verify"):
        latentmill(command, tmp_path / "out")
        said += latentmill.out
    latentmill("status", tmp_path / "out", "--json")
    said += latentmill.out + "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "ilter" not in said.replace(str(tmp_path), "") and not (tmp_path / "out" / "filtered").exists()
    assert all(b"latentmill.filtered" not in path.read_bytes() for path in (tmp_path / "out" / "data").iterdir())


def test_a_shard_of_which_no_row_is_left_has_its_columns_and_a_job_of_such_shards_is_done(
    make, latentmill, filtered, tmp_path
):
    out, all_of_them = tmp_path / "out", "filters=[0,1,2,3,4,5,6,7,8,9]"
    assert make("out", all_of_them, options=["on_error=stop", "max_error_rate=0"]) == 0, latentmill.said
    assert (
        "filtered (20 rows, each with its reason: all that were planned, so that the dataset has no row)"
        in latentmill.out
    )
    assert len(filtered(out)) == 20 and (out / "_SUCCESS").exists()
    assert make("some", "filters=[1]") == 0
    wanted = pq.read_schema(tmp_path / "some" / "data" / "00000.parquet")
    for path in (out / "data").iterdir():
        assert pq.read_metadata(path).num_rows == 0 and pq.read_schema(path).equals(wanted)
    assert latentmill("export", out, "--to", "folder", tmp_path / "to") == 2 and not (tmp_path / "to").exists()
    assert latentmill.err == f"latentmill: {out} has no rows: latentmill status says what became of them\n"
    assert latentmill("verify", out) == 0
    assert "0 rows ok, 0 failed with a reason, 20 filtered with one, each once\nsound\n" in latentmill.out
    assert make("out", all_of_them) == 0 and "nothing to do, all 20 rows were finished before" in latentmill.out


def test_a_job_with_failed_rows_and_none_that_is_ok_ends_with_5(make):
    assert make("out", "filters=[0,1,2,3,4]", "fails=[5,6,7,8,9]") == 5


def test_filtered_rows_are_no_errors_and_are_not_done_again(make, latentmill, tmp_path):
    out, settings = tmp_path / "out", ("filters=[0,1,2,3,4,5,6]", "fails=[9]")
    assert make("out", *settings, options=["max_error_rate=0.1"]) == 0, latentmill.said
    before = {path.name: path.stat().st_ino for path in (out / "data").iterdir()}
    assert make("out", *settings, options=["--retry-failed", "max_error_rate=0.1"]) == 0
    after = {path.name: path.stat().st_ino for path in (out / "data").iterdir()}
    again = {name for name in before if after[name] != before[name]}
    assert again == {"00001.parquet", "00002.parquet"}  # rows 9 and 19; the first shard has filtered rows alone


def test_copies_are_made_again_by_whoever_finds_them_missing(make, latentmill, filtered, tmp_path):
    out = tmp_path / "out"
    assert make("out", "filters=[1,2,3]") == 0
    before = filtered(out)
    for name in ("filtered/00000.jsonl", "_SUCCESS"):
        (out / name).unlink()
    (out / "filtered" / "00002.jsonl").write_text("a killed writer's\n")
    assert make("out", "filters=[1,2,3]") == 0 and filtered(out) == before
    (out / "filtered" / "00001.jsonl").write_text("something else\n")
    assert (
        latentmill("verify", out) == 1
        and "filtered/00001.jsonl is not what data/00001.parquet says\n" in latentmill.out
    )
    assert latentmill("verify", out, "--repair") == 1 and "made filtered/00001.jsonl again\n" in latentmill.out
    assert filtered(out) == before and latentmill("verify", out) == 0


def test_rows_that_a_shard_says_are_filtered_must_be_its_planned_rows(make, latentmill, tmp_path):
    assert make("out", "filters=[1]") == 0
    path = tmp_path / "out" / "data" / "00000.parquet"
    table = pq.read_table(path)
    said = json.loads(table.schema.metadata[b"latentmill.filtered"])
    said[0]["row_id"] = "000000000-000"
    changed = table.replace_schema_metadata({**table.schema.metadata, b"latentmill.filtered": json.dumps(said)})
    Parquet().write(str(path), changed, {})
    assert latentmill("verify", tmp_path / "out") == 1
    assert "shard 0 has not the planned rows: 1 missing, 1 twice, 0 foreign\n" in latentmill.out


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("words=' '", "filters a row without a reason: people read it in filtered/"),
        ("score={tens: high}", "filters a row with the scores {'tens': 'high'}: they are numbers, by name"),
        ("score={tens: 1" + "0" * 400 + "}", "filters a row with the scores {'tens': 1000"),
        ("score=[1]", "filters a row with the scores [1]: they are numbers, by name"),
    ],
)
def test_a_stage_that_filters_without_words_or_by_no_numbers_ends_the_job(make, latentmill, setting, says, tmp_path):
    assert make("out", "filters=[1]", setting) == 1
    assert says in latentmill.err and "sieve" in latentmill.err and "Traceback" not in latentmill.err
    assert not list((tmp_path / "out" / "data").glob("*.parquet"))


def test_a_stage_that_has_filtered_a_row_has_worked(make, latentmill, failed, tmp_path):
    """What fails in it then is the row's fault, though the stage lets no row pass."""
    assert make("out", "filters=[0,1,2,3,4,5,6,7,9]", "raises=[8]", shard=20) == 5
    assert [error["row"] for error in failed(tmp_path / "out")] == [8, 18], latentmill.said
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_rows_that_were_filtered_show_a_later_run_that_their_stage_has_worked(make, latentmill, failed, tmp_path):
    """It finds a bad row alone, and no row of the dataset is ok."""
    out, settings = tmp_path / "out", ("filters=[0,1,2,3,4,5,6,7,9]", "raises=[8]")
    assert make("out", *settings, shard=1) == 5, latentmill.said
    for name in ("data/00018.parquet", "errors/00018.jsonl", "_SUCCESS"):
        (out / name).unlink()
    assert make("out", *settings, shard=1) == 5
    assert [error["row"] for error in failed(out)] == [8, 18] and (out / "_SUCCESS").exists(), latentmill.said


def test_rows_filtered_before_a_stage_show_nothing_of_it(make, latentmill, filtered, tmp_path):
    """The run stops; what it has committed has its copies."""
    flow = "read,encode,decode,{name: sieve, as: early, filters: [0,1,2,3,4,5,6,7,9]},sieve,write"
    assert make("out", "raises=[8]", flow=flow) == 1, latentmill.said
    assert "stage sieve failed for each of 2 rows that it was given: ValueError: row" in latentmill.err
    assert filtered(tmp_path / "out") == [line(row, row % 5, row // 5, "early") for row in range(8)]


def test_what_is_left_of_a_dataset_is_a_source_and_is_exported(make, latentmill, patches, rows, tmp_path, monkeypatch):
    cached = {"job": "encode", "flow": "read,encode,sieve,write"}
    assert make("latents", "filters=[1,2,3]", "fails=[7]", **cached) == 0, latentmill.said
    told = (f"source.path={tmp_path / 'latents'}", "samples_per_row=1", f"output={tmp_path / 'decoded'}")
    assert latentmill("run", "decode", *patches, *told) == 0, latentmill.said
    assert len(rows(tmp_path / "decoded")) == 12 and "12 of 12 rows" in latentmill.out

    assert make("made", "filters=[1,2,3]", "fails=[7]") == 0

    def exported():
        command = ("export", tmp_path / "made", "--to", "folder", tmp_path / "to", "--names", "row_id")
        assert latentmill(*command) == 0, latentmill.said
        return len([*(tmp_path / "to").rglob("*.png")])

    assert exported() == 12
    (tmp_path / "made" / "data" / "00000.parquet").unlink()
    monkeypatch.setenv("DIGITS", "[1]")  # the same shard, of which other rows are filtered: other files
    assert make("made", "filters=[1,2,3]", "fails=[7]") == 0
    assert exported() == 14


def test_a_picture_s_reason_is_told_without_what_the_job_took_from_the_environment(
    make, filtered, monkeypatch, tmp_path
):
    monkeypatch.setenv("SECRET", "hunter2-and-more")
    assert make("out", "filters=[1]", "words=${oc.env:SECRET}") == 0
    assert {row["reason"] for row in filtered(tmp_path / "out")} == {"${oc.env:SECRET}"}
    assert not any(b"hunter2" in path.read_bytes() for path in Path(tmp_path / "out").rglob("*") if path.is_file())

"""``accept.rows``: a dataset ends with so many accepted rows, those of the smallest numbers, whoever makes it and whatever happens."""

import os
import signal
import time

import pyarrow.parquet as pq
import pytest
from tests.outside.test_accept import ATTEMPTS, became, expected, job, shards  # noqa: F401

WANTED = 6


def ends(rows, wanted=WANTED, size=4):
    """Of ``expected`` rows those that are told of: all before the accepted one that is one too many, shard by shard."""
    found, accepted = {}, 0
    for at, (row_id, each) in enumerate(rows.items()):
        if accepted == wanted and (isinstance(each, tuple) or at % size == 0):
            break
        found[row_id] = each
        accepted += isinstance(each, tuple)
    return found


def told(output):
    """What a dataset says of each row that it tells of, and how many it says are not needed."""
    metadata = [pq.read_schema(path).metadata for path in sorted((output / "data").glob("*.parquet"))]
    return became(output), [int(about.get(b"latentmill.not_needed", 0)) for about in metadata]


@pytest.fixture
def enough():
    return f"accept={{rows: {WANTED}, attempts: {ATTEMPTS}}}"


def test_the_dataset_ends_with_the_first_rows_that_pass(job, latentmill, enough, rows, tmp_path):  # noqa: F811
    assert latentmill("plan", *job("out", accept=enough)[1:]) == 0
    assert f"accept   the first {WANTED} rows that are not filtered; no more are made\n" in latentmill.out
    assert latentmill(*job("out", accept=enough)) == 0, latentmill.said
    wanted = ends(expected())
    found, not_needed = told(tmp_path / "out")
    assert found == wanted and not_needed == [0, 1, 4, 4, 4]  # of five shards; else it would show nothing
    assert [row["row_id"] for row in rows(tmp_path / "out")] == [k for k, each in wanted.items() if type(each) is tuple]
    left_out = sum(type(each) is int for each in wanted.values())
    assert f"not needed    13 rows, since {WANTED} were accepted before" in latentmill.out
    said = f"20 of 20 rows: {WANTED} ok, 0 failed, {left_out} filtered, 13 not needed"
    assert said in (latentmill("status", tmp_path / "out"), latentmill.out)[1]
    assert latentmill("verify", tmp_path / "out") == 0 and ", 13 not needed, each once" in latentmill.out
    for name in ("README.md", "report.html"):
        assert "not needed" in (tmp_path / "out" / name).read_text()
    before = shards(tmp_path / "out")
    assert latentmill(*job("out", accept=enough)) == 0 and "nothing to do" in latentmill.out
    assert shards(tmp_path / "out") == before
    assert latentmill(*job("out", accept=f"accept={{rows: 7, attempts: {ATTEMPTS}}}")) == 2
    assert f"accept.rows: {WANTED} -> 7" in latentmill.err


def test_where_fewer_pass_it_says_so(job, latentmill, tmp_path):  # noqa: F811
    wanted = expected()
    ok = sum(type(each) is tuple for each in wanted.values())
    assert latentmill(*job("out", accept=f"accept={{rows: {ok + 1}, attempts: {ATTEMPTS}}}")) == 0
    assert told(tmp_path / "out") == (wanted, [0] * 5)
    assert f"accepted      {ok} of the {ok + 1} rows that accept.rows asks for: no more are planned" in latentmill.out


def test_more_than_is_planned_is_refused(job, latentmill, tmp_path):  # noqa: F811
    assert latentmill(*job("out", accept="accept={rows: 21}")) == 2 and not (tmp_path / "out").exists()
    says = "accept.rows is 21, and 20 rows are planned: a larger samples_per_row draws more of each prompt"
    assert latentmill.err == f"latentmill: {says}\n"


def test_rows_alone_needs_no_noise(job, latentmill, tmp_path):  # noqa: F811
    """The first three prompts that have no cross, of a job that denoises nothing."""
    (tmp_path / "prompts.txt").write_text(
        "a cross\na star\na ring\na circle\na square\na red star\na triangle\na cross"
    )
    words = [word for word in job("out", "samples_per_row=1", accept="accept.rows=3") if not word.startswith("flow=")]
    assert latentmill(*words[:1], "encode_text", *words[2:], "flow=[read,word,encode_text,write]") == 0, latentmill.said
    found, empty = (pq.read_table(path) for path in sorted((tmp_path / "out" / "data").glob("*")))
    assert (
        found.column("prompt").to_pylist() == ["a star", "a ring", "a circle"] and "attempt" not in found.column_names
    )
    assert len(empty) == 0 and b"latentmill.not_needed" not in found.schema.metadata
    assert empty.schema.metadata[b"latentmill.not_needed"] == b"4"


def test_failed_rows_that_are_done_again_move_the_end(job, latentmill, enough, tmp_path, monkeypatch):  # noqa: F811
    """With some rows more before it the dataset ends sooner: the shards that went beyond are made anew."""
    assert latentmill(*job("whole", accept=enough)) == 0
    monkeypatch.setenv("TROUBLE", "circle")
    assert latentmill(*job("out", accept=enough)) == 0, latentmill.said
    before, not_needed = told(tmp_path / "out")
    assert [*before.values()][:4] == ["failed"] * 4 and not_needed == [0, 0, 0, 0, 4]
    monkeypatch.delenv("TROUBLE")
    assert latentmill(*job("out", accept=enough), "--retry-failed") == 0, latentmill.said
    assert told(tmp_path / "out") == told(tmp_path / "whole")
    assert latentmill("verify", tmp_path / "out") == 0
    assert not [*(tmp_path / "out" / "quarantine").glob("*")]


def test_shards_that_go_beyond_the_end_are_damage_that_verify_repairs(job, latentmill, enough, tmp_path, monkeypatch):  # noqa: F811
    """One before them has come to have more rows, and no run has looked since."""
    assert latentmill(*job("whole", accept=enough)) == 0
    monkeypatch.setenv("TROUBLE", "circle")
    assert latentmill(*job("out", accept=enough)) == 0, latentmill.said
    monkeypatch.delenv("TROUBLE")
    first = "data/00000.parquet"
    (tmp_path / "out" / first).write_bytes((tmp_path / "whole" / first).read_bytes())
    assert latentmill("verify", tmp_path / "out", "--repair") == 1
    wrong = [line for line in latentmill.out.splitlines() if line.startswith("shard ")]
    assert wrong == [f"shard {k} its rows don't end where accept.rows={WANTED} are accepted" for k in (1, 2, 3)]
    assert [*shards(tmp_path / "out")] == ["00000.parquet", "00004.parquet"]
    assert latentmill(*job("out", accept=enough)) == 0 and latentmill("verify", tmp_path / "out") == 0
    assert told(tmp_path / "out") == told(tmp_path / "whole")


def test_the_same_bytes_after_kills_and_with_two_drivers(job, forks, enough, tmp_path):  # noqa: F811
    """And after a shard before the end is lost, with the first driver held at a row until the second has begun."""
    sizes = (f"stages.{name}.batch_size=1" for name in ("read", "word", "encode", "denoise", "fourth", "write"))
    settings, site, log = ("deterministic=true", "rows_per_shard=2", *sizes), [tmp_path / "site"], tmp_path / "log"

    def words(name):
        return job(name, *settings, accept=enough)

    assert forks.run(words("alone"), log, path=site) == 0, log.read_text()
    alone = shards(tmp_path / "alone")
    assert told(tmp_path / "alone")[0] == ends(expected(), size=2) and len(alone) == 10

    for number, place in enumerate(("denoise", "published")):
        at = tmp_path / f"at-{number}"
        at.mkdir()
        killed = forks.run(words("killed"), log, path=site, LATENTMILL_FAILPOINT=f"{place}:kill:{at}")
        assert killed == -9, log.read_text()
        assert shards(tmp_path / "killed").items() <= alone.items()
    assert forks.run(words("killed"), log, path=site) == 0, log.read_text()
    assert shards(tmp_path / "killed") == alone
    (tmp_path / "killed" / "data" / "00001.parquet").unlink()
    assert forks.run(words("killed"), log, path=site) == 0, log.read_text()
    assert shards(tmp_path / "killed") == alone

    (tmp_path / "pause").mkdir()
    held = f"denoise:pause:{tmp_path / 'pause'}"
    first = forks.begin(words("shared"), tmp_path / "first", path=site, LATENTMILL_FAILPOINT=held)
    try:
        while not (tmp_path / "pause" / "denoise").exists():
            assert forks.runs(first), (tmp_path / "first").read_text()
            time.sleep(0.01)
        second = forks.begin(words("shared"), tmp_path / "second", path=site)
        while len([*(tmp_path / "shared" / "leases").glob("*.alive")]) < 2:
            assert forks.runs(second), (tmp_path / "second").read_text()
            time.sleep(0.01)
        (tmp_path / "pause" / "go").touch()
    except BaseException:
        os.kill(first, signal.SIGKILL)
        raise
    assert [forks.end(first), forks.end(second)] == [0, 0], (tmp_path / "second").read_text()
    assert shards(tmp_path / "shared") == alone

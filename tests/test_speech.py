"""What a worker says: how much of it the driver is told, and the file in the output."""

import logging
import sys

import pytest

from latentmill import storage
from latentmill.workers import speech
from latentmill.workers.hearing import Hearing
from latentmill.workers.speech import Speech, WorkerName
from latentmill.workers.watch import Notice, Watch


@pytest.fixture
def out(tmp_path):
    (tmp_path / "plan.json").touch()
    return tmp_path


def begun(out, monkeypatch, **more):
    """A worker's speech, with a clock that stands still: ``now[0]``."""
    now = [100.0]
    said = Speech(WorkerName("denoise-3", "ab12cd", str(out), **more), clock=lambda: now[0])
    for name in ("stdout", "stderr"):  # put back by monkeypatch
        monkeypatch.setattr(sys, name, getattr(sys, name))
    said.begin()
    return said, now


def lines(out):
    return [line[20:] for line in (out / "logs" / "denoise-3@ab12cd.log").read_text().splitlines()]


def test_so_many_lines_a_minute_and_how_many_more_there_are(out, monkeypatch):
    said, now = begun(out, monkeypatch)
    first = [f"line {number}" for number in range(10)]
    for number in range(13):
        print(f"line {number}")
    assert said.take() == [*first, "3 more lines in logs/denoise-3@ab12cd.log"]
    print("one more")
    assert said.take() == []
    now[0] += 60
    assert said.take() == ["1 more line in logs/denoise-3@ab12cd.log"]
    print("another minute")
    assert said.take() == ["another minute"]
    assert lines(out) == [f"line {number}" for number in range(13)] + ["one more", "another minute"]


def test_bars_colours_halves_and_what_is_heard_already(out, monkeypatch):
    said, _ = begun(out, monkeypatch)
    print("\r 10%\r 20%", end="", file=sys.stderr)
    print("\r100%", file=sys.stderr)
    print("\x1b[31mred\x1b[0m")
    print("half", end="")
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("acme").addHandler(handler)
    hearing = Hearing()
    with hearing.on():
        logging.getLogger("acme").warning("a message")
    logging.getLogger("acme").removeHandler(handler)
    print(" and half")
    assert said.take() == ["100%", "red", "half and half"]
    assert hearing.take() == ["acme: a message"]
    assert lines(out) == ["100%", "red", "a message", "half and half"]


def test_a_file_begins_anew_and_one_where_there_is_no_plan_is_not_made(out, monkeypatch):
    monkeypatch.setattr(speech, "MOST_BYTES", 100)
    said, _ = begun(out, monkeypatch)
    for number in range(7):
        said.note(f"line {number}")
    assert lines(out) == ["line 6"]
    assert len((out / "logs" / "denoise-3@ab12cd.before.log").read_text().splitlines()) == 3
    (out / "other").mkdir()
    begun(out / "other", monkeypatch)[0].note("nobody's")
    assert list((out / "other").iterdir()) == []


def test_in_a_store_the_last_of_it_is_put_at_the_end(bucket, monkeypatch):
    monkeypatch.setattr(speech, "LAST_BYTES", 100)
    said, _ = begun(f"{bucket}/out", monkeypatch, secrets={"a long secret": "$WORD"})
    for number in range(6):
        said.note(f"a long secret {number}")
    said.end()
    found = storage.at(f"{bucket}/out").read("logs/denoise-3@ab12cd.log").decode().splitlines()
    assert [line[20:] for line in found] == ["$WORD 3", "$WORD 4", "$WORD 5"]


def test_what_workers_say_together_is_limited_too(caplog):
    now = [0.0]
    watch = Watch("job", clock=lambda: now[0])
    watch.called(0, 0, ["denoise"])
    for number in range(70):
        watch.noticed(0, "denoise", Notice([f"line {number}"]))
    assert [record.getMessage() for record in caplog.records] == [f"denoise-0: line {number}" for number in range(60)]
    caplog.clear()
    now[0] = 61.0
    watch.noticed(0, "denoise", Notice(["later"]))
    assert [record.getMessage() for record in caplog.records] == [
        f"10 more lines of workers are in logs/*@{watch.run}.log",
        "denoise-0: later",
    ]

"""What a worker says: how much of it the driver is told, and the file in the output."""

import copy
import io
import logging
import os
import pickle
import sys
import threading
import time
import warnings

import pytest

from latentmill import storage
from latentmill.text import one_line, secrets
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


def test_a_worker_of_a_sweep_has_one_thread_for_its_log_in_a_store(bucket, monkeypatch):
    def logs():
        return {thread for thread in threading.enumerate() if thread.name == "log"}

    before = logs()
    said, _ = begun(f"{bucket}/0", monkeypatch)
    for number in range(1, 4):
        said.note("a line")
        said.go_on_as(WorkerName("denoise-3", "ab12cd", f"{bucket}/{number}"))
    for thread in logs() - before:
        thread.join(30)
    assert logs() <= before
    for number in range(3):
        assert storage.at(f"{bucket}/{number}").read("logs/denoise-3@ab12cd.log").endswith(b" a line\n")


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


def test_how_many_more_there_were_is_said_when_the_minute_is_over_and_at_the_end(caplog):
    now = [0.0]
    watch = Watch("job", clock=lambda: now[0])
    watch.called(0, 0, ["denoise"])
    watch.noticed(0, "denoise", Notice([f"line {number}" for number in range(63)]))
    watch.look()
    assert len(caplog.records) == 60
    now[0] = 60.0
    watch.look()
    watch.look()
    assert [record.getMessage() for record in caplog.records[60:]] == [
        f"3 more lines of workers are in logs/*@{watch.run}.log"
    ]
    for number in range(12):
        watch.called(1 + number, 1, ["write"])
        watch.gone(1 + number, "killed")
    watch.look(ends=True)
    assert caplog.records[-1].getMessage() == "2 more workers were gone, or came in another's place"


def test_one_that_was_never_ready_leaves_no_place_of_its_own(caplog):
    watch = Watch("job")
    for number in range(4):
        watch.called(number, 0, ["denoise"])
    watch.ready(0)
    watch.gone(0, "killed")
    watch.gone(1, "its node was full")
    watch.ready(2)
    watch.ready(3)  # one more is wanted
    assert [record.getMessage() for record in caplog.records] == [
        "denoise-0 is gone: killed",
        "denoise-1 is gone: its node was full",
        "denoise-2 has come in the place of denoise-0",
    ]


def test_a_thread_that_can_t_speak_goes_on_and_so_does_a_child(out, monkeypatch):
    monkeypatch.setattr(speech, "TURN_WITHIN", 0.1)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    said, _ = begun(out, monkeypatch)
    held, go = threading.Event(), threading.Event()

    def holds():  # as one that writes to a disk that doesn't answer, or waits for a lock of the other
        with said.turn():
            held.set()
            go.wait(10)

    thread = threading.Thread(target=holds)
    thread.start()
    held.wait()
    print("unheard")
    assert sys.stdout.getvalue() == "unheard\n" and said.take() == []
    with warnings.catch_warnings():  # of a fork beside threads
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        print("of a child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    go.set()
    thread.join()
    print("heard")
    assert said.take() == ["heard"] and lines(out) == ["of a child", "heard"]


def test_a_file_that_somebody_deletes_is_closed_once_and_begins_anew(out, monkeypatch):
    monkeypatch.setattr(speech, "MOST_BYTES", 100)
    said, _ = begun(out, monkeypatch)
    said.note("first")
    (out / "logs" / "denoise-3@ab12cd.log").unlink()
    for number in range(2):
        said.note(f"{number}" * 80)
        with (out / "another").open("w") as another:  # it gets the number of one that is closed
            said.note("more")
            another.write("x")
    assert (out / "another").read_text() == "x" and lines(out) == ["1" * 80, "more"][-len(lines(out)) :]


def test_a_file_that_can_t_be_written_is_left_alone_for_a_while(out, monkeypatch):
    (out / "logs").write_text("in the way")
    said, _ = begun(out, monkeypatch)
    said.note("first")
    (out / "logs").unlink()
    said.note("second")
    assert not (out / "logs").exists()
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    said.note("third")
    assert lines(out) == ["third"]


def test_what_could_not_be_put_is_put_later(bucket, monkeypatch):
    said, _ = begun(f"{bucket}/out", monkeypatch)
    said.note("a line")
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(speech.storage, "at", None)
        said.end()
    with pytest.raises(FileNotFoundError):
        storage.at(f"{bucket}/out").read("logs/denoise-3@ab12cd.log")
    said.end()
    assert storage.at(f"{bucket}/out").read("logs/denoise-3@ab12cd.log").endswith(b" a line\n")


def test_ends_of_lines_of_windows_and_lines_that_share_a_bracket_with_a_message(out, monkeypatch):
    said, _ = begun(out, monkeypatch)
    print("from curl\r")
    hearing = Hearing()
    with hearing.on():
        logging.getLogger("acme").warning("config:\n{\n}")
    print("{'cause': 7}")
    assert said.take() == ["from curl", "{'cause': 7}"]


def test_a_message_that_can_t_be_put_together_is_no_error_of_the_stage(monkeypatch):
    monkeypatch.setattr(logging.getLogger("acme"), "propagate", False)  # pytest's own handler raises
    monkeypatch.setattr(logging, "raiseExceptions", False)
    hearing = Hearing()
    with hearing.on():
        logging.getLogger("acme").warning("%d rows", "many")
        logging.getLogger("acme").warning("%d rows", 3)
    assert hearing.take() == ["acme: 3 rows"]


def test_secrets_of_several_lines_cut_or_in_one_another(out, monkeypatch):
    monkeypatch.setenv("PEM", "-----BEGIN KEY-----\nMIIEvQIBADANBg\n-----END KEY-----")
    monkeypatch.setenv("WANDB_API_KEY", "open sesame")
    monkeypatch.setenv("MY_WORD", "open sesame and more")
    said, _ = begun(out, monkeypatch, secrets=secrets("${oc.env:PEM} ${oc.env:MY_WORD}", keys=True))
    print(os.environ["PEM"])
    print(os.environ["MY_WORD"], repr(os.environ["PEM"]))
    print("x" * 1984 + "open sesame")
    hearing = Hearing()
    with hearing.on():
        logging.getLogger("acme").warning("x" * 480 + "open sesame")
    found = "".join([*said.take(), *hearing.take(), *lines(out)])
    assert not any(part in found for part in ("open", "MIIE", "BEGIN", "and more"))


def test_a_line_of_blanks_costs_little():
    started = time.process_time()
    assert one_line("a" + " " * 100_000 + "b \n c", 10**6) == "a" + " " * 100_000 + "b c"
    assert time.process_time() - started < 5


def test_what_holds_a_stream_can_be_copied(out, monkeypatch):
    begun(out, monkeypatch)
    for stream in (sys.stdout, sys.stderr):
        assert copy.copy(stream) is stream and copy.deepcopy([stream])[0] is stream
        assert pickle.loads(pickle.dumps(stream)) is stream

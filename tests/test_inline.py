"""Workers in this process: what computes here, and what is done beside."""

import os
import queue
import signal
import threading

import pytest
import torch

from latentmill import weights
from latentmill.driver.loop import drive
from latentmill.driver.messages import Dispatch, StageSpec, Started, StartWorker, WorkerType
from latentmill.driver.state import DriverState
from latentmill.errors import RunError, WrongWorker
from latentmill.plugin import Stage
from latentmill.workers.inline import InlinePool
from latentmill.workers.worker import StageWork, Worker, WorkerSetup


class Note(Stage):
    """Notes the thread that it works in; refuses a row with an error."""

    contract = 2

    def __init__(self, noted, error=None, row=-1):
        self.noted, self.error, self.row = noted, error, row

    def __call__(self, batch, reject):
        self.noted.append(threading.current_thread())
        if self.error and self.row in batch["row"].to_pylist():
            raise self.error
        return batch

    def commit(self, shard, packed, errors):
        self.noted.append(threading.current_thread())
        self.shards = {
            **getattr(self, "shards", {}),
            shard: (sorted(r for p in packed for r in p["row"].to_pylist()), errors),
        }
        return True


def run_inline(rows=30, error=None, row=-1):
    """Read, compute, compute, write: the threads of each, and what was committed."""
    threads, stages = [[] for _ in range(4)], {}

    def make(at):
        stages[at] = Note(threads[at], *((error, row) if at == 0 else ()))
        return stages[at]

    names = ("read", "encode", "denoise", "write")
    work = [StageWork(name, lambda at=at: make(at)) for at, name in enumerate(names)]
    setups = [
        WorkerSetup((work[0],), computes=False),
        WorkerSetup((work[1], work[2])),
        WorkerSetup((work[3],), computes=False),
    ]
    types = (WorkerType((0,)), WorkerType((1, 2)), WorkerType((3,)))
    state = DriverState(tuple(StageSpec(name, 4) for name in names), rows, rows_per_shard=10, worker_types=types)
    pool = InlinePool(setups)
    try:
        drive(state, pool, lambda: None)
    finally:
        pool.close()
    return threads, stages[3].shards


def test_rows_are_read_and_written_beside_what_computes_here():
    threads, shards = run_inline()
    assert {number: rows for number, (rows, _) in shards.items()} == {
        k: [*range(10 * k, 10 * k + 10)] for k in range(3)
    }
    here = threading.current_thread()
    assert {*threads[1], *threads[2]} == {here}
    assert here not in threads[0] + threads[3] and {*threads[0]}.isdisjoint(threads[3])
    for thread in {*threads[0], *threads[3]}:
        thread.join(10)
        assert not thread.is_alive()


def test_what_a_thread_raises_is_its_row_s():
    _, shards = run_inline(error=ValueError("no such picture"), row=13)
    assert [(error["row"], error["reason"]) for _, errors in shards.values() for error in errors] == [
        (13, "ValueError: no such picture")
    ]
    assert sorted(row for rows, _ in shards.values() for row in rows) == [row for row in range(30) if row != 13]


def test_what_ends_a_thread_is_an_answer():
    """A library that calls sys.exit doesn't leave the run waiting for ever."""
    _, shards = run_inline(error=SystemExit("no"), row=13)
    assert [(error["row"], error["reason"]) for _, errors in shards.values() for error in errors] == [
        (13, "RuntimeError: SystemExit: no")
    ]


def test_torch_s_threads_are_those_of_the_stages_that_compute():
    """Stages that read and write have one; what computes here keeps what torch had."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pool = InlinePool([WorkerSetup((StageWork("read", lambda: Note([]), threads=1),), computes=False)])
        pool.submit(StartWorker(0, 0))
        assert pool.collect(0) == [Started(0, 0)] and torch.get_num_threads() == 3
        pool.close()
    finally:
        torch.set_num_threads(before)


def test_a_stage_is_on_the_gpu_only_if_it_asks_for_one():
    class Loads(Note):
        def load(self, device):
            self.noted.append(device.type)

    told = []
    Worker([StageWork("encode", lambda: Loads(told)), StageWork("denoise", lambda: Loads(told), gpu=True)])
    assert told == ["cpu", "cuda"]


def test_another_ctrl_c_does_not_wait_for_a_shard_that_hangs():
    class Hangs(Note):
        def commit(self, shard, packed, errors):
            begun.set()
            ends.wait(60)

    begun, ends = threading.Event(), threading.Event()
    pool = InlinePool([WorkerSetup((StageWork("write", lambda: Hangs([])),), computes=False)])
    pool.submit(StartWorker(0, 0))
    assert pool.collect(0) == [Started(0, 0)]
    pool.submit(Dispatch(0, "commit", 0, 0, [], shard=0))
    assert begun.wait(60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.close()
    finally:
        signal.signal(signal.SIGINT, before)
        ends.set()


def test_an_interrupt_that_comes_as_an_answer_is_taken_ends_the_run():
    """Whoever waits for that answer once more waits for ever."""

    class Interrupted(queue.SimpleQueue):
        def get(self, *args, **settings):
            super().get(*args, **settings)
            raise KeyboardInterrupt

    pool = InlinePool([WorkerSetup((StageWork("write", lambda: Note([])),), computes=False)])
    pool.answers = Interrupted()
    pool.submit(StartWorker(0, 0))
    assert pool.collect(0) == [Started(0, 0)]
    pool.submit(Dispatch(0, "commit", 0, 0, [], shard=0))
    with pytest.raises(KeyboardInterrupt):
        pool.collect(60)
    closing = threading.Thread(target=pool.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


def test_a_reader_takes_nothing_of_what_another_worker_reads_meanwhile(tmp_path):
    """A model is loaded here in parts, and rows are read beside: the record of the model is whole."""
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(file.name)
    told = []

    class Loads(Note):
        def load(self, device):
            with weights.reading("denoiser"):
                weights.record(files[0])
                reads.read("read", [1, 2])
                weights.record(files[1])

    reads = Worker([StageWork("read", lambda: Note(told))])
    loads = Worker([StageWork("denoise", lambda: Loads(told))])
    assert [name for name, _ in loads.loaded["denoiser"]] == ["a", "b"]
    assert reads.read("read", [3])[0].read == {}


def test_a_thread_s_worker_that_is_not_the_plan_s_ends_the_job():
    with pytest.raises(RunError, match="stage read: a worker is not what the plan says: another source"):
        run_inline(error=WrongWorker("another source"), row=13)

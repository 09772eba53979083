"""What a worker does around its stage."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from latentmill import tally
from latentmill.batch import FixedShape
from latentmill.plugin import ContinuousStage, Filtered, Stage, tensors
from latentmill.workers.worker import StageWork, Worker


class Narrow(Stage):
    """Has memory for so many rows; rejects rows that are multiples of 5."""

    contract = 2

    def __init__(self, memory, error=torch.OutOfMemoryError):
        self.memory, self.error, self.given = memory, error, []

    def __call__(self, batch, reject):
        numbers = batch.column("row").to_pylist()
        self.given.append(len(numbers))
        for i, number in enumerate(numbers):  # what was rejected before the memory ran out is not told twice
            if number % 5 == 0:
                reject(i, f"{number} is a multiple of five")
        if len(numbers) > self.memory:
            raise self.error("no room")
        return batch.filter(pa.array([number % 5 != 0 for number in numbers]))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_batch_and_the_stage_remembers(error, caplog):
    worker = Worker([StageWork("narrow", lambda: Narrow(3, error))])
    outcome, block = worker.read("narrow", range(100, 112))
    assert [number for table in block for number in table["row"].to_pylist()] == [n for n in range(100, 112) if n % 5]
    assert dict(outcome.rejected) == {n: f"{n} is a multiple of five" for n in (100, 105, 110)}
    assert worker.stages["narrow"].stage.given == [12, 6, 3, 3, 3, 3]
    worker.read("narrow", range(4))
    assert worker.stages["narrow"].stage.given[6:] == [3, 1]
    assert [record.message for record in caplog.records] == [
        "narrow: out of memory with 12 rows; from now on 6 at a time",
        "narrow: out of memory with 6 rows; from now on 3 at a time",
    ]


def test_a_row_for_which_there_is_no_memory_alone_fails():
    worker = Worker([StageWork("narrow", lambda: Narrow(0))])
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        worker.read("narrow", range(4))


def test_a_batch_of_fixed_shape_is_not_halved_since_that_would_not_help():
    def make():
        stage = Narrow(3)
        stage.fixed = FixedShape(batch_size=12, rows_per_shard=12)
        return stage

    worker = Worker([StageWork("narrow", make)])
    with pytest.raises(torch.OutOfMemoryError, match="no room; in a deterministic job only a smaller batch_size helps"):
        worker.read("narrow", range(12))
    assert worker.stages["narrow"].stage.given == [12]


class Half(Stage):
    contract = 2

    def __call__(self, batch, reject):
        self.given = batch.schema.field("x").type
        return [batch.slice(0, 1), batch.slice(1, 1)]


@pytest.mark.parametrize("shares", [True, False])
def test_rows_that_share_tensors_part_with_their_own_and_a_stage_that_does_not_ask_for_them_has_plain_ones(shares):
    stage = Half()
    stage.shares_tensors = shares
    worker = Worker([StageWork("half", lambda: stage)])
    batch = tensors.with_shared(pa.table({"row": [4, 5]}), "x", torch.rand(2, 1000), [1, 0])
    _, block = worker.batch("half", [(0, 0, 0, 2)], [batch])
    assert pa.types.is_dictionary(stage.given) == shares
    for table, number in zip(block, (0, 1)):
        assert torch.equal(tensors.from_arrow(table, "x"), tensors.from_arrow(batch, "x")[number : number + 1])
        if shares:
            assert len(table.column("x").chunk(0).dictionary) == 1


class Twice(Stage):
    """Gives two reasons for each row."""

    contract = 2

    def __call__(self, batch, reject):
        for i, number in enumerate(batch.column("row").to_pylist()):
            for reason in REASONS[number]:
                reject(i, reason)
        return batch.slice(len(batch))


class TwiceLater(ContinuousStage):
    """The same, of a stage that works on several batches."""

    contract = 2
    __call__ = None

    def take(self, batch, reject):
        Twice()(batch, reject)
        return SimpleNamespace(done=True, batch=batch)

    def advance(self):
        pass

    def finish(self, request):
        return [request.batch.slice(len(request.batch))]


DARK, BLURRED = Filtered("dark"), Filtered("blurred")
REASONS = [("unfit", DARK), (DARK, "unfit"), ("unfit", "too small"), (DARK, BLURRED)]


@pytest.mark.parametrize("kind", [Twice, TwiceLater])
def test_of_several_reasons_an_error_counts_before_a_filter_and_else_the_first(kind):
    outcome, _ = Worker([StageWork("twice", kind)]).read("twice", range(4))
    assert dict(outcome.rejected) == {0: "unfit", 1: "unfit", 2: "unfit", 3: DARK}


class Counts(Stage):
    contract = 2

    def __call__(self, batch, reject):
        tally.count("seen", len(batch))
        return batch


def test_calls_that_end_at_once_tell_all_that_was_counted_and_each_once():
    """Every thread takes what its stage has counted since that was last told; no row may fail of it."""
    worker, before = Worker([StageWork("counts", Counts)]), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            outcomes = [outcome for outcome, _ in threads.map(lambda k: worker.read("counts", [k, k + 1]), range(1500))]
    finally:
        sys.setswitchinterval(before)
    assert sum(outcome.notice.counts["seen"] for outcome in outcomes) == 3000

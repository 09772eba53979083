"""What a worker does around its stage."""

import pyarrow as pa
import pytest
import torch

from latentmill.batch import FixedShape
from latentmill.plugin import Stage, tensors
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

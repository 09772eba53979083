"""What a worker does with a dispatch, wherever it runs: gather its table slices, call its stage, account for every row."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import pyarrow as pa
import torch

from latentmill import checks, failpoints, weights
from latentmill.batch import concat, shape_key
from latentmill.plugin import CommittingStage, ContinuousStage, Request, RowError, Stage, tensors
from latentmill.workers.context import this_node
from latentmill.workers.hearing import Hearing

logger = logging.getLogger("latentmill")

Admit: TypeAlias = Callable[[str, weights.Reading], str]
"""Of a node's name and what a worker on it has read: why its rows would not be the dataset's, or "" if they would."""


OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)

Block: TypeAlias = list[pa.Table]
SliceAddress: TypeAlias = tuple[int, int, int, int]
"""A table slice as a worker sees it: which of the blocks given, which table of it, from which row to which."""


@dataclass(frozen=True)
class StageWork:
    """What a pool needs to start one of a stage's workers. The resources are Ray's, in Ray's words."""

    name: str
    make: Callable[[], Stage]
    replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    calls: int = 2
    """Calls that may be under way at a time: one computes, others unpack, pack or wait."""
    threads: int | None = None
    """torch's threads in a worker; None leaves torch's own choice."""
    timeout: float | None = None
    """Seconds without an answer after which a worker that has work counts as hanging. A process can't tell of itself."""


@dataclass(frozen=True)
class Outcome:
    """What the driver learns of a block without seeing it."""

    parts: list[tuple[str, tuple[int, ...]]]
    rejected: list[tuple[int, str]]
    heard: list[str] = field(default_factory=list)
    """What libraries said in the worker since it was last asked."""
    read: weights.Reading = field(default_factory=dict)
    """What the worker has read since it was loaded."""
    node: str = ""


@dataclass(eq=False)
class Call:
    """A batch that a worker was given, until it hands it back."""

    batch: pa.Table
    rejected: dict[int, str] = field(default_factory=dict)
    request: Request | None = None
    block: Block | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.block is not None or self.error is not None

    def reject(self, i: int, reason: str) -> None:
        self.rejected.setdefault(self.batch.column("row")[i].as_py(), reason)


class Worker:
    """A stage, built and loaded, and the few verbs that a pool calls.

    Several calls may come at once, each in a thread: batches are unpacked and packed while another is computed. Whoever
    waits for a batch works on, whosever batch it is, unless another already does: one at a time.
    """

    def __init__(self, make: Callable[[], Stage], gpu: bool, threads: int | None, name: str = "") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads, self.name = threads, name
        self.hearing = Hearing()
        weights.taken()
        with self.hearing.on():
            self.stage = make()
            with weights.reading(f"stage {name}"):
                self.stage.load(torch.device("cuda" if gpu else "cpu"))
        self.loaded = weights.taken()
        """What was read while the stage was loaded."""
        self.read_later: weights.Reading = {}
        """What was read since: weights that are needed for some rows only."""
        self.waiting: deque[Call] = deque()
        self.inside: list[Call] = []
        """Of a continuous stage: the batches that it has taken in."""
        self.turn = threading.Condition()
        self.taken = False
        self.most: int | None = None
        """Rows that the stage is given at once, since more were too many for its memory."""

    def read(self, numbers: Sequence[int]) -> tuple[Outcome, Block]:
        """Read rows by number."""
        return self._finish(self._begin(pa.table({"row": pa.array(numbers, pa.int64())})))

    def batch(self, slices: Sequence[SliceAddress], *blocks: Block) -> tuple[Outcome, Block]:
        """Work on one batch."""
        return self._finish(self.begin(slices, *blocks))

    def begin(self, slices: Sequence[SliceAddress], *blocks: Block) -> Call:
        """Take in one batch, to be worked on by ``advance``."""
        return self._begin(concat(_gather(slices, blocks)))

    def commit(self, shard: int, errors: list[dict[str, Any]], slices: Sequence[SliceAddress], *blocks: Block) -> bool:
        """Publish a shard; False if another driver had."""
        return cast(CommittingStage, self.stage).commit(shard, _gather(slices, blocks), errors)

    def advance(self) -> None:
        """Do the next piece of work: a batch, or a step of a continuous stage."""
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # each thread has its own, and stages in one process share one
        with self.hearing.on(), weights.reading(f"stage {self.name}", each=True):
            self._advance()

    def _advance(self) -> None:
        if not isinstance(self.stage, ContinuousStage):
            call = self.waiting.popleft()
            with _noting(call):
                failpoints.reach(self.name)
                block = self._in_memory(call)
                self._note_reading()
                call.block = block
            return
        while self.waiting:
            call = self.waiting.popleft()
            with _noting(call):
                failpoints.reach(self.name)
                call.request = self.stage.take(call.batch, call.reject)
                self.inside.append(call)
        self.stage.advance()
        for call in [call for call in self.inside if call.request is not None and call.request.done]:
            self.inside.remove(call)
            with _noting(call):
                block = list(self.stage.finish(call.request))
                self._note_reading()
                call.block = block

    def _note_reading(self) -> None:
        """Before a batch counts as done: with it the driver hears by what it was made."""
        for unit, files in weights.taken().items():
            self.read_later[unit] = sorted({*self.read_later.get(unit, []), *files})

    def _in_memory(self, call: Call) -> Block:
        """The stage's answer; in smaller and smaller pieces where it runs out of memory. It remembers how small."""
        block: Block = []
        start = 0
        while start < len(call.batch):
            count = min(self.most or len(call.batch), len(call.batch) - start)
            rejected: dict[int, str] = {}
            try:
                result = self.stage(call.batch.slice(start, count), rejected.__setitem__)
                block += [result] if isinstance(result, pa.Table) else list(result)
            except OUT_OF_MEMORY as error:
                if self.stage.fixed is not None:
                    raise type(error)(f"{error}; in a deterministic job only a smaller batch_size helps") from error
                if count == 1:
                    raise
                self.most = count // 2
                logger.warning(f"{self.name}: out of memory with {count} rows; from now on {self.most} at a time")
                torch.cuda.empty_cache()
                continue
            for i, reason in rejected.items():
                call.reject(start + i, reason)
            start += count
        return block

    def result(self, call: Call) -> tuple[Outcome, Block]:
        """What became of a call that is done, every row accounted for. Raises what the stage raised, or ContractError."""
        if isinstance(call.error, RowError) and len(call.batch) == 1:
            call.reject(0, str(call.error))
            call.block, call.error = [], None
        if call.error is not None:
            raise call.error
        assert call.block is not None
        checks.same_rows(self.stage, call.batch, call.block, call.rejected)
        if not isinstance(self.stage, CommittingStage):
            checks.same_columns(self.stage, call.batch, call.block)
        call.block = [tensors.compact(table) for table in call.block]
        outcome = [(shape_key(table), tuple(table.column("row").to_pylist())) for table in call.block]
        node = this_node() if self.read_later else ""
        heard, read = self.hearing.take(), dict(self.read_later)
        return Outcome(outcome, list(call.rejected.items()), heard, read, node), call.block

    def _begin(self, batch: pa.Table) -> Call:
        call = Call(batch if self.stage.shares_tensors else tensors.expanded(batch))
        self.waiting.append(call)
        return call

    def _finish(self, call: Call) -> tuple[Outcome, Block]:
        while True:
            with self.turn:
                self.turn.wait_for(lambda: call.done or not self.taken)
                if call.done:
                    break
                self.taken = True
            try:
                self.advance()
            finally:
                with self.turn:
                    self.taken = False
                    self.turn.notify_all()
        return self.result(call)


@contextmanager
def _noting(call: Call) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        call.error = error


def _gather(slices: Sequence[SliceAddress], blocks: Sequence[Block]) -> list[pa.Table]:
    out = []
    for block, number, start, stop in slices:
        table = blocks[block][number]
        out.append(table if (start, stop) == (0, len(table)) else table.slice(start, stop - start))
    return out

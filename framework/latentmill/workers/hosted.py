"""A stage in a worker, built and loaded, and the batches that it has been given."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import pyarrow as pa

from latentmill import failpoints, tally, weights
from latentmill.errors import is_out_of_memory
from latentmill.plugin import ContinuousStage, Filtered, Reason, Request, Stage, tensors
from latentmill.workers.hearing import Hearing
from latentmill.workers.shared_parts import SharedParts

logger = logging.getLogger("latentmill")

Block: TypeAlias = list[pa.Table]
Back: TypeAlias = Literal["", "untouched", "begun", "half-way"]
"""How a batch comes back that is handed over before its end: nobody has begun with it, or its stage had, and it is what it was; or as its
stage left it."""


@dataclass(frozen=True)
class StageWork:
    """What a worker needs to know of a stage that it hosts."""

    name: str
    make: Callable[[], Stage]
    gpu: bool = False
    """Whether it is loaded onto the worker's GPU."""
    calls: int = 2
    """Calls that may be under way at a time: one computes, others unpack, pack or wait."""
    threads: int | None = None
    """torch's threads while it computes; None leaves torch's own choice."""
    names: tuple[tuple[str, str], ...] = ()
    """Columns and what it knows them by: ``refine.steps`` by ``steps``, and the other way round."""
    timeout: float | None = None
    """Seconds without an answer after which a worker that has work counts as hanging. A process can't tell of itself."""
    shared: SharedParts | None = None
    """Where ``make`` looks for parts with weights, and puts them: one for all stages of a worker."""
    parts: tuple[str, ...] = ()
    """The keys of those that it works with."""


@dataclass(eq=False)
class Call:
    """A batch that a worker was given, until it hands it back."""

    batch: pa.Table
    rejected: dict[int, Reason] = field(default_factory=dict)
    request: Request | None = None
    block: Block | None = None
    error: Exception | None = None
    back: Back = ""

    @property
    def done(self) -> bool:
        return self.block is not None or self.error is not None or self.back != ""

    def reject(self, i: int, reason: Reason) -> None:
        """Of several reasons for one row the first counts, and one for which it has failed before one for which it is filtered."""
        if not 0 <= i < len(self.batch):
            raise IndexError(f"reject({i}, ...): the batch has the rows 0 to {len(self.batch) - 1}")
        row = self.batch.column("row")[i].as_py()
        if row not in self.rejected or (isinstance(self.rejected[row], Filtered) and not isinstance(reason, Filtered)):
            self.rejected[row] = reason


class Hosted:
    """A stage in a worker, built and loaded, and the batches that it has been given."""

    def __init__(self, work: StageWork, read: weights.Reading) -> None:
        """``read`` is told what it reads."""
        self.name, self.threads, self.names = work.name, work.threads, dict(work.names)
        self.hearing = Hearing()
        self.set_threads()
        with self.hearing.on():
            self.stage = work.make()
            with weights.reading(f"stage {work.name}", into=read):
                self._load(work.gpu)
        self.seconds: deque[float] = deque()
        """How long it has computed, each time since that was last told."""
        self.counts: deque[Counter[str]] = deque()
        """What it has counted, each time since that was last told."""
        self.inside: list[Call] = []
        """Of a continuous stage: the batches that it has taken in."""
        self.most: int | None = None
        """Rows that the stage is given at once, since more were too many for its memory."""

    def _load(self, gpu: bool) -> None:
        """Load the stage, if it has anything to load: most that read rows or write files take no torch, and are there sooner."""
        if getattr(self.stage.load, "__func__", None) is not Stage.load:
            import torch

            self.stage.load(torch.device("cuda" if gpu else "cpu"))

    def set_threads(self) -> None:
        """Give torch the stage's threads: stages in one process share one torch, and each thread of Python has its own number."""
        if self.threads is None:
            return
        if not (torch := sys.modules.get("torch")):
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # should a plugin take it
        elif torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)

    def begin(self, batch: pa.Table) -> Call:
        """A call for a batch, that nobody has begun to work on."""
        return Call(self.renamed(batch if self.stage.shares_tensors else tensors.expanded(batch)))

    def renamed(self, batch: pa.Table) -> pa.Table:
        """A batch as the stage knows it or, if it is one of the stage's, as all others do."""
        if not self.names:
            return batch
        return batch.rename_columns([self.names.get(name, name) for name in batch.column_names])

    def work_on(self, call: Call) -> Block | None:
        """Do a batch; a continuous stage takes it in, and there is no block yet."""
        failpoints.reach(self.name)
        if not isinstance(self.stage, ContinuousStage):
            return self._in_memory(call)
        call.request = self.stage.take(call.batch, call.reject)
        self.inside.append(call)
        return None

    def step(self) -> list[Call]:
        """Do a step of a continuous stage. Returns the calls that are at their end."""
        assert isinstance(self.stage, ContinuousStage)
        self.stage.advance()
        return [call for call in self.inside if call.request is not None and call.request.done]

    def finish(self, call: Call) -> Block:
        """What a continuous stage has made of a batch."""
        assert isinstance(self.stage, ContinuousStage) and call.request is not None
        return list(self.stage.finish(call.request))

    def hand_over(self, call: Call) -> None:
        """Take a batch out of a continuous stage, as far as it is."""
        assert isinstance(self.stage, ContinuousStage)
        tables = self.stage.hand_over(call.request)
        if tables is None:
            call.back, call.rejected = "begun", {}
        else:
            call.block, call.back = list(tables), "half-way"

    def _in_memory(self, call: Call) -> Block:
        """The stage's answer; in smaller and smaller pieces where it runs out of memory. It remembers how small."""
        block: Block = []
        start = 0
        while start < len(call.batch):
            count = min(self.most or len(call.batch), len(call.batch) - start)
            piece = Call(call.batch.slice(start, count))
            try:
                result = self.stage(piece.batch, piece.reject)
                block += [result] if isinstance(result, pa.Table) else list(result)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.stage.fixed is not None:
                    raise type(error)(f"{error}; in a deterministic job only a smaller batch_size helps") from error
                if count == 1:
                    raise
                self.most = count // 2
                tally.count(tally.HALVINGS)
                logger.warning(f"{self.name}: out of memory with {count} rows; from now on {self.most} at a time")
                if torch := sys.modules.get("torch"):
                    torch.cuda.empty_cache()
                continue
            call.rejected |= piece.rejected
            start += count
        return block

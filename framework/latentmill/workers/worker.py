"""What a worker does with a dispatch, wherever it runs: gather its table slices, call its stage, account for every row."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import pyarrow as pa

from latentmill import checks, tally, weights
from latentmill.batch import ATTEMPT, concat, shape_key
from latentmill.half_done import HALF_DONE, HalfDone, HalfDoneRows, described
from latentmill.plugin import CommittingStage, Reason, RowError, tensors
from latentmill.text import one_line
from latentmill.workers.context import this_node
from latentmill.workers.hearing import drained
from latentmill.workers.hosted import Back, Block, Call, Hosted, StageWork
from latentmill.workers.meter import Meter, memory_held
from latentmill.workers.shared_parts import SharedParts
from latentmill.workers.speech import Speech
from latentmill.workers.watch import Notice

logger = logging.getLogger("latentmill")

Admit: TypeAlias = Callable[[str, weights.Reading], str]
"""Of a node's name and what a worker on it has read: why its rows would not be the dataset's, or "" if they would."""


SliceAddress: TypeAlias = tuple[int, int, int, int]
"""A table slice as a worker sees it: which of the blocks given, which table of it, from which row to which."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a pool needs to start one of the workers of a type. The resources are Ray's, in Ray's words."""

    stages: tuple[StageWork, ...]
    replicas: int | None = 1
    """How many there are; None: one, and more when the driver asks for them."""
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    computes: bool = True
    """Whether there is more to do than to read rows, and to write files."""
    fetching: float = 0.0
    """Seconds that its node may take to fetch models before it is ready."""
    half_done: HalfDone | None = None
    """Where half-done rows are kept."""
    min_replicas: int | None = None
    """Of ``replicas``, how many are enough; None: all to begin with, and one to go on."""

    @property
    def fewest(self) -> int:
        """How many there must be before the job begins."""
        return (self.replicas or 1) if self.min_replicas is None else self.min_replicas

    @property
    def name(self) -> str:
        """The names of its stages."""
        return ", ".join(stage.name for stage in self.stages)

    @property
    def alike(self) -> tuple[Any, ...]:
        """What is the same of workers that can take over from one another, each with the models that it has."""
        stages = [(stage.name, stage.gpu, stage.parts) for stage in self.stages]
        return (*stages, sum(stage.calls for stage in self.stages), *sorted(self.asks.items()))

    @property
    def asks(self) -> dict[str, float]:
        """What one worker asks of its node, nothing of nothing."""
        asks = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory or 0), **self.resources}
        if self.accelerator_type:
            asks[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in asks.items() if amount}


@dataclass(frozen=True)
class Outcome:
    """What the driver learns of a block without seeing it."""

    parts: list[tuple[str, tuple[int, ...]]]
    rejected: list[tuple[int, Reason]]
    heard: list[str] = field(default_factory=list)
    """What libraries said in the worker since it was last asked."""
    read: weights.Reading = field(default_factory=dict)
    """What the worker has read since it was loaded."""
    node: str = ""
    bytes: int = 0
    """The size of the block."""
    seconds: float = 0.0
    """How long its stage has computed since the last one."""
    memory: int = 0
    """The bytes that the worker holds."""
    notice: Notice = field(default_factory=Notice)
    """What else is to be known of the worker."""
    back: Back = ""


@dataclass(frozen=True)
class Resumed:
    """What the driver learns of half-done rows that are taken up: as ``TakenUp``."""

    tables: Sequence[tuple[int, str, tuple[int, ...]]] = ()
    filtered: Sequence[Mapping[str, Any]] = ()
    attempts: Mapping[int, int] = field(default_factory=dict)
    wrong: str = ""
    """Why the file can't be used."""


class Worker:
    """One stage or several, built and loaded in one process, and the few verbs that a pool calls.

    Several calls may come at once, each in a thread: batches are unpacked and packed while another is computed. Whoever
    waits for a batch works on, whosever batch it is, unless another already does: one at a time. A step of a continuous
    stage is done when no batch waits: so as many rows as there can be are in it.
    """

    speech: Speech | None = None
    """What is printed, if the worker has a process of its own."""

    def __init__(self, stages: Sequence[StageWork], half_done: HalfDone | None = None) -> None:
        """``half_done`` writes and reads what is kept of rows when the driver stops."""
        self.meter = Meter(any(work.gpu for work in stages))
        self._begin_run(stages, half_done)

    def _begin_run(self, stages: Sequence[StageWork], half_done: HalfDone | None) -> None:
        self.half_done = half_done
        self.handing_over = False
        self.shared = next((work.shared for work in stages if work.shared is not None), SharedParts())
        self.read_now: weights.Reading = {}
        self.stages = {work.name: Hosted(work, self.read_now) for work in stages}
        self.loaded = weights.taken(self.read_now)
        """What was read while the stages were loaded."""
        self.read_later: weights.Reading = {}
        """What was read since: weights that are needed for some rows only."""
        self.waiting: deque[tuple[Hosted, Call]] = deque()
        self.turn = threading.Condition()
        self.taken = False

    def take_over(self, stages: Sequence[StageWork], half_done: HalfDone | None = None) -> None:
        """Work for another run, as a worker that is new: all is built anew, but what has weights and is the same stays loaded.

        What isn't the same is let go before anything is loaded. So is all that there is, if files of weights were read while rows were
        made: a part may remember what was in them, and by now it may be something else.
        """
        read_for_rows = any(", file " in unit for unit in (*self.read_now, *self.read_later))
        stays = {} if read_for_rows else self.shared.hand_on({key for work in stages for key in work.parts})
        computes = any(hosted.stage.position == "between" for hosted in self.stages.values())
        self.stages = {}
        if computes:  # what has weights may know itself: a library's model, a stage of others
            gc.collect()
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        for shared in {id(work.shared): work.shared for work in stages if work.shared is not None}.values():
            shared.there.update(stays)
        self._begin_run(stages, half_done)

    def heard(self) -> dict[str, list[str]]:
        """What libraries said of late, by stage."""
        return {name: hosted.hearing.take() for name, hosted in self.stages.items()}

    def probe(self) -> str:
        """The name of a file that the stage that commits, if it is here, has written beside the dataset; else ""."""
        found = [hosted.stage.probe() for hosted in self.stages.values() if isinstance(hosted.stage, CommittingStage)]
        return found[0] if found else ""

    def read(self, stage: str, numbers: Sequence[int], attempts: Sequence[int] = ()) -> tuple[Outcome, Block]:
        """Read rows by number, each as its attempt has it, in a job with ``accept``."""
        given = pa.table({"row": pa.array(numbers, pa.int64())})
        if attempts:
            given = given.append_column(ATTEMPT, pa.array(attempts, ATTEMPT.type))
        return self._finish(stage, self._begin(stage, given))

    def batch(self, stage: str, slices: Sequence[SliceAddress], *blocks: Block) -> tuple[Outcome, Block]:
        """Work on one batch."""
        return self._finish(stage, self.begin(stage, slices, *blocks))

    def begin(self, stage: str, slices: Sequence[SliceAddress], *blocks: Block) -> Call:
        """Take in one batch, to be worked on by ``advance``."""
        return self._begin(stage, concat(_gather(slices, blocks)))

    def commit(
        self,
        stage: str,
        shard: int,
        errors: list[dict[str, Any]],
        filtered: list[dict[str, Any]],
        not_needed: int,
        slices: Sequence[SliceAddress],
        *blocks: Block,
    ) -> float:
        """Publish a shard, unless another driver had. Returns the seconds that it took."""
        started = time.perf_counter()
        # A stage that is older than filtered rows, or than rows that are not needed, knows of none.
        more: dict[str, Any] = {"filtered": filtered} if filtered else {}
        more |= {"not_needed": not_needed} if not_needed else {}
        cast(CommittingStage, self.stages[stage].stage).commit(shard, _gather(slices, blocks), errors, **more)
        return time.perf_counter() - started

    def hand_over(self) -> None:
        """From now on give everything back that is not at its end, at the next step of its stage."""
        with self.turn:
            self.handing_over = True
            self._give_back_waiting()
            self.turn.notify_all()

    def _give_back_waiting(self) -> None:
        while next_call := self._next_call():
            next_call[1].back = "untouched"

    def _next_call(self) -> tuple[Hosted, Call] | None:
        """Take what waits longest, if anything does: whoever has the turn and who gives back take it from one another."""
        with suppress(IndexError):
            return self.waiting.popleft()
        return None

    def keep(
        self,
        shard: int,
        stages: Sequence[int],
        filtered: Sequence[Mapping[str, Any]],
        attempts: Mapping[int, int],
        slices: Sequence[SliceAddress],
        *blocks: Block,
    ) -> float:
        """Write what is half done of a shard: of each slice the stage that its rows come to next. Returns the seconds that it took."""
        assert self.half_done is not None
        started = time.perf_counter()
        self.half_done.keep(shard, HalfDoneRows(_gather(slices, blocks), stages, filtered, attempts))
        return time.perf_counter() - started

    def take_up(self, shard: int, name: str) -> tuple[Resumed, Block]:
        """What is half done of a shard. Of a file that can't be used nothing is, and it is said why."""
        assert self.half_done is not None
        try:
            found = self.half_done.take_up(shard, name)
        except Exception as error:  # whatever a damaged file makes a reader say
            why = one_line(str(error))
            return Resumed(wrong=f"{HALF_DONE}/{name} is passed over, and its rows are made anew: {why}"), []
        return Resumed(described(found), found.filtered, found.attempts), list(found.tables)

    def advance(self) -> None:
        """Do the next piece of work: a batch, or else a step of the continuous stages."""
        if self.handing_over:
            self._hand_over()
            return
        if next_call := self._next_call():
            hosted, call = next_call
            with self._doing(hosted, call):
                call.block = self._noted(hosted.work_on(call))
            return
        for hosted in self.stages.values():
            if not hosted.inside:
                continue
            with self._doing(hosted, *hosted.inside):
                for call in hosted.step():
                    with _noting(call):
                        call.block = self._noted(hosted.finish(call))
            hosted.inside = [call for call in hosted.inside if not call.done]

    def _hand_over(self) -> None:
        with (
            self.turn
        ):  # whoever waits for a call sees all of what it has become, or nothing: half-way rows are not done
            self._give_back_waiting()
            for hosted in self.stages.values():
                for call in hosted.inside:
                    with _noting(call):
                        if call.request is not None and call.request.done:
                            call.block = self._noted(hosted.finish(call))
                        else:
                            hosted.hand_over(call)
                hosted.inside = []

    @contextmanager
    def _doing(self, hosted: Hosted, *calls: Call) -> Iterator[None]:
        hosted.set_threads()
        reading = weights.reading(f"stage {hosted.name}", each=True, into=self.read_now)
        started, counts = time.perf_counter(), Counter[str]()
        with hosted.hearing.on(), reading, tally.counting(counts), _noting(*calls):
            yield
        if counts:
            hosted.counts.append(counts)
        hosted.seconds.append(time.perf_counter() - started)

    def _noted(self, block: Block | None) -> Block | None:
        """Before a batch counts as done: with it the driver hears by what it was made."""
        if block is not None:
            for unit, files in weights.taken(self.read_now).items():
                self.read_later[unit] = sorted({*self.read_later.get(unit, []), *files})
        return block

    def result(self, stage: str, call: Call) -> tuple[Outcome, Block]:
        """What became of a call that is done, every row accounted for. Raises what the stage raised, or ContractError."""
        hosted = self.stages[stage]
        of = hosted.stage
        if isinstance(call.error, RowError) and len(call.batch) == 1:
            call.reject(0, str(call.error))
            call.block, call.error = [], None
        if call.error is not None:
            raise call.error
        if call.back in ("untouched", "begun"):
            return Outcome([], [], back=call.back), []
        assert call.block is not None
        checks.same_rows(of, call.batch, call.block, call.rejected)
        rejected = [(row, checks.reason(of, why)) for row, why in call.rejected.items()]
        if not isinstance(of, CommittingStage) and not call.back:
            checks.same_columns(of, call.batch, call.block)
        call.block = [tensors.compact(hosted.renamed(table)) for table in call.block]
        outcome = [(shape_key(table), tuple(table.column("row").to_pylist())) for table in call.block]
        node = this_node() if self.read_later else ""
        heard, read = hosted.hearing.take(), dict(self.read_later)
        size = sum(table.nbytes for table in call.block)
        seconds, counts = sum(drained(hosted.seconds)), sum(drained(hosted.counts), Counter())
        notice = Notice(self.speech.take() if self.speech else (), counts, self.meter.take())
        return Outcome(
            outcome, rejected, heard, read, node, size, seconds, memory_held(), notice, call.back
        ), call.block

    def _begin(self, stage: str, batch: pa.Table) -> Call:
        hosted = self.stages[stage]
        call = hosted.begin(batch)
        with self.turn:
            if self.handing_over:
                call.back = "untouched"
            else:
                self.waiting.append((hosted, call))
        return call

    def _finish(self, stage: str, call: Call) -> tuple[Outcome, Block]:
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
        return self.result(stage, call)


@contextmanager
def _noting(*calls: Call) -> Iterator[None]:
    """What is raised meanwhile is the calls' error."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except Exception as error:
        for call in calls:
            call.error = error
    except (
        BaseException
    ) as error:  # a library that calls sys.exit, or panics: whoever waits for the calls must hear of it
        for call in calls:
            call.error = RuntimeError(f"{type(error).__name__}: {error}")


def _gather(slices: Sequence[SliceAddress], blocks: Sequence[Block]) -> list[pa.Table]:
    out = []
    for block, number, start, stop in slices:
        table = blocks[block][number]
        out.append(table if (start, stop) == (0, len(table)) else table.slice(start, stop - start))
    return out

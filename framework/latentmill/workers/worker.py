"""What a worker does with a dispatch, wherever it runs: gather its pieces, call its stage, account for every row."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias, cast

import pyarrow as pa
import torch

from latentmill import checks, failpoints, registry, storage, weights
from latentmill.batch import FixedShape, concat, shape_key
from latentmill.config import Job
from latentmill.errors import PluginError, WrongWorker
from latentmill.plan import LIBRARIES, Plan, identity, of_row, plugin_of, versions
from latentmill.plan import read as read_plan
from latentmill.plugin import Denoiser, Plugin, RowError, Scheduler, Source, Stage
from latentmill.shards import PLAN_KEY
from latentmill.stages.decode import Decode
from latentmill.stages.denoise import Denoise, Visit
from latentmill.stages.encode import Encode
from latentmill.stages.read import Read
from latentmill.stages.write import Write
from latentmill.workers.hearing import Hearing

logger = logging.getLogger("latentmill")

Admit: TypeAlias = Callable[[str, weights.Reading], str]
"""Of a node's name and what a worker on it has read: why its rows would not be the dataset's, or "" if they would."""


MANY = 1000
"""Names of schedulers in rows of which a worker tells: nobody has so many, and rows may hold anything."""


OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)

Block: TypeAlias = list[pa.Table]
Cut: TypeAlias = tuple[int, int, int, int]
"""A piece as a worker sees it: which of the blocks given, which part of it, from which row to which."""


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
    visit: Visit | None = None
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
        self.threads, self.name = threads, f"stage {name}"
        self.hearing = Hearing()
        weights.taken()
        with self.hearing.on():
            self.stage = make()
            with weights.reading(self.name):
                self.stage.load(torch.device("cuda" if gpu else "cpu"))
        self.loaded = weights.taken()
        """What was read while the stage was loaded."""
        self.read_later: weights.Reading = {}
        """What was read since: weights that are needed for some rows only."""
        self.waiting: deque[Call] = deque()
        self.inside: list[Call] = []
        """Denoise only: batches of which some rows are on their way."""
        self.turn = threading.Condition()
        self.taken = False
        self.most: int | None = None
        """Rows that the stage is given at once, since more were too many for its memory."""

    def read(self, numbers: Sequence[int]) -> tuple[Outcome, Block]:
        """Read rows by number."""
        return self._finish(self._begin(pa.table({"row": pa.array(numbers, pa.int64())})))

    def batch(self, cuts: Sequence[Cut], *blocks: Block) -> tuple[Outcome, Block]:
        """Work on one batch."""
        return self._finish(self.begin(cuts, *blocks))

    def begin(self, cuts: Sequence[Cut], *blocks: Block) -> Call:
        """Take in one batch, to be worked on by ``advance``."""
        return self._begin(concat(_gather(cuts, blocks)))

    def commit(self, shard: int, errors: list[dict[str, Any]], cuts: Sequence[Cut], *blocks: Block) -> bool:
        """Publish a shard; False if another driver had."""
        return cast(Write, self.stage).commit(shard, _gather(cuts, blocks), errors)

    def advance(self) -> None:
        """Do the next piece of work: a batch, or, of those that are being denoised, a step of as many rows as go at a time."""
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # each thread has its own, and stages in one process share one
        with self.hearing.on(), weights.reading(self.name, each=True):
            self._advance()

    def _advance(self) -> None:
        name = type(self.stage).__name__.lower()
        if not isinstance(self.stage, Denoise):
            call = self.waiting.popleft()
            with _noting(call):
                failpoints.reach(name)
                block = self._in_memory(call)
                self._note_reading()
                call.block = block
            return
        while self.waiting:
            call = self.waiting.popleft()
            with _noting(call):
                failpoints.reach(name)
                call.visit = self.stage.enter(call.batch, call.reject)
                self.inside.append(call)
        self.stage.advance()
        for call in [call for call in self.inside if call.visit and call.visit.done]:
            self.inside.remove(call)
            with _noting(call):
                assert call.visit is not None
                block = list(self.stage.leave(call.visit))
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
                if getattr(self.stage, "fixed", None) is not None:
                    raise type(error)(f"{error}; in a deterministic job only a smaller batch_size helps") from error
                if count == 1:
                    raise
                self.most = count // 2
                logger.warning(
                    f"{type(self.stage).__name__}: out of memory with {count} rows; from now on {self.most} at a time"
                )
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
        if not isinstance(self.stage, Write):
            checks.same_columns(self.stage, call.batch, call.block)
        outcome = [(shape_key(table), tuple(table.column("row").to_pylist())) for table in call.block]
        node = this_node() if self.read_later else ""
        heard, read = self.hearing.take(), dict(self.read_later)
        return Outcome(outcome, list(call.rejected.items()), heard, read, node), call.block

    def _begin(self, batch: pa.Table) -> Call:
        call = Call(batch)
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


def _gather(cuts: Sequence[Cut], blocks: Sequence[Block]) -> list[pa.Table]:
    out = []
    for block, part, start, stop in cuts:
        table = blocks[block][part]
        out.append(table if (start, stop) == (0, len(table)) else table.slice(start, stop - start))
    return out


def make_stage(job: Job, plan: Plan, name: str) -> Stage:
    """Build a stage by its name in the job's flow, with its own plugins and no others. Loads nothing onto a device.

    Raises WrongWorker if what is installed here, or the plugins find, is not what the plan says.
    """
    _require_libraries(plan, LIBRARIES)
    if name not in MAKERS:
        stage: Stage = as_planned(job, plan, f"stage {name}")
        return stage
    fixed = FixedShape(job.stages[name].batch_size, job.rows_per_shard) if job.deterministic else None
    return MAKERS[name](job, plan, fixed)


def as_planned(job: Job, plan: Plan, kind: str) -> Any:
    """One of the job's plugins, built, if it is the plan's; else raises WrongWorker."""
    planned = plan.plugins[kind]
    what, same = f"{kind} {planned['name']}", "Install the same version on every node"
    try:
        here = identity(job, kind)
    except PluginError as error:
        raise WrongWorker(
            f"{this_node()} lacks {what}, which the plan has of {planned['distribution']} {planned['version']}: "
            f"{error}. {same}"
        ) from error
    for key in ("distribution", "version"):
        if here[key] != planned[key]:
            raise WrongWorker(
                f"{this_node()} has {what} of {here['distribution']} {here['version']}, "
                f"and the plan of {planned['distribution']} {planned['version']}. {same}"
            )
    try:
        plugin: Plugin = plugin_of(job, kind)
    except PluginError as error:
        if isinstance(error.__cause__, OSError):  # the storage's, and may be gone at the next attempt
            raise
        raise WrongWorker(f"{this_node()} can't build what the driver could: {error}") from error
    _require_libraries(plan, plugin.libraries)
    if (found := plugin.fingerprint()) != planned["fingerprint"]:
        raise WrongWorker(
            f"{this_node()} has other weights or files for {what}: its fingerprint is {found or 'empty'} there, and "
            f"{planned['fingerprint'] or 'empty'} in the plan. Put the same files on every node"
        )
    return plugin


def _require_libraries(plan: Plan, names: Sequence[str]) -> None:
    for name, here in versions(names).items():
        if here != plan.libraries.get(name, here):
            raise WrongWorker(
                f"{this_node()} has {name} {here}, and the driver {plan.libraries[name]}. Install the same version on every node"
            )


def this_node() -> str:
    """Names the machine that this process runs on."""
    ray = sys.modules.get("ray")
    address = f" ({ray.util.get_node_ip_address()})" if ray and ray.is_initialized() else ""
    return f"node {socket.gethostname()}{address}"


def _read(job: Job, plan: Plan, fixed: FixedShape | None) -> Stage:
    scheduler = job.scheduler["name"] if job.scheduler and "denoise" in job.flow else ""
    source: Source = as_planned(job, plan, "source")
    fragments = {fragment.name: fragment for fragment in plan.fragments}

    @cache
    def require(name: str) -> None:
        if source.changed(fragments[name]):
            raise WrongWorker(
                f"{this_node()} has another {name} for source {job.source['name']} than was planned: "
                "a source must be the same on every node, and stay so until the job is done"
            )

    return Read(source, plan, job.sampling, scheduler, plan.spec.downscale if plan.spec else 1, require)


def _encode(job: Job, plan: Plan, fixed: FixedShape | None) -> Stage:
    text_encoder = as_planned(job, plan, "text_encoder") if "denoise" in job.flow else None
    keep_image = "decode" in job.flow and "denoise" not in job.flow
    return Encode(as_planned(job, plan, "vae"), text_encoder, fixed, keep_image, job.latents_std)


def _denoise(job: Job, plan: Plan, fixed: FixedShape | None) -> Stage:
    assert job.scheduler is not None
    denoiser: Denoiser = as_planned(job, plan, "denoiser")
    schedulers: dict[str, Scheduler] = {job.scheduler["name"]: as_planned(job, plan, "scheduler")}
    looked: set[str] = set()

    def scheduler(name: str) -> Scheduler:
        """The job's with the job's settings, a row's own with its defaults."""
        if name not in schedulers:
            if (
                name not in looked and len(looked) < MANY
            ):  # the plan doesn't know of it, and it must be the same on all nodes
                looked.add(name)
                weights.note(f"scheduler {name}", name, of_row(name))
            try:
                schedulers[name] = registry.build("scheduler", {"name": name})
            except PluginError as error:
                raise RowError(str(error)) from error
        return schedulers[name]

    grid = job.scheduler.get("grid", "trailing")
    sampling, batch_size = job.sampling, job.stages["denoise"].batch_size
    return Denoise(denoiser, scheduler, grid, batch_size, fixed, sampling["first_noise"], sampling["until"])


def _decode(job: Job, plan: Plan, fixed: FixedShape | None) -> Stage:
    return Decode(as_planned(job, plan, "vae"), fixed)


def _write(job: Job, plan: Plan, fixed: FixedShape | None) -> Stage:
    store = storage.at(job.output, job.single_writer)
    if not store.exists("plan.json") or read_plan(store)["hash"] != plan.hash:
        raise RuntimeError(
            f"{this_node()} doesn't see the plan.json that the driver wrote in {job.output}: "
            "the output must be one folder or store for all nodes, by its whole path"
        )
    return Write(as_planned(job, plan, "sink"), store, plan, {PLAN_KEY: plan.hash})


MAKERS: dict[str, Callable[[Job, Plan, FixedShape | None], Stage]] = {
    "read": _read,
    "encode": _encode,
    "denoise": _denoise,
    "decode": _decode,
    "write": _write,
}

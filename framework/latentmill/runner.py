"""Run a job: decide, dispatch, collect, until every shard is committed."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from latentmill import (
    failpoints,
    generations,
    half_done,
    parts,
    plan_files,
    progress,
    registry,
    report,
    storage,
    survey,
)
from latentmill import plan as planning
from latentmill.config import Job, load_job
from latentmill.dataset import RETRIED, Dataset
from latentmill.driver import leases
from latentmill.driver.apply import apply
from latentmill.driver.leases import Leases
from latentmill.driver.loop import Pool, drive, view
from latentmill.driver.messages import TakenOut, WorkerType
from latentmill.driver.signals import Signals
from latentmill.driver.state import DriverState, finished
from latentmill.errors import RunError
from latentmill.exports import of_job
from latentmill.notices import as_ctrl_c
from latentmill.plan import Plan
from latentmill.shard_index import WORTH
from latentmill.shards import data_name
from latentmill.snapshots import Snapshots
from latentmill.text import secrets, without_secrets
from latentmill.usage import History
from latentmill.workers import pools
from latentmill.workers.left import LeftWorkers
from latentmill.workers.pools import make_pool, max_bytes_in_flight, stage_spec, worker_types
from latentmill.workers.watch import Watch

logger = logging.getLogger("latentmill")

REMEMBER_EVERY = 300.0
"""Seconds between two looks at a long run's shards."""


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    output: str
    planned: int
    ok: int
    failed: int
    seconds: float
    text: str
    """The summary, for people."""
    interrupted: bool = False
    filtered: int = 0
    not_needed: int = 0
    """``ok``, ``filtered``, ``failed`` and ``not_needed`` are what was planned, once all is done."""


def run(
    job: Job | str,
    overrides: Sequence[str] = (),
    retry_failed: Callable[[Mapping[str, Any]], bool] | None = None,
    grow: bool = False,
    left: LeftWorkers | None = None,
) -> Result:
    """Run a job to its end, or go on where an earlier run stopped.

    ``job`` is the name of a shipped job, the path of a YAML file, or a Job; ``overrides`` as on the command line
    (``["sampling.steps=10"]``). ``retry_failed`` says of an error row (``row_id``, ``stage``, ``reason``) whether it is to be
    done again: shards with such rows are taken out of the dataset and done anew, whole. ``grow``: rows that have come to the source since
    the dataset was begun get shards of their own, and what is there stays. ``left``: workers of the run before, which go on with this one
    where they have what it needs; its own are left there for the next. Raises JobError, PluginError, PlanError, ExportError or PlacementError before anything is started or
    written, RunError if the job has to stop; ExportError and StorageError of a finished dataset's export, too.
    """
    job = load_job(job, overrides) if isinstance(job, str) else job
    built = parts.parts(job)
    plan = planning.plan(job, built)
    for line in survey.notices(job, built):
        logger.warning(line)
    store = storage.at(job.output, job.single_writer)
    plan = generations.settle(plan, store, built.source, grow)
    of_job.require(job, built, plan, logger.warning)
    there = Dataset(store, plan, built.sink)
    state = begin(job, there)
    for line in plan_files.changed_libraries(plan, store):
        logger.warning(line)
    again = failed_shards(there, state.done, retry_failed) if retry_failed else []
    if finished(state) and not again and store.exists("_SUCCESS") and plan_files.is_published(plan, store):
        return _with_export(job, there, _result(job, there, state, seconds=0.0))
    pool: Pool | None = None
    watch = Watch(job.name, job.output, secrets(job.config, keys=True))
    started, interrupted, ended = time.monotonic(), False, False
    signals = Signals(job.grace_seconds)
    try:
        looks = pools.metrics(job, watch.run)
        with signals.on(), progress.live(job.name) as live, Snapshots(store, live, watch.run, looks) as seen:
            live.add = watch.onto
            if again or not finished(state):
                pool = make_pool(job, plan, store, watch, left=left)
                signals.listen()
            store.check()
            generations.publish(plan, store, built.source)
            there.remember()
            failpoints.reach("planning")
            store.sweep()
            half_done.sweep(store, state.done)
            if again:
                store.delete("_SUCCESS")
            for shard in again:
                there.take_out(shard, f"{RETRIED}-{uuid.uuid4().hex[:8]}")
            show, data = partial(_show, live, watch, state, plan, started), partial(data_name, sink=built.sink)
            taken = frozenset(again) | there.newly_taken_out()
            while True:
                apply(state, TakenOut(taken))
                if not finished(state):
                    pool = pool or make_pool(job, plan, store, watch, left=left)
                    state.max_bytes_in_flight = max_bytes_in_flight(job)
                    store.delete("_SUCCESS")  # somebody has taken shards out
                    file = partial(_half_done_file, store)
                    lease = nullcontext() if job.single_writer else Leases(store, data, half_done=file)
                    state.half_done = half_done.newest(store) if job.single_writer else {}
                    with _remembering(there), lease as held:
                        drive(state, pool, show, held, there.has_worked, signals, there.stored_in)
                    if state.stopping.how == "stopped":
                        interrupted = True
                        break
                if taken := there.newly_taken_out() or there.settle():
                    continue
                there.remember(all_there=True)
                seen.keep()
                if not (taken := _end(there, live.pace, seen.history)):
                    break
            if not interrupted:
                for sweep in (leases.sweep, half_done.sweep):
                    sweep(store, there.done())
                ended = True
    except KeyboardInterrupt:
        if not store.exists("plan.json"):
            raise
        interrupted = True
    except RunError as error:  # it may quote a plugin
        raise type(error)(without_secrets(str(error), job.config)) from error
    finally:
        if pool is not None:
            pool.close(leave=ended and left is not None)
        watch.look(ends=True)
    return _with_export(job, there, _result(job, there, state, time.monotonic() - started, interrupted))


def _with_export(job: Job, there: Dataset, result: Result) -> Result:
    """The result, once the job's export is there, if it asks for one and has a finished dataset. All workers are gone by then."""
    if job.export is None or result.interrupted or not result.ok:
        return result
    if there.outgrown() or not there.store.exists("_SUCCESS"):  # whoever makes what has come exports it, too
        return result
    try:
        with as_ctrl_c():
            found = of_job.write(job, logger.warning)
    except KeyboardInterrupt:
        told = "stopped; the same command goes on with it"
        return replace(result, interrupted=True, text=f"{result.text}\n  export        {told}")
    said = [f"  export        {line}" for line in found.lines()]
    return replace(result, text="\n".join([result.text, *said]))


def _end(there: Dataset, pace: progress.Pace, history: History) -> frozenset[int]:
    """All rows of the plan are there. Those are the whole dataset, unless another driver has grown it meanwhile, and does the rest.

    Returns the shards that another has taken out meanwhile: the dataset is not complete.
    """
    if there.outgrown():
        logger.warning(
            f"{there.store.url} has grown meanwhile: the same command goes on with what has come, if nobody does"
        )
        return frozenset()
    _finish_sink(there)
    report.finish(there, pace, history)
    failpoints.reach("finishing")
    # If it has grown, or lost a shard, since we looked, what deletes this file may have come before it; one that is there then is of the whole.
    if not there.outgrown() and there.store.create("_SUCCESS", b""):
        taken = there.newly_taken_out()
        if taken or there.outgrown():
            there.store.delete("_SUCCESS")
        if taken:
            return taken
    there.forget_retried()
    return frozenset()


def _finish_sink(there: Dataset) -> None:
    try:
        there.finish()
    except OSError:  # the store's
        raise
    except Exception as error:
        raise RunError(f"{registry.called(there.sink)}: finish: {type(error).__name__}: {error}") from error


def _half_done_file(store: storage.Storage, shard: int) -> str:
    """The file of a shard's half-done rows, if there is one. It is a help, and a store that fails does without."""
    with suppress(OSError):
        return half_done.newest(store, shard).get(shard, "")
    return ""


def _show(live: progress.Live, watch: Watch, state: DriverState, plan: Plan, started: float) -> None:
    watch.look()
    live.show(view(state, plan, time.monotonic() - started))


def _result(job: Job, there: Dataset, state: DriverState, seconds: float, interrupted: bool = False) -> Result:
    now = there.status()
    there.remember()
    counts = {name: now.get(name, 0) for name in ("planned", "ok", "failed", "filtered", "not_needed")}
    made = state.committed_ok + state.committed_failed + state.committed_filtered
    try:
        text = report.summary(
            job.name,
            there.store,
            **counts,
            wanted=there.plan.accept_rows,
            made=made,
            seconds=seconds,
            interrupted=interrupted,
            stopping=state.stopping,
            warnings=now["warnings"],
        )
    except Exception:  # a store that answers no more: the rows are there all the same
        text = f"{job.name}: {now['ok']:,} of {now['planned']:,} rows, {now['failed']:,} failed"
        text += f", {now['filtered']:,} filtered" if "filtered" in now else ""
    return Result(job.output, **counts, seconds=seconds, text=text, interrupted=interrupted)


def begin(job: Job, there: Dataset, types: Sequence[WorkerType] = ()) -> DriverState:
    """The driver's state at the start of a run: all shards that are not in the dataset yet. ``types``: other workers than the job's.

    Raises PlanError if what is in the dataset's place is another's.
    """
    done, plan = there.adopt(), there.plan
    for name in there.foreign():
        logger.warning(f"{job.output}/data/{name} is no shard of this dataset, and is passed over")
    if done and not there.store.exists("plan.json"):
        logger.warning(f"{job.output} has {len(done)} shards of this very job, and no plan.json: it is put back")
    stages = tuple(stage_spec(job, stage) for stage in plan.stages)
    return DriverState(
        stages,
        plan.end,
        plan.rows_per_shard,
        done,
        shared=not job.single_writer,
        fixed=job.deterministic,
        stop_on_error=job.on_error == "stop",
        max_error_rate=job.max_error_rate,
        attempts=job.attempts,
        accept_rows=plan.accept_rows,
        accepted=there.stored_in(done) if plan.accept_rows else {},
        drawn_in=next((at for at, stage in enumerate(plan.stages) if "denoiser" in stage.needs), 0),
        row_name=plan.row_id,
        short=plan.short,
        worker_types=tuple(types) or worker_types(job, plan),
    )


def failed_shards(there: Dataset, done: Set[int], wanted: Callable[[Mapping[str, Any]], bool]) -> list[int]:
    """The shards that have error rows of which one or more are ``wanted``."""
    failed = [shard for shard, found in there.look().readable.items() if shard in done and found.failed]
    return [shard for shard, errors in there.told(failed) if any(map(wanted, errors))]


@contextmanager
def _remembering(there: Dataset) -> Iterator[None]:
    """Add to the index now and then, while a long run goes on: a run that is killed leaves few shards to be read."""
    ended = threading.Event()

    def remember() -> None:
        pause = REMEMBER_EVERY
        while not ended.wait(pause):
            started = time.monotonic()
            with suppress(Exception):  # the next time
                there.look(until=ended)
                there.remember()
            pause = max(REMEMBER_EVERY, 20 * (time.monotonic() - started))

    thread = threading.Thread(target=remember, name="index", daemon=True)
    if there.plan.shards >= WORTH:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join(10)  # a store that doesn't answer is not waited for

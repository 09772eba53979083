"""Run a job: decide, dispatch, collect, until every shard is committed."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol

from latentmill import failpoints, flow, report, storage
from latentmill import plan as planning
from latentmill.job import Job, load_job, without_secrets
from latentmill.leases import Leases
from latentmill.plan import Plan
from latentmill.storage import Storage
from latentmill.worker import StageWork, make_stage
from latentmill.write import copy_errors, data_name, done_shards, failed_rows

logger = logging.getLogger("latentmill")

KINDS = 4
"""Shapes and schedulers of which a denoise worker holds rows at a time, so that the calls of each are full."""


class RunError(RuntimeError):
    """The job had to stop before its end; one line. The same command continues it."""


class OutputError(RunError):
    """It had to stop because its output can't be written: a full disk, a permission, a store that fails."""


class Pool(Protocol):
    """Where the work is done: Ray's actors, this process, or a simulation."""

    def submit(self, order: flow.Order) -> None: ...

    def collect(self, timeout: float) -> list[flow.Event]: ...

    def release(self, block: int) -> None: ...

    def close(self) -> None: ...


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


def run(job: Job | str, overrides: Sequence[str] = ()) -> Result:
    """Run a job to its end, or go on where an earlier run stopped.

    ``job`` is the name of a shipped job, the path of a YAML file, or a Job; ``overrides`` as on the command line
    (``["sampling.steps=10"]``). Raises JobError, PluginError, PlanError or PlacementError before anything is started or
    written, RunError if the job has to stop.
    """
    job = load_job(job, overrides) if isinstance(job, str) else job
    parts = planning.parts(job)
    plan = planning.plan(job, parts)
    for line in planning.notices(parts):
        logger.warning(line)
    store = storage.at(job.output, job.single_writer)
    state = begin(job, plan, store)
    if flow.finished(state) and store.exists("_SUCCESS"):
        return _result(job, state, seconds=0.0)
    pool: Pool | None = None
    started, interrupted = time.monotonic(), False
    try:
        with interruptible(), report.live(job.name) as live:
            if not flow.finished(state):
                pool = make_pool(job, plan)
            store.check()
            planning.publish(plan, store)
            failpoints.reach("planning")
            store.sweep()
            if pool is not None:
                store.delete("_SUCCESS")  # somebody has taken shards out
                with nullcontext() if job.single_writer else Leases(store) as leases:
                    show = partial(_show, live, state, plan, started)
                    drive(state, pool, show, leases, lambda shard: data_name(shard, parts.sink))
            with ThreadPoolExecutor(16) as threads:  # a store answers in its own time; all at once is one time
                list(threads.map(lambda shard: copy_errors(store, shard, parts.sink), done_shards(store)))
            report.finish(store, live.pace)
            failpoints.reach("finishing")
            store.put("_SUCCESS", b"")
    except KeyboardInterrupt:
        if not store.exists("plan.json"):
            raise
        interrupted = True
    except RunError as error:  # it may quote a plugin
        raise type(error)(without_secrets(str(error), job.config)) from error
    finally:
        if pool is not None:
            pool.close()
    return _result(job, state, time.monotonic() - started, interrupted)


def _show(live: report.Live, state: flow.State, plan: Plan, started: float) -> None:
    live.show(view(state, plan, time.monotonic() - started))


def _result(job: Job, state: flow.State, seconds: float, interrupted: bool = False) -> Result:
    now = status(job.output)
    counts = {name: now[name] for name in ("planned", "ok", "failed")}
    text = report.summary(
        job.name,
        job.output,
        **counts,
        made=state.committed_ok + state.committed_failed,
        seconds=seconds,
        interrupted=interrupted,
    )
    return Result(job.output, **counts, seconds=seconds, text=text, interrupted=interrupted)


def begin(job: Job, plan: Plan, store: Storage) -> flow.State:
    """The flow's state at the start of a run: all shards that are not in the dataset yet."""
    planning.compare(plan, store)
    stages = tuple(_spec(job, name) for name in job.flow)
    return flow.State(
        stages,
        plan.rows,
        plan.rows_per_shard,
        done_shards(store),
        shared=not job.single_writer,
        fixed=job.deterministic,
        stop_on_error=job.on_error == "stop",
        max_error_rate=job.max_error_rate,
        row_name=plan.row_id,
    )


def _spec(job: Job, name: str) -> flow.StageSpec:
    kinds, stage = KINDS if name == "denoise" and not job.deterministic else 1, job.stages[name]
    replicas = 1 if job.cluster.kind == "inline" else stage.replicas
    return flow.StageSpec(name, stage.batch_size, replicas, kinds=kinds, retries=stage.retries)


def make_pool(job: Job, plan: Plan) -> Pool:
    """The pool that the job's cluster asks for. Ray is imported only if it is wanted."""
    work = [_work(job, plan, name) for name in job.flow]
    if job.cluster.kind == "inline":
        from latentmill.inline import InlinePool

        return InlinePool(work)
    from latentmill import pool

    owned = pool.connect(job.cluster.address if job.cluster.kind == "ray" else None)
    try:
        return pool.RayPool(work, owned)
    except pool.PlacementError:
        if owned:
            pool.disconnect()
        raise


def drive(
    state: flow.State,
    pool: Pool,
    show: Callable[[], None],
    leases: Leases | None = None,
    data: Callable[[int], str] = str,
) -> None:
    """The loop. Raises RunError if the flow says that the job can't go on."""
    while not flow.finished(state):
        turn(state, pool, leases, data)
        show()
        if state.failed:
            raise (OutputError if state.output_failed else RunError)(state.failed)
        if state.elsewhere and not state.flying and not state.starting:
            time.sleep(0.2)  # there is nothing to do but to wait for other drivers


def turn(state: flow.State, pool: Pool, leases: Leases | None = None, data: Callable[[int], str] = str) -> None:
    """Decide, dispatch, collect, once. ``data`` names a shard's file."""
    while True:
        claimed = False
        for order in flow.decide(state):
            if isinstance(order, flow.Claim):
                assert leases is not None
                flow.apply(state, leases.claim(order.shard, data(order.shard)))
                claimed = True
            else:
                pool.submit(order)
        if not claimed:
            break
    for event in pool.collect(timeout=0.5):
        flow.apply(state, event)
    if leases is not None:
        leases.keep({*state.shards, *state.claimed})
        if news := leases.news(state.elsewhere):
            flow.apply(state, news)
    for block in state.released:
        pool.release(block)
    state.released.clear()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, which schedulers of clusters send before they take a machine away, stops as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def view(state: flow.State, plan: Plan, seconds: float) -> report.View:
    """What a person is shown of a state."""
    stages = [
        report.StageView(
            name=spec.name,
            done=state.finished_rows[at],
            queued=state.queued(at) if at else sum(map(len, state.to_read)),
            workers=len(state.workers[at]),
            busy=sum(1 for held in state.workers[at].values() if held),
        )
        for at, spec in enumerate(state.stages)
    ]
    before = len(state.done) * plan.rows_per_shard
    if plan.shards - 1 in state.done:  # the last may be short
        before -= plan.rows_per_shard - len(plan.shard_rows(plan.shards - 1))
    return report.View(
        stages=stages,
        planned=plan.rows,
        finished=before + state.committed_ok + state.committed_failed,
        failed=state.committed_failed,
        seconds=seconds,
        shards_done=len(state.done) + state.committed_shards,
        shards=plan.shards,
        elsewhere=len(state.elsewhere),
    )


def _work(job: Job, plan: Plan, name: str) -> StageWork:
    stage = job.stages[name]
    threads: int | None = stage.threads
    # In one process, and nothing to be reproduced bit by bit, torch takes all there are.
    if job.cluster.kind == "inline" and not job.deterministic:
        threads = None
    return StageWork(
        name=name,
        make=partial(make_stage, job, plan, name),
        replicas=stage.replicas,
        num_cpus=stage.num_cpus,
        num_gpus=stage.num_gpus,
        memory=stage.memory,
        resources=stage.resources,
        accelerator_type=stage.accelerator_type,
        threads=threads,
        timeout=stage.timeout,
        calls=(spec := _spec(job, name)).in_flight * spec.kinds,
    )


def status(output: str) -> dict[str, Any]:
    """How far a dataset is, from its folder alone. Raises PlanError if the folder holds none.

    Keys: ``output``, ``name``, ``planned``, ``ok``, ``failed`` (rows), ``shards``, ``shards_done``, ``success``.
    """
    store = storage.at(output)
    found = planning.read(store)
    done = done_shards(store)
    size, rows = found["rows_per_shard"], found["rows"]
    failed = sum(failed_rows(store).values())
    return {
        "output": output,
        "name": found["name"],
        "planned": rows,
        "ok": sum(min(size, rows - shard * size) for shard in done) - failed,
        "failed": failed,
        "shards": found["shards"],
        "shards_done": len(done),
        "success": store.exists("_SUCCESS"),
    }

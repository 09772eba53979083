"""What the driver and a pool must know of a job's stages, and the pool that a job asks for."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from latentmill import values
from latentmill.config import Job
from latentmill.config.schema import StageSettings
from latentmill.driver.loop import Pool
from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.half_done import HalfDone
from latentmill.models import seconds_to_fetch
from latentmill.plan import Plan
from latentmill.plugin import Declaration, WorkerNeeds
from latentmill.progress import Shown
from latentmill.storage import Storage
from latentmill.workers.context import make_stage
from latentmill.workers.hosted import StageWork
from latentmill.workers.left import LeftWorkers
from latentmill.workers.shared_parts import WEIGHTED, SharedParts, part_key
from latentmill.workers.watch import Watch
from latentmill.workers.weights_read import WeightsRead
from latentmill.workers.worker import WorkerSetup

RUNNING_BATCHES = 4
"""Stack keys (shapes, schedulers) of which a worker of a continuous stage holds rows at a time, so that the calls for each are full."""


FEED = 4
"""Batches of one stack key that a worker holds of a continuous stage which finds its batch size: a call has no more rows."""


def stage_spec(job: Job, declared: Declaration) -> StageSpec:
    """What the driver must know of a stage."""
    stage = job.stages[declared.name]
    running = RUNNING_BATCHES if declared.continuous and not job.deterministic else 1
    feed = FEED if running > 1 and stage.batch_size == "auto" else StageSpec.batches_per_worker
    return StageSpec(declared.name, stage.first_batch_size, feed, running_batches=running, retries=stage.retries)


def worker_types(job: Job, plan: Plan) -> tuple[WorkerType, ...]:
    """What the driver must know of the job's workers: which stages they host, how many they are, and what each asks for."""
    setups = [(stages, worker_setup(job, plan, stages)) for stages in hosted(job, job.flow)[0]]
    return tuple(WorkerType(stages, setup.replicas, setup.asks, setup.min_replicas) for stages, setup in setups)


def hosted(job: Job, names: Sequence[str]) -> tuple[list[tuple[int, ...]], str]:
    """The numbers of the stages that share a worker, in the order of the flow, and why, for people. ``names``: of the flow's stages.

    Split, each stage has workers of its own. Fused, one worker hosts all that are between the first and the last: each
    worker has all that a row needs, and none waits for another. ``placement=auto`` fuses what asks for the same device, if
    one device has room for it.
    """
    count = len(names)
    between = list(range(1, count - 1))
    if job.cluster.kind == "inline":
        groups, why = [between], "cluster=inline has one process"
    elif job.placement == "auto":
        groups, why = _shared(job, names, between)
    else:
        groups = [between] if job.placement == "fused" else [[stage] for stage in between]
        why = f"placement={job.placement}"
    return [(0,), *(tuple(group) for group in groups if group), (count - 1,)], why


def replicas_text(job: Job, plan: Plan, stages: Sequence[int]) -> str:
    """How few and how many workers host these stages: ``denoise 2 to 8``, ``read 1 or more``."""
    setup = worker_setup(job, plan, stages)
    name = " + ".join(stage.name for stage in setup.stages)
    if setup.replicas is None:
        return f"{name} 1 or more"
    return (
        f"{name} {setup.replicas}" if setup.fewest == setup.replicas else f"{name} {setup.fewest} to {setup.replicas}"
    )


def _shared(job: Job, names: Sequence[str], between: Sequence[int]) -> tuple[list[list[int]], str]:
    """Which neighbours share a worker if placement is auto, and why."""
    groups: list[list[int]] = []
    reasons = []
    for stage in between:
        if groups:
            settings = [job.stages[names[other]] for other in (*groups[-1], stage)]
            apart = _apart(settings)
            if not apart:
                groups[-1].append(stage)
                continue
            before, name = names[groups[-1][-1]], names[stage]
            reasons.append(f"{name} shares none with {before}: {apart}")
        groups.append([stage])
    return groups, "; ".join(reasons) or "they ask for the same device, and it has room for all of them"


def _apart(stages: Sequence[StageSettings]) -> str:
    """Why stages can't share a worker; "" if they can. ``stages``: what the job says of each."""
    if len({(stage.num_gpus > 0, stage.accelerator_type, *sorted(stage.resources.items())) for stage in stages}) > 1:
        return "it asks for another device"
    if (gpus := sum(stage.num_gpus for stage in stages)) > 1:
        return f"together they ask for {gpus:g} GPUs"
    if len({(stage.replicas, stage.min_replicas) for stage in stages}) > 1:
        return "the job gives it other replicas"
    return ""


def worker_needs(job: Job, names: Sequence[str]) -> WorkerNeeds:
    """What each worker that hosts these stages asks for.

    Of CPUs one asks for the most that one of its stages asks for, since one computes at a time; of memory, on the GPU too, for
    what they all ask for.
    """
    settings = [job.stages[name] for name in names]
    memory = [stage.bytes for stage in settings if stage.bytes is not None]
    gpus = [stage.num_gpus for stage in settings]
    given = [stage.replicas for stage in settings if isinstance(stage.replicas, int)]
    return WorkerNeeds(
        stages=tuple(names),
        replicas=1 if job.cluster.kind == "inline" else max(given, default=None),
        num_cpus=max(stage.num_cpus for stage in settings),
        num_gpus=max(gpus) if max(gpus) > 1 else min(1.0, round(sum(gpus), 6)),
        memory=sum(memory) if memory else None,
        accelerator_type=next((stage.accelerator_type for stage in settings if stage.accelerator_type), None),
        resources={
            name: max(stage.resources.get(name, 0.0) for stage in settings)
            for name in {name for stage in settings for name in stage.resources}
        },
    )


def worker_setup(job: Job, plan: Plan, stages: Sequence[int], run: str = "") -> WorkerSetup:
    """What a pool must know of the workers that host these stages. ``run`` names the run."""
    declared = [plan.stages[stage] for stage in stages]
    needs = worker_needs(job, [stage.name for stage in declared])
    least = [few for stage in declared if (few := job.stages[stage.name].min_replicas) is not None]
    parts, shares = SharedParts(), 0 < needs.num_gpus < 1
    return WorkerSetup(
        stages=tuple(_stage_work(job, plan, stage, shares, run, parts) for stage in declared),
        replicas=needs.replicas,
        min_replicas=None if job.cluster.kind == "inline" or not least else max(least),
        num_cpus=needs.num_cpus,
        num_gpus=needs.num_gpus,
        memory=needs.memory,
        resources=needs.resources,
        accelerator_type=needs.accelerator_type,
        computes=any(stage.position == "between" for stage in declared),
        fetching=seconds_to_fetch(plan.models),
        half_done=HalfDone(job.output, job.single_writer, plan),
    )


def _stage_work(job: Job, plan: Plan, declared: Declaration, shares: bool, run: str, parts: SharedParts) -> StageWork:
    """``shares``: the worker's GPU has others, which need their memory: there no stage looks for a larger batch size."""
    spec, settings = stage_spec(job, declared), job.stages[declared.name]
    # In one process, and nothing to be reproduced bit by bit, torch takes all there are where it computes.
    free = job.cluster.kind == "inline" and not job.deterministic and declared.position == "between"
    gpu, kinds = settings.num_gpus > 0, [kind for kind in WEIGHTED if kind in declared.needs]
    return StageWork(
        declared.name,
        partial(make_stage, job, plan, declared.name, fixed_size=shares, run=run, shared=parts),
        gpu=gpu,
        calls=spec.batches_per_worker * spec.running_batches,
        threads=None if free else settings.threads,
        shared=parts,
        parts=tuple(part_key(job, plan, job.place(kind, declared.name), gpu) for kind in kinds),
        names=tuple(plan.columns.names_in(declared.name, plan.stages).items()),
        timeout=settings.timeout_seconds,
    )


SHARE = 1 / 3
"""Of the object store's memory, what may be between stages: packed rows that wait for their shard want room, too."""


def max_bytes_in_flight(job: Job) -> float:
    """The bytes that may be between stages: what the job says, or else a share of the object store of the cluster, if there is one."""
    if job.max_bytes_in_flight is not None:
        return values.in_bytes(job.max_bytes_in_flight)
    if job.cluster.kind == "inline":
        return math.inf
    import ray

    there = cast(Any, ray).cluster_resources().get("object_store_memory")
    return SHARE * there if there else math.inf


def make_pool(
    job: Job,
    plan: Plan,
    store: Storage,
    watch: Watch,
    setups: Sequence[WorkerSetup] | None = None,
    left: LeftWorkers | None = None,
) -> Pool:
    """The pool that the job's cluster asks for, which tells ``watch`` of its workers. Ray is imported only if it is wanted.

    ``setups``: other workers than the job's. ``left``: workers of the run before, of which it takes over those that it can use.
    """
    run = uuid.uuid4().hex
    setups = setups or [worker_setup(job, plan, stages, run) for stages in hosted(job, job.flow)[0]]
    admit = WeightsRead(plan, store)
    if job.cluster.kind == "inline":
        from latentmill.workers.inline import InlinePool

        return InlinePool(setups, admit, watch, left)
    from latentmill.workers import cluster, ray_pool

    owned = cluster.connect(job.cluster.address if job.cluster.kind == "ray" else None)
    try:
        wait = None if owned else job.cluster.wait_seconds  # of a cluster of our own there will be no more
        return ray_pool.RayPool(setups, owned, partial(_sees, store), admit, watch, wait, left)
    except BaseException:
        if owned:
            cluster.disconnect()
        raise


def metrics(job: Job, run: str) -> list[Callable[[Shown], None]]:
    """Who is to be told every few seconds how a run stands: Ray, if it is wanted, which shows it to Prometheus."""
    if job.cluster.kind == "inline":
        return []
    from latentmill.workers.ray_metrics import RayMetrics

    return [RayMetrics(job.name, run)]


def _sees(store: Storage, name: str) -> bool:
    """Whether what a worker has written is there for this process, too."""
    there = store.exists(name)
    store.delete(name)
    return there

"""What the driver and a pool must know of a job's stages, and the pool that a job asks for."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

from latentmill import plan as planning
from latentmill import values
from latentmill.config import Job
from latentmill.driver.loop import Pool
from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.errors import PlacementError
from latentmill.plan import Plan
from latentmill.plugin import Declaration
from latentmill.storage import Storage
from latentmill.workers.context import make_stage
from latentmill.workers.worker import StageWork, WorkerSetup

RUNNING_BATCHES = 4
"""Stack keys (shapes, schedulers) of which a worker of a continuous stage holds rows at a time, so that the calls for each are full."""


def stage_spec(job: Job, declared: Declaration) -> StageSpec:
    """What the driver must know of a stage."""
    stage = job.stages[declared.name]
    running = RUNNING_BATCHES if declared.continuous and not job.deterministic else 1
    return StageSpec(declared.name, stage.batch_size, running_batches=running, retries=stage.retries)


def worker_types(job: Job, plan: Plan) -> tuple[WorkerType, ...]:
    """Which stages the job's workers host: one each where they are split; where they are fused, one worker hosts all that are
    between the first and the last.
    """
    count = len(plan.stages)
    inline = job.cluster.kind == "inline"
    if inline or job.placement == "fused":
        hosted = [(0,), tuple(range(1, count - 1)), (count - 1,)]
    else:
        hosted = [(stage,) for stage in range(count)]
    return tuple(
        WorkerType(stages, 1 if inline else max(job.stages[plan.stages[stage].name].replicas for stage in stages))
        for stages in hosted
        if stages
    )


def worker_setup(job: Job, plan: Plan, hosts: WorkerType) -> WorkerSetup:
    """What a pool must know of a worker type. It asks for the most that one of its stages asks for, and for the memory of all."""
    declared = [plan.stages[stage] for stage in hosts.stages]
    settings = [job.stages[stage.name] for stage in declared]
    memory = [stage.bytes for stage in settings if stage.bytes is not None]
    return WorkerSetup(
        stages=tuple(_stage_work(job, plan, stage) for stage in declared),
        replicas=hosts.replicas,
        num_cpus=max(stage.num_cpus for stage in settings),
        num_gpus=max(stage.num_gpus for stage in settings),
        memory=sum(memory) if memory else None,
        resources={
            name: max(stage.resources.get(name, 0.0) for stage in settings)
            for name in {name for stage in settings for name in stage.resources}
        },
        accelerator_type=next((stage.accelerator_type for stage in settings if stage.accelerator_type), None),
        computes=any(stage.position == "between" for stage in declared),
    )


def _stage_work(job: Job, plan: Plan, declared: Declaration) -> StageWork:
    spec, settings = stage_spec(job, declared), job.stages[declared.name]
    # In one process, and nothing to be reproduced bit by bit, torch takes all there are where it computes.
    free = job.cluster.kind == "inline" and not job.deterministic and declared.position == "between"
    return StageWork(
        declared.name,
        partial(make_stage, job, plan, declared.name),
        gpu=settings.num_gpus > 0,
        calls=spec.batches_per_worker * spec.running_batches,
        threads=None if free else settings.threads,
        timeout=settings.timeout,
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


def make_pool(job: Job, plan: Plan, store: Storage) -> Pool:
    """The pool that the job's cluster asks for. Ray is imported only if it is wanted."""
    setups = [worker_setup(job, plan, hosts) for hosts in worker_types(job, plan)]
    admit = planning.WeightsRead(plan, store)
    if job.cluster.kind == "inline":
        from latentmill.workers.inline import InlinePool

        return InlinePool(setups, admit)
    from latentmill.workers import cluster, ray_pool

    owned = cluster.connect(job.cluster.address if job.cluster.kind == "ray" else None)
    try:
        return ray_pool.RayPool(setups, owned, partial(_sees, store), admit)
    except PlacementError:
        if owned:
            cluster.disconnect()
        raise


def _sees(store: Storage, name: str) -> bool:
    """Whether what a worker has written is there for this process, too."""
    there = store.exists(name)
    store.delete(name)
    return there

"""What the driver and a pool must know of a job's stages, and the pool that a job asks for."""

from __future__ import annotations

from functools import partial

from latentmill import plan as planning
from latentmill.config import Job
from latentmill.driver.loop import Pool
from latentmill.driver.messages import StageSpec
from latentmill.errors import PlacementError
from latentmill.plan import Plan
from latentmill.plugin import Declaration
from latentmill.storage import Storage
from latentmill.workers.context import make_stage
from latentmill.workers.worker import StageWork

RUNNING_BATCHES = 4
"""Stack keys (shapes, schedulers) of which a worker of a continuous stage holds rows at a time, so that the calls for each are full."""


def stage_spec(job: Job, declared: Declaration) -> StageSpec:
    """What the driver must know of a stage."""
    stage = job.stages[declared.name]
    running = RUNNING_BATCHES if declared.continuous and not job.deterministic else 1
    replicas = 1 if job.cluster.kind == "inline" else stage.replicas
    return StageSpec(declared.name, stage.batch_size, replicas, running_batches=running, retries=stage.retries)


def stage_work(job: Job, plan: Plan, declared: Declaration) -> StageWork:
    """What a pool must know of a stage."""
    name, stage = declared.name, job.stages[declared.name]
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
        memory=stage.bytes,
        resources=stage.resources,
        accelerator_type=stage.accelerator_type,
        threads=threads,
        timeout=stage.timeout,
        calls=(spec := stage_spec(job, declared)).batches_per_worker * spec.running_batches,
    )


def make_pool(job: Job, plan: Plan, store: Storage) -> Pool:
    """The pool that the job's cluster asks for. Ray is imported only if it is wanted."""
    work, admit = [stage_work(job, plan, stage) for stage in plan.stages], planning.WeightsRead(plan, store)
    if job.cluster.kind == "inline":
        from latentmill.workers.inline import InlinePool

        return InlinePool(work, admit)
    from latentmill.workers import cluster, ray_pool

    owned = cluster.connect(job.cluster.address if job.cluster.kind == "ray" else None)
    try:
        return ray_pool.RayPool(work, owned, partial(_sees, store), admit)
    except PlacementError:
        if owned:
            cluster.disconnect()
        raise


def _sees(store: Storage, name: str) -> bool:
    """Whether what a worker has written is there for this process, too."""
    there = store.exists(name)
    store.delete(name)
    return there

"""How near the numbers of workers that a job finds come to the best ones, on Ray, with stages that sleep in place of GPUs.

    python benchmarks/replicas.py

Three profiles of costs, eight places for workers. The best numbers are found by trying all; the same job then runs once with those
given and once with ``replicas: auto``, which begins with one worker each. The rate is that of the second half of the rows.
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial

import pyarrow as pa
import ray
from printed import begin, table

from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.driver.state import DriverState
from latentmill.plugin import Reject, Stage
from latentmill.workers import ray_pool
from latentmill.workers.worker import StageWork, WorkerSetup

BATCH, PLACES = 8, 8
PROFILES = ((0.05, 0.4, 0.1), (0.3, 0.3, 0.3), (0.4, 0.1, 0.02))
"""Seconds that encode, denoise and decode take for a batch."""


class Sleep(Stage):
    """Takes its time."""

    contract = 2

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        time.sleep(self.seconds)
        return batch

    def commit(self, shard: int, packed: list[pa.Table], errors: list[dict[str, object]]) -> bool:
        return True


def rate(profile: tuple[float, ...], numbers: tuple[int | None, ...], batches: int) -> tuple[float, tuple[int, ...]]:
    """Batches a second in the second half, and the numbers of workers at the end."""
    seconds = dict(zip(("read", "encode", "denoise", "decode", "write"), (0.0, *profile, 0.0)))
    counts = (1, *numbers, 1)
    setups = [
        WorkerSetup(
            (StageWork(name, partial(Sleep, seconds[name])),),
            count,
            num_cpus=0.01,
            resources={"place": 1.0} if seconds[name] else {},
        )
        for name, count in zip(seconds, counts)
    ]
    types = tuple(WorkerType((stage,), setup.replicas, setup.asks) for stage, setup in enumerate(setups))
    specs = tuple(StageSpec(name, BATCH) for name in seconds)
    state = DriverState(specs, BATCH * batches, 160, worker_types=types)
    pool = ray_pool.RayPool(setups)
    half: list[tuple[float, int]] = []
    found = tuple(state.targets)

    def show() -> None:
        nonlocal found
        done = state.finished_rows[3]
        if BATCH * batches // 2 <= done <= BATCH * batches * 9 // 10:
            half.append((time.perf_counter(), done))
            found = tuple(state.targets)

    drive(state, pool, show)
    pool.close()
    (began, first), (ended, last) = half[0], half[-1]
    return (last - first) / BATCH / (ended - began), found[1:4]


def best(profile: tuple[float, ...]) -> tuple[int, ...]:
    """The numbers with which the slowest stage is fastest."""
    every = itertools.product(range(1, PLACES - 1), repeat=3)
    return max(
        (numbers for numbers in every if sum(numbers) <= PLACES),
        key=lambda numbers: min(n / seconds for n, seconds in zip(numbers, profile)),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=240)
    batches = parser.parse_args().batches
    begin(__doc__)
    ray.init(num_cpus=2, resources={"place": PLACES}, include_dashboard=False, log_to_driver=False)
    rows = []
    for profile in PROFILES:
        numbers = best(profile)
        given, _ = rate(profile, numbers, batches)
        found, ours = rate(profile, (None, None, None), batches)
        rows.append((profile, numbers, f"{given:.2f}", ours, f"{found:.2f}", f"{found / given:.3f}"))
    table(("seconds a batch", "best numbers", "batches/s", "found", "batches/s", "of the best"), rows)
    ray.shutdown()


if __name__ == "__main__":
    main()

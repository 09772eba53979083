"""How many dispatches a second one driver makes on Ray, what Ray itself takes of that, and how the driver's memory grows.

    python benchmarks/dispatch.py [ROWS]

A dispatch is a call of an actor with two results, and the answer. The stages do nothing: read, three more, write, two workers
each; a batch is 32 row numbers. The bare loop makes the same calls of as many actors, two under way at each, and does nothing
else: no driver that calls through Ray can make more. The CPU is the calling process's own; where there are few cores, workers
share them with it. *In Ray* is what a profile of a tenth of the rows finds in Ray's own code. The memory is what the
driver's process holds.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from printed import begin, table

from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.driver.state import DriverState
from latentmill.plugin import Reject, Stage
from latentmill.workers import cluster, ray_pool
from latentmill.workers.worker import StageWork, WorkerSetup

BATCH, WORKERS = 32, 2
NAMES = ("read", "first", "second", "third", "write")
UNDER_WAY = 2
"""Calls that an actor of the bare loop has."""


class Nothing(Stage):
    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        return batch


class Write(Nothing):
    contract = 2

    def commit(self, shard: int, packed: list[pa.Table], errors: list[dict[str, object]]) -> bool:
        return True


class Echo:
    """An actor of the bare loop."""

    def batch(self, addresses: list[tuple[int, int]], block: pa.Table) -> tuple[dict[str, object], pa.Table]:
        return {"parts": addresses, "seconds": 0.0}, block


class Counting(ray_pool.RayPool):
    """Ray's pool, which counts the answers."""

    dispatches = 0

    def _answered(self, order: Any) -> None:
        self.dispatches += 1
        super()._answered(order)


def ours(rows: int) -> tuple[int, float, float, float, float]:
    """Dispatches, seconds, seconds of CPU, and MiB held after a tenth of the rows and at the end."""
    stages = [StageWork(name, Write if name == "write" else Nothing) for name in NAMES]
    pool = Counting([WorkerSetup((stage,), WORKERS, num_cpus=0.1) for stage in stages])
    types = tuple(WorkerType((stage,), WORKERS) for stage in range(len(NAMES)))
    state = DriverState(tuple(StageSpec(name, BATCH) for name in NAMES), rows, rows_per_shard=1000, worker_types=types)
    held: list[float] = []
    begun: list[tuple[int, float, float]] = []

    def look() -> None:
        if not begun and state.committed_ok:
            begun.append((pool.dispatches, time.perf_counter(), time.process_time()))
        if not held and state.committed_ok >= rows // 10:
            held.append(_memory())

    drive(state, pool, look)
    count, wall, cpu = begun[0]
    found = pool.dispatches - count, time.perf_counter() - wall, time.process_time() - cpu
    held.append(_memory())
    pool.close()
    return *found, held[0], held[-1]


def bare(calls: int) -> tuple[float, float]:
    """So many calls from a loop that does nothing else: seconds, and seconds of CPU."""
    actors = [ray.remote(num_cpus=0.1)(Echo).remote() for _ in range(WORKERS * len(NAMES))]
    block = ray.put(pa.table({"row": list(range(BATCH))}))
    addresses = [(number, 0) for number in range(BATCH)]

    def call(actor: Any) -> tuple[Any, tuple[Any, Any]]:
        outcome, made = actor.batch.options(num_returns=2).remote(addresses, block)
        return outcome, (actor, made)

    ray.get([call(actor)[0] for actor in actors])
    wall, cpu = time.perf_counter(), time.process_time()
    under_way = dict(call(actor) for actor in actors * UNDER_WAY)
    for _ in range(calls):
        ready, _ = ray.wait(list(under_way), num_returns=1)
        actor, _ = under_way.pop(ready[0])
        ray.get(ready[0])
        outcome, rest = call(actor)
        under_way[outcome] = rest
    found = time.perf_counter() - wall, time.process_time() - cpu
    for actor in actors:
        ray.kill(actor)
    return found


def in_ray(rows: int) -> float:
    """The share of a driver's time, less what it waits, that is in Ray's own code."""
    profile = cProfile.Profile()
    profile.runcall(ours, rows)
    times = {where: own for where, (_, _, own, _, _) in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    waits = {"get", "acquire", "sleep"}
    work = {where: own for where, own in times.items() if not any(f"'{name}' of" in where[2] for name in waits)}
    return sum(own for (file, _, name), own in work.items() if "/ray/" in file or "ray." in name) / sum(work.values())


def _memory() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def main() -> None:
    """Print the tables."""
    rows = int(sys.argv[1]) if sys.argv[1:] else 10**6
    begin(__doc__)
    owned = cluster.connect(None)
    count, wall, cpu, tenth, end = ours(rows)
    found = {"latentmill": (wall, cpu), "bare loop": bare(count)}
    share = in_ray(rows // 10)
    if owned:
        cluster.disconnect()
    head = ("", "dispatches", "a second", "of a CPU", "a second of CPU", "of the bare loop's")
    least = found["bare loop"][1]
    lines = [
        (name, f"{count:,}", f"{count / wall:,.0f}", f"{cpu / wall:.0%}", f"{count / cpu:,.0f}", f"{least / cpu:.2f}")
        for name, (wall, cpu) in found.items()
    ]
    table(head, lines)
    print(f"\nIn Ray: {share:.0%} of the driver's time.\n")
    table(("rows committed", "MiB"), [(f"{rows // 10:,}", f"{tenth:.0f}"), (f"{rows:,}", f"{end:.0f}")])


if __name__ == "__main__":
    main()

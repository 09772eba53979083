"""The driver alone: orders a second that it gives to simulated workers, and how busy it keeps the slowest stage.

    python benchmarks/flow.py [WORKERS ...]

There is no Ray, no tensor and no file. The workers answer after a time that is drawn; the time that is measured is the CPU's, and
the simulation's own work is in it.
"""

from __future__ import annotations

import heapq
import random
import sys
import time

from printed import begin, table

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import Event, Finished, StageSpec, Started, StartWorker, StopWorker, WorkerType
from latentmill.driver.state import DriverState

STAGES = {"read": 0.05, "encode": 0.1, "denoise": 1.2, "decode": 0.2, "write": 0.05}
"""Seconds a batch takes in each."""
SHARES = (1 / 32, 1 / 16, 3 / 4, 1 / 8, 1 / 32)
"""Of the workers, for each stage: denoise is the slowest all the same."""
BATCH, DENOISE = 8, 2


def flow(workers: int) -> tuple[float, float]:
    """Orders a second of CPU, and the share of its time for which denoise works."""
    dice = random.Random(1)
    replicas = [max(1, int(workers * share)) for share in SHARES]
    types = tuple(WorkerType((stage,), count) for stage, count in enumerate(replicas))
    specs = tuple(StageSpec(name, BATCH) for name in STAGES)
    state = DriverState(specs, 10**7, rows_per_shard=1000, worker_types=types)
    seconds, events, busy_until = list(STAGES.values()), list[tuple[float, int, Event]](), dict[int, float]()
    now = worked = 0.0
    given, wanted = 0, max(20_000, 40 * workers)
    started = time.process_time()
    while given < wanted:
        for order in decide(state):
            if isinstance(order, StartWorker):
                heapq.heappush(events, (now, len(events), Started(order.worker_type, order.worker)))
                continue
            assert not isinstance(order, StopWorker) and hasattr(order, "rows")
            given += 1
            begins = max(now, busy_until.get(order.worker, 0.0))
            ends = busy_until[order.worker] = begins + seconds[order.stage] * dice.uniform(0.8, 1.2)
            worked += ends - begins if order.stage == DENOISE else 0.0
            tables = () if order.task == "commit" else [("a", tuple(order.rows))]
            heapq.heappush(events, (ends, given, Finished(order.id, tables)))
        now = events[0][0]
        while events and events[0][0] <= now + 0.0005:
            apply(state, heapq.heappop(events)[2])
        state.released.clear()
    return given / (time.process_time() - started), worked / (now * replicas[DENOISE])


def main() -> None:
    """Print the table, for the numbers of workers that are given."""
    begin(__doc__)
    found = []
    for workers in map(int, sys.argv[1:] or (64, 2_000, 10_000)):
        orders, busy = flow(workers)
        found.append((f"{workers:,}", f"{orders:,.0f}", orders, f"{busy:.3f}"))
    head = ("workers", "orders a second of CPU", "of those at the first", "denoise works, of its time (at most 1)")
    table(head, [(workers, shown, f"{orders / found[0][2]:.2f}", busy) for workers, shown, orders, busy in found])


if __name__ == "__main__":
    main()

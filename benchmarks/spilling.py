"""How much lies in Ray's object store where one stage is much slower than the others, and whether anything is spilled to disk.

    python benchmarks/spilling.py

A stage's batches wait in the object store for the next. Rows of 1024 x 1024 pixels are 256 KiB behind denoise (float32 latents) and
3 MiB behind decode (uint8). Stages sleep; the slow one takes ten times as long as the others together. The peak is what the
store says, asked for 50 times a second: Ray takes up to a second to free what nobody needs any more. Packed rows wait for
their shard besides: they are small here. The store has 1 GiB.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch
from printed import begin, table
from ray._private.internal_api import node_stats

from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.driver.state import DriverState
from latentmill.plugin import Reject, Stage, tensors
from latentmill.workers import ray_pool
from latentmill.workers.worker import StageWork, WorkerSetup

STORE, CAP = 1024, 256
"""MiB."""
BATCH = 16


class Make(Stage):
    """Adds a tensor of so many bytes a row, in so many seconds a batch."""

    contract = 2

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        time.sleep(self.seconds)
        rows = batch.select(["row"])
        return tensors.with_tensor(rows, "made", torch.zeros(len(batch), self.size, dtype=torch.uint8))

    def commit(self, shard: int, packed: list[pa.Table], errors: list[dict[str, object]]) -> bool:
        return True


SIZES = {"read": 100, "denoise": 1 << 18, "decode": 3 << 20, "write": 1000}


class Watch(threading.Thread):
    """Asks the object store for what is in it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stop = 0, threading.Event()
        [node] = ray.nodes()
        self.at = node["NodeManagerAddress"], node["NodeManagerPort"]

    def stats(self) -> Any:
        """Of the one node."""
        return node_stats(*self.at, False).store_stats

    def run(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self.stats().object_store_bytes_used)


def peak(slow: str, cap: float, rows: int) -> tuple[int, int, int]:
    """The most bytes in the store, the bytes spilled, and those of one batch of each worker."""
    seconds = {name: 0.05 if name != slow else 0.5 for name in SIZES}
    setups = [
        WorkerSetup((StageWork(name, partial(Make, size, seconds[name])),), num_cpus=0.1)
        for name, size in SIZES.items()
    ]
    specs = tuple(StageSpec(name, BATCH) for name in SIZES)
    types = tuple(WorkerType((stage,)) for stage in range(len(SIZES)))
    state = DriverState(specs, rows, 160, worker_types=types, max_bytes_in_flight=cap)
    pool = ray_pool.RayPool(setups)
    watch = Watch()
    spilled = watch.stats().spilled_bytes_total
    watch.start()
    drive(state, pool, lambda: None)
    watch.stop.set()
    watch.join()
    spilled = watch.stats().spilled_bytes_total - spilled
    pool.close()
    return watch.peak, spilled, BATCH * sum(SIZES.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=640)
    count = parser.parse_args().rows
    begin(__doc__)
    ray.init(object_store_memory=STORE << 20, num_cpus=2, include_dashboard=False, log_to_driver=False)
    found = []
    for slow in ("decode", "write"):
        for cap in (float(CAP << 20), math.inf):
            most, spilled, batches = peak(slow, cap, count)
            shown = [f"{size / 2**20:.0f} MiB" for size in (most, spilled)]
            ratio = "" if math.isinf(cap) else f"{most / (cap + batches):.2f}"
            found.append((slow, "none" if math.isinf(cap) else f"{CAP} MiB", *shown, ratio))
    table(("slow", "max_bytes_in_flight", "peak", "spilled", "peak, of that and one batch a worker"), found)
    ray.shutdown()


if __name__ == "__main__":
    main()

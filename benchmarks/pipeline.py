"""How near the flow on Ray comes to the bound, with stages that sleep in place of GPUs.

    python benchmarks/pipeline.py

1,024 and 3,072 rows in batches of 8: encode 5 ms x 1 worker makes float32 latents 4x64x64; denoise 100 ms x 4 workers
halves them; decode 20 ms x 1 worker makes uint8 pictures 512x512x3. No pipeline can beat 25 ms a batch (denoise's 100 ms
over four workers). The share of the bound is marginal, (bound(3072) - bound(1024)) / (time(3072) - time(1024)), after a
warm-up, so that start and end cancel out.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import pyarrow as pa
import torch

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec, Started, WorkerType
from latentmill.driver.state import DriverState
from latentmill.plugin import Reject, Stage, tensors
from latentmill.workers import ray_pool
from latentmill.workers.cluster import connect
from latentmill.workers.worker import StageWork, WorkerSetup

BATCH = 8


class Read(Stage):
    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        return batch


class Encode(Stage):
    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        time.sleep(0.005)
        return tensors.with_tensor(batch, "latents", torch.ones(len(batch), 4, 64, 64))


class Denoise(Stage):
    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        time.sleep(0.1)
        return tensors.with_tensor(batch, "latents", tensors.from_arrow(batch, "latents") / 2)


class Decode(Stage):
    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        time.sleep(0.02)
        pictures = torch.zeros(len(batch), 512, 512, 3, dtype=torch.uint8)
        return tensors.with_tensor(batch.drop_columns(["latents"]), "image", pictures)


class Write(Stage):
    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        return batch.select(["row"])

    def commit(self, shard: int, packed: list[pa.Table], errors: list[dict[str, object]]) -> bool:
        return True


STAGES = [("read", Read, 1), ("encode", Encode, 1), ("denoise", Denoise, 4), ("decode", Decode, 1), ("write", Write, 1)]


def main() -> None:
    """Print the share of the bound and the driver's CPU share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    connect(None)
    workers = ray_pool.RayPool(
        [WorkerSetup((StageWork(name, make),), count, num_cpus=0.1) for name, make, count in STAGES]
    )
    specs = tuple(StageSpec(name, BATCH) for name, _, _ in STAGES)
    types = tuple(WorkerType((stage,), count) for stage, (_, _, count) in enumerate(STAGES))

    def run(rows: int) -> tuple[float, float]:
        state = DriverState(specs, rows, rows_per_shard=256, worker_types=types)
        if workers.actors:  # these workers are there from the run before
            decide(state)
            for stage, worker in list(state.starting):
                apply(state, Started(stage, worker))
        wall, cpu = time.perf_counter(), time.process_time()
        drive(state, workers, lambda: None)
        return time.perf_counter() - wall, time.process_time() - cpu

    run(256)
    print(
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}; bound 25 ms a batch of {BATCH}"
    )
    shares = []
    for _ in range(repeats):
        (short, _), (long, cpu) = run(1024), run(3072)
        shares.append((3072 - 1024) / BATCH * 0.025 / (long - short))
        print(
            f"1024 rows {short:.2f} s, 3072 rows {long:.2f} s: {shares[-1]:.3f} of the bound; driver {cpu / long:.1%} of a CPU"
        )
    print(f"median share of the bound: {sorted(shares)[len(shares) // 2]:.3f}")
    workers.close()


if __name__ == "__main__":
    main()

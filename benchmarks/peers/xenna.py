"""The pipeline of benchmarks/pipeline.py by cosmos-xenna, in a virtual environment of its own that has it.

    python benchmarks/peers/xenna.py 1024 3072

prints, as JSON, the seconds of each number of rows, with the actors' start in them, and the driver's share of a CPU in the last. In good faith: an
item is a batch of 8 rows as arrays, so that there is nothing to stack; workers are fixed at what the bound assumes; three slots an
actor; queues a half deeper than the default; no autoscaling meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import numpy as np
from cosmos_xenna.pipelines import v1 as xenna

BATCH = 8
SLOTS, DEEPER = 3, 1.5


class Sleeping(xenna.Stage):  # type: ignore[misc]
    """One that computes by sleeping."""

    seconds = 0.0

    @property
    def required_resources(self) -> Any:
        return xenna.Resources(cpus=0.1)

    def process_data(self, in_data: list[Any]) -> list[Any]:
        time.sleep(self.seconds)
        return [self.made(each) for each in in_data]

    def made(self, batch: Any) -> Any:
        raise NotImplementedError


class Encode(Sleeping):
    seconds = 0.005

    def made(self, batch: Any) -> Any:
        return np.ones((len(batch), 4, 64, 64), np.float32)


class Denoise(Sleeping):
    seconds = 0.1

    def made(self, batch: Any) -> Any:
        return batch / 2


class Decode(Sleeping):
    seconds = 0.02

    def made(self, batch: Any) -> Any:
        return np.zeros((len(batch), 512, 512, 3), np.uint8)


class Write(Sleeping):
    def made(self, batch: Any) -> Any:
        return len(batch)


def run(rows: int) -> tuple[float, float]:
    """Seconds, and seconds of this process's CPU."""
    items = [np.arange(start, min(start + BATCH, rows)) for start in range(0, rows, BATCH)]
    stages = [(Encode, 1), (Denoise, 4), (Decode, 1), (Write, 1)]
    streaming = xenna.StreamingSpecificSpec(autoscale_interval_s=3600.0, max_queued_multiplier=DEEPER)
    spec = xenna.PipelineSpec(
        input_data=items,
        stages=[xenna.StageSpec(cls(), num_workers=count, slots_per_actor=SLOTS) for cls, count in stages],
        config=xenna.PipelineConfig(
            execution_mode=xenna.ExecutionMode.STREAMING, mode_specific=streaming, return_last_stage_outputs=False
        ),
    )
    wall, cpu = time.perf_counter(), time.process_time()
    xenna.run_pipeline(spec)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the line."""
    found = []
    with contextlib.redirect_stdout(sys.stderr):
        run(8 * BATCH)  # with it Ray starts
        for rows in map(int, sys.argv[1:]):
            found.append(run(rows))
    print(json.dumps({"seconds": [wall for wall, _ in found], "cpu": found[-1][1] / found[-1][0]}))


if __name__ == "__main__":
    main()

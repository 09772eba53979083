"""How near the flow on Ray comes to the bound, with stages that sleep in place of GPUs, and how near others come.

    python benchmarks/pipeline.py [--xenna PYTHON]

1,024 and 3,072 rows in batches of 8: encode 5 ms x 1 worker makes float32 latents 4x64x64; denoise 100 ms x 4 workers
halves them; decode 20 ms x 1 worker makes uint8 pictures 512x512x3. No pipeline can beat 25 ms a batch (denoise's 100 ms
over four workers). The share of the bound is marginal, (bound(3072) - bound(1024)) / (time(3072) - time(1024)), after a
warm-up, so that start and end cancel out.

Ray Data does the same work in the same run: blocks of 8 rows, actors of a fixed number for each stage, four tasks in flight an
actor, order not kept, a Ray that is told of 16 CPUs. Its actors start with each run, and not in equal times: so the two times
are of one run, until 1,024 rows have come out and until 3,072 have. cosmos-xenna (``benchmarks/peers/xenna.py``) needs a virtual environment of its own, with it, numpy and tqdm, whose
Python ``--xenna`` names; its settings stand in that file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch
from printed import begin, median, table

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec, Started, WorkerType
from latentmill.driver.state import DriverState
from latentmill.plugin import Reject, Stage, tensors
from latentmill.workers import cluster, ray_pool
from latentmill.workers.worker import StageWork, WorkerSetup

BATCH = 8
CPUS = 16
"""That Ray is told of where Ray Data runs: nobody computes, and no task is to wait for one."""


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
    """Print each one's share of the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=1, help="they take three to five times as long")
    parser.add_argument("--rows", type=int, nargs=2, default=(1024, 3072))
    parser.add_argument("--xenna", metavar="PYTHON", help="of a virtual environment that has cosmos-xenna")
    options = parser.parse_args()
    begin(__doc__)
    rows: tuple[int, int] = tuple(options.rows)
    owned = cluster.connect(None)
    ours = Ours()
    found = {"latentmill": [ours(rows) for _ in range(options.repeats)]}
    ours.workers.close()  # what they take of the cluster, others need
    if owned:
        cluster.disconnect()
    with contextlib.redirect_stdout(sys.stderr):  # Ray has advice
        found["Ray Data"] = with_ray_data(rows, options.peer_repeats)
    absent = "it needs a virtual environment of its own, and none was named"
    if options.xenna:
        try:
            found["cosmos-xenna"] = [with_xenna(options.xenna, rows) for _ in range(options.peer_repeats)]
        except subprocess.CalledProcessError as error:
            absent = f"it failed: {error.stderr.strip().splitlines()[-1]}"
    shares = {name: median(share(rows, *walls) for *walls, _ in runs) for name, runs in found.items()}
    head = (
        "",
        f"{rows[0]:,} rows, s",
        f"{rows[1]:,} rows, s",
        "of the bound",
        "driver, of a CPU",
        "latentmill is faster by",
    )
    lines = []
    for name, runs in found.items():
        walls = [f"{median(run[at] for run in runs):.2f}" for at in (0, 1)]
        cpu, faster = median(run[2] for run in runs), shares["latentmill"] / shares[name]
        lines.append((name, *walls, f"{shares[name]:.3f}", f"{cpu:.0%}", f"{faster:.2f}"))
    table(head, lines)
    if "cosmos-xenna" not in found:
        print(f"\ncosmos-xenna is left out: {absent}.")


def share(rows: tuple[int, int], short: float, long: float) -> float:
    """Marginal, of the bound."""
    return (rows[1] - rows[0]) / BATCH * 0.025 / (long - short)


class Ours:
    """The driver and a pool on Ray, whose workers stay from one run to the next."""

    def __init__(self) -> None:
        setups = [WorkerSetup((StageWork(name, make),), count, num_cpus=0.1) for name, make, count in STAGES]
        self.workers = ray_pool.RayPool(setups)

    def __call__(self, rows: tuple[int, int]) -> tuple[float, float, float]:
        """Seconds of each, and the driver's share of a CPU in the second."""
        if not self.workers.actors:
            self._run(256)
        (short, _), (long, cpu) = map(self._run, rows)
        return short, long, cpu / long

    def _run(self, rows: int) -> tuple[float, float]:
        specs = tuple(StageSpec(name, BATCH) for name, _, _ in STAGES)
        types = tuple(WorkerType((stage,), count) for stage, (_, _, count) in enumerate(STAGES))
        state = DriverState(specs, rows, rows_per_shard=256, worker_types=types)
        if self.workers.actors:  # these workers are there from the run before
            decide(state)
            for stage, worker in list(state.starting):
                apply(state, Started(stage, worker))
        wall, cpu = time.perf_counter(), time.process_time()
        drive(state, self.workers, lambda: None)
        return time.perf_counter() - wall, time.process_time() - cpu


def with_ray_data(rows: tuple[int, int], repeats: int) -> list[tuple[float, float, float]]:
    """The same by Ray Data."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    ray.init(num_cpus=CPUS, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    context = DataContext.get_current()
    context.enable_progress_bars = context.execution_options.preserve_order = False
    made = {
        "encode": lambda batch: np.ones((len(batch["id"]), 4, 64, 64), np.float32),
        "denoise": lambda batch: batch["x"] / 2,
        "decode": lambda batch: np.zeros((len(batch["x"]), 512, 512, 3), np.uint8),
        "write": lambda batch: np.array([len(batch["x"])]),
    }

    def sleeping(seconds: float, name: str) -> type:
        class Sleeping:
            def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                time.sleep(seconds)
                return {"x": made[name](batch)}

        return Sleeping

    def run(count: int, few: int) -> tuple[float, float, float]:
        """Seconds until a few rows have come out and until all have, and the driver's share of a CPU in between."""
        data = ray.data.range(count, override_num_blocks=count // BATCH)
        for name, seconds, workers in (
            ("encode", 0.005, 1),
            ("denoise", 0.1, 4),
            ("decode", 0.02, 1),
            ("write", 0.0, 1),
        ):
            actors = ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=4)
            data = data.map_batches(sleeping(seconds, name), batch_size=BATCH, compute=actors, num_cpus=0.1)
        seen, started, at_few = 0, time.perf_counter(), (0.0, 0.0)
        for batch in data.iter_batches(batch_size=None):
            if seen < few:
                at_few = time.perf_counter(), time.process_time()
            seen += int(batch["x"].sum())
        assert seen == count
        ended = time.perf_counter()
        return at_few[0] - started, ended - started, (time.process_time() - at_few[1]) / (ended - at_few[0])

    run(8 * BATCH, BATCH)
    found = [run(rows[1], rows[0]) for _ in range(repeats)]
    ray.shutdown()
    return found


def with_xenna(python: str, rows: tuple[int, int]) -> tuple[float, float, float]:
    """The same by cosmos-xenna, in a session of its own: some of its Ray's processes stay, and would take a fifth of a core from what follows."""
    command = [python, str(Path(__file__).parent / "peers" / "xenna.py"), *map(str, rows)]
    peer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    said, wrong = peer.communicate()
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == peer.pid:
                process.kill()
    if peer.returncode:
        raise subprocess.CalledProcessError(peer.returncode, command, said, wrong)
    told = json.loads(said.splitlines()[-1])
    return *told["seconds"], told["cpu"]


if __name__ == "__main__":
    main()

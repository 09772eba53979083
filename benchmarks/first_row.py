"""How long the first row takes after the command, on a Ray that the job starts itself, beside Ray alone.

    python benchmarks/first_row.py [--repeats N]

Ours is ``latentmill run txt2img`` with the shapes model and one step, each row a shard, until the first file of ``data/`` has its name: rows are
planned, read, encoded, denoised, decoded, written and read back. No job can be quicker than Ray alone: a script that starts Ray as the job
does, and an actor that imports torch and answers. Both start in turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from printed import begin, median, table

BARE = """
import ray

ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")

@ray.remote
class Worker:
    def ready(self):
        import torch
        return torch.__version__

ray.get(Worker.remote().ready.remote())
print("ready", flush=True)
"""


def bare() -> float:
    """Seconds until the actor has answered."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return time.perf_counter() - started


def ours() -> float:
    """Seconds until the first row is there for others."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red circle\na blue square\n")
        words = [f"source.path={prompts}", "samples_per_row=1", "sampling.steps=1", "rows_per_shard=1"]
        command = ["-c", "from latentmill.cli import main; main()", "run", "txt2img", *words, f"output={folder}/out"]
        started = time.perf_counter()
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as job:
            while not [*Path(folder, "out", "data").glob("*.parquet")]:
                assert job.poll() is None, "the job ended without a row"
                time.sleep(0.01)
            seconds = time.perf_counter() - started
        return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    begin(__doc__)
    found = [(ours(), bare()) for _ in range(options.repeats)]
    row = [median(each) for each in (*zip(*found), (mine / bound for mine, bound in found))]
    table(("first row, s", "Ray alone, s", "times Ray alone"), [[f"{value:.2f}" for value in row]])


if __name__ == "__main__":
    main()

"""What it costs to plan a hundred million rows: seconds, and megabytes above what the process had before.

    python benchmarks/planning.py [ROWS]

A Parquet file and a text file of so many prompts, and the same Parquet file with its ids checked, each planned in a process
of its own up to the first order: ``plan``, ``begin``, ``decide``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import printed
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill import parts, storage
from latentmill import plan as planning
from latentmill.config import load_job
from latentmill.dataset import Dataset
from latentmill.driver.decide import decide
from latentmill.runner import begin

GROUP = 1_000_000


def make(folder: str, rows: int) -> None:
    schema = pa.schema([("prompt", pa.string()), ("number", pa.int64())])
    prompts = pa.DictionaryArray.from_arrays(np.zeros(GROUP, np.int32), ["a red star"]).cast(pa.string())
    with pq.ParquetWriter(f"{folder}/p.parquet", schema) as writer, open(f"{folder}/p.txt", "wb") as lines:
        for start in range(0, rows, GROUP):
            size = min(GROUP, rows - start)
            writer.write_table(pa.table([prompts[:size], np.arange(start, start + size)], schema=schema))
            lines.write(b"a red star\n" * size)


def measure(folder: str, settings: list[str]) -> None:
    output = f"output={folder}/out"
    job = load_job("txt2img", ["samples_per_row=1", "rows_per_shard=10000", "cluster=inline", output, *settings])
    built = parts.parts(job)
    Path("/proc/self/clear_refs").write_text("5")  # the highest that memory stood is what it stands at now
    before, started = _memory("VmRSS"), time.monotonic()
    plan = planning.plan(job, built)
    state = begin(job, Dataset(storage.at(job.output), plan, built.sink))
    decide(state)
    seconds = time.monotonic() - started
    print(plan.rows, seconds, _memory("VmHWM") - before)


def _memory(key: str) -> float:
    """Megabytes, as Linux counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[3:])
        return
    rows = int(sys.argv[1]) if sys.argv[1:] else 10**8
    printed.begin(__doc__)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make(folder, rows)
        for name, *ids in (("p.parquet",), ("p.txt",), ("p.parquet", "source.id_column=number")):
            command = [sys.executable, __file__, "measure", folder, f"source.path={folder}/{name}", *ids]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            count, seconds, megabytes = map(float, done.stdout.split()[-3:])
            found.append(
                (
                    " ".join([name, *ids]),
                    f"{count:,.0f}",
                    f"{seconds:.1f}",
                    f"{megabytes:.0f}",
                    f"{megabytes * 2**20 / count:.1f}",
                )
            )
    printed.table(("source", "rows", "s", "MB", "bytes a row"), found)


if __name__ == "__main__":
    main()

"""How near ``latentmill plan --probe`` comes to what the job then takes.

    python benchmarks/probe.py

Three jobs: pictures from prompts and latents from pictures in one process, and stages that sleep, of which one has three workers, on a Ray of their own.
Each is probed, run, and probed again. Seconds from when all workers are ready to the last commit. Where a row takes a millisecond, more are probed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from printed import begin, table

from latentmill import parts, plan, runner
from latentmill.config import Job, load_job
from latentmill.driver.messages import Event
from latentmill.probe import Probed, Stopwatch, probe
from latentmill.workers.pools import make_pool

SLEEPS = '''
import time
from latentmill.plugin import Stage

class Sleeps(Stage):
    """Takes its time for each row; a little more for some."""

    contract = 2

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, batch, reject):
        time.sleep(sum(self.seconds * (0.5 + row % 3 / 2) for row in batch["row"].to_pylist()))
        return batch
'''
FAST, MANY = 16, ("encode, inline",)
"""Of these so many times the rows are probed, and run."""
POINTS = "[latentmill.stages]\nsleeps = acme_sleeps:Sleeps\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64, help="that are probed")
    parser.add_argument("--times", type=int, default=8, help="as many are run")
    parser.add_argument("--only", default="", help="jobs with this in their names")
    options = parser.parse_args()
    found: list[list[object]] = []
    begin(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for name, words in jobs(Path(folder), options.times * options.rows):
            if options.only in name:
                found += compared(name, words, FAST * options.rows if name in MANY else options.rows)
    table(["job", "rows", "probed", "probe", "9 in 10", "run", "off"], found)


def jobs(folder: Path, rows: int) -> list[tuple[str, list[str]]]:
    """Each with its words."""
    (folder / "acme-1.0.dist-info").mkdir()
    (folder / "acme-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (folder / "acme-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    (folder / "acme_sleeps.py").write_text(SLEEPS)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    (folder / "prompts.txt").write_text(
        "a red circle\na blue square above a green circle\na yellow square\n" * (rows // 3)
    )
    few = "rows_per_shard=64"
    first = "{name: sleeps, as: first, seconds: 0.02}"
    second = "{name: sleeps, as: second, seconds: 0.1}"
    slow = [
        f"flow=[read,encode,{first},{second},write]",
        "placement=split",
        "stages.second.replicas=3",
        "vae.name=patches",
        "vae.side=1",
    ]
    slow += [f"stages.{stage}.num_cpus=0.1" for stage in ("read", "encode", "first", "second", "write")]
    slow += [f"stages.{stage}.replicas=1" for stage in ("read", "encode", "first", "write")]
    prompts, pictures = f"source.path={folder / 'prompts.txt'}", f"source.path={draw(folder / 'few', rows)}"
    many = f"source.path={draw(folder / 'many', FAST * rows)}"
    return [
        ("txt2img, inline", ["txt2img", prompts, "samples_per_row=1", few, "cluster=inline", f"output={folder / 'a'}"]),
        ("encode, inline", ["encode", many, "rows_per_shard=512", "cluster=inline", f"output={folder / 'b'}"]),
        ("sleeps, Ray", ["encode", pictures, few, "cluster=local", f"output={folder / 'c'}", *slow]),
    ]


def draw(folder: Path, count: int) -> Path:
    """So many pictures."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number:05d}.png")
    return folder


class RunWatch(Stopwatch):
    """A pool, and when the last of its work was done: what a run does afterwards, its report and Ray's end, isn't probed."""

    ended = 0.0

    def collect(self, timeout: float) -> list[Event]:
        events = super().collect(timeout)
        if events:
            self.ended = time.monotonic()
        return events


def compared(name: str, words: list[str], rows: int) -> list[list[object]]:
    """Of each probe a line of the table."""
    job = load_job(words[0], words[1:])
    before = probed(job, rows)
    pools: list[RunWatch] = []

    def watched(*given: Any, **more: Any) -> RunWatch:
        pools.append(RunWatch(make_pool(*given, **more)))
        pools[-1].begin_round(len(job.flow))
        return pools[-1]

    runner.make_pool = watched  # type: ignore[assignment]
    try:
        planned = runner.run(job).planned
    finally:
        runner.make_pool = make_pool
    real = pools[0].ended - max(pools[0].started)
    shutil.rmtree(job.output)
    lines = []
    for found in (before, probed(job, rows)):
        of = found.estimate.seconds
        within = f"{of.low:.1f} to {of.high:.1f}"
        lines.append(
            [name, planned, found.rows, f"{of.value:.1f}", within, f"{real:.1f}", f"{of.value / real - 1:+.0%}"]
        )
    return lines


def probed(job: Job, rows: int) -> Probed:
    built = parts.parts(job)
    return probe(job, plan.plan(job, built), built.sink, rows, done=0)


if __name__ == "__main__":
    main()

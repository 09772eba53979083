"""A folder on a Slurm cluster from which jobs are submitted as people do, and a model that counts what it computes, slowly if wanted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cluster.slurm import until
from tests.outside.drain_parts import CODE, POINTS

ROWS, STEPS = 48, 10
SLOWLY = (
    "    def predict(self, x, t, conditioning):\n        __import__('time').sleep(float(os.environ.get('PACE', '0')))\n"
)


class Site:
    """``latentmill`` in a process of its own, in a folder of its own."""

    def __init__(self, slurm, folder, pace=0.0):
        """``pace``: the least seconds that an evaluation of the counting model takes."""
        self.slurm, self.folder, self.notes = slurm, folder, folder / "notes"
        self.notes.mkdir()
        about = folder / "site" / "acme-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(POINTS)
        code = CODE.replace("    def predict(self, x, t, conditioning):\n", SLOWLY)
        (folder / "site" / "acme_counts.py").write_text(code)
        (folder / "prompts.txt").write_text("".join(f"prompt {row}\n" for row in range(ROWS)))
        self.environment = {
            **os.environ, "SLURM_CONF": str(slurm.conf), "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(folder / "site"), "PACE": str(pace),
        }  # fmt: skip
        self.counted = (
            "deterministic=true", "vae.name=patches", "vae.side=1", "text_encoder.name=letters", "denoiser.name=counts",
            "text_encoder.notes=notes", "denoiser.notes=notes", "source.path=prompts.txt",
            "samples_per_row=1", "rows_per_shard=8", f"sampling.steps={STEPS}", "sampling.guidance_scale=1",
            "sampling.width=4", "sampling.height=4", "scheduler=dpmpp_2m",
            *(f"stages.{stage}.batch_size=4" for stage in ("read", "encode", "denoise", "decode", "write")),
        )  # fmt: skip
        """Settings of a job with that model."""

    def __call__(self, *words, code=0):
        command = [sys.executable, "-P", "-m", "latentmill.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.folder)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def submit(self, output, *words, first=""):
        """Returns its id and Slurm's number. ``first``: a folder that comes before all others on the path there."""
        paths = dict.fromkeys([str(first or "."), str(Path(sys.executable).parent), *os.environ["PATH"].split(":")])
        setup = f"target.setup=export PATH={':'.join(paths)}"
        said = self("submit", "txt2img", "--to", "slurm", f"output={output}", setup, *words)
        return re.match(r"(\S+) is submitted to slurm \((\d+)\)", said).groups()

    def jobs(self):
        return {job["id"]: job for job in json.loads(self("jobs", "--json"))}

    def ended(self, name, seconds=300):
        until(lambda: self.jobs()[name]["state"] == "ended", f"{name}: {self.jobs()[name]}", seconds)
        return self.jobs()[name]

    def shards(self, output):
        return {path.name: path.read_bytes() for path in sorted((self.folder / output / "data").glob("*.parquet"))}

    def evaluated(self):
        """Rows that the counting model has evaluated, in all lives of all jobs of this folder."""
        file = self.notes / "evaluated"
        return file.stat().st_size if file.exists() else 0

    def at_once(self, number):
        """A job that was put back into the queue waits two minutes otherwise."""
        until(lambda: "JobState=PENDING" in self.slurm("scontrol", "show", "job", number), "in the queue again", 120)
        self.slurm("scontrol", "update", f"JobId={number}", "StartTime=now")

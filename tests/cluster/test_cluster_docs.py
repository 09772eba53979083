"""docs/cluster.md typed word for word, on a real Ray, and on a real Slurm whose nodes claim GPUs. By hand: ``CLUSTER=docs python -m pytest tests/cluster``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster.slurm import SlurmCluster, free_ports, missing, until

from latentmill import storage

DOC = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
NOT_RUN = "(Not run"
UNTYPED = {"The image", "Many drivers on one output"}
"""Sections with commands that no test runs, and that say so."""
JOB = """\
defaults: [job, model: shapes, scheduler: dpmpp_2m, source: prompts, sink: parquet, cluster: local, _self_]
output: s3://bucket/my-job
source: {path: "prompts.txt"}
samples_per_row: 4
rows_per_shard: 8
sampling: {steps: 4, width: 32, height: 32}
"""
ROWS = 64

by_hand = pytest.mark.skipif(
    "docs" not in os.environ.get("CLUSTER", ""), reason="takes minutes: by hand, with CLUSTER=docs"
)


def sections():
    """The commands of each section, by its heading: what stands indented by four. Those in fences are run as the docs are made."""
    found = {}
    for text in DOC.split("\n## ")[1:]:
        plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        commands = re.findall(r"^ {4}((?:latentmill|docker) .*?)(?: +#.*)?$", plain, re.MULTILINE)
        if commands:
            found[text.partition("\n")[0]] = commands
    return found


SECTIONS = sections()


class Shell:
    """Types a command in a folder that holds ``my-job.yaml``. What stands for people's own is put in by ``words``."""

    def __init__(self, folder, words):
        self.folder, self.words = folder, {"/shared/out": str(folder / "shared"), **words}
        (folder / "prompts.txt").write_text("a red circle\n" * (ROWS // 4))
        (folder / "my-job.yaml").write_text(JOB.replace("prompts.txt", str(folder / "prompts.txt")))
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}

    def __call__(self, command):
        typed = self.begin(command)
        out, err = typed.communicate(timeout=600)
        assert typed.returncode == 0, out + err
        return out

    def begin(self, command):
        for word, ours in self.words.items():
            command = command.replace(word, ours)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", "-c", command], cwd=self.folder, env=self.environment, **pipes)

    def ended(self):
        """What was submitted has ended, well."""

        def job():
            [job] = json.loads(self("latentmill jobs --json"))
            return job

        until(lambda: job()["state"] == "ended", "what was submitted", 300)
        assert job()["exit_code"] == 0 and job()["dataset"]["success"], self("latentmill logs my-job")


def test_each_command_is_typed_here_or_said_not_to_be_run():
    typed = {
        "Before it starts",
        "A Ray cluster that is running",
        "Waiting for places, growing and shrinking",
        "Watching a job",
        "Slurm",
    }
    assert SECTIONS.keys() == typed | UNTYPED
    for heading in SECTIONS:
        text = DOC.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert (NOT_RUN in text) == (heading in UNTYPED), heading


@pytest.fixture(autouse=True)
def activated(monkeypatch):
    """The virtual environment, as people have it; Ray and Slurm hand it on."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def ray(activated, tmp_path, monkeypatch):
    """A Ray of one node with a job server, the only one that ``auto`` finds. Returns the job server's address."""
    port, dashboard, agent = free_ports(3)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=9", *ports]
    out = (tmp_path / "ray.log").open("w")
    running = subprocess.Popen([*ray, "--temp-dir=/tmp/raydocs"], stdout=out, stderr=out)
    try:
        until(lambda: "will now block" in (tmp_path / "ray.log").read_text(), "Ray")
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        running.terminate()
        running.wait(60)


@by_hand
def test_on_a_ray_cluster(ray, bucket, tmp_path):
    shell = Shell(tmp_path, {"http://HEAD:8265": ray})
    doctor, plan = SECTIONS["Before it starts"]
    assert "WRONG" not in (said := shell(doctor)) and "  ok   nodes " in said
    assert " rows/s" in shell(plan)

    run, submit = SECTIONS["A Ray cluster that is running"]
    shell(run)
    assert f"{ROWS} of {ROWS} rows" in shell("latentmill status s3://bucket/my-job")
    shell(submit)
    shell.ended()

    [waits], [top, dashboard] = SECTIONS["Waiting for places, growing and shrinking"], SECTIONS["Watching a job"]
    (tmp_path / "my-job.yaml").write_text(
        (tmp_path / "my-job.yaml").read_text().replace("samples_per_row: 4", "samples_per_row: 40")
    )
    storage.at("s3://bucket").clear()
    running = shell.begin(waits)
    until(lambda: '"drivers": [{' in shell(f"{top} --json || true"), "a driver", 120)
    assert "denoise" in shell(top)
    _, err = running.communicate(timeout=600)
    assert running.returncode == 0, err
    shell(dashboard)
    assert json.loads((tmp_path / "latentmill.json").read_text())["panels"]


@by_hand
@pytest.mark.skipif(bool(missing()), reason=f"no Slurm here: {missing()}")
def test_on_slurm(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    submit, jobs, logs, cancel = SECTIONS["Slurm"]
    with SlurmCluster(tmp_path / "slurm", nodes=4, cpus=64, gpus=8) as slurm:
        monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
        shell = Shell(tmp_path, {})
        assert "is submitted to slurm" in shell(submit)
        assert "my-job-" in shell(jobs)
        assert f"{ROWS} of {ROWS} rows" in shell(logs)
        shell.ended()
        shell(cancel)

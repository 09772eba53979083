"""Jobs on a real Slurm, submitted as people do. By hand: ``CLUSTER=slurm python -m pytest tests/cluster``, as root, with Debian's slurmctld, slurmd and munge."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster.slurm import SlurmCluster, missing, until

pytestmark = [
    pytest.mark.skipif(
        "slurm" not in os.environ.get("CLUSTER", ""), reason="takes minutes: by hand, with CLUSTER=slurm"
    ),
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm here: {missing()}"),
]
JOB = ("samples_per_row=3", "sampling.steps=8", "deterministic=true", "rows_per_shard=8")
INLINE = (*JOB, "cluster=inline")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Site:
    """``latentmill`` in a process of its own, in a folder of its own."""

    def __init__(self, slurm, folder):
        self.slurm, self.folder = slurm, folder
        self.environment = {
            **os.environ, "SLURM_CONF": str(slurm.conf), "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"
        }  # fmt: skip

    def __call__(self, *words, code=0):
        command = [sys.executable, "-P", "-m", "latentmill.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.folder)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def submit(self, output, *words):
        paths = dict.fromkeys([str(Path(sys.executable).parent), *os.environ["PATH"].split(":")])
        said = self(
            "submit",
            "txt2img",
            "--to",
            "slurm",
            f"output={output}",
            f"target.setup=export PATH={':'.join(paths)}",
            *words,
        )
        return re.match(r"(\S+) is submitted to slurm \((\d+)\)", said).groups()

    def jobs(self):
        return {job["id"]: job for job in json.loads(self("jobs", "--json"))}

    def ended(self, name, seconds=300):
        until(lambda: self.jobs()[name]["state"] == "ended", f"{name}: {self.jobs()[name]}", seconds)
        return self.jobs()[name]

    def shards(self, output):
        return {path.name: path.read_bytes() for path in sorted((self.folder / output / "data").glob("*.parquet"))}

    def at_once(self, number):
        """A job that was put back into the queue waits two minutes otherwise."""
        until(lambda: "JobState=PENDING" in self.slurm("scontrol", "show", "job", number), "in the queue again", 120)
        self.slurm("scontrol", "update", f"JobId={number}", "StartTime=now")


@pytest.fixture
def site(slurm, tmp_path):
    return Site(slurm, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    site = Site(slurm, tmp_path_factory.mktemp("undisturbed"))
    site("run", "txt2img", *INLINE, "output=out")
    return site.shards("out")


def test_what_is_submitted_comes_to_the_same_bytes(site, undisturbed):
    name, number = site.submit("out", *INLINE)
    job = site.ended(name)
    assert (job["exit_code"], job["dataset"]["success"], job["handle"]) == (0, True, number)
    assert site.shards("out") == undisturbed
    assert "120 of 120 rows" in site("logs", name, "--follow")


def test_three_drivers_share_one_output(site, undisturbed):
    name, _ = site.submit("out", *INLINE, "target.drivers=3")
    assert site.ended(name)["exit_code"] == 0
    assert site.shards("out") == undisturbed
    assert len(list(site.folder.glob("state/latentmill/jobs/*/exit_code-*"))) == 3


def test_what_is_put_back_into_the_queue_goes_on(site, slurm, undisturbed):
    name, number = site.submit("out", *INLINE)
    until(lambda: len(site.shards("out")) >= 3, "three shards", 120)
    slurm("scontrol", "requeue", number)
    before = site.shards("out")
    site.at_once(number)
    job = site.ended(name)
    assert (job["exit_code"], job["detail"]) == (0, "started again 1 times")
    assert len(before) < 15 and site.shards("out") == undisturbed


def test_at_the_end_of_its_time_it_drains_and_goes_on_by_itself(site, undisturbed):
    name, number = site.submit(
        "out", *JOB, "cluster=inline", "target.time=00:02:00", "target.grace=60", "sampling.steps=20"
    )
    until(lambda: "in the queue again" in site("logs", name), "drained", 150)
    site.at_once(number)
    for _ in range(4):
        until(lambda: site.jobs()[name]["state"] in ("ended", "queued"), "drained again, or done", 150)
        if site.jobs()[name]["state"] == "ended":
            break
        site.at_once(number)
    assert site.ended(name)["exit_code"] == 0
    assert site.shards("out") == undisturbed


def test_cancelled_it_ends_and_is_not_started_again(site):
    name, _ = site.submit("out", *INLINE, "samples_per_row=100")
    until(lambda: site.jobs()[name]["dataset"], "begun", 120)
    site("cancel", name)
    job = site.ended(name, 90)
    assert job["exit_code"] == 130 and not job["dataset"]["success"]


def test_cancelled_while_it_waits_it_does_not_begin(site):
    waits, _ = site.submit("other", *INLINE, "target.options=['--begin=now+1hour']")
    assert site.jobs()[waits]["state"] == "queued"
    site("cancel", waits)
    assert site.ended(waits)["detail"] == "cancelled"


def test_two_jobs_with_ray_share_a_node(site, undisturbed):
    """And one of them has two nodes: three Rays' worth of ports on this host."""
    small = ("samples_per_row=1", "sampling.steps=2", "cluster=local", "target.cpus_per_node=2")
    names = [site.submit("a", *small, "target.options=['--nodelist=n1']")[0]]
    names.append(site.submit("b", *small, "target.nodes=2", "target.options=['--nodelist=n[1-2]']")[0])
    assert [site.ended(name)["exit_code"] for name in names] == [0, 0]
    assert site.shards("a").keys() == site.shards("b").keys() != set()

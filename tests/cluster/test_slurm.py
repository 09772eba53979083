"""Jobs on a real Slurm, submitted as people do. By hand: ``CLUSTER=slurm python -m pytest tests/cluster``, as root, with Debian's slurmctld, slurmd and munge."""

import os
import re
import sys
from pathlib import Path

import pytest
from tests.cluster.site import ROWS, STEPS, Site
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


@pytest.fixture
def site(slurm, tmp_path):
    return Site(slurm, tmp_path)


@pytest.fixture(scope="module")
def counted(slurm, tmp_path_factory):
    """The shards of the counting model, undisturbed."""
    site = Site(slurm, tmp_path_factory.mktemp("counted"))
    site("run", "txt2img", *site.counted, "cluster=inline", "output=out")
    assert site.evaluated() == ROWS * STEPS
    return site.shards("out")


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


def test_at_the_end_of_its_time_it_drains_and_goes_on_by_itself(slurm, tmp_path, counted):
    """Slurm counts in minutes, and gives notice up to one sooner than it is asked to."""
    site = Site(slurm, tmp_path, pace=0.9)
    limit = ("target.time=00:02:00", "target.grace=60", "grace=4s")
    name, number = site.submit("out", *site.counted, "cluster=inline", *limit)
    until(lambda: "in the queue again" in site("logs", name), "drained", 150)
    first, half_done = site.evaluated(), len(list((tmp_path / "out" / "half_done").glob("*")))
    assert 0 < first < ROWS * STEPS and half_done
    for _ in range(4):  # once is usual
        site.at_once(number)
        until(lambda: site.jobs()[name]["state"] in ("ended", "queued"), "drained again, or done", 150)
        if site.jobs()[name]["state"] == "ended":
            break
    assert site.ended(name)["exit_code"] == 0
    assert site.shards("out") == counted and site.evaluated() == ROWS * STEPS
    assert "thrown away" not in (said := site("logs", name)) and "SIGUSR1: what has begun goes on" in said


def test_preempted_it_drains_and_goes_on(slurm, tmp_path, counted):
    """Others of a partition that comes first need its node. Slurm tells the script alone, and once: with preempt_send_user_signal."""
    site = Site(slurm, tmp_path, pace=0.3)
    name, number = site.submit("out", *site.counted, "cluster=inline", "grace=4s", "target.options=['--nodelist=n1']")
    until(lambda: len(site.shards("out")) >= 1, "a shard", 120)
    other = tmp_path / "other.sh"
    other.write_text("#!/bin/bash\nsleep 1\n")
    slurm("sbatch", "--partition=first", "--nodelist=n1", "--exclusive", "--output=/dev/null", other)
    states = set()

    def goes_on():
        states.add((job := site.jobs()[name])["state"])
        return "in the queue again" in site("logs", name) and job["state"] == "queued"

    until(goes_on, "drained", 60)
    assert states <= {"running", "queued"} and site.evaluated() < ROWS * STEPS
    site.at_once(number)
    job = site.ended(name)
    assert (job["exit_code"], job["detail"]) == (0, "started again 1 times"), slurm("scontrol", "show", "job", number)
    assert site.shards("out") == counted and site.evaluated() == ROWS * STEPS
    assert "SIGUSR1: what has begun goes on" in (said := site("logs", name)) and "thrown away" not in said, said


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


def test_jobs_with_ray_share_a_node(slurm, tmp_path, counted):
    """Two on one node, and one of them has another node beside: three Rays' worth of ports and folders on this host."""
    site, ours = Site(slurm, tmp_path), set(Path("/tmp").glob("lm-*"))
    few = (*site.counted, "cluster=local", "target.cpus_per_node=2")
    names = [site.submit("a", *few, "target.options=['--nodelist=n1']")[0]]
    names.append(site.submit("b", *few, "target.nodes=2", "target.options=['--nodelist=n[1-2]']")[0])
    until(lambda: {job["state"] for job in site.jobs().values()} == {"running"}, "both at once", 60)
    assert [site.ended(name)["exit_code"] for name in names] == [0, 0]
    assert site.shards("a") == site.shards("b") == counted
    until(lambda: not slurm("squeue", "-h"), "both gone")
    assert set(Path("/tmp").glob("lm-*")) == ours, "what they leave behind"


def test_a_node_on_which_ray_does_not_start_is_left_out(slurm, tmp_path, counted):
    """It is known at once, and what fits on the others begins there; were it the first, the job would go back to the queue at once."""
    site = Site(slurm, tmp_path)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/bash\n[ "${{SLURM_PROCID-}}$3" = 1ray.scripts.scripts ] && {{ echo a bad node; exit 1; }}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    few = (*site.counted, "cluster=local", "target.cpus_per_node=4", "target.nodes=2")
    name, _ = site.submit("out", *few, first=python.parent)
    too_many, _ = site.submit(
        "more", *few, "stages.decode.replicas=5", "stages.decode.num_cpus=1", "target.retries=0", first=python.parent
    )
    assert site.ended(name, 120)["exit_code"] == 0 and site.shards("out") == counted
    assert re.search(r"begins with 1 of 2 nodes: Ray has ended on n\d", site("logs", name))
    assert site.ended(too_many, 120)["exit_code"] == 4, "it would fit on two"

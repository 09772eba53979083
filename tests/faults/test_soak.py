"""Runs that are killed three times at random moments, and end as if nobody had touched them.

RUNS=50 .venv/bin/python -m pytest tests/faults/test_soak.py        # as docs/reliability.md says; without RUNS three
"""

import os
import random
import signal
import threading
import time

import psutil
import pytest
from tests import ray_forks
from tests.faults.forks import PROMPTS, command, shards

import latentmill
from latentmill import storage
from latentmill.verify import verify
from latentmill.workers.cluster import connect

RUNS = int(os.environ.get("RUNS", 3))
KILLS = 3


@pytest.fixture(scope="module")
def job(forks, tmp_path_factory):
    """A job of 48 rows in 12 shards, the files that it makes undisturbed, and the seconds that this computes."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = [
        f"source.path={alone / 'prompts.txt'}", "samples_per_row=8", "rows_per_shard=4", "sampling.steps=4", "deterministic=true",
        "sampling.height=32", "sampling.width=32",
        *(f"stages.{name}.batch_size=4" for name in ("read", "encode", "denoise", "decode", "write")),
    ]  # fmt: skip
    process = forks.begin(command(settings, alone / "out"), alone / "log")
    while forks.runs(process):
        time.sleep(0.05)
    seconds = computed(process)
    assert forks.end(process) == 0, (alone / "log").read_text()
    return settings, shards(alone / "out"), seconds


def computed(process):
    """The seconds that it has computed: whatever else the machine does, they are about as many."""
    times = psutil.Process(process).cpu_times()
    return times.user + times.system


def whole(output, alone):
    assert shards(output) == alone and (output / "_SUCCESS").exists()
    verdict = verify(storage.at(str(output)))
    assert verdict.sound and verdict.ok == 48


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_driver_killed_three_times(seed, job, forks, tmp_path):
    settings, alone, seconds = job
    dice = random.Random(seed)
    for _ in range(KILLS):
        process = forks.begin(command(settings, tmp_path / "out"), tmp_path / "log")
        moment = dice.uniform(0, seconds / 5)
        while forks.runs(process) and computed(process) < moment:
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        code = forks.end(process)
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert shards(tmp_path / "out").items() <= alone.items()
    assert forks.run(command(settings, tmp_path / "out"), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    whole(tmp_path / "out", alone)


@pytest.fixture(scope="module")
def cluster():
    there = ray_forks.Cluster(num_cpus=2)
    try:
        connect(there.address)
        yield there
    finally:
        there.shutdown()


@pytest.mark.parametrize("seed", range(max(1, RUNS // 3)))
def test_workers_killed_three_times(seed, job, cluster, tmp_path):
    """Whichever worker it hits, as soon as there are some; the run goes on by itself."""
    settings, alone, seconds = job
    dice, victims, ended = random.Random(seed), [], threading.Event()

    def hunt():
        while len(victims) < KILLS and not ended.wait(dice.uniform(0, seconds / 6)):
            if workers := sorted(cluster.actors() - {*victims}):
                victims.append(dice.choice(workers))
                os.kill(victims[-1], signal.SIGKILL)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        place = ["cluster=ray", f"cluster.address={cluster.address}", f"output={tmp_path / 'out'}"]
        result = latentmill.run("txt2img", [*settings, *place, "stages.write.retries=5"])
    finally:
        ended.set()
        hunter.join()
    assert len(victims) == KILLS and (result.ok, result.failed) == (48, 0)
    whole(tmp_path / "out", alone)

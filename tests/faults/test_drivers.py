"""Two and three drivers on one output: they share the shards, and it is the dataset of one that was alone."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tests.faults.forks import shards

from latentmill import storage
from latentmill.cli import main
from latentmill.verify import verify

PROMPTS = [
    f"a {colour} {shape} on a white background"
    for shape in ("star", "ring", "cross")
    for colour in ("red", "blue", "green", "black")
]
DRIVER = """
from latentmill.driver import leases

leases.BEAT_EVERY, leases.MAX_SILENCE = 0.2, 2.0


def main(arguments):
    result = latentmill.run("txt2img", arguments)
    print(result.ok, result.failed, flush=True)
"""


@pytest.fixture
def start(forks, job, tmp_path):
    """``start(*settings)``: a driver of the job, writing to ``out``."""
    begun = []

    def start(*settings, **environment):
        begun.append(Driver(forks, [*job[0], *settings, f"output={tmp_path / 'out'}"], tmp_path, environment))
        return begun[-1]

    yield start
    for driver in begun:
        driver.kill()


class Driver:
    """A process; ``end`` waits for it, and returns its exit code and the last line that it wrote."""

    def __init__(self, forks, arguments, folder, environment):
        self.forks, self.code = forks, None
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        self.process = forks.begin(arguments, self.log, prepare=DRIVER, **environment)

    def runs(self):
        return self.forks.runs(self.process)

    def signal(self, number):
        os.kill(self.process, number)

    def end(self):
        self.code = self.forks.end(self.process)
        return self.code, self.log.read_text().splitlines()[-1:]

    def kill(self):
        if self.code is None:
            self.signal(signal.SIGKILL)
            self.end()


@pytest.fixture(scope="module")
def job(forks, tmp_path_factory):
    """A job of 24 rows in 12 shards, and the files that it makes when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = [
        f"source.path={folder / 'prompts.txt'}", "samples_per_row=2", "rows_per_shard=2", "sampling.steps=2", "cluster=inline",
        "deterministic=true", "sampling.height=32", "sampling.width=32", "stages.read.batch_size=2", "stages.encode.batch_size=2", "stages.denoise.batch_size=2",
        "stages.decode.batch_size=2", "stages.write.batch_size=2",
    ]  # fmt: skip
    assert forks.run([*settings, f"output={folder / 'out'}"], folder / "log", prepare=DRIVER) == 0, (
        folder / "log"
    ).read_text()
    return settings, shards(folder / "out")


def wait_for(there, driver, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end and driver.runs(), driver.log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("count", [2, 3])
def test_drivers_at_the_same_time_share_the_shards(count, start, job, tmp_path):
    output = tmp_path / "out"
    drivers = [start() for _ in range(count)]
    assert [driver.end() for driver in drivers] == [(0, ["24 0"])] * count
    assert shards(output) == job[1] and (output / "_SUCCESS").exists()
    assert storage.at(str(output)).names("leases") == [] and storage.at(str(output)).names(".tmp") == []


def test_a_driver_that_was_stopped_robbed_and_woken_does_no_harm(start, job, tmp_path):
    """SIGSTOP at the moment before a shard gets its name: another takes its leases, does all; then it goes on."""
    output, folder = tmp_path / "out", tmp_path / "fail"
    folder.mkdir()
    first = start(LATENTMILL_FAILPOINT=f"data synced:pause:{folder}")
    wait_for((folder / "data synced").exists, first)
    first.signal(signal.SIGSTOP)
    held = [name for name in storage.at(str(output)).names("leases") if name.isdecimal()]
    assert held and shards_done(output) == 0
    assert start().end() == (0, ["24 0"])
    assert shards(output) == job[1] and (output / "_SUCCESS").exists()
    (folder / "go").touch()
    first.signal(signal.SIGCONT)
    assert first.end() == (0, ["24 0"])
    assert shards(output) == job[1] and verify(storage.at(str(output))).sound
    assert json.loads((output / "plan.json").read_text())["rows"] == 24


def test_a_driver_that_is_killed_is_not_waited_for_by_another_that_runs(start, tmp_path):
    """96 rows, more than one driver takes at a time."""
    output, folder, more = tmp_path / "out", tmp_path / "fail", ("samples_per_row=8",)
    folder.mkdir()
    first = start(*more, LATENTMILL_FAILPOINT=f"published:pause:{folder}")
    wait_for((folder / "published").exists, first)
    second = start(*more)
    wait_for(lambda: shards_done(output) > 2, second)  # while the first is paused, and alive
    first.kill()
    assert second.end() == (0, ["96 0"])
    verdict = verify(storage.at(str(output)))
    assert verdict.sound and verdict.ok == 96


def test_a_shard_that_is_taken_out_as_a_driver_calls_the_dataset_complete_is_made_again(start, job, tmp_path):
    output, at = tmp_path / "out", tmp_path / "at"
    at.mkdir()
    driver = start(LATENTMILL_FAILPOINT=f"finishing:pause:{at}")
    wait_for((at / "finishing").exists, driver)
    damaged = output / "data" / "00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["verify", str(output), "--repair"]) == 1 and not damaged.exists()
    (at / "go").touch()
    assert driver.end() == (0, ["24 0"]), driver.log.read_text()
    assert shards(output) == job[1] and (output / "_SUCCESS").exists()
    assert verify(storage.at(str(output))).sound


def shards_done(output):
    folder = Path(output, "data")
    return len(list(folder.iterdir())) if folder.is_dir() else 0

"""Two and three drivers on one output: they share the shards, and it is the dataset of one that was alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import latentmill
from latentmill import storage
from latentmill.verify import verify

PROMPTS = [
    f"a {colour} {shape} on a white background"
    for shape in ("star", "ring", "cross")
    for colour in ("red", "blue", "green", "black")
]
DRIVER = """
import sys
import latentmill
from latentmill.driver import leases
leases.BEAT_EVERY, leases.MAX_SILENCE = 0.2, 2.0
result = latentmill.run("txt2img", sys.argv[1:])
print(result.ok, result.failed, flush=True)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job of 24 rows in 12 shards, and the files that it makes when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = [
        f"source.path={folder / 'prompts.txt'}", "samples_per_row=2", "rows_per_shard=2", "sampling.steps=6", "cluster=inline",
        "deterministic=true", "stages.read.batch_size=2", "stages.encode.batch_size=2", "stages.denoise.batch_size=2",
        "stages.decode.batch_size=2", "stages.write.batch_size=2",
    ]  # fmt: skip
    latentmill.run("txt2img", [*settings, f"output={folder / 'out'}"])
    return settings, shards(folder / "out")


def shards(output):
    return {path.name: path.read_bytes() for path in Path(output, "data").iterdir()}


def start(settings, output, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *settings, f"output={output}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def wait_for(there, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.01)


@pytest.mark.parametrize("count", [2, 3])
def test_drivers_at_the_same_time_share_the_shards(count, job, tmp_path):
    settings, alone = job
    output = tmp_path / "out"
    drivers = [start(settings, output) for _ in range(count)]
    said = [driver.communicate(timeout=300) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * count, said
    assert [out for out, _ in said] == ["24 0\n"] * count
    assert shards(output) == alone and (output / "_SUCCESS").exists()
    assert storage.at(str(output)).names("leases") == [] and storage.at(str(output)).names(".tmp") == []


def test_a_driver_that_was_stopped_robbed_and_woken_does_no_harm(job, tmp_path):
    """SIGSTOP at the moment before a shard gets its name: another takes its leases, does all; then it goes on."""
    settings, alone = job
    output, folder = tmp_path / "out", tmp_path / "fail"
    folder.mkdir()
    first = start(settings, output, LATENTMILL_FAILPOINT=f"data synced:pause:{folder}")
    wait_for((folder / "data synced").exists, first)
    first.send_signal(signal.SIGSTOP)
    held = [name for name in storage.at(str(output)).names("leases") if name.isdecimal()]
    assert held and shards_done(output) == 0
    second = start(settings, output)
    out, err = second.communicate(timeout=300)
    assert (second.returncode, out) == (0, "24 0\n"), err
    assert shards(output) == alone and (output / "_SUCCESS").exists()
    (folder / "go").touch()
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=300)
    assert (first.returncode, out) == (0, "24 0\n"), err
    assert shards(output) == alone and verify(storage.at(str(output))).sound
    assert json.loads((output / "plan.json").read_text())["rows"] == 24


def test_a_driver_that_is_killed_is_not_waited_for_by_another_that_runs(job, tmp_path):
    """96 rows, more than one driver takes at a time."""
    settings = [*job[0], "samples_per_row=8", "sampling.steps=2"]
    output, folder = tmp_path / "out", tmp_path / "fail"
    folder.mkdir()
    first = start(settings, output, LATENTMILL_FAILPOINT=f"published:pause:{folder}")
    wait_for((folder / "published").exists, first)
    second = start(settings, output)
    wait_for(lambda: shards_done(output) > 2, second)  # while the first is paused, and alive
    first.kill()
    first.communicate()
    out, err = second.communicate(timeout=300)
    assert (second.returncode, out) == (0, "96 0\n"), err
    verdict = verify(storage.at(str(output)))
    assert verdict.sound and verdict.ok == 96


def shards_done(output):
    folder = Path(output, "data")
    return len(list(folder.iterdir())) if folder.is_dir() else 0

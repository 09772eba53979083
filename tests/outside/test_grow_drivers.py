"""A dataset that grows while drivers are killed, begin at the same time, or know the old plan alone."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

SOON = """
from latentmill.driver import leases

leases.BEAT_EVERY = 0.2
"""
PLACES = [".rows synced", "plan-1.json synced", "data synced", "finishing"]


def picture(folder, name):
    Image.new("RGB", (4, 4), (len(name) * 40, sum(map(ord, name)) % 256, 7)).save(folder / f"{name}.png")


def files(output):
    """Shards, plans and _SUCCESS."""
    names = [*output.glob("data/*"), *output.glob("plan*.json"), *output.glob("_SUCCESS")]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in names}


def wait_for(path):
    for _ in range(2000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


@pytest.fixture
def world(forks, tmp_path):
    return World(forks, tmp_path)


class World:
    """Pictures, and drivers that encode them into ``out``, two rows a shard."""

    def __init__(self, forks, folder):
        self.forks, self.folder, self.pictures, self.output = forks, folder, folder / "pictures", folder / "out"
        self.pictures.mkdir()
        for name in "bdf":
            picture(self.pictures, name)
        self.log = folder / "log"

    def grown(self):
        """Two pictures come, one of them before all others."""
        picture(self.pictures, "a")
        picture(self.pictures, "e")

    def begin(self, *more, output=None, log=None, **environment):
        told = ["run", "encode", "cluster=inline", "vae.name=patches", "vae.side=1", "rows_per_shard=2", *more]
        told += [f"source.path={self.pictures}", f"output={output or self.output}"]
        return self.forks.begin(told, log or self.log, prepare=SOON, **environment)

    def run(self, *more, **how):
        return self.forks.end(self.begin(*more, **how))

    def undisturbed(self):
        """What a dataset is that has grown with nothing in the way."""
        output = self.folder / "alone"
        first, second = self.folder / "first", [self.pictures / "a.png", self.pictures / "e.png"]
        first.mkdir()
        for path in second:
            path.rename(first / path.name)
        assert self.run(output=output) == 0, self.log.read_text()
        for path in second:
            (first / path.name).rename(path)
        assert self.run("--grow", output=output) == 0, self.log.read_text()
        return files(output)

    def sound(self):
        assert self.forks.run(["verify", self.output], self.log, prepare=SOON) == 0, self.log.read_text()


def test_killed_at_any_moment_of_growing_it_goes_on_to_the_same(world):
    assert world.run() == 0, world.log.read_text()
    begun = files(world.output)
    world.grown()
    alone = world.undisturbed()
    for place in PLACES:
        at = world.folder / place
        at.mkdir()
        assert world.run("--grow", LATENTMILL_FAILPOINT=f"{place}:kill:{at}") == -9, f"{place}\n{world.log.read_text()}"
        there = files(world.output)
        assert there.items() <= alone.items(), place
        assert ("_SUCCESS" in there) == (place == ".rows synced"), f"{place}: until the plan says otherwise it is whole"
        assert there.items() >= {name: content for name, content in begun.items() if name != "_SUCCESS"}.items(), place
    assert world.run() == 0, f"the plan is published, and whoever goes on need not say it\n{world.log.read_text()}"
    assert files(world.output) == alone
    world.sound()


def test_two_that_grow_it_at_once_agree(world):
    assert world.run() == 0, world.log.read_text()
    world.grown()
    alone = world.undisturbed()
    logs = [world.folder / "log-1", world.folder / "log-2"]
    drivers = [world.begin("--grow", log=log) for log in logs]
    codes = [world.forks.end(driver) for driver in drivers]
    assert codes == [0, 0], [log.read_text() for log in logs]
    assert files(world.output) == alone
    world.sound()


def test_one_that_knows_the_old_plan_finishes_it_while_another_grows(world):
    """It holds a shard of the old generation, for which the other waits."""
    at = world.folder / "at"
    at.mkdir()
    old = world.begin(log=world.folder / "old", LATENTMILL_FAILPOINT=f"data synced:pause:{at}")
    wait_for(at / "data synced")
    world.grown()
    grower = world.begin("--grow", log=world.folder / "grower")
    wait_for(world.output / "data" / "00002.parquet")
    assert not (world.output / "_SUCCESS").exists()
    (at / "go").touch()
    assert world.forks.end(old) == 0, (world.folder / "old").read_text()
    assert "has grown meanwhile" in (world.folder / "old").read_text()
    assert world.forks.end(grower) == 0, (world.folder / "grower").read_text()
    assert files(world.output) == world.undisturbed()
    world.sound()


def test_one_that_knows_the_old_plan_does_not_say_that_all_is_there(world):
    """It had looked whether the dataset has grown, and was about to say that it is complete."""
    at, killed = world.folder / "at", world.folder / "killed"
    at.mkdir()
    killed.mkdir()
    old = world.begin(LATENTMILL_FAILPOINT=f"finishing:pause:{at}")
    wait_for(at / "finishing")
    world.grown()
    assert world.run("--grow", LATENTMILL_FAILPOINT=f"planning:kill:{killed}") == -9
    (at / "go").touch()
    assert world.forks.end(old) == 0, world.log.read_text()
    assert not (world.output / "_SUCCESS").exists()
    assert world.forks.run(["status", world.output, "--json"], world.folder / "status") == 0
    now = json.loads(Path(world.folder / "status").read_text())
    assert (now["success"], now["shards_done"], now["shards"], now["lost"]) == (False, 2, 3, 0)
    assert world.run() == 0, world.log.read_text()
    assert files(world.output) == world.undisturbed()


def test_one_that_knows_the_old_plan_leaves_the_success_of_another(world):
    """It had looked whether the dataset has grown, and was about to say that it is complete, until another had said so of more."""
    at = world.folder / "at"
    at.mkdir()
    old = world.begin(LATENTMILL_FAILPOINT=f"finishing:pause:{at}")
    wait_for(at / "finishing")
    world.grown()
    assert world.run("--grow", log=world.folder / "grower") == 0, (world.folder / "grower").read_text()
    whole = files(world.output)
    assert "_SUCCESS" in whole
    (at / "go").touch()
    assert world.forks.end(old) == 0, world.log.read_text()
    assert files(world.output) == whole

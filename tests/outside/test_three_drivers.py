"""Three drivers on one output, of which one is killed: with ``accept``, while it grows, and where near duplicates are filtered."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from tests.outside.conftest import table, told
from tests.outside.test_accept import POINTS, SIEVE, hashed
from tests.outside.test_grow_drivers import SOON, wait_for

SMALL = ("sampling.width=16", "sampling.height=16", "sampling.steps=1", "samples_per_row=1", "rows_per_shard=2")
SEEDS = (4, 5, 4, 7, 8, 5, 11, 8)
"""Those of the rows: whose seed is a multiple of four is accepted at once, and whose is that of another is the same picture."""


@pytest.fixture
def drivers(install, forks, tmp_path):
    install("fourth", POINTS, fourth=SIEVE)
    return Drivers(forks, tmp_path)


class Drivers:
    def __init__(self, forks, folder):
        self.forks, self.folder = forks, folder
        self.source = folder / "rows.jsonl"
        self.has(6)

    def has(self, count):
        """So many rows are in the source."""
        rows = ({"id": f"r{k}", "prompt": "a red circle", "seed": seed} for k, seed in enumerate(SEEDS[:count]))
        self.source.write_text("\n".join(map(json.dumps, rows)))

    def pictures(self, output):
        """A job of those whose seed is a multiple of four; of others three samples are drawn."""
        flow = "flow=[read,encode,denoise,fourth,decode,near_duplicates,write]"
        source = (f"source.path={self.source}", "source.id_column=id")
        return ["txt2img", *source, *SMALL, flow, "accept.attempts=3", f"output={self.folder / output}"]

    def kept(self, output):
        """A job of the first of each picture of ``alone``."""
        there = self.folder / "alone"
        source = ("source=prompts", f"source.path={there / 'data'}", "source.id_column=row_id")
        flow = f"flow=[read,{{name: near_duplicates, of: {there}, distance: 0}},encode,write]"
        return ["encode", *source, flow, "rows_per_shard=2", f"output={self.folder / output}"]

    def begin(self, job, name, *more, **environment):
        told = ["run", *job, "cluster=inline", "deterministic=true", *more]
        return self.forks.begin(told, self.folder / name, prepare=SOON, path=[self.folder / "site"], **environment)

    def one(self, job, *more):
        """One that nothing disturbs."""
        assert self.forks.end(self.begin(job, "one.log", *more)) == 0, (self.folder / "one.log").read_text()

    def three(self, job, *more):
        """The first is held where it has a shard to commit, until the two others wait for that, and is killed there."""
        (at := Path(job[-1].removeprefix("output="), "at")).mkdir(parents=True)
        first = self.begin(job, "first.log", *more, LATENTMILL_FAILPOINT=f"data synced:pause:{at}")
        wait_for(at / "data synced")
        others = [self.begin(job, f"{name}.log", *more) for name in ("second", "third")]
        while len([*at.parent.glob("leases/*.alive")]) < 3:
            assert all(self.forks.runs(each) for each in others), (self.folder / "second.log").read_text()
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        logs = [(self.folder / f"{name}.log").read_text for name in ("second", "third")]
        assert [self.forks.end(each) for each in (first, *others)] == [-9, 0, 0], [log() for log in logs]
        shutil.rmtree(at)

    def there(self, output):
        names, folder = ("data/*", "errors/*", "filtered/*", "plan*.json", "_SUCCESS"), self.folder / output
        return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.glob(name)}


def test_what_three_make_is_what_one_makes_in_bytes(drivers, tmp_path):
    """Pictures with ``accept``, then more of them with ``--grow``, then the first of each picture."""
    for makes, pictures, kept in ((drivers.one, "alone", "kept-alone"), (drivers.three, "shared", "kept-shared")):
        drivers.has(6)
        makes(drivers.pictures(pictures))
        drivers.has(8)
        makes(drivers.pictures(pictures), "--grow")
        makes(drivers.kept(kept))
    again = hashed(f"{5}/attempt/2")  # the only one of three that is a multiple of four
    made = {"r0": (4, 0), "r1": (again, 2), "r2": (4, 0), "r4": (8, 0), "r5": (again, 2), "r7": (8, 0)}
    assert {row["id"]: (row["seed"], row["attempt"]) for row in table(tmp_path / "alone").to_pylist()} == made
    assert [row["row_id"] for row in told(tmp_path / "alone", "filtered")] == ["000000003-000", "000000006-000"]
    assert table(tmp_path / "kept-alone")["id"].to_pylist() == [f"00000000{k}-000" for k in (0, 1, 4)]
    assert drivers.there("shared") == drivers.there("alone")
    assert drivers.there("kept-shared") == drivers.there("kept-alone")

"""The plan: arithmetic over rows, and a hash that changes when, and only when, the dataset would."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill import plan_files, storage
from latentmill.errors import PlanError
from latentmill.plan import Plan
from latentmill.plugin import Fragment

PLAN = Plan(
    name="test",
    config={"sampling": {"steps": 20}, "seed": 0},
    plugins={"vae": {"name": "shapes", "version": "1"}},
    fragments=(Fragment("a.txt", 3, "x"), Fragment("empty.txt", 0), Fragment("b.txt", 2, "y")),
    samples_per_row=4,
    rows_per_shard=6,
    seed=0,
)


def test_rows_part_into_shards_without_a_gap():
    assert PLAN.rows == 20 and PLAN.shards == 4
    assert [row for shard in range(4) for row in PLAN.shard_rows(shard)] == list(range(20))
    assert PLAN.shard_rows(3) == range(18, 20)


def test_a_row_is_found_in_its_fragment():
    places = [PLAN.locate(row) for row in range(20)]
    assert places[0] == ("a.txt", 0, 0) and places[11] == ("a.txt", 2, 3)
    assert places[12] == ("b.txt", 0, 0) and places[19] == ("b.txt", 1, 3)
    assert len(set(places)) == 20


def test_ten_million_rows_cost_nothing():
    big = dataclasses.replace(PLAN, fragments=(Fragment("a", 10**8),))
    assert big.shards == -(-4 * 10**8 // 6) and big.row_id(4 * 10**8 - 1) == "099999999-003"


MEASURE = """
import sys, time
from pathlib import Path
from latentmill import parts, plan, storage
from latentmill.driver.decide import decide
from latentmill.config import load_job
from latentmill.config import load_job
from latentmill.dataset import Dataset
from latentmill.runner import begin

def memory(key):
    return int(dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())[key].split()[0])

job = load_job("txt2img", [f"source.path={sys.argv[1]}", "samples_per_row=1", "output=nowhere", "cluster=inline"])
built = parts.parts(job)
Path("/proc/self/clear_refs").write_text("5")
before, started = memory("VmRSS"), time.monotonic()
made = plan.plan(job, built)
decide(begin(job, Dataset(storage.at(job.output), made, built.sink)))
print(made.rows, time.monotonic() - started, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_million_rows_are_planned_in_seconds_and_little_memory(tmp_path):
    size = 1_000_000
    prompts = pa.DictionaryArray.from_arrays(np.zeros(size, np.int32), ["a red star"]).cast(pa.string())
    with pq.ParquetWriter(tmp_path / "p.parquet", pa.schema([("prompt", pa.string())])) as writer:
        for _ in range(100):
            writer.write_table(pa.table({"prompt": prompts}))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "p.parquet")]
    rows, seconds, kilobytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == 10**8 and float(seconds) < 10 and int(kilobytes) < 200_000


def test_row_ids_are_the_row_s_own_for_ever():
    assert PLAN.row_id(13) == "000000003-001"


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"sampling": {"steps": 21}, "seed": 0}},
        {"plugins": {"vae": {"name": "shapes", "version": "2"}}},
        {"fragments": (Fragment("a.txt", 3, "changed"), Fragment("b.txt", 2, "y"))},
        {"samples_per_row": 5},
        {"rows_per_shard": 7},
        {"seed": 1},
    ],
)
def test_whatever_changes_the_dataset_changes_the_hash_and_is_refused(change, tmp_path):
    plan_files.publish(PLAN, storage.at(str(tmp_path)))
    other = dataclasses.replace(PLAN, **change)
    assert other.hash != PLAN.hash
    with pytest.raises(PlanError, match="holds another job's dataset"):
        plan_files.publish(other, storage.at(str(tmp_path)))
    assert json.loads((tmp_path / "plan.json").read_text())["hash"] == PLAN.hash


def test_the_same_plan_goes_on_and_its_name_does_not_matter(tmp_path):
    plan_files.publish(PLAN, storage.at(str(tmp_path)))
    plan_files.publish(dataclasses.replace(PLAN, name="another"), storage.at(str(tmp_path)))


def test_the_difference_is_said(tmp_path):
    plan_files.publish(PLAN, storage.at(str(tmp_path)))
    other = dataclasses.replace(PLAN, config={"sampling": {"steps": 21}, "seed": 0})
    with pytest.raises(PlanError, match=r"sampling\.steps: 20 -> 21\. Choose another output"):
        plan_files.compare(other, storage.at(str(tmp_path)))


def test_a_broken_plan_is_said_in_one_line(tmp_path):
    (tmp_path / "plan.json").write_text("{not json")
    with pytest.raises(PlanError, match="can't be read as a plan"):
        plan_files.compare(PLAN, storage.at(str(tmp_path)))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="can't be read as a plan"):
        plan_files.read(storage.at(str(tmp_path)))
    for nowhere in ("nowhere", "plan.json"):
        with pytest.raises(PlanError, match="has no plan.json"):
            plan_files.read(storage.at(str(tmp_path / nowhere)))

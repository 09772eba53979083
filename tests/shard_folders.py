"""Datasets of many shards of one row each, made without a run."""

import json

import pyarrow as pa

from latentmill.plan import Plan
from latentmill.plugin import Fragment
from latentmill.sinks.parquet import Parquet
from latentmill.storage import LocalFolder


def plan_of(shards):
    return Plan("many", {"sink": {"name": "parquet"}}, {}, (Fragment("p.txt", shards),), 1, 1, 0)


def shard_file(path, plan, failed=(), filtered=()):
    """A shard of one row, that is ok, or failed or was filtered in these stages."""
    errors = [{"row": 0, "row_id": "0-000", "stage": stage, "reason": "a reason"} for stage in failed]
    unwanted = [{"row": 0, "row_id": "0-000", "stage": stage, "reason": "a reason", "scores": {}} for stage in filtered]
    row = not failed and not filtered
    rows = pa.table({"row_id": pa.array(["0-000"] * row), "prompt": pa.array(["a"] * row)})
    about = {"latentmill.plan": plan.hash, "latentmill.errors": json.dumps(errors)}
    if unwanted:
        about["latentmill.filtered"] = json.dumps(unwanted)
    Parquet().write(str(path), rows, about)
    return path


def data(out, shard):
    return out / "data" / f"{shard:05d}.parquet"


def make(out, plan):
    """A dataset in which each seventh shard has a failed row, and none has its copy in ``errors/``."""
    (out / "data").mkdir(parents=True)
    (out / "plan.json").write_text(plan.to_json())
    ok, failed = (shard_file(data(out, 0), plan, stages).read_bytes() for stages in ([], ["decode"]))
    for shard in range(plan.shards):
        data(out, shard).write_bytes(failed if shard % 7 == 6 else ok)
    return out


class Counting(LocalFolder):
    """A folder that counts which shards are read."""

    def __init__(self, url):
        super().__init__(url)
        self.asked = []

    def open(self, name):
        self.asked.append(name)
        return super().open(name)

"""Read a dataset back whole, against its plan: every planned row once, nothing damaged, nothing that doesn't belong."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from latentmill import plan as planning
from latentmill import registry
from latentmill.plan import Plan
from latentmill.plugin import Sink
from latentmill.storage import Storage
from latentmill.write import ERRORS_KEY, copy_errors, data_name, done_shards, errors_name, errors_of


@dataclass
class Verdict:
    """What a dataset is found to be."""

    plan: Plan
    ok: int = 0
    """Rows in shards that are right."""
    failed: int = 0
    """Rows in their error tables."""
    missing: list[int] = field(default_factory=list)
    """Shards that are not done yet."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Shards that are not what was planned, with the reason."""
    copies: list[int] = field(default_factory=list)
    """Shards that are right, with an error file that isn't."""
    strange: list[str] = field(default_factory=list)
    """What else is wrong, a line each."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; a dataset that isn't complete yet may be sound."""
        return not self.damaged and not self.strange


def verify(store: Storage) -> Verdict:
    """Re-read every shard of a dataset: checksums, each planned row exactly once. Raises PlanError if there is no plan."""
    plan = planning.load(store)
    sink: Sink = registry.build("sink", plan.config["sink"])
    verdict = Verdict(plan)
    done = done_shards(store)
    verdict.missing = [shard for shard in range(plan.shards) if shard not in done]
    known = {data_name(shard, sink).removeprefix("data/") for shard in range(plan.shards)}
    verdict.strange += [f"data/{name} is no shard of this plan" for name in sorted(set(store.names("data")) - known)]
    with ThreadPoolExecutor(8) as threads:
        checks = threads.map(
            lambda shard: (shard, *_check(store, plan, sink, shard)), sorted(done & {*range(plan.shards)})
        )
        for shard, failed, wrong in checks:
            if wrong:
                verdict.damaged[shard] = wrong
            else:
                verdict.ok += len(plan.shard_rows(shard)) - failed
                verdict.failed += failed
                name = errors_name(shard)
                if store.exists(name) and store.read(name) != errors_of(store, shard, sink):
                    verdict.copies.append(shard)
                    verdict.strange.append(f"{name} is not what {data_name(shard, sink)} says")
    if store.exists("_SUCCESS") and (verdict.missing or verdict.damaged):
        verdict.strange.append("_SUCCESS is there, and not all rows are")
    return verdict


def repair(store: Storage, verdict: Verdict) -> Iterator[str]:
    """Take damaged shards out of the dataset, into ``quarantine/``, so that the next run does them again. And make error files what those say. Tells what it does."""
    sink: Sink = registry.build("sink", verdict.plan.config["sink"])
    if verdict.damaged or verdict.missing:
        store.delete("_SUCCESS")
    for shard in verdict.damaged:
        name = data_name(shard, sink)
        store.delete(errors_name(shard))
        to = f"quarantine/{name.removeprefix('data/')}-{uuid.uuid4().hex[:8]}"
        store.move(name, to)
        yield f"moved {name} -> {to}; the next run does it again"
    for shard in verdict.copies:
        copy_errors(store, shard, sink)
        yield f"made {errors_name(shard)} again"


def _check(store: Storage, plan: Plan, sink: Sink, shard: int) -> tuple[int, str]:
    """How many rows of a shard failed, and what is wrong with it, if anything is."""
    try:
        with store.open(data_name(shard, sink)) as file:
            about = sink.metadata(file)
        with store.open(data_name(shard, sink)) as file:
            found = list(sink.row_ids(file))
    except Exception as error:  # whatever a damaged file makes a reader say
        return 0, f"can't be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if about.get("latentmill.plan") != plan.hash:
        return 0, f"was made by another plan, {about.get('latentmill.plan')}"
    try:
        errors = json.loads(about.get(ERRORS_KEY, "[]"))
        failed = [error["row_id"] for error in errors]
    except (ValueError, KeyError, TypeError):
        return 0, "has errors in it that can't be read"
    planned = [plan.row_id(row) for row in plan.shard_rows(shard)]
    if sorted([*found, *failed]) != sorted(planned):
        missing, foreign = set(planned) - {*found, *failed}, {*found, *failed} - set(planned)
        twice = len(found) + len(failed) - len({*found, *failed})
        return 0, f"has not the planned rows: {len(missing)} missing, {twice} twice, {len(foreign)} foreign"
    there = set(found)
    if found != [row_id for row_id in planned if row_id in there]:
        return 0, "has its rows in another order"
    return len(failed), ""

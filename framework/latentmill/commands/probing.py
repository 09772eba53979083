"""How ``latentmill plan --probe`` says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from latentmill.config import Job
from latentmill.estimates import Spread
from latentmill.plan import Plan
from latentmill.probe import Probed
from latentmill.progress import duration_text, rate_text
from latentmill.text import plural
from latentmill.workers import pools

COLUMNS_TOLD = 4
"""Of a dataset, that are named: the largest."""


def told(job: Job, plan: Plan, found: Probed, price: float | None, as_json: bool) -> str:
    """For people, or for programs; ``price``: of a GPU for an hour."""
    cost = found.estimate.gpu_hours.times(price) if price is not None else None
    if as_json:
        about: dict[str, Any] = {
            "job": job.name,
            **{key: value._asdict() if isinstance(value, Spread) else value for key, value in asdict(found).items()},
        }
        about["estimate"] = {
            key: value._asdict() if isinstance(value, Spread) else value for key, value in vars(found.estimate).items()
        }
        return json.dumps({**about, "cost": cost and cost._asdict()}, indent=1)
    return "\n".join(f"{what:<9}{line}" for what, line in _lines(job, plan, found, cost))


def _lines(job: Job, plan: Plan, found: Probed, cost: Spread | None) -> Iterator[tuple[str, str]]:
    of = found.estimate
    hosted = [" + ".join(plan.stages[stage].name for stage in stages) for stages in pools.hosted(job, job.flow)[0]]
    yield "job", f"{job.name}: {plan.rows:,} rows in {plan.shards:,} shards of {plan.rows_per_shard:,}"
    yield "probe", f"{plural(found.rows, 'row')} measured, after others to warm up, in {duration_text(found.seconds)}"
    if found.failed or found.filtered:
        yield "", f"{found.failed:,} of {found.all_rows:,} rows failed, {found.filtered:,} were filtered"
    rows = zip(plan.stages, of.row_seconds)
    yield "a row", ", ".join(f"{stage.name} {_short(seconds)}" for stage, seconds in rows)
    counts = ", ".join(f"{count} x {name}" for count, name in zip(of.workers, hosted))
    yield "workers", f"{counts}; all wait for {hosted[of.slowest]}"
    yield "speed", _within(of.rows_a_second, lambda rate: rate_text(rate)) + " rows/s"
    yield "time", f"{_within(of.seconds, duration_text)}, and {duration_text(of.start)} before to start"
    if of.gpu_hours.value:
        money = f", which cost {_within(cost, lambda amount: f'{amount:,.2f}')}" if cost is not None else ""
        yield "GPUs", f"{_within(of.gpu_hours, lambda hours: f'{hours:,.3g}')} GPU hours{money}"
    elif cost is not None:
        yield "GPUs", "no worker asks for a GPU"
    yield "storage", f"{_within(of.bytes, _size)} in {plural(plan.shards, 'shard')}{_columns(found)}"
    if job.cluster.kind != "inline":
        yield "memory", f"at most {_size(of.object_store)} between stages, in Ray's object store"
    yield "", "in brackets: 9 in 10 of what may be, by how much the rounds of the probe differ"


def _within(spread: Spread, text: Callable[[float], str]) -> str:
    return f"{text(spread.value)} ({text(spread.low)} to {text(spread.high)})"


def _columns(found: Probed) -> str:
    """Which columns are large."""
    total = sum(found.columns.values())
    large = [f"{name} {size / total:.0%}" for name, size in list(found.columns.items())[:COLUMNS_TOLD]]
    return f": {', '.join(large)}" if large else ""


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 1 else f"{seconds:.2g} s"


def _size(size: float) -> str:
    number, unit = size, 0
    while number >= 999.5 and unit < 4:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"

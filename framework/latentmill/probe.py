"""``plan --probe``: a few rows of a job, through all of its stages in its own workers, and what that says of the rest.

They go to a place of their own beside the output, which is removed again. Of each worker type there is one worker. A first round
warms the workers up; the other rounds are measured, each by itself.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pyarrow.parquet as pq

from latentmill import plan_files, storage
from latentmill.config import Job
from latentmill.dataset import Dataset
from latentmill.driver.apply import apply
from latentmill.driver.loop import Pool, drive
from latentmill.driver.messages import Dispatch, Event, Finished, PoolOrder, Started, TakenOut
from latentmill.driver.signals import Signals
from latentmill.errors import PlanError
from latentmill.estimates import Estimate, Left, Round, estimate
from latentmill.plan import Generation, Plan
from latentmill.plugin import Sink
from latentmill.runner import begin
from latentmill.shards import FOLDER, data_name, side_file_shard
from latentmill.workers import pools
from latentmill.workers.watch import Watch

ROUNDS = 4
"""The first of which warms up."""
FEW = 4
"""One in so many of the first round's rows is a shard of its own: what a shard costs and what its rows cost can be told apart."""


@dataclass(frozen=True)
class Probed:
    """What a probe found."""

    estimate: Estimate
    rows: int
    """That were measured."""
    all_rows: int
    """Those included that warmed up."""
    failed: int
    filtered: int
    columns: Mapping[str, float]
    """Of each stored column the bytes of all measured rows, the largest first; none of a sink whose files aren't Parquet."""
    seconds: float


def probe(job: Job, plan: Plan, sink: Sink, rows: int, done: int) -> Probed:
    """Run ``rows`` of a job. ``done``: shards of the plan that are there already. Raises what a run of it would."""
    if rows < ROUNDS:
        raise PlanError(f"--probe {rows}: a probe takes {ROUNDS} rows or more")
    url = f"{job.output.rstrip('/')}.probe-{uuid.uuid4().hex[:8]}"
    few, rounds = chosen(job, plan, rows)
    short = replace(job, output=url, single_writer=True, prompt_cache=None, rows_per_shard=few.rows_per_shard)
    store = storage.at(url, single_writer=True)
    run, hosted = uuid.uuid4().hex, pools.hosted(job, job.flow)[0]
    setups = [replace(pools.worker_setup(short, few, stages, run), replicas=1, min_replicas=None) for stages in hosted]
    types = [replace(each, replicas=1, fewest=None) for each in pools.worker_types(job, plan)]
    started, pool = time.monotonic(), None
    with Signals().on(), store.visit():
        try:
            state = begin(short, Dataset(store, few, sink), types)
            state.accept_rows = None  # all of its rows are measured
            store.create(
                plan_files.FIRST_PLAN, json.dumps({**json.loads(few.to_json()), "hash": few.first_hash}).encode()
            )
            pool = Stopwatch(pools.make_pool(short, few, store, Watch(), setups))
            state.max_bytes_in_flight = pools.max_bytes_in_flight(job)
            nodes = _nodes(job)
            measured = []
            state.done |= {shard for shards in rounds[1:] for shard in shards}
            for shards in rounds:
                apply(state, TakenOut(frozenset(shards)))
                pool.begin_round(len(state.stages))
                drive(state, pool, lambda: None)
                measured.append(_round(pool, store, few, sink, shards))
            columns = _columns(store, sink, [data_name(shard, sink) for shards in rounds[1:] for shard in shards])
            loading = max(pool.started) - started
            memory = state.memory_seen
        finally:
            if pool is not None:
                pool.close()
            store.clear()
    by_type = [
        replace(hosts, asks={**hosts.asks, "memory": max(hosts.asks.get("memory", 0.0), seen)} if seen else hosts.asks)
        for hosts, seen in zip(pools.worker_types(job, plan), memory)
    ]
    shards_left = plan.shards - done
    rows_left = round(plan.rows * shards_left / plan.shards)
    if plan.accept_rows and state.committed_ok:
        needed = math.ceil(plan.accept_rows * few.rows / state.committed_ok)
        rows_left = max(0, min(rows_left, needed - (plan.rows - rows_left)))
        shards_left = min(shards_left, math.ceil(rows_left / plan.rows_per_shard))
    left = Left(
        max(1, rows_left),
        shards_left,
        plan.rows_per_shard,
        state.stages,
        by_type,
        nodes,
        [setup.num_gpus for setup in setups],
    )
    try:
        found = estimate(measured[1:], left, loading, measured[0])
    except ValueError as error:
        raise PlanError(f"--probe: {error}") from error
    ended = state.committed_failed, state.committed_filtered
    return Probed(found, sum(r.rows for r in measured[1:]), few.rows, *ended, columns, time.monotonic() - started)


def chosen(job: Job, plan: Plan, rows: int) -> tuple[Plan, list[list[int]]]:
    """The plan of a probe, and of each round its shards. Its rows are runs of the source's, evenly over all of it.

    To a plan its shards are generations, each of as many rows as it likes.
    """
    source_rows = plan.rows // plan.samples_per_row
    a_round = max(1, rows // ROUNDS // plan.samples_per_row)
    few = a_round // FEW
    sizes = [size for size in (a_round - few, few) if size] + [a_round] * (ROUNDS - 1)
    run = max(1, min(a_round, source_rows, job.stages[job.flow[0]].first_batch_size // plan.samples_per_row))
    count = -(-a_round // run)
    starts = [round(place * (source_rows - run) / max(1, ROUNDS * count - 1)) for place in range(ROUNDS * count)]
    places = []
    for first in range(ROUNDS):
        wanted = a_round
        for start in starts[first::ROUNDS]:
            places += _places(plan, start, min(run, wanted))
            wanted -= min(run, wanted)
    generations = [Generation(f"{plan.hash}-{number}", size) for number, size in enumerate(sizes)]
    made = replace(
        plan, places=tuple(places), generations=tuple(generations), rows_per_shard=a_round * plan.samples_per_row
    )
    first_round = len(sizes) - ROUNDS + 1
    return made, [list(range(first_round)), *([shard] for shard in range(first_round, len(sizes)))]


def _places(plan: Plan, start: int, rows: int) -> list[tuple[int, int, int]]:
    """Where rows of the source lie: runs of fragment, first row, rows."""
    ends, found = list(accumulate(rows for _, _, rows in plan.runs)), []
    while rows:
        at = bisect_right(ends, start)
        fragment, first, length = plan.runs[at]
        skipped = start - (ends[at] - length)
        here = min(rows, length - skipped)
        found.append((fragment, first + skipped, here))
        start, rows = start + here, rows - here
    return found


class Stopwatch:
    """A pool, and how long its workers took for what they did in a round."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.orders: dict[int, Dispatch] = {}
        self.started: list[float] = []
        """When workers were ready."""

    def begin_round(self, stages: int) -> None:
        self.began, self.waited_before = time.monotonic(), self._waited()
        self.seconds, self.bytes = [0.0] * stages, [0.0] * stages
        self.commits: list[tuple[int, float]] = []

    def computing(self) -> float:
        """Seconds of the round in which the pool's own process had work; nan if its workers have processes of their own."""
        return time.monotonic() - self.began - (self._waited() - self.waited_before)

    def _waited(self) -> float:
        waited: float = getattr(self.pool, "waited", math.nan)
        return waited

    def submit(self, order: PoolOrder) -> None:
        if isinstance(order, Dispatch):
            self.orders[order.id] = order
        self.pool.submit(order)

    def collect(self, timeout: float) -> list[Event]:
        events = self.pool.collect(timeout)
        for event in events:
            if isinstance(event, Started):
                self.started.append(time.monotonic())
            elif isinstance(event, Finished):
                self._finished(self.orders.pop(event.id), event)
        return events

    def _finished(self, order: Dispatch, event: Finished) -> None:
        if order.task == "commit":
            self.commits.append((len(order.rows), event.seconds))
            return
        self.seconds[order.stage] += event.seconds
        self.bytes[order.stage] += event.bytes

    def release(self, block: int) -> None:
        self.pool.release(block)

    def close(self, leave: bool = False) -> None:
        self.pool.close(leave)


def _round(pool: Stopwatch, store: storage.Storage, plan: Plan, sink: Sink, shards: Sequence[int]) -> Round:
    computing = pool.computing()
    sizes: Counter[int] = Counter()
    for shard in shards:
        sizes[shard] = store.size(data_name(shard, sink)) or 0
    for name in store.names(FOLDER):
        if (of := side_file_shard(name)) is not None and of in shards:
            sizes[of] += store.size(f"{FOLDER}/{name}") or 0
    rows = {shard: len(plan.shard_rows(shard)) for shard in shards}
    files = [(rows[shard], float(sizes[shard])) for shard in shards]
    return Round(sum(rows.values()), computing, pool.seconds, pool.commits, pool.bytes, files)


def _columns(store: storage.Storage, sink: Sink, names: Sequence[str]) -> dict[str, float]:
    """What each column takes in some shards, compressed."""
    sizes: Counter[str] = Counter()
    for name in names if sink.suffix == ".parquet" else ():
        with store.open(name) as file:
            about = pq.ParquetFile(file).metadata
            for group in (about.row_group(number) for number in range(about.num_row_groups)):
                for column in (group.column(number) for number in range(group.num_columns)):
                    sizes[column.path_in_schema.partition(".")[0]] += column.total_compressed_size
    return dict(sizes.most_common())


def _nodes(job: Job) -> list[dict[str, float]]:
    """What the nodes have for workers, in Ray's words; none of a job in this process alone."""
    if job.cluster.kind == "inline":
        return []
    from latentmill.workers.nodes import alive

    return [dict(resources) for resources in alive().values()]

"""All that the driver knows. What it decides and what it takes in change this and nothing else."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from latentmill.driver.messages import Dispatch, StageSpec, StartWorker, TableSlice, WorkerOrder, WorkerType
from latentmill.driver.stopping import Stopping
from latentmill.driver.waiting import Chunk, Rank, Ranking, StageQueue, StageTime

MANY_KEYS = 64
"""Rankings of one stage, from which on those are dropped of which nothing waits."""


@dataclass
class OpenShard:
    """A shard on its way: what has arrived at its end, and what is still to come."""

    missing: set[int]
    """Rows that have neither arrived nor failed nor been filtered."""
    packed: list[TableSlice] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    filtered: list[dict[str, Any]] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    """Where batches are fixed: rows that were filtered and begin again as soon as no other row of the shard is under way."""
    failures: int = 0


class TakenUpRows(NamedTuple):
    """What the file of a shard had."""

    file: str
    attempt_of: Mapping[int, int]
    """Of each row the attempt that it was at."""


class Suspect(NamedTuple):
    """A row that failed alone, of which is not known yet whether it, its worker or its stage is to blame."""

    dispatch: Dispatch
    reason: str


@dataclass
class WorkerRecord:
    """How a worker has fared at a stage since it last finished something of it."""

    consecutive_failures: list[set[int]] = field(default_factory=list)
    """The rows of batches that failed on it and have none in common."""
    suspects: list[Suspect] = field(default_factory=list)
    """Rows that failed on it to the last. They are quarantined when the worker finishes something: it was the row. If the worker
    turns out to be broken, others try them again."""


@dataclass
class DriverState:
    """Everything that the driver knows."""

    stages: tuple[StageSpec, ...]
    rows: int
    """The number behind the last row's: shards in the middle may be short."""
    rows_per_shard: int
    done: set[int] = field(default_factory=set)
    """Shards that were committed before, or by other drivers."""
    shared: bool = False
    """Other drivers may work on this dataset: a shard is claimed before it is opened."""
    fixed: bool = False
    """Deterministic: batches are cut by row number, never by who arrives first, those of rows that are drawn again among them."""
    stop_on_error: bool = False
    """The first row that fails ends the job."""
    max_error_rate: float = 1.0
    """A larger share of failed rows ends it, once the share says something."""
    attempts: int | None = None
    """Of a job with ``accept``: samples of a row that are drawn at most, until one is not filtered."""
    accept_rows: int | None = None
    """Of a job with ``accept.rows``: how many accepted rows the dataset ends with."""
    drawn_in: int = 0
    """The stage that draws them: what is filtered before it would be the same again, and is filtered for good."""
    max_bytes_in_flight: float = inf
    """Bytes that may be between stages, in blocks that are there and in those that are to come."""
    row_name: Callable[[int], str] = str
    """How people are told of a row."""
    short: Mapping[int, int] = field(default_factory=dict)
    """How many rows those shards have that have fewer than others: the last of each generation."""
    last_stage: int = 0
    """The number of the last stage: the one that commits."""
    worker_types: tuple[WorkerType, ...] = ()
    """Which stages the workers host. By default each stage has one worker of its own."""

    # Shards
    cursor: int = 0
    """The next shard to open or to claim."""
    claiming: set[int] = field(default_factory=set)
    claimed: deque[int] = field(default_factory=deque)
    """Shards that are ours and not open yet."""
    leased_by_others: set[int] = field(default_factory=set)
    free_shards: deque[int] = field(default_factory=deque)
    """Shards that nobody works on: other drivers have not finished them, or they were taken out of the dataset."""
    shards: dict[int, OpenShard] = field(default_factory=dict)
    """Those that are open."""
    half_done: dict[int, str] = field(default_factory=dict)
    """Shards of which rows were left half done, each with its file."""
    to_take_up: deque[tuple[int, str, Sequence[int]]] = field(default_factory=deque)
    """Of open shards the rows that are to be taken up, as far as they were left half done, each with the file."""
    taken_up: dict[int, TakenUpRows] = field(default_factory=dict)
    """Of open shards what was taken up: if it is lost with a node, it is taken up again."""
    stopping: Stopping = field(default_factory=Stopping)
    complete: dict[int, None] = field(default_factory=dict)
    """Of those the ones of which nothing is missing and which wait for their commit, in that order."""

    # How many rows were accepted, of a job that ends with so many
    accepted: dict[int, int] = field(default_factory=dict)
    """Of shards in the dataset the rows that they store."""
    uncounted: set[int] = field(default_factory=set)
    """Shards in the dataset of which nobody has been asked yet."""
    first_uncounted: int = 0
    """All shards before it are in ``accepted``."""
    accepted_before_that: int = 0
    """The sum of these."""

    # Rows and batches
    to_read: deque[Sequence[int]] = field(default_factory=deque)
    attempt_of: Counter[int] = field(default_factory=Counter)
    """The attempt that a row of an open shard is at, from 0; those at their first need not be there."""
    queues: list[StageQueue] = field(default_factory=list)
    """For each stage, what waits for it."""
    in_flight: dict[int, Dispatch] = field(default_factory=dict)
    """Dispatches that were given out and have not come back, by number."""
    blocks: dict[int, int] = field(default_factory=dict)
    """Rows of a block that are still wanted."""
    block_bytes: dict[int, int] = field(default_factory=dict)
    """The size of each of them that is between stages."""
    bytes_held: int = 0
    """The sum of these."""
    bytes_of_row: Counter[int] = field(default_factory=Counter)
    """For each stage, what a row takes behind it, by what it has made lately."""
    released: list[int] = field(default_factory=list)
    """Blocks that nothing needs any more: whoever holds them empties this list."""

    # Workers
    worker_orders: list[WorkerOrder] = field(default_factory=list)
    """Not given out yet."""
    starting: set[tuple[int, int]] = field(default_factory=set)
    type_of: list[int] = field(default_factory=list)
    """The worker type that hosts each stage."""
    workers: list[dict[int, list[int]]] = field(default_factory=list)
    """For each worker type, each ready worker's dispatches, oldest first."""
    loaded_types: set[int] = field(default_factory=set)
    """Worker types of which a worker has been ready."""
    targets: list[int] = field(default_factory=list)
    """For each worker type, how many workers are wanted: there, starting, or about to be started, less those that leave."""
    leaving: dict[int, int] = field(default_factory=dict)
    """Workers that are given nothing more and end when they hold nothing, each with its type."""
    busy: Counter[int] = field(default_factory=Counter)
    """For each stage, how many workers have something to do for it."""
    rows_in_flight: Counter[int] = field(default_factory=Counter)
    """For each stage, how many rows its workers hold; commits don't count."""
    rankings: list[dict[Any, Ranking]] = field(default_factory=list)
    """For each stage, and stack key where that matters, its workers by what they hold."""

    # What decides how many workers there are
    nodes: Sequence[Mapping[str, float]] | None = None
    """What each node has for them; None if nobody says."""
    more_come: bool = False
    asked_for: tuple[int, ...] = ()
    """Whether more nodes come for who asks; for each worker type, how many more were last asked for; empty: as if nobody knew."""
    stage_times: list[StageTime] = field(default_factory=list)
    loading_seconds: list[float] = field(default_factory=list)
    """For each worker type, how long one takes to be ready: the shortest time of any, since others waited for a place."""
    memory_seen: list[float] = field(default_factory=list)
    """For each worker type, the most bytes that one has held."""
    most_replicas: list[float] = field(default_factory=list)
    """For each worker type, how many could be started: one more could not."""
    largest_targets: list[int] = field(default_factory=list)
    """For each worker type, the most that were wanted at a time: failures are counted over a while."""
    room_changed: bool = False
    to_follow: bool = False
    """Nodes have come or gone, or workers hold more than was seen: those that are wanted may have no room. To follow: fewest and most."""
    measured_batches: int = 0
    batches_to_measure: int = 1
    """After so many the numbers are looked at again."""
    looks: int = 0
    """How often that was."""

    # Failures
    worked_stages: set[int] = field(default_factory=set)
    """Stages that have done a row: one that was filtered in them is done."""
    worked_before: dict[int, bool] = field(default_factory=dict)
    """Of each stage of which it was asked, whether the dataset shows that it has worked before."""
    quarantined_on_trust: Counter[int] = field(default_factory=Counter)
    """Rows of stages that have not worked in this run, quarantined because the dataset shows that the stages worked before."""
    load_failures: Counter[int] = field(default_factory=Counter)
    """How often a stage's workers could not load weights that they first needed when they worked."""
    records: dict[tuple[int, int], WorkerRecord] = field(default_factory=dict)
    """Of each stage and worker of it that has failed at something and not succeeded since."""
    fatal_suspects: list[Suspect] = field(default_factory=list)
    """Rows that ended every worker that had them alone, of stages that have not worked yet."""
    losses: Counter[int] = field(default_factory=Counter)
    """How often a row's data, or the worker that held it, was lost with a node."""
    deaths: list[list[set[int]]] = field(default_factory=list)
    """For each stage, the rows that its workers held when they died, since it last finished something."""
    failed: str = ""
    """Why the job can't go on, if it can't."""
    output_failed: bool = False
    """That is because a shard can't be committed."""

    # Counts
    next_id: int = 0
    next_worker: int = 0
    finished_rows: Counter[int] = field(default_factory=Counter)
    """Rows that each stage has done."""
    rows_read: int = 0
    """Rows that were read: again if they were lost, not if they were drawn again."""
    committed_ok: int = 0
    committed_failed: int = 0
    committed_filtered: int = 0
    committed_not_needed: int = 0
    committed_shards: int = 0
    arrived: int = 0
    """Rows that have left the last stage, committed or not."""
    failed_rows: Counter[int] = field(default_factory=Counter)
    """Rows that failed in each stage, committed or not."""
    quarantined: int = 0
    """Rows that failed, committed or not."""
    filtered: int = 0
    """Rows that were filtered, committed or not."""
    ended_rows: Counter[int] = field(default_factory=Counter)
    """Rows that failed or were filtered in each stage, committed or not."""
    drawn_again: Counter[int] = field(default_factory=Counter)
    """How often a row was filtered in each stage and begun again."""

    def __post_init__(self) -> None:
        self.last_stage = (count := len(self.stages)) - 1
        if not self.worker_types:
            self.worker_types = tuple(WorkerType((stage,)) for stage in range(count))
        types = {stage: number for number, hosts in enumerate(self.worker_types) for stage in hosts.stages}
        self.type_of = [types[stage] for stage in range(count)]
        self.queues = [StageQueue(spec.batch_size, self._chunk_rows(spec)) for spec in self.stages]
        self.workers = [{} for _ in self.worker_types]
        self.rankings = [{} for _ in range(count)]
        self.deaths = [[] for _ in range(count)]
        self.stage_times = [StageTime() for _ in range(count)]
        self.loading_seconds, self.memory_seen = [inf] * len(self.worker_types), [0.0] * len(self.worker_types)
        self.targets = [hosts.fewest or hosts.replicas or 1 for hosts in self.worker_types]
        self.largest_targets, self.most_replicas = list(self.targets), [inf] * len(self.targets)
        for number, wanted in enumerate(self.targets):
            for _ in range(wanted):
                self.start_worker(number)
        self._skip_done()

    def _chunk_rows(self, spec: StageSpec) -> Callable[[Chunk], int] | None:
        if not self.fixed:
            return None
        return lambda chunk: min(spec.batch_size, len(self.shard_rows(chunk[0])) - chunk[1] * spec.batch_size)

    def start_worker(self, worker_type: int) -> None:
        """Order a new worker of a type."""
        self.worker_orders.append(StartWorker(worker_type, self.next_worker))
        self.next_worker += 1

    def next_shard(self) -> int:
        """Take the next shard that isn't done."""
        shard = self.cursor
        self.cursor += 1
        self._skip_done()
        return shard

    def _skip_done(self) -> None:
        while self.cursor in self.done:
            self.cursor += 1

    @property
    def shard_count(self) -> int:
        """Shards of the plan."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Row numbers of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.short.get(shard, self.rows_per_shard), self.rows))

    def chunk(self, stage: int, row: int) -> Chunk:
        """The batch that a row belongs to when batches are fixed: its shard, and the batch's place in it."""
        shard, place = divmod(row, self.rows_per_shard)
        return shard, place // self.stages[stage].batch_size

    def replicas(self, stage: int) -> int:
        """How many workers are wanted that host a stage."""
        return self.targets[self.type_of[stage]]

    def most_replicas_so_far(self, stage: int) -> int:
        """How many workers were wanted at most that host a stage."""
        return self.largest_targets[self.type_of[stage]]

    def workers_of(self, stage: int) -> dict[int, list[int]]:
        """The ready workers that host a stage, each with its dispatches, of all stages that it hosts, oldest first."""
        return self.workers[self.type_of[stage]]

    def rows_done(self, stage: int, rows: Sequence[int]) -> None:
        """Count what a stage has done."""
        self.finished_rows[stage] += len(rows)
        if stage == 0:
            self.rows_read += sum(not self.attempt_of[row] for row in rows)

    def worker_came(self, worker_type: int, worker: int) -> None:
        """A worker is ready, and can be given work."""
        self.loaded_types.add(worker_type)
        self.workers[worker_type][worker] = []
        self._holds_less(worker_type, worker)

    def worker_gone(self, worker_type: int, worker: int) -> list[Dispatch]:
        """A worker is no more. Returns the dispatches that it held."""
        ids = tuple(self.workers[worker_type].get(worker, ()))
        held = [self.taken_back(id) for id in ids]
        self.workers[worker_type].pop(worker, None)
        for stage in self.worker_types[worker_type].stages:
            self.stage_times[stage].seen.discard(worker)
        return held

    def given(self, dispatch: Dispatch) -> Dispatch:
        """Number a dispatch and note that its worker has it."""
        dispatch.id = self.next_id
        self.next_id += 1
        self.in_flight[dispatch.id] = dispatch
        ids = self.workers_of(dispatch.stage)[dispatch.worker]
        if not any(self.in_flight[id].stage == dispatch.stage for id in ids):
            self.busy[dispatch.stage] += 1
        ids.append(dispatch.id)
        if dispatch.task not in ("commit", "keep"):
            self.rows_in_flight[dispatch.stage] += len(dispatch.rows)
        return dispatch

    def taken_back(self, id: int) -> Dispatch:
        """Note that a worker has a dispatch no more."""
        dispatch = self.in_flight.pop(id)
        ids = self.workers_of(dispatch.stage)[dispatch.worker]
        ids.remove(id)
        if not any(self.in_flight[other].stage == dispatch.stage for other in ids):
            self.busy[dispatch.stage] -= 1
        if dispatch.task not in ("commit", "keep"):
            self.rows_in_flight[dispatch.stage] -= len(dispatch.rows)
        self._holds_less(self.type_of[dispatch.stage], dispatch.worker)
        return dispatch

    def _holds_less(self, worker_type: int, worker: int) -> None:
        for stage in self.worker_types[worker_type].stages:
            for ranking in self.rankings[stage].values():
                ranking.add(worker)

    def least_loaded(self, stage: int, key: Any = None) -> Rank | None:
        """The rank of the worker that can be given a batch of ``key`` for a stage and holds the least.

        It is (what it holds for the stage and that key, how many dispatches it holds in all, its number).
        """
        spec, found = self.stages[stage], self.rankings[stage]
        key = key if spec.running_batches > 1 else None
        if key not in found:
            if len(found) >= MANY_KEYS:
                self.rankings[stage] = found = {key: found[key] for key in found if key in self.queues[stage].slices}
            found[key] = Ranking(lambda worker: self._rank(stage, key, worker), self.workers_of(stage))
        return found[key].first()

    def _rank(self, stage: int, key: Any, worker: int) -> Rank | None:
        """None if a worker can be given no batch of ``key``. One that tries something again is given nothing else: should it
        die once more, it is clear of what.
        """
        spec, ids = self.stages[stage], self.workers_of(stage).get(worker)
        if ids is None or worker in self.leaving:
            return None
        held = [self.in_flight[id] for id in ids]
        if any(dispatch.failures for dispatch in held):
            return None
        here = [dispatch for dispatch in held if dispatch.stage == stage]
        if spec.running_batches == 1:
            load, fits = len(here), len(here) < spec.batches_per_worker
        else:  # it stacks small batches of one key
            most = spec.batches_per_worker * spec.batch_size
            load = sum(len(dispatch.rows) for dispatch in here if dispatch.stack_key == key)
            fits = load < most and sum(len(dispatch.rows) for dispatch in here) < most * spec.running_batches
        return (load, len(held), worker) if fits else None

    def rows_queued(self, stage: int) -> int:
        """Rows that wait for a stage."""
        return self.queues[stage].rows

    def bytes_to_come(self) -> float:
        """Bytes that what the workers hold now is going to be, between stages."""
        return sum(self.rows_in_flight[stage] * self.bytes_of_row[stage] for stage in range(self.last_stage))

    def block_came(self, dispatch: Dispatch, rows: int, size: int) -> None:
        """A stage has made a block of so many rows that are wanted, and bytes. That of the last stage waits for its shard."""
        self.blocks[dispatch.id] = rows
        if dispatch.stage == self.last_stage:
            return
        self.block_bytes[dispatch.id] = size
        self.bytes_held += size
        # The largest of late: rows may differ in size, and what is to come is better over- than underestimated.
        self.bytes_of_row[dispatch.stage] = max(size // rows, self.bytes_of_row[dispatch.stage] * 9 // 10)

    def suspects(self, stage: int) -> list[Suspect]:
        """The suspects of a stage, of workers that live and of those that died."""
        if not self.records and not self.fatal_suspects:
            return []
        of_workers = [suspect for record in self.records.values() for suspect in record.suspects]
        return [suspect for suspect in (*of_workers, *self.fatal_suspects) if suspect.dispatch.stage == stage]

    def drop(self, slice_: TableSlice) -> None:
        """A slice's rows are wanted no more. A block of which no row is wanted is released."""
        self.blocks[slice_.block] -= len(slice_.rows)
        if not self.blocks[slice_.block]:
            del self.blocks[slice_.block]
            self.bytes_held -= self.block_bytes.pop(slice_.block, 0)
            self.released.append(slice_.block)


def finished(state: DriverState) -> bool:
    """Whether every shard is committed, by whomever."""
    left = state.shards or state.claiming or state.claimed or state.leased_by_others or state.free_shards
    return state.cursor >= state.shard_count and not left

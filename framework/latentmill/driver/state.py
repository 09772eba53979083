"""All that the driver knows. What it decides and what it takes in change this and nothing else."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from latentmill.driver.messages import Dispatch, StageSpec, StartWorker, StopWorker, TableSlice


@dataclass
class OpenShard:
    """A shard on its way: what has arrived at its end, and what is still to come."""

    missing: set[int]
    """Rows that have neither arrived nor failed."""
    packed: list[TableSlice] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    committing: bool = False
    attempts: int = 0


@dataclass
class Retry:
    """Work that failed and is tried again as one unit."""

    rows: Sequence[int]
    slices: list[TableSlice]
    attempts: int


class Suspect(NamedTuple):
    """A row that failed alone, of which is not known yet whether it, its worker or its stage is to blame."""

    dispatch: Dispatch
    reason: str


@dataclass
class WorkerRecord:
    """How a worker has fared since it last finished something."""

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
    rows_per_shard: int
    done: set[int] = field(default_factory=set)
    """Shards that were committed before, or by other drivers."""
    shared: bool = False
    """Other drivers may work on this dataset: a shard is claimed before it is opened."""
    fixed: bool = False
    """Deterministic: batches are cut by row number, never by who arrives first."""
    stop_on_error: bool = False
    """The first row that fails ends the job."""
    max_error_rate: float = 1.0
    """A larger share of failed rows ends it, once the share says something."""
    row_name: Callable[[int], str] = str
    """How people are told of a row."""

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

    # Rows and batches
    to_read: deque[Sequence[int]] = field(default_factory=deque)
    queues: list[dict[Any, deque[TableSlice]]] = field(default_factory=list)
    """For each stage, what waits for it, by stack key."""
    retries: list[deque[Retry]] = field(default_factory=list)
    """For each stage, what failed and waits to be tried again."""
    accounted: list[Counter[tuple[int, int]]] = field(default_factory=list)
    """Fixed only: how many rows of (shard, chunk) have reached a stage or failed before it."""
    in_flight: dict[int, Dispatch] = field(default_factory=dict)
    """Dispatches that were given out and have not come back, by number."""
    blocks: dict[int, int] = field(default_factory=dict)
    """Rows of a block that are still wanted."""
    released: list[int] = field(default_factory=list)
    """Blocks that nothing needs any more: whoever holds them empties this list."""

    # Workers
    worker_orders: list[StartWorker | StopWorker] = field(default_factory=list)
    """Not given out yet."""
    starting: set[tuple[int, int]] = field(default_factory=set)
    workers: list[dict[int, list[int]]] = field(default_factory=list)
    """For each stage, each ready worker's dispatches, oldest first."""
    loaded_stages: set[int] = field(default_factory=set)
    """Stages of which a worker has been ready."""

    # Failures
    worked_stages: set[int] = field(default_factory=set)
    """Stages that have done a row."""
    dataset_holds_ok: bool | None = None
    """Whether the dataset holds a row that is ok; None until that was asked."""
    quarantined_on_trust: Counter[int] = field(default_factory=Counter)
    """Rows of stages that have not worked in this run, quarantined because the dataset shows that the stages worked before."""
    load_failures: Counter[int] = field(default_factory=Counter)
    """How often a stage's workers could not load weights that they first needed when they worked."""
    records: dict[int, WorkerRecord] = field(default_factory=dict)
    """Of each worker that has failed at something and not succeeded since."""
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
    committed_ok: int = 0
    committed_failed: int = 0
    committed_shards: int = 0
    arrived: int = 0
    """Rows that have left the last stage, committed or not."""
    quarantined: int = 0
    """Rows that failed, committed or not."""

    def __post_init__(self) -> None:
        count = len(self.stages)
        self.queues = [{} for _ in range(count)]
        self.retries = [deque() for _ in range(count)]
        self.accounted = [Counter() for _ in range(count)]
        self.workers = [{} for _ in range(count)]
        self.deaths = [[] for _ in range(count)]
        for stage, spec in enumerate(self.stages):
            for _ in range(spec.replicas):
                self.start_worker(stage)
        self._skip_done()

    def start_worker(self, stage: int) -> None:
        """Order a new worker of a stage."""
        self.worker_orders.append(StartWorker(stage, self.next_worker))
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
    def last_stage(self) -> int:
        """The number of the last stage: the one that commits."""
        return len(self.stages) - 1

    @property
    def shard_count(self) -> int:
        """Shards of the plan."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Row numbers of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def chunk(self, stage: int, row: int) -> tuple[int, int]:
        """The batch that a row belongs to when batches are fixed: its shard, and the batch's place in it."""
        shard, place = divmod(row, self.rows_per_shard)
        return shard, place // self.stages[stage].batch_size

    def rows_queued(self, stage: int) -> int:
        """Rows that wait for a stage."""
        waiting = sum(len(slice_.rows) for queue in self.queues[stage].values() for slice_ in queue)
        return waiting + sum(len(retry.rows) for retry in self.retries[stage])

    def rows_in_flight(self, stage: int) -> int:
        """Rows that a stage's workers hold."""
        held = (self.in_flight[id] for ids in self.workers[stage].values() for id in ids)
        return sum(len(dispatch.rows) for dispatch in held if dispatch.task != "commit")

    def suspects(self, stage: int) -> list[Suspect]:
        """The suspects of a stage, of workers that live and of those that died."""
        of_workers = [suspect for record in self.records.values() for suspect in record.suspects]
        return [suspect for suspect in (*of_workers, *self.fatal_suspects) if suspect.dispatch.stage == stage]

    def drop(self, slice_: TableSlice) -> None:
        """A slice's rows are wanted no more. A block of which no row is wanted is released."""
        self.blocks[slice_.block] -= len(slice_.rows)
        if not self.blocks[slice_.block]:
            del self.blocks[slice_.block]
            self.released.append(slice_.block)


def finished(state: DriverState) -> bool:
    """Whether every shard is committed, by whomever."""
    left = state.shards or state.claiming or state.claimed or state.leased_by_others or state.free_shards
    return state.cursor >= state.shard_count and not left

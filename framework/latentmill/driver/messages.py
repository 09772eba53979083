"""What the driver says to the workers, and what it hears: orders and events.

A stage's output for one dispatch is a *block*: a list of tables, one for each shape of tensors. The driver never sees a block.
It knows the row numbers in it. A *slice* is a run of rows of one table of a block, on its way into the next batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from latentmill.plugin import Reason


@dataclass(frozen=True)
class StageSpec:
    """What the driver must know of a stage."""

    name: str
    batch_size: int
    batches_per_worker: int = 2
    """Batches that a worker is given at a time: it computes one, and the next is ready when it has."""
    running_batches: int = 1
    """Stack keys of which a worker may have ``batches_per_worker`` batches each. A stage that works continuously, on all rows of
    one stack key together, takes more than 1."""
    retries: int = 1
    """How often a batch that failed is tried again as it is, before it is split to find the row."""


@dataclass(frozen=True)
class WorkerType:
    """Workers that are alike: they host the same stages, and each computes one batch at a time, of whichever stage."""

    stages: tuple[int, ...]
    replicas: int | None = 1
    """How many are wanted; None: one at first, and then as many as are of use and the nodes have room for."""
    asks: Mapping[str, float] = field(default_factory=dict)
    """What each asks of its node, in Ray's words: CPU, GPU, memory."""
    fewest: int | None = None
    """Of a number that is given, how many there are at least: the others come and go with the nodes. None: all of them."""


@dataclass(frozen=True)
class TableSlice:
    """Rows ``start`` to ``stop`` of a table of a block."""

    block: int
    """The number of the dispatch that made the block."""
    table: int
    start: int
    stop: int
    rows: tuple[int, ...]
    """The row numbers, one for each row."""

    def sub(self, start: int, stop: int | None) -> TableSlice:
        """Rows ``start`` to ``stop`` of this slice, counted from its own start."""
        rows = self.rows[start:stop]
        return TableSlice(self.block, self.table, self.start + start, self.start + start + len(rows), rows)


# ------------------------------------------------------------------------------------------------------- orders


@dataclass
class Dispatch:
    """An order to a worker: read rows, work on a batch of slices, or commit a shard; keep what is half done of a shard, or take that up."""

    id: int
    task: Literal["read", "batch", "commit", "keep", "take up"]
    stage: int
    worker: int
    rows: Sequence[int]
    slices: list[TableSlice] = field(default_factory=list)
    shard: int = -1
    errors: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    """How often these rows have failed together. Above 0, the worker is given nothing else meanwhile."""
    stack_key: Any = None
    """The key of the queue that the rows come from; None for what is tried again. Rows of one key can be stacked."""
    filtered: list[dict[str, Any]] = field(default_factory=list)
    """Of a commit: those of the shard's rows that were filtered; ``errors`` are those that failed."""
    not_needed: int = 0
    """Of a commit: so many rows at the shard's end are not needed, whatever became of them."""
    attempts: Sequence[int] = ()
    """Of a read: the attempt that each row is at, from 0; nothing if all are at their first."""
    stages: Sequence[int] = ()
    """Of a keep: for each slice the stage that its rows come to next; behind the last stage they wait for the rest of their shard."""
    attempt_of: Mapping[int, int] = field(default_factory=dict)
    """Of a keep: the attempts of those of the shard's rows that are not at their first."""
    file: str = ""
    """Of a take up: the name of the file of half-done rows."""

    def blocks(self) -> list[int]:
        """The blocks that its slices are of, each once."""
        return list(dict.fromkeys(slice_.block for slice_ in self.slices))

    def addresses(self) -> list[tuple[int, int, int, int]]:
        """Its slices, for who is given ``blocks``: the place of the block there, the table, from which row, to which."""
        at = {block: place for place, block in enumerate(self.blocks())}
        return [(at[slice_.block], slice_.table, slice_.start, slice_.stop) for slice_ in self.slices]


@dataclass(frozen=True)
class StartWorker:
    """An order to the pool: start a worker of a type."""

    worker_type: int
    worker: int


@dataclass(frozen=True)
class StopWorker:
    """An order to the pool: end a worker that is not wanted, or fails at whatever it is given. What it held is given out anew."""

    worker_type: int
    worker: int
    reason: str = ""
    """What it fails with, if it does."""


@dataclass(frozen=True)
class AskFor:
    """An order to the pool, where nodes come for who asks: so many workers more of each type would be of use if there was room.

    It holds until the next.
    """

    more: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """An order to whoever keeps the leases: try to get this shard for us."""

    shard: int


@dataclass(frozen=True)
class CheckDataset:
    """An order to whoever sees the dataset: say whether it shows that a stage has worked before."""

    stage: int


@dataclass(frozen=True)
class CountRows:
    """An order to whoever sees the dataset: say how many rows these shards of others store."""

    shards: frozenset[int]


@dataclass(frozen=True)
class HandOver:
    """An order to a worker, as the driver stops or its node is drained: give back all that is not at its end, as far as it is."""

    worker: int


WorkerOrder: TypeAlias = "StartWorker | StopWorker | AskFor | HandOver"
PoolOrder: TypeAlias = "WorkerOrder | Dispatch"
Order: TypeAlias = "PoolOrder | Claim | CheckDataset | CountRows"

# ------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class Started:
    """A worker is ready."""

    worker_type: int
    worker: int
    seconds: float = 0.0
    """How long that took."""
    memory: int = 0
    """The bytes that it holds."""


@dataclass(frozen=True)
class Finished:
    """A dispatch is done."""

    id: int
    tables: Sequence[tuple[str, tuple[int, ...]]] = ()
    """For each table of the block, its shape key and its row numbers."""
    rejected: Sequence[tuple[int, Reason]] = ()
    """Row numbers that go no further, with the reason."""
    bytes: int = 0
    """The size of the block."""
    seconds: float = 0.0
    """How long the stage has computed in its worker since that last finished something of it."""
    memory: int = 0
    """The bytes that the worker holds."""


@dataclass(frozen=True)
class Failed:
    """A dispatch was not done."""

    id: int
    cause: Literal["raised", "lost", "unloaded", "contract", "store"]
    """Its stage raised; its input was lost with a node; its stage could not load weights that it first needed now; a plugin broke
    the contract; a store failed."""
    reason: str = ""


@dataclass(frozen=True)
class Died:
    """A worker is gone. All that it held is suspect, and is tried again on a worker of its own."""

    worker_type: int
    worker: int
    reason: str = ""
    at_start: bool = False
    """It raised while it was being built or loaded. If no worker of its type has ever been ready, none will be. If its type's
    number is found and others are there, it was one too many."""
    with_node: bool = False
    """Its node went, and all that was on it: no row is to blame."""
    wrong: bool = False
    """It is not what the plan says, and no other on its node would be. Ends the job, unless it was one too many: no row is to blame."""


@dataclass(frozen=True)
class Draining:
    """A worker's node is about to be taken away."""

    worker_type: int
    worker: int


@dataclass(frozen=True)
class NodesSeen:
    """What each node has for this job's workers, those included that are there: a cluster grows, and loses nodes."""

    nodes: tuple[Mapping[str, float], ...]
    more_come: bool = False
    """More nodes come if the pool is told to ask for them: the cluster has an autoscaler."""


@dataclass(frozen=True)
class Claimed:
    """What became of a claim: the shard is ours to do, another driver has taken it, or it is in the dataset already."""

    shard: int
    outcome: Literal["ours", "taken", "done"]
    half_done: str = ""
    """If it is ours: the file of rows of it that a driver left half done, if there is one."""


@dataclass(frozen=True)
class DatasetChecked:
    """The answer to ``CheckDataset``: whether a row has been through the stage, in an earlier run or in another driver's. One that is
    ok has been through every stage, one that was filtered through those up to the one that filtered it.
    """

    stage: int
    worked: bool


@dataclass(frozen=True)
class LeasesSeen:
    """Of the shards that others had leased: those that are in the dataset now, and those that nobody works on any more."""

    done: frozenset[int]
    free: frozenset[int]


@dataclass(frozen=True)
class TakenOut:
    """Shards that were done are in the dataset no more: somebody wants them done again."""

    shards: frozenset[int]


@dataclass(frozen=True)
class Stop:
    """The driver is to stop: it opens no shard and reads no row any more."""

    how: Literal["finish", "hand over", "keep"]
    """``finish``: go on with what has been read, for a while; ``hand over``: have the workers give back what they hold; ``keep``: wait
    for none of them any longer. Each goes further than the one before."""


@dataclass(frozen=True)
class RowsCounted:
    """How many rows shards store; of one that is there no more, none."""

    rows: Mapping[int, int]


@dataclass(frozen=True)
class HandedOver:
    """A dispatch came back before its end."""

    id: int
    tables: Sequence[tuple[str, tuple[int, ...]]] | None = None
    """Its rows as its stage left them, half-way, for each table of the block; None: they are what they were when it was given out."""
    rejected: Sequence[tuple[int, Reason]] = ()
    bytes: int = 0
    begun: bool = False
    """Whether the stage had begun with what it gives back as it was."""


@dataclass(frozen=True)
class TakenUp:
    """What was half done of a shard is here again. Rows that it doesn't name begin from the source."""

    id: int
    tables: Sequence[tuple[int, str, tuple[int, ...]]] = ()
    """For each table of the block: the stage that its rows come to next, its shape key and its row numbers."""
    filtered: Sequence[Mapping[str, Any]] = ()
    attempts: Mapping[int, int] = field(default_factory=dict)
    """The attempt that rows are at, of those that are not at their first."""


Event: TypeAlias = "Started | Finished | Failed | Died | Draining | NodesSeen | Claimed | LeasesSeen | DatasetChecked | RowsCounted | TakenOut | Stop | HandedOver | TakenUp"

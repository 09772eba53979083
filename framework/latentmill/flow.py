"""Which batch goes where next: pure decisions over a state. No Ray, no clock, no I/O, no tensors.

``decide(state)`` says what to dispatch; ``apply(state, event)`` takes what happened. Both change the state that they are
given and touch nothing else, so the same events give the same decisions: on a cluster, in one process, in a simulation.

What goes wrong climbs a ladder. A batch that raised is tried again as the stage's retries say, then in halves, down to the
row. A row that fails alone is a *verdict* of the worker that it failed on: it is quarantined once that worker does something
else right. Batches without a common row that fail on one worker are *strikes*: after three it is the worker, which is
stopped, and its verdicts are tried elsewhere. A worker's *death* makes all that it held suspects, tried one at a time, unless
its node went with it. Deaths over different rows with nothing done in between end the job: then it is the stage.

No row is quarantined for an exception or a death before its stage has *worked*: done a row. While it has not, verdicts wait, and
when nothing else is left to do it is the stage that fails, and the job ends. Two things are a stage's fault at once: it can't
load its part, and its plugin breaks the contract. A row that a stage rejects, with a reason, is another matter: it is the row's fault.

A stage's output is a *block*: a list of tables (*parts*), one for each tensor shape. The flow never sees it; it knows the
row numbers in it. A *piece* is a run of rows of one part, on its way into a stage's next batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

LOSSES = 20
"""How often a node may take a row's data or its worker away."""
DEATHS = 3
"""Deaths of a stage's workers, for each replica, over rows that have none in common and with no batch finished in between,
that end the job. One row that kills, in smaller and smaller batches until it is found, counts once."""
ENOUGH = 100
"""Rows from which on a share of them says something about the rest."""
STRIKES = 3
"""Batches that have no row in common and fail on one worker in a row: then it is the worker, and not the rows."""


@dataclass(frozen=True)
class StageSpec:
    """What the flow must know of a stage."""

    name: str
    batch_size: int
    replicas: int = 1
    in_flight: int = 2
    """Batches given to a worker at a time: one that computes, and one that is ready when it has."""
    kinds: int = 1
    """Kinds of batches (of one shape, one scheduler) of which a worker may have ``in_flight`` each: more than 1 for a stage
    that works on all its batches at once, and only on those of a kind together."""
    retries: int = 1
    """How often a batch that failed is tried again as it is, before it is split to find the row."""


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a block's part."""

    block: int
    part: int
    start: int
    stop: int
    rows: tuple[int, ...]
    """The row numbers, one for each."""


@dataclass
class Dispatch:
    """An order to a worker: read rows, work on pieces, or commit a shard."""

    id: int
    kind: Literal["read", "batch", "commit"]
    stage: int
    worker: int
    rows: Sequence[int]
    pieces: list[Piece] = field(default_factory=list)
    shard: int = -1
    errors: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    group: Any = None
    """Whose rows these are: the key of the queue that they come from."""


@dataclass(frozen=True)
class Start:
    """An order to the pool: start a worker of a stage."""

    stage: int
    worker: int


@dataclass(frozen=True)
class Stop:
    """An order to the pool: end a worker that fails whatever it is given. What it held is given out anew."""

    stage: int
    worker: int


@dataclass(frozen=True)
class Claim:
    """An order to whoever keeps the leases: try to get this shard for us."""

    shard: int


@dataclass(frozen=True)
class Ask:
    """An order to whoever sees the dataset: say whether it holds a row that is ok."""


Order: TypeAlias = "Start | Stop | Dispatch"


@dataclass(frozen=True)
class Started:
    """A worker is ready."""

    stage: int
    worker: int


@dataclass(frozen=True)
class Finished:
    """A dispatch is done. ``parts``: for each table of the block, its shape key and its row numbers."""

    id: int
    parts: Sequence[tuple[str, tuple[int, ...]]] = ()
    rejected: Sequence[tuple[int, str]] = ()
    """Row numbers that end in the error table, with the reason."""


@dataclass(frozen=True)
class Failed:
    """A dispatch was not done."""

    id: int
    cause: Literal["raised", "lost", "unloaded", "contract"]
    """Its stage raised; its input was lost with a node; its stage could not load a part, first wanted now; a plugin broke the
    contract."""
    reason: str = ""


@dataclass(frozen=True)
class Died:
    """A worker is gone. All that it held is suspect, and is tried again on a worker of its own."""

    stage: int
    worker: int
    reason: str = ""
    at_start: bool = False
    """It raised while it was being built or loaded. If no worker of its stage has ever been ready, none will be."""
    with_node: bool = False
    """Its node went, and all that was on it: no row is to blame."""
    wrong: bool = False
    """It is not what the plan says, and no other on its node would be. Ends the job: no row is to blame."""


@dataclass(frozen=True)
class Claimed:
    """What became of a claim: the shard is ours to do, another driver has taken it, or it is in the dataset already."""

    shard: int
    outcome: Literal["ours", "taken", "done"]


@dataclass(frozen=True)
class Shown:
    """The answer to ``Ask``: an ok row has been through every stage, in an earlier run or in another driver's."""

    ok: bool


@dataclass(frozen=True)
class Seen:
    """Of the shards that others had taken: those that are in the dataset now, and those that nobody works on any more."""

    done: frozenset[int]
    free: frozenset[int]


@dataclass(frozen=True)
class TakenOut:
    """Shards that were done are in the dataset no more: somebody wants them done again."""

    shards: frozenset[int]


Event: TypeAlias = "Started | Finished | Failed | Died | Claimed | Seen | Shown | TakenOut"


@dataclass
class Shard:
    """A shard on its way: what has arrived at its end, and what is still to come."""

    open: set[int]
    packed: list[Piece] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    committing: bool = False
    attempts: int = 0


@dataclass
class Retry:
    """Work that failed and is tried again as one unit."""

    rows: Sequence[int]
    pieces: list[Piece]
    attempts: int


@dataclass
class Record:
    """How a worker has fared since it last finished something."""

    strikes: list[set[int]] = field(default_factory=list)
    """The rows of batches that failed on it and have none in common."""
    verdicts: list[tuple[Dispatch, str]] = field(default_factory=list)
    """Rows that failed on it to the last, with the reason. They are quarantined when the worker finishes something: it
    was the row. If the worker turns out to be broken, others try them again."""


@dataclass
class State:
    """Everything that the flow knows."""

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

    cursor: int = 0
    """The next shard to open or to claim."""
    claiming: set[int] = field(default_factory=set)
    claimed: deque[int] = field(default_factory=deque)
    """Shards that are ours and not open yet."""
    elsewhere: set[int] = field(default_factory=set)
    """Shards that other drivers have taken."""
    free: deque[int] = field(default_factory=deque)
    """Shards that nobody works on: other drivers have not finished them, or they were taken out of the dataset."""
    shards: dict[int, Shard] = field(default_factory=dict)
    to_read: deque[Sequence[int]] = field(default_factory=deque)
    queues: list[dict[Any, deque[Piece]]] = field(default_factory=list)
    retries: list[deque[Retry]] = field(default_factory=list)
    accounted: list[Counter[tuple[int, int]]] = field(default_factory=list)
    """Fixed only: how many rows of (shard, chunk) have reached a stage or failed before it."""
    workers: list[dict[int, list[int]]] = field(default_factory=list)
    """For each stage, each ready worker's dispatches, oldest first."""
    starting: set[tuple[int, int]] = field(default_factory=set)
    proven: set[int] = field(default_factory=set)
    """Stages of which a worker has been ready."""
    to_start: list[Start | Stop] = field(default_factory=list)
    worked: set[int] = field(default_factory=set)
    """Stages that have done a row."""
    shown: bool | None = None
    """Whether the dataset holds a row that is ok; None until that was asked."""
    judged: Counter[int] = field(default_factory=Counter)
    """Rows of stages that have not worked in this run which were quarantined because of what was shown."""
    unloaded: Counter[int] = field(default_factory=Counter)
    """How often a stage's workers could not load a part that was first wanted when they worked."""
    records: dict[int, Record] = field(default_factory=dict)
    """Of each worker that has failed at something and not succeeded since."""
    fatal: list[tuple[Dispatch, str]] = field(default_factory=list)
    """Rows that ended every worker that had them alone, with the reason, of stages that have not worked yet."""
    flying: dict[int, Dispatch] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    """Rows of a block that are still wanted."""
    released: list[int] = field(default_factory=list)
    """Blocks that nothing needs any more: whoever holds them empties this list."""
    losses: Counter[int] = field(default_factory=Counter)
    deaths: list[list[set[int]]] = field(default_factory=list)
    """For each stage, the rows that its workers held when they died, since it last finished something."""
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
    failed: str = ""
    """Why the job can't go on, if it can't."""
    output_failed: bool = False
    """That is because a shard can't be committed."""

    def __post_init__(self) -> None:
        count = len(self.stages)
        self.queues = [{} for _ in range(count)]
        self.retries = [deque() for _ in range(count)]
        self.accounted = [Counter() for _ in range(count)]
        self.workers = [{} for _ in range(count)]
        self.deaths = [[] for _ in range(count)]
        for stage, spec in enumerate(self.stages):
            for _ in range(spec.replicas):
                self._start(stage)
        self._skip()

    def _skip(self) -> None:
        """Move the cursor past shards that are done."""
        while self.cursor in self.done:
            self.cursor += 1

    def _start(self, stage: int) -> None:
        self.to_start.append(Start(stage, self.next_worker))
        self.next_worker += 1

    @property
    def shard_count(self) -> int:
        """Shards of the plan."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Row numbers of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def chunk(self, stage: int, row: int) -> tuple[int, int]:
        """The batch that a row belongs to when batches are fixed."""
        shard, place = divmod(row, self.rows_per_shard)
        return shard, place // self.stages[stage].batch_size

    def queued(self, stage: int) -> int:
        """Rows that wait for a stage."""
        waiting = sum(p.stop - p.start for queue in self.queues[stage].values() for p in queue)
        return waiting + sum(len(retry.rows) for retry in self.retries[stage])

    def in_flight(self, stage: int) -> int:
        """Rows that a stage's workers hold."""
        ids = (id for held in self.workers[stage].values() for id in held)
        return sum(len(self.flying[id].rows) for id in ids if self.flying[id].kind != "commit")


def finished(state: State) -> bool:
    """Whether every shard is committed, by whomever."""
    left = state.shards or state.claiming or state.claimed or state.elsewhere or state.free
    return state.cursor >= state.shard_count and not left


# ------------------------------------------------------------------------------------------------------- decide


def decide(state: State) -> list[Order | Claim | Ask]:
    """What to start and to dispatch now. What it returns counts as given out."""
    orders: list[Order | Claim | Ask] = list(state.to_start)
    state.starting.update((order.stage, order.worker) for order in state.to_start if isinstance(order, Start))
    state.to_start.clear()
    if state.failed:
        return orders
    last = len(state.stages) - 1
    while True:
        given = len(orders)
        orders.extend(_commits(state))
        for stage in range(last, 0, -1):  # the far end first: what is nearly done makes room
            orders.extend(_batches(state, stage, partial=False))
        orders.extend(_reads(state))
        if len(orders) == given:
            break
    orders.extend(_claims(state))
    # A group that no full batch will come of goes as it is, once nothing before it can add to it.
    if not state.fixed:
        for stage in range(1, last + 1):
            if any(state.in_flight(before) for before in range(stage)):
                break
            orders.extend(_batches(state, stage, partial=True))
        # Or once what waits is so much that nothing more may come, in many groups of which none is full.
        given = -1
        while given != len(orders):  # what one stage takes makes room before it, and fills the room behind it
            given = len(orders)
            for stage in range(last, 0, -1):
                if not _has_room(state, stage - 1, state.stages[stage - 1].batch_size):
                    orders.extend(_batches(state, stage, partial=True))
    if not orders and not state.flying and all(state.workers[stage] for stage, _ in state.starting):
        orders.extend(_unstick(state))
        if not orders and (state.records or state.fatal):  # nobody is left to show that it was the rows
            return _judge(state)
    return orders


def _judge(state: State) -> list[Order | Claim | Ask]:
    """Only rows are left that failed alone. It was they where their stage has worked; else it is the stage.

    A run that goes on where another stopped may find a bad row alone: so a few are theirs where the dataset shows that all stages
    have worked before.
    """
    for stage in {*range(len(state.stages))} - state.worked:
        undecided = _undecided(state, stage)
        if undecided and state.shown is None:
            return [Ask()]
        state.judged[stage] += len(undecided)
        if undecided and (not state.shown or state.judged[stage] > STRIKES):
            count = "the only row" if len(undecided) == 1 else f"each of {len(undecided)} rows"
            state.failed = f"stage {state.stages[stage].name} failed for {count} that it was given: {undecided[-1][1]}"
            return []
    for worker in list(state.records):
        _convict(state, worker)
    _convict_fatal(state)
    return decide(state)


def _commits(state: State) -> Iterator[Dispatch]:
    last = len(state.stages) - 1
    for number, shard in state.shards.items():
        if not shard.open and not shard.committing:
            worker = _idle_worker(state, last, empty=shard.attempts > 0)
            if worker is None:
                return
            shard.committing = True
            rows = state.shard_rows(number)
            yield _give(
                state, Dispatch(-1, "commit", last, worker, rows, shard.packed, number, shard.errors, shard.attempts)
            )


def _batches(state: State, stage: int, partial: bool, room: bool = True) -> Iterator[Dispatch]:
    size, kinds = state.stages[stage].batch_size, state.stages[stage].kinds
    while True:
        if state.retries[stage]:
            worker = _idle_worker(state, stage, empty=partial or _is_suspect(state.retries[stage]))
            if worker is None:
                return
            retry = state.retries[stage].popleft()
            yield _give(state, Dispatch(-1, "batch", stage, worker, retry.rows, retry.pieces, attempts=retry.attempts))
            continue
        if room and not _has_room(state, stage, size):
            return
        for key in _ready_groups(state, stage, partial):
            worker = _idle_worker(state, stage, empty=partial and kinds == 1, group=key)
            if worker is not None:
                break
        else:
            return
        pieces = _take(state.queues[stage], key, size)
        numbers = tuple(row for piece in pieces for row in piece.rows)
        yield _give(state, Dispatch(-1, "batch", stage, worker, numbers, pieces, group=key))


def _reads(state: State, room: bool = True) -> Iterator[Dispatch]:
    size = state.stages[0].batch_size
    while not room or _has_room(state, 0, size):
        worker = _idle_worker(state, 0, empty=_is_suspect(state.retries[0]))
        if worker is None:
            return
        if state.retries[0]:
            retry = state.retries[0].popleft()
            yield _give(state, Dispatch(-1, "read", 0, worker, retry.rows, attempts=retry.attempts))
            continue
        if not state.to_read and not _open_shard(state):
            return
        rows = state.to_read.popleft()
        if len(rows) > size:
            state.to_read.appendleft(rows[size:])
            rows = rows[:size]
        yield _give(state, Dispatch(-1, "read", 0, worker, rows))


def _open_shard(state: State) -> bool:
    """Begin the next shard that isn't done, unless so many are open that their finished rows would pile up."""
    if len(state.shards) >= _most_shards(state):
        return False
    if state.shared:
        if not state.claimed:
            return False
        shard = state.claimed.popleft()
    elif state.cursor < state.shard_count:
        shard = _next_shard(state)
    elif state.free:
        shard = state.free.popleft()
    else:
        return False
    rows = state.shard_rows(shard)
    state.shards[shard] = Shard(open=set(rows))
    state.to_read.append(rows)
    return True


def _claims(state: State) -> Iterator[Claim]:
    """Claim one shard ahead, so that nobody waits for a lease; more would keep other drivers from them."""
    while state.shared and not state.claiming and not state.claimed:
        if state.cursor < state.shard_count:
            shard = _next_shard(state)
        elif state.free:
            shard = state.free.popleft()
        else:
            return
        state.claiming.add(shard)
        yield Claim(shard)


def _next_shard(state: State) -> int:
    shard = state.cursor
    state.cursor += 1
    state._skip()
    return shard


def _most_shards(state: State) -> int:
    """Shards that may be open at a time: the rows of all stages, and what waits for the rest of its shard."""
    return 2 + sum(_limit(state, stage) for stage in range(1, len(state.stages))) // state.rows_per_shard


def _ready_groups(state: State, stage: int, partial: bool) -> list[Any]:
    """The groups of which a batch can go: full ones, or else ``partial`` ones, the largest first."""
    size, queues = state.stages[stage].batch_size, state.queues[stage]
    waiting = {key: sum(p.stop - p.start for p in queue) for key, queue in queues.items()}
    if partial:
        return sorted(waiting, key=waiting.__getitem__, reverse=True)
    if not state.fixed:
        return [key for key, count in waiting.items() if count >= size]
    wholes = {key: min(size, len(state.shard_rows(key[0])) - key[1] * size) for key in queues}
    return [key for key in queues if state.accounted[stage][key[0], key[1]] == wholes[key]]


def _unstick(state: State) -> Iterator[Order]:
    """Nothing moves though work is left: bounds stand in each other's way. Let one batch past them, the furthest on."""
    for stage in range(len(state.stages) - 1, 0, -1):
        orders = list(_batches(state, stage, partial=not state.fixed, room=False))
        if orders:
            yield from orders
            return
    yield from _reads(state, room=False)


def _limit(state: State, stage: int) -> int:
    """Rows that may wait for a stage."""
    spec = state.stages[stage]
    return spec.batch_size * spec.replicas * (spec.in_flight + 1)


def _has_room(state: State, stage: int, rows: int) -> bool:
    """Whether the next stage's queue can take what this one would add to it.

    What the stage's own workers can hold is room besides: a fast stage of one worker must not keep a slow stage of
    eight from working all at once.
    """
    if stage + 1 == len(state.stages):
        return True  # what leaves the last stage waits in its shard, and open shards are bounded
    spec = state.stages[stage]
    room = _limit(state, stage + 1) + spec.batch_size * spec.replicas * spec.in_flight
    coming = state.queued(stage + 1) + state.in_flight(stage) + len(_undecided(state, stage + 1))
    return coming == 0 or coming + rows <= room


def _undecided(state: State, stage: int) -> list[tuple[Dispatch, str]]:
    """Rows that failed alone in a stage, with the reason, of which is not known yet whether they or the stage are to blame."""
    verdicts = [verdict for record in state.records.values() for verdict in record.verdicts]
    return [verdict for verdict in (*verdicts, *state.fatal) if verdict[0].stage == stage]


def _idle_worker(state: State, stage: int, empty: bool = False, group: Any = None) -> int | None:
    """The ready worker with the fewest dispatches, if it may be given one more, of ``group``.

    One that has a suspect is given no other: should it die again, it is clear of what.
    """
    spec, found = state.stages[stage], []
    for worker, ids in state.workers[stage].items():
        held = [state.flying[id] for id in ids]
        if any(dispatch.attempts for dispatch in held):
            continue
        if spec.kinds == 1:
            load, fits = len(held), len(held) < spec.in_flight
        else:  # small batches of a kind are one to it
            most = spec.in_flight * spec.batch_size
            load = sum(len(dispatch.rows) for dispatch in held if dispatch.group == group)
            fits = load < most and sum(len(dispatch.rows) for dispatch in held) < most * spec.kinds
        if fits and not (empty and held):
            found.append((load, len(held), worker))
    return min(found)[-1] if found else None


def _is_suspect(retries: deque[Retry]) -> bool:
    """Whether the next to be tried again has failed before, so that it is to be tried alone."""
    return bool(retries) and retries[0].attempts > 0


def _take(queues: dict[Any, deque[Piece]], key: Any, size: int) -> list[Piece]:
    queue, pieces = queues[key], []
    while queue and size:
        piece = queue.popleft()
        if piece.stop - piece.start > size:
            queue.appendleft(_cut(piece, size, None))
            piece = _cut(piece, 0, size)
        pieces.append(piece)
        size -= piece.stop - piece.start
    if not queue:
        del queues[key]
    return pieces


def _cut(piece: Piece, start: int, stop: int | None) -> Piece:
    rows = piece.rows[start:stop]
    return Piece(piece.block, piece.part, piece.start + start, piece.start + start + len(rows), rows)


def _give(state: State, dispatch: Dispatch) -> Dispatch:
    dispatch.id = state.next_id
    state.next_id += 1
    state.flying[dispatch.id] = dispatch
    state.workers[dispatch.stage][dispatch.worker].append(dispatch.id)
    return dispatch


# -------------------------------------------------------------------------------------------------------- apply


def apply(state: State, event: Event) -> State:
    """Take in what happened. An event about a dispatch that is not in flight any more changes nothing."""
    if isinstance(event, Started):
        if (event.stage, event.worker) in state.starting:
            state.starting.discard((event.stage, event.worker))
            state.proven.add(event.stage)
            state.workers[event.stage][event.worker] = []
    elif isinstance(event, Died):
        _died(state, event)
    elif isinstance(event, Claimed):
        state.claiming.discard(event.shard)
        if event.outcome == "ours":
            state.claimed.append(event.shard)
        else:
            (state.done if event.outcome == "done" else state.elsewhere).add(event.shard)
    elif isinstance(event, Shown):
        state.shown = event.ok
    elif isinstance(event, Seen):
        state.done |= event.done & state.elsewhere
        state.free.extend(sorted(event.free & state.elsewhere))
        state.elsewhere -= event.done | event.free
    elif isinstance(event, TakenOut):
        state.done -= event.shards
        state.free.extend(shard for shard in sorted(event.shards) if shard < state.cursor)
    elif event.id in state.flying:
        dispatch = state.flying.pop(event.id)
        held = state.workers[dispatch.stage].get(dispatch.worker)
        if held is not None:
            held.remove(dispatch.id)
        if isinstance(event, Finished):
            _finished(state, dispatch, event)
        elif event.cause == "lost":
            _lost(state, dispatch, event.reason)
        elif event.cause == "unloaded":
            _unloaded(state, dispatch, event.reason)
        elif event.cause == "contract":
            state.failed = f"stage {state.stages[dispatch.stage].name}: {event.reason}"
            _again(state, dispatch, dispatch.attempts)
        else:
            _failed(state, dispatch, event.reason)
            _strike(state, dispatch, event.reason)
    return state


def _finished(state: State, dispatch: Dispatch, event: Finished) -> None:
    state.deaths[dispatch.stage].clear()
    if any(rows for _, rows in event.parts) and dispatch.stage not in state.worked:
        state.worked.add(dispatch.stage)
        _convict_fatal(state, dispatch.stage)
    if dispatch.stage in state.worked:
        _convict(state, dispatch.worker)
    for piece in dispatch.pieces:
        _drop(state, piece)
    if dispatch.kind == "commit":
        shard = state.shards.pop(dispatch.shard)
        if state.fixed:
            rows = dispatch.rows
            for stage in range(1, len(state.stages)):
                for row in rows[:: state.stages[stage].batch_size]:
                    state.accounted[stage].pop(state.chunk(stage, row), None)
        state.committed_shards += 1
        state.committed_failed += len(shard.errors)
        state.committed_ok += len(dispatch.rows) - len(shard.errors)
        return
    state.finished_rows[dispatch.stage] += len(dispatch.rows)
    for row, reason in event.rejected:
        _quarantine(state, row, dispatch.stage, reason)
    wanted = sum(len(rows) for _, rows in event.parts)
    if wanted:
        state.blocks[dispatch.id] = wanted
    else:
        state.released.append(dispatch.id)
    last = len(state.stages) - 1
    for part, (key, rows) in enumerate(event.parts):
        if not rows:
            continue
        piece = Piece(dispatch.id, part, 0, len(rows), tuple(rows))
        if dispatch.stage == last:
            _arrive(state, piece)
        else:
            _enqueue(state, dispatch.stage + 1, key, piece)


def _enqueue(state: State, stage: int, key: str, piece: Piece) -> None:
    if not state.fixed:
        state.queues[stage].setdefault(key, deque()).append(piece)
        return
    start = 0
    for at in range(1, len(piece.rows) + 1):
        chunk = state.chunk(stage, piece.rows[start])
        if at == len(piece.rows) or state.chunk(stage, piece.rows[at]) != chunk:
            state.queues[stage].setdefault((*chunk, key), deque()).append(_cut(piece, start, at))
            state.accounted[stage][chunk] += at - start
            start = at


def _arrive(state: State, piece: Piece) -> None:
    """Rows have left the last stage: they wait for the rest of their shard."""
    start = 0
    for at in range(1, len(piece.rows) + 1):
        number = piece.rows[start] // state.rows_per_shard
        if at == len(piece.rows) or piece.rows[at] // state.rows_per_shard != number:
            shard, cut = state.shards[number], _cut(piece, start, at)
            shard.open.difference_update(cut.rows)
            shard.packed.append(cut)
            state.arrived += len(cut.rows)
            start = at


def _quarantine(state: State, row: int, stage: int, reason: str) -> None:
    shard, name = state.shards[row // state.rows_per_shard], state.stages[stage].name
    shard.open.discard(row)
    shard.errors.append({"row": row, "stage": name, "reason": reason})
    if state.fixed:
        for later in range(stage + 1, len(state.stages)):
            state.accounted[later][state.chunk(later, row)] += 1
    state.quarantined += 1
    ended = max(
        state.finished_rows[0], state.quarantined + state.arrived
    )  # those under way are not the failed ones' fault
    if state.failed:
        return
    if state.stop_on_error:
        state.failed = f"row {state.row_name(row)} failed in {name}, and on_error is stop: {reason}"
    elif state.quarantined > state.max_error_rate * max(ended, ENOUGH):
        state.failed = (
            f"{state.quarantined} of {ended} rows failed, more than max_error_rate={state.max_error_rate:g} allows; "
            f"the last was row {state.row_name(row)}, in {name}: {reason}"
        )


def _failed(state: State, dispatch: Dispatch, reason: str, least: int = 0) -> None:
    attempts, retries = dispatch.attempts + 1, max(state.stages[dispatch.stage].retries, least)
    if dispatch.kind == "commit":
        shard = state.shards[dispatch.shard]
        shard.attempts += 1
        if shard.attempts > retries:
            state.failed, state.output_failed = f"shard {dispatch.shard} can't be committed: {reason}", True
        _again(state, dispatch, attempts)
    elif attempts <= retries:
        _again(state, dispatch, attempts)
    elif len(dispatch.rows) > 1:
        half = len(dispatch.rows) // 2
        for side in (slice(half, None), slice(None, half)):
            pieces = _slice(dispatch.pieces, side)
            state.retries[dispatch.stage].appendleft(Retry(dispatch.rows[side], pieces, max(retries, 1)))
    elif dispatch.worker in state.workers[dispatch.stage]:
        state.records.setdefault(dispatch.worker, Record()).verdicts.append((dispatch, reason))
    elif dispatch.stage in state.worked:  # its worker died, and it was all that the worker held
        _condemn(state, dispatch, reason)
    else:
        state.fatal.append((dispatch, reason))


def _condemn(state: State, dispatch: Dispatch, reason: str) -> None:
    """Quarantine the one row of a dispatch that failed to the last."""
    for piece in dispatch.pieces:
        _drop(state, piece)
    state.finished_rows[dispatch.stage] += 1
    _quarantine(state, dispatch.rows[0], dispatch.stage, reason)


def _convict(state: State, worker: int) -> None:
    """A worker is sound: what failed on it failed for its own sake."""
    for dispatch, reason in state.records.pop(worker, Record()).verdicts:
        _condemn(state, dispatch, reason)


def _convict_fatal(state: State, stage: int | None = None) -> None:
    """Of a stage, or of all: what ended its workers was the rows."""
    of_stage = [verdict for verdict in state.fatal if stage in (None, verdict[0].stage)]
    state.fatal = [verdict for verdict in state.fatal if verdict not in of_stage]
    for dispatch, reason in of_stage:
        _condemn(state, dispatch, reason)


def _unloaded(state: State, dispatch: Dispatch, reason: str) -> None:
    """Another worker may load what this one couldn't, if any of the stage has worked; not time and again."""
    spec = state.stages[dispatch.stage]
    state.unloaded[dispatch.stage] += 1
    if dispatch.stage not in state.worked or state.unloaded[dispatch.stage] > DEATHS * spec.replicas:
        state.failed = f"stage {spec.name} can't start: {reason}"
    _again(state, dispatch, dispatch.attempts)
    if not state.failed and dispatch.worker in state.workers[dispatch.stage]:
        _stop(state, dispatch.stage, dispatch.worker, reason)


def _strike(state: State, dispatch: Dispatch, reason: str) -> None:
    """Note that a worker failed; replace it if it fails at everything."""
    record = state.records.setdefault(dispatch.worker, Record())
    rows = set(dispatch.rows)
    if all(rows.isdisjoint(strike) for strike in record.strikes):
        record.strikes.append(rows)
    if len(record.strikes) >= STRIKES and dispatch.worker in state.workers[dispatch.stage]:
        _stop(state, dispatch.stage, dispatch.worker, reason)


def _stop(state: State, stage: int, worker: int, reason: str) -> None:
    """Replace a worker that lives. What it held is given out anew."""
    state.to_start.append(Stop(stage, worker))
    held = [state.flying.pop(id) for id in state.workers[stage].pop(worker)]
    _replace(state, stage, worker, set(), reason)
    for other in held:
        _again(state, other, other.attempts)


def _again(state: State, dispatch: Dispatch, attempts: int) -> None:
    if dispatch.kind == "commit":
        state.shards[dispatch.shard].committing = False
    else:
        state.retries[dispatch.stage].append(Retry(dispatch.rows, dispatch.pieces, attempts))


def _lost(state: State, dispatch: Dispatch, reason: str) -> None:
    """The data of these rows is gone with a node: they begin again from the source."""
    rows = list(dispatch.rows)
    if dispatch.kind == "commit":
        shard = state.shards[dispatch.shard]
        rows = [row for piece in shard.packed for row in piece.rows]
        shard.open.update(rows)
        shard.packed, shard.committing = [], False
    for piece in dispatch.pieces:
        _drop(state, piece)
    again = []
    for row in rows:
        state.losses[row] += 1
        if state.losses[row] > LOSSES:
            _quarantine(state, row, dispatch.stage, f"lost {LOSSES} times with its node: {reason}")
            continue
        again.append(row)
        for stage in range(1, dispatch.stage + 1) if state.fixed else ():
            state.accounted[stage][state.chunk(stage, row)] -= 1
    if again:
        state.to_read.appendleft(again)


def _died(state: State, event: Died) -> None:
    state.starting.discard((event.stage, event.worker))
    if event.wrong:
        state.failed = f"stage {state.stages[event.stage].name}: a worker is not what the plan says: {event.reason}"
        return
    if event.at_start and event.stage not in state.proven:
        state.failed = f"stage {state.stages[event.stage].name} can't start: {event.reason}"
        return
    held = [state.flying.pop(id) for id in state.workers[event.stage].pop(event.worker, [])]
    if event.with_node:
        state.losses.update(row for dispatch in held for row in dispatch.rows)
    rows = {row for dispatch in held for row in dispatch.rows}
    _replace(state, event.stage, event.worker, rows, event.reason, counts=not event.with_node)
    for dispatch in held:
        if event.with_node and max(state.losses[row] for row in dispatch.rows) <= LOSSES:
            _again(state, dispatch, dispatch.attempts)
            continue
        # Of several it may have been any: each is tried again alone, whatever the stage's retries. And one row alone
        # twice more, since workers die for other reasons, too.
        least = 2 if len(dispatch.rows) == 1 else int(len(held) > 1)
        _failed(state, dispatch, f"its worker died: {event.reason}", least)


def _replace(state: State, stage: int, worker: int, rows: set[int], reason: str, counts: bool = True) -> None:
    """Start another worker in the place of one that is gone, because of ``rows`` if of any. It tries what the first condemned.

    If it ``counts``, it is one of the deaths that end a job.
    """
    spec = state.stages[stage]
    for dispatch, _ in state.records.pop(worker, Record()).verdicts:
        _again(state, dispatch, max(spec.retries, 1))
    if counts and all(rows.isdisjoint(before) for before in state.deaths[stage]):
        state.deaths[stage].append(rows)
    if len(state.deaths[stage]) > DEATHS * spec.replicas:
        state.failed = f"stage {spec.name}: its workers fail one after another: {reason}"
    state._start(stage)


def _drop(state: State, piece: Piece) -> None:
    state.blocks[piece.block] -= piece.stop - piece.start
    if not state.blocks[piece.block]:
        del state.blocks[piece.block]
        state.released.append(piece.block)


def _slice(pieces: Sequence[Piece], side: slice) -> list[Piece]:
    """The pieces of rows ``side`` of what the pieces hold one after another."""
    total = sum(len(piece.rows) for piece in pieces)
    start, stop, _ = side.indices(total)
    out, at = [], 0
    for piece in pieces:
        a, b = max(start - at, 0), min(stop - at, len(piece.rows))
        if a < b:
            out.append(_cut(piece, a, b))
        at += len(piece.rows)
    return out

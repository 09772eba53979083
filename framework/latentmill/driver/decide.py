"""What to start, to dispatch and to claim now: pure decisions over the state."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from latentmill.driver import failures
from latentmill.driver.limits import has_room, max_open_shards
from latentmill.driver.messages import Claim, Dispatch, Order, StartWorker, TableSlice
from latentmill.driver.state import DriverState, OpenShard, Retry


def decide(state: DriverState) -> list[Order]:
    """What to start and to dispatch now. What it returns counts as given out."""
    orders: list[Order] = list(state.worker_orders)
    state.starting.update(
        (order.stage, order.worker) for order in state.worker_orders if isinstance(order, StartWorker)
    )
    state.worker_orders.clear()
    if state.failed:
        return orders
    while True:
        given = len(orders)
        orders.extend(_commits(state))
        for stage in range(state.last_stage, 0, -1):  # the far end first: what is nearly done makes room
            orders.extend(_batches(state, stage, partial=False))
        orders.extend(_reads(state))
        if len(orders) == given:
            break
    orders.extend(_claims(state))
    if not state.fixed:
        orders.extend(_partial_batches(state))
    if not orders and not state.in_flight and all(state.workers[stage] for stage, _ in state.starting):
        orders.extend(_unstick(state))
        if not orders and (state.records or state.fatal_suspects):
            if question := failures.settle_suspects(state):
                return [question]
            return [] if state.failed else decide(state)
    return orders


def _commits(state: DriverState) -> Iterator[Dispatch]:
    for number, shard in state.shards.items():
        if not shard.missing and not shard.committing:
            worker = _idle_worker(state, state.last_stage, empty=shard.attempts > 0)
            if worker is None:
                return
            shard.committing = True
            rows = state.shard_rows(number)
            yield _give(
                state,
                Dispatch(
                    -1, "commit", state.last_stage, worker, rows, shard.packed, number, shard.errors, shard.attempts
                ),
            )


def _batches(state: DriverState, stage: int, partial: bool, room: bool = True) -> Iterator[Dispatch]:
    """Batches for a stage: what is to be tried again, then full ones, or else ``partial`` ones. ``room``: only if it has room."""
    spec = state.stages[stage]
    while True:
        if state.retries[stage]:
            worker = _idle_worker(state, stage, empty=partial or _goes_alone(state.retries[stage]))
            if worker is None:
                return
            retry = state.retries[stage].popleft()
            yield _give(state, Dispatch(-1, "batch", stage, worker, retry.rows, retry.slices, attempts=retry.attempts))
            continue
        if room and not has_room(state, stage, spec.batch_size):
            return
        for key in _ready_keys(state, stage, partial):
            worker = _idle_worker(state, stage, empty=partial and spec.running_batches == 1, stack_key=key)
            if worker is not None:
                break
        else:
            return
        slices = _take(state.queues[stage], key, spec.batch_size)
        rows = tuple(row for slice_ in slices for row in slice_.rows)
        yield _give(state, Dispatch(-1, "batch", stage, worker, rows, slices, stack_key=key))


def _partial_batches(state: DriverState) -> Iterator[Dispatch]:
    """Batches that are not full, where no full one will come of them."""
    # Nothing before a stage can add to what waits for it.
    for stage in range(1, len(state.stages)):
        if any(state.rows_in_flight(before) for before in range(stage)):
            break
        yield from _batches(state, stage, partial=True)
    # Or so much waits that nothing more may come, under many stack keys of which none fills a batch.
    moved = True
    while moved:  # what one stage takes makes room before it, and fills the room behind it
        moved = False
        for stage in range(state.last_stage, 0, -1):
            if not has_room(state, stage - 1, state.stages[stage - 1].batch_size):
                for dispatch in _batches(state, stage, partial=True):
                    moved = True
                    yield dispatch


def _reads(state: DriverState, room: bool = True) -> Iterator[Dispatch]:
    size = state.stages[0].batch_size
    while not room or has_room(state, 0, size):
        worker = _idle_worker(state, 0, empty=_goes_alone(state.retries[0]))
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


def _open_shard(state: DriverState) -> bool:
    """Begin the next shard that isn't done, unless so many are open that their finished rows would pile up."""
    if len(state.shards) >= max_open_shards(state):
        return False
    if state.shared:
        if not state.claimed:
            return False
        shard = state.claimed.popleft()
    elif state.cursor < state.shard_count:
        shard = state.next_shard()
    elif state.free_shards:
        shard = state.free_shards.popleft()
    else:
        return False
    rows = state.shard_rows(shard)
    state.shards[shard] = OpenShard(missing=set(rows))
    state.to_read.append(rows)
    return True


def _claims(state: DriverState) -> Iterator[Claim]:
    """Claim one shard ahead, so that nobody waits for a lease; more would keep other drivers from them."""
    while state.shared and not state.claiming and not state.claimed:
        if state.cursor < state.shard_count:
            shard = state.next_shard()
        elif state.free_shards:
            shard = state.free_shards.popleft()
        else:
            return
        state.claiming.add(shard)
        yield Claim(shard)


def _unstick(state: DriverState) -> Iterator[Dispatch]:
    """Nothing moves though work is left: limits stand in each other's way. Let one batch past them, the furthest on."""
    for stage in range(state.last_stage, 0, -1):
        dispatches = list(_batches(state, stage, partial=not state.fixed, room=False))
        if dispatches:
            yield from dispatches
            return
    yield from _reads(state, room=False)


def _ready_keys(state: DriverState, stage: int, partial: bool) -> list[Any]:
    """The stack keys of which a batch can go: full ones, or else ``partial`` ones, the largest first."""
    size, queues = state.stages[stage].batch_size, state.queues[stage]
    waiting = {key: sum(len(slice_.rows) for slice_ in queue) for key, queue in queues.items()}
    if partial:
        return sorted(waiting, key=waiting.__getitem__, reverse=True)
    if not state.fixed:
        return [key for key, count in waiting.items() if count >= size]
    wholes = {key: min(size, len(state.shard_rows(key[0])) - key[1] * size) for key in queues}
    return [key for key in queues if state.accounted[stage][key[0], key[1]] == wholes[key]]


def _idle_worker(state: DriverState, stage: int, empty: bool = False, stack_key: Any = None) -> int | None:
    """The ready worker with the fewest dispatches that may be given one more, of ``stack_key``; one without any if ``empty``.

    A worker that tries something again is given nothing else: should it die once more, it is clear of what.
    """
    spec, found = state.stages[stage], []
    for worker, ids in state.workers[stage].items():
        held = [state.in_flight[id] for id in ids]
        if any(dispatch.attempts for dispatch in held):
            continue
        if spec.running_batches == 1:
            load, fits = len(held), len(held) < spec.batches_per_worker
        else:  # it stacks small batches of one key
            most = spec.batches_per_worker * spec.batch_size
            load = sum(len(dispatch.rows) for dispatch in held if dispatch.stack_key == stack_key)
            fits = load < most and sum(len(dispatch.rows) for dispatch in held) < most * spec.running_batches
        if fits and not (empty and held):
            found.append((load, len(held), worker))
    return min(found)[-1] if found else None


def _goes_alone(retries: deque[Retry]) -> bool:
    """Whether the next to be tried again has failed before, so that it needs a worker of its own."""
    return bool(retries) and retries[0].attempts > 0


def _take(queues: dict[Any, deque[TableSlice]], key: Any, size: int) -> list[TableSlice]:
    """Take up to ``size`` rows from a queue."""
    queue, slices = queues[key], []
    while queue and size:
        slice_ = queue.popleft()
        if len(slice_.rows) > size:
            queue.appendleft(slice_.sub(size, None))
            slice_ = slice_.sub(0, size)
        slices.append(slice_)
        size -= len(slice_.rows)
    if not queue:
        del queues[key]
    return slices


def _give(state: DriverState, dispatch: Dispatch) -> Dispatch:
    """Number a dispatch and note that its worker has it."""
    dispatch.id = state.next_id
    state.next_id += 1
    state.in_flight[dispatch.id] = dispatch
    state.workers[dispatch.stage][dispatch.worker].append(dispatch.id)
    return dispatch

"""What to start, to dispatch and to claim now: pure decisions over the state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from latentmill.driver import drain, failures, needed
from latentmill.driver.limits import has_room, max_open_shards, queue_limit
from latentmill.driver.messages import Claim, CountRows, Dispatch, Order, StartWorker, Stop
from latentmill.driver.replicas import adjust
from latentmill.driver.state import DriverState, OpenShard


def decide(state: DriverState) -> list[Order]:
    """What to start and to dispatch now. What it returns counts as given out."""
    if state.stopping.how not in ("", "finish"):
        return drain.next_step(state)
    orders: list[Order] = _worker_orders(state)
    if state.failed:
        return orders
    adjust(state)
    orders += _worker_orders(state)
    if state.uncounted:  # what is needed hangs on the answer
        orders.append(CountRows(frozenset(state.uncounted)))
        state.uncounted.clear()
        return orders
    orders.extend(_commits(state))
    # The far end first: what is nearly done makes room for what is before it.
    for stage in range(state.last_stage, 0, -1):
        orders.extend(_batches(state, stage, partial=False))
    if not state.stopping.how:
        orders.extend(_reads(state))
        orders.extend(_commits(state))  # of shards of which nothing is read
        orders.extend(_claims(state))
    if not state.fixed:
        orders.extend(_partial_batches(state))
    if state.stopping.how:
        if not orders and not state.in_flight:  # it has done what it could
            drain.told_to_stop(state, Stop("hand over"))
            return drain.next_step(state)
        return orders
    if not orders and not state.in_flight and all(state.workers[worker_type] for worker_type, _ in state.starting):
        orders.extend(_unstick(state))
        if not orders and (state.records or state.fatal_suspects):
            if question := failures.settle_suspects(state):
                return [question]
            return [] if state.failed else decide(state)
    return orders


def _worker_orders(state: DriverState) -> list[Order]:
    orders: list[Order] = list(state.worker_orders)
    state.starting.update((order.worker_type, order.worker) for order in orders if isinstance(order, StartWorker))
    state.worker_orders.clear()
    return orders


def _commits(state: DriverState) -> Iterator[Dispatch]:
    for number in [*state.complete]:
        not_needed = needed.rows_not_needed(state, number)
        if not_needed is None:
            continue
        shard = state.shards[number]
        worker = _worker(state, state.last_stage, alone=shard.failures > 0)
        if worker is None:
            return
        del state.complete[number]
        rows = state.shard_rows(number)
        order = Dispatch(
            -1, "commit", state.last_stage, worker, rows, shard.packed, number, shard.errors, shard.failures
        )
        order.filtered, order.not_needed = shard.filtered, not_needed
        yield state.given(order)


def _batches(state: DriverState, stage: int, partial: bool, room: bool = True) -> Iterator[Dispatch]:
    """Batches for a stage: what is to be tried again, then full ones, or else ``partial`` ones. ``room``: only if it has room."""
    spec, queue = state.stages[stage], state.queues[stage]
    while queue.retries or (queue.slices if partial else queue.full):
        if queue.retries:
            worker = _worker(state, stage, idle=partial, alone=queue.retries[0].failures > 0)
            if worker is None:
                return
            retry = queue.next_retry()
            yield state.given(Dispatch(-1, "batch", stage, worker, retry.rows, retry.slices, failures=retry.failures))
            continue
        if room and not has_room(state, stage, spec.batch_size):
            return
        for key in queue.largest_first() if partial else queue.full:
            worker = _worker(state, stage, key, idle=partial and spec.running_batches == 1)
            if worker is not None:
                break
        else:
            return
        slices = queue.take(key)
        rows = tuple(row for slice_ in slices for row in slice_.rows)
        yield state.given(Dispatch(-1, "batch", stage, worker, rows, slices, stack_key=key))


def _partial_batches(state: DriverState) -> Iterator[Dispatch]:
    """Batches that are not full, where no full one will come of them."""
    # Nothing before a stage can add to what waits for it.
    for stage in range(1, len(state.stages)):
        if any(state.rows_in_flight[before] for before in range(stage)):
            break
        yield from _batches(state, stage, partial=True)
    # Or so much waits that nothing more may come, under many stack keys of which none fills a batch.
    moved = True
    while moved:  # what one stage takes makes room before it, and fills the room behind it
        moved = False
        for stage in range(state.last_stage, 0, -1):
            if state.queues[stage].rows and not has_room(state, stage - 1, state.stages[stage - 1].batch_size):
                for dispatch in _batches(state, stage, partial=True):
                    moved = True
                    yield dispatch


def _reads(state: DriverState, room: bool = True) -> Iterator[Dispatch]:
    size, queue = state.stages[0].batch_size, state.queues[0]
    while not room or has_room(state, 0, size):
        worker = _worker(state, 0, alone=bool(queue.retries) and queue.retries[0].failures > 0)
        if worker is None:
            return
        if state.to_take_up:
            shard, file, rows = state.to_take_up.popleft()
            yield state.given(Dispatch(-1, "take up", 0, worker, rows, shard=shard, file=file))
            continue
        if queue.retries:
            retry = queue.next_retry()
            yield state.given(_read(state, worker, retry.rows, retry.failures))
            continue
        if not state.to_read and not _open_shard(state):
            return
        if not state.to_read:
            continue
        rows = state.to_read.popleft()
        if len(rows) > size:
            state.to_read.appendleft(rows[size:])
            rows = rows[:size]
        yield state.given(_read(state, worker, rows))


def _read(state: DriverState, worker: int, rows: Sequence[int], failures: int = 0) -> Dispatch:
    attempts = [] if state.attempts is None else [state.attempt_of[row] for row in rows]
    return Dispatch(-1, "read", 0, worker, rows, failures=failures, attempts=attempts)


def _open_shard(state: DriverState) -> bool:
    """Begin the next shard that isn't done, unless so many are open that their finished rows would pile up."""
    if len(state.shards) >= max_open_shards(state):
        return False
    if state.half_done and _is_full(state):
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
    if not needed.is_needed(state, shard):
        state.half_done.pop(shard, "")
        state.shards[shard], state.complete[shard] = OpenShard(missing=set()), None
        return True
    rows = state.shard_rows(shard)
    state.shards[shard] = OpenShard(missing=set(rows))
    if file := state.half_done.pop(shard, ""):
        state.to_take_up.append((shard, file, rows))
    else:
        state.to_read.append(rows)
    return True


def _is_full(state: DriverState) -> bool:
    """Whether some stage has all that may wait for it: a shard that is taken up brings what others had room for."""
    return any(state.rows_queued(stage) >= queue_limit(state, stage) for stage in range(1, len(state.stages)))


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
    """Nothing moves though work is left: limits stand in each other's way. Let the furthest stage take what waits for it."""
    for stage in range(state.last_stage, 0, -1):
        dispatches = list(_batches(state, stage, partial=not state.fixed, room=False))
        if dispatches:
            yield from dispatches
            return
    yield from _reads(state, room=False)


def _worker(
    state: DriverState, stage: int, stack_key: Any = None, *, idle: bool = False, alone: bool = False
) -> int | None:
    """The worker that can be given a batch of ``stack_key`` and holds the least; ``idle``: nothing of this stage; ``alone``: nothing."""
    rank = state.least_loaded(stage, stack_key)
    if rank is None:
        return None
    of_stage, held, worker = rank
    return None if (idle and of_stage) or (alone and held) else worker

"""What an event changes in the state."""

from __future__ import annotations

from math import inf

from latentmill.driver import ended, failures
from latentmill.driver.messages import (
    Claimed,
    DatasetChecked,
    Died,
    Dispatch,
    Event,
    Failed,
    Finished,
    LeasesSeen,
    NodesSeen,
    Started,
    TableSlice,
    TakenOut,
)
from latentmill.driver.state import DriverState
from latentmill.plugin import Filtered


def apply(state: DriverState, event: Event) -> DriverState:
    """Take in what happened. An event about a dispatch that is not in flight any more changes nothing."""
    if isinstance(event, Started):
        if (event.worker_type, event.worker) in state.starting:
            state.starting.discard((event.worker_type, event.worker))
            state.worker_came(event.worker_type, event.worker)
            state.loading_seconds[event.worker_type] = min(state.loading_seconds[event.worker_type], event.seconds)
            _memory_seen(state, event.worker_type, event.memory)
    elif isinstance(event, Died):
        failures.worker_died(state, event)
    elif isinstance(event, NodesSeen):
        state.nodes, state.batches_to_measure, state.room_changed = event.nodes, 0, True
        state.most_replicas = [inf] * len(state.worker_types)
    elif isinstance(event, Claimed):
        state.claiming.discard(event.shard)
        if event.outcome == "ours":
            state.claimed.append(event.shard)
        else:
            (state.done if event.outcome == "done" else state.leased_by_others).add(event.shard)
    elif isinstance(event, DatasetChecked):
        state.worked_before[event.stage] = event.worked
    elif isinstance(event, LeasesSeen):
        state.done |= event.done & state.leased_by_others
        state.free_shards.extend(sorted(event.free & state.leased_by_others))
        state.leased_by_others -= event.done | event.free
    elif isinstance(event, TakenOut):
        state.done -= event.shards
        state.free_shards.extend(shard for shard in sorted(event.shards) if shard < state.cursor)
    elif event.id not in state.in_flight:
        if isinstance(event, Finished) and event.tables:  # of a worker that was given up: nobody wants its block
            state.released.append(event.id)
    else:
        dispatch = state.taken_back(event.id)
        if isinstance(event, Finished):
            _dispatch_finished(state, dispatch, event)
        else:
            _dispatch_failed(state, dispatch, event)
    return state


def _dispatch_failed(state: DriverState, dispatch: Dispatch, event: Failed) -> None:
    if event.cause == "lost":
        failures.data_lost(state, dispatch, event.reason)
    elif event.cause == "unloaded":
        failures.load_failed(state, dispatch, event.reason)
    elif event.cause == "contract":
        state.failed = state.failed or f"stage {state.stages[dispatch.stage].name}: {event.reason}"
        failures.try_again(state, dispatch, dispatch.failures)
    elif event.cause == "store" and dispatch.task != "commit":
        failures.store_failed(state, dispatch, event.reason)
    else:
        failures.dispatch_failed(state, dispatch, event.reason)
        failures.count_failure(state, dispatch, event.reason)


def _memory_seen(state: DriverState, worker_type: int, memory: int) -> None:
    if memory > 1.1 * state.memory_seen[worker_type]:
        state.memory_seen[worker_type], state.room_changed = memory, True


def _measure(state: DriverState, dispatch: Dispatch, event: Finished) -> None:
    """Note what a dispatch cost. The rows of a commit are those of the batches before it, and are not counted again."""
    rows = 0 if dispatch.task == "commit" else len(dispatch.rows)
    state.stage_times[dispatch.stage].add(event.seconds, rows, dispatch.worker, state.replicas(dispatch.stage))
    state.measured_batches += 1
    _memory_seen(state, state.type_of[dispatch.stage], event.memory)


def _dispatch_finished(state: DriverState, dispatch: Dispatch, event: Finished) -> None:
    if state.nodes is not None:  # else nobody asks how many workers there should be
        _measure(state, dispatch, event)
    unwanted = [(row, why) for row, why in event.rejected if isinstance(why, Filtered)]
    failures.count_success(state, dispatch, has_done_a_row=bool(unwanted) or any(rows for _, rows in event.tables))
    for slice_ in dispatch.slices:
        state.drop(slice_)
    if dispatch.task == "commit":
        _shard_committed(state, dispatch)
        return
    state.rows_done(dispatch.stage, dispatch.rows)
    for row, why in event.rejected:
        if not isinstance(why, Filtered):
            ended.quarantine(state, row, dispatch.stage, why)
    ended.filtered(state, dispatch.stage, unwanted)
    wanted = sum(len(rows) for _, rows in event.tables)
    if wanted:
        state.block_came(dispatch, wanted, event.bytes)
    else:
        state.released.append(dispatch.id)
    for table, (shape_key, rows) in enumerate(event.tables):
        if not rows:
            continue
        slice_ = TableSlice(dispatch.id, table, 0, len(rows), tuple(rows))
        if dispatch.stage == state.last_stage:
            _arrive(state, slice_)
        else:
            _enqueue(state, dispatch.stage + 1, shape_key, slice_)


def _shard_committed(state: DriverState, dispatch: Dispatch) -> None:
    shard = state.shards.pop(dispatch.shard)
    if state.fixed:
        for stage in range(1, len(state.stages)):
            for row in dispatch.rows[:: state.stages[stage].batch_size]:
                state.queues[stage].forget(state.chunk(stage, row))
    for row in dispatch.rows:
        state.attempt_of.pop(row, None)
    state.committed_shards += 1
    state.committed_failed += len(shard.errors)
    state.committed_filtered += len(shard.filtered)
    state.committed_ok += len(dispatch.rows) - len(shard.errors) - len(shard.filtered)


def _enqueue(state: DriverState, stage: int, shape_key: str, slice_: TableSlice) -> None:
    """Rows wait for their next stage. Where batches are fixed, those of each chunk wait for one another."""
    if not state.fixed:
        state.queues[stage].put(shape_key, slice_)
        return
    start = 0
    for at in range(1, len(slice_.rows) + 1):
        chunk = state.chunk(stage, slice_.rows[start])
        if at == len(slice_.rows) or state.chunk(stage, slice_.rows[at]) != chunk:
            state.queues[stage].put((*chunk, shape_key), slice_.sub(start, at))
            state.queues[stage].account(chunk, at - start)
            start = at


def _arrive(state: DriverState, slice_: TableSlice) -> None:
    """Rows have left the last stage: they wait for the rest of their shard."""
    start = 0
    for at in range(1, len(slice_.rows) + 1):
        number = slice_.rows[start] // state.rows_per_shard
        if at == len(slice_.rows) or slice_.rows[at] // state.rows_per_shard != number:
            shard, arrived = state.shards[number], slice_.sub(start, at)
            shard.missing.difference_update(arrived.rows)
            shard.packed.append(arrived)
            state.arrived += len(arrived.rows)
            ended.settle(state, number)
            start = at

"""What an event changes in the state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from math import inf

from latentmill.driver import drain, ended, failures, needed
from latentmill.driver.messages import (
    Claimed,
    DatasetChecked,
    Died,
    Dispatch,
    Draining,
    Event,
    Failed,
    Finished,
    HandedOver,
    LeasesSeen,
    NodesSeen,
    RowsCounted,
    Started,
    Stop,
    TableSlice,
    TakenOut,
    TakenUp,
)
from latentmill.driver.state import DriverState, TakenUpRows
from latentmill.driver.waiting import Retry
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
    elif isinstance(event, Draining):
        drain.worker_drains(state, event)
    elif isinstance(event, NodesSeen):
        state.nodes, state.batches_to_measure, state.room_changed = event.nodes, 0, True
        state.most_replicas, state.more_come = [inf] * len(state.worker_types), event.more_come
        state.to_follow, state.asked_for = (
            True,
            (),
        )  # of what was asked for some may have come, and others have taken it
    elif isinstance(event, Claimed):
        state.claiming.discard(event.shard)
        if event.outcome == "ours":
            state.claimed.append(event.shard)
            if event.half_done:
                state.half_done[event.shard] = event.half_done
        elif event.outcome == "done":
            needed.shards_done(state, {event.shard})
        else:
            state.leased_by_others.add(event.shard)
    elif isinstance(event, DatasetChecked):
        state.worked_before[event.stage] = event.worked
    elif isinstance(event, RowsCounted):
        state.accepted.update(event.rows)
    elif isinstance(event, LeasesSeen):
        needed.shards_done(state, event.done & state.leased_by_others)
        state.free_shards.extend(sorted(event.free & state.leased_by_others))
        state.leased_by_others -= event.done | event.free
    elif isinstance(event, TakenOut):
        needed.shards_taken_out(state, event.shards)
        state.free_shards.extend(shard for shard in sorted(event.shards) if shard < state.cursor)
    elif isinstance(event, Stop):
        drain.told_to_stop(state, event)
    elif event.id not in state.in_flight or _comes_too_late(state, state.in_flight[event.id]):
        if (
            isinstance(event, (Finished, HandedOver, TakenUp)) and event.tables
        ):  # of a worker that was given up: nobody wants its block
            state.released.append(event.id)
    else:
        dispatch = state.taken_back(event.id)
        if isinstance(event, Finished):
            _dispatch_finished(state, dispatch, event)
        elif isinstance(event, HandedOver):
            _handed_over(state, dispatch, event)
        elif isinstance(event, TakenUp):
            _taken_up(state, dispatch, event)
        else:
            _dispatch_failed(state, dispatch, event)
    return state


def _comes_too_late(state: DriverState, dispatch: Dispatch) -> bool:
    """Whether what came to a stage is being kept by now, so that its answer counts no more."""
    return state.stopping.how in ("keep", "stopped") and dispatch.task not in ("keep", "commit")


def _dispatch_failed(state: DriverState, dispatch: Dispatch, event: Failed) -> None:
    if dispatch.task == "keep" or (dispatch.task == "take up" and event.cause != "lost"):
        failures.try_again(state, dispatch, dispatch.failures, event.reason)
    elif event.cause == "lost":
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
        state.memory_seen[worker_type], state.room_changed, state.to_follow = memory, True, True


def _measure(state: DriverState, dispatch: Dispatch, event: Finished) -> None:
    """Note what a dispatch cost. The rows of a commit are those of the batches before it, and are not counted again."""
    rows = 0 if dispatch.task in ("commit", "keep") else len(dispatch.rows)
    state.stage_times[dispatch.stage].add(event.seconds, rows, dispatch.worker, state.replicas(dispatch.stage))
    state.measured_batches += 1
    _memory_seen(state, state.type_of[dispatch.stage], event.memory)


def _dispatch_finished(state: DriverState, dispatch: Dispatch, event: Finished) -> None:
    if dispatch.task == "keep":
        state.stopping.kept += len(dispatch.rows)
        return
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
            _put(state, dispatch.stage + 1, shape_key, slice_)


def _shard_committed(state: DriverState, dispatch: Dispatch) -> None:
    shard = state.shards.pop(dispatch.shard)
    state.taken_up.pop(dispatch.shard, None)
    if state.fixed:
        for stage in range(1, len(state.stages)):
            for row in dispatch.rows[:: state.stages[stage].batch_size]:
                state.queues[stage].forget(state.chunk(stage, row))
    for row in dispatch.rows:
        state.attempt_of.pop(row, None)
    state.committed_shards += 1
    end = dispatch.rows[-1] + 1 - dispatch.not_needed
    failed, filtered = (sum(about["row"] < end for about in of) for of in (shard.errors, shard.filtered))
    state.committed_failed += failed
    state.committed_filtered += filtered
    state.committed_not_needed += dispatch.not_needed
    state.accepted[dispatch.shard] = len(dispatch.rows) - dispatch.not_needed - failed - filtered
    state.committed_ok += state.accepted[dispatch.shard]


def _put(state: DriverState, stage: int, shape_key: str, slice_: TableSlice, again: bool = False) -> None:
    """Rows wait for a stage; ``again``: they had come to it before. Where batches are fixed, those of each chunk wait for one another."""
    if not state.fixed:
        state.queues[stage].put(shape_key, slice_)
        return
    start = 0
    for at in range(1, len(slice_.rows) + 1):
        chunk = state.chunk(stage, slice_.rows[start])
        if at == len(slice_.rows) or state.chunk(stage, slice_.rows[at]) != chunk:
            state.queues[stage].put((*chunk, shape_key), slice_.sub(start, at))
            state.queues[stage].account(chunk, 0 if again else at - start)
            start = at


def _arrive(state: DriverState, slice_: TableSlice) -> None:
    """Rows have left the last stage: they wait for the rest of their shard."""
    for arrived in drain.by_shard(state, slice_):
        number = arrived.rows[0] // state.rows_per_shard
        shard = state.shards[number]
        shard.missing.difference_update(arrived.rows)
        shard.packed.append(arrived)
        state.arrived += len(arrived.rows)
        ended.settle(state, number)


# -------------------------------------------------------------------------------- what is half done, at the end and at the beginning


def _handed_over(state: DriverState, dispatch: Dispatch, event: HandedOver) -> None:
    """A batch is back before its end."""
    name = state.stages[dispatch.stage].name
    if event.tables is None:
        if event.begun and state.stopping.how:  # else it is done again long before the driver stops
            state.stopping.begun_again[name] += len(dispatch.rows)
        state.queues[dispatch.stage].try_again(Retry(dispatch.rows, dispatch.slices, dispatch.failures))
        return
    for slice_ in dispatch.slices:
        state.drop(slice_)
    for row, why in event.rejected:
        if not isinstance(why, Filtered):
            ended.quarantine(state, row, dispatch.stage, why)
    ended.filtered(state, dispatch.stage, [(row, why) for row, why in event.rejected if isinstance(why, Filtered)])
    wanted = sum(len(rows) for _, rows in event.tables)
    if not wanted:
        state.released.append(dispatch.id)
        return
    state.block_came(dispatch, wanted, event.bytes)
    for table, (shape_key, rows) in enumerate(event.tables):
        if rows:  # they were accounted for when they came to the stage
            _put(
                state, dispatch.stage, shape_key, TableSlice(dispatch.id, table, 0, len(rows), tuple(rows)), again=True
            )


def _taken_up(state: DriverState, dispatch: Dispatch, event: TakenUp) -> None:
    """Rows are where they were when a driver stopped, those that were asked for. All others of these begin from the source."""
    left = dict.fromkeys(dispatch.rows)
    for row in left.keys() & event.attempts.keys():  # of a Counter, update would add to what is there
        state.attempt_of[row] = event.attempts[row]
    last = len(state.stages)
    names = [spec.name for spec in state.stages]
    for about in event.filtered:
        if about["row"] not in left:
            continue
        stage = names.index(about["stage"])
        _passed(state, [about["row"]], stage + 1)
        left.pop(about["row"])
        ended.filtered_before(state, about, stage)
    slices = [
        (stage, shape_key, slice_)
        for table, (stage, shape_key, rows) in enumerate(event.tables)
        for slice_ in _asked_for(TableSlice(dispatch.id, table, 0, len(rows), tuple(rows)), left)
    ]
    found = [row for *_, slice_ in slices for row in slice_.rows]
    if found:  # of its bytes nobody is asked: those of packed rows don't count, and the driver that stopped had room for the others
        state.blocks[dispatch.id] = len(found)
        state.taken_up.setdefault(
            dispatch.shard, TakenUpRows(dispatch.file, {row: state.attempt_of[row] for row in found})
        )
    else:
        state.released.append(dispatch.id)
        state.taken_up.pop(dispatch.shard, None)
    for stage, shape_key, slice_ in slices:
        for row in slice_.rows:
            del left[row]
        _passed(state, slice_.rows, stage)
        if stage == last:
            _arrive(state, slice_)
        else:
            _put(state, stage, shape_key, slice_)
    if left:
        state.to_read.appendleft(list(left))


def _asked_for(slice_: TableSlice, rows: Collection[int]) -> Iterator[TableSlice]:
    """The parts of a slice that are of these rows."""
    start = 0
    for asked, run in groupby(slice_.rows, lambda row: row in rows):
        stop = start + len([*run])
        if asked:
            yield slice_.sub(start, stop)
        start = stop


def _passed(state: DriverState, rows: Sequence[int], stage: int) -> None:
    """Rows have been through all stages before this one, in another run."""
    for before in range(stage):
        state.rows_done(before, rows)
        if before and state.fixed:
            for row in rows:
                state.queues[before].account(state.chunk(before, row), 1)

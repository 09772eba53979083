"""A driver that stops: it finishes what it can, has its workers hand over what they hold, and has that kept half done. And a worker whose
node is drained: it hands over, too, and others go on with that.

Of each open shard that is not committed one file is kept, with the rows that have been read: each as it came to the stage that it is
to do next, or as a stage that works step by step left it. Rows that failed are not in it: the next driver tries them again, as
those of any shard that is not committed. Whoever opens the shard next takes the file up, and what is not in it begins from the source.
"""

from __future__ import annotations

from collections.abc import Iterator

from latentmill.driver.messages import Dispatch, Draining, HandOver, Order, Stop, TableSlice
from latentmill.driver.state import DriverState

WAYS_TO_STOP = ("", "finish", "hand over", "keep", "stopped")


def told_to_stop(state: DriverState, event: Stop) -> None:
    """Go further with stopping, never back."""
    if WAYS_TO_STOP.index(event.how) > WAYS_TO_STOP.index(state.stopping.how):
        if event.how == "keep":
            _begin_to_keep(state)
        state.stopping.how = event.how


def worker_drains(state: DriverState, event: Draining) -> None:
    """Give a worker nothing more, have it hand over what it holds, and start another in its place. It ends when it holds nothing."""
    if event.worker not in state.workers[event.worker_type]:
        return
    if event.worker not in state.leaving:
        state.leaving[event.worker] = event.worker_type
        state.start_worker(event.worker_type)
    state.worker_orders.append(HandOver(event.worker))


def next_step(state: DriverState) -> list[Order]:
    """What to order beyond finishing: to hand over, then to keep."""
    stopping = state.stopping
    if stopping.how == "hand over":
        orders: list[Order] = list(_hand_over(state))
        if orders or state.in_flight:
            return orders
        _begin_to_keep(state)
        stopping.how = "keep"
    if stopping.how == "keep":
        keeps: list[Order] = list(_keep(state))
        if keeps or any(dispatch.task == "keep" for dispatch in state.in_flight.values()):
            return keeps
        stopping.how = "stopped"
    return []


def _hand_over(state: DriverState) -> Iterator[HandOver]:
    for dispatch in state.in_flight.values():
        if dispatch.task != "commit" and dispatch.worker not in state.stopping.asked:
            state.stopping.asked.add(dispatch.worker)
            yield HandOver(dispatch.worker)


def _begin_to_keep(state: DriverState) -> None:
    state.stopping.to_keep = sorted(state.shards)
    for dispatch in state.in_flight.values():  # their workers don't answer: what they were given is there still
        if dispatch.task == "batch":
            state.stopping.begun_again[state.stages[dispatch.stage].name] += len(dispatch.rows)


def _keep(state: DriverState) -> Iterator[Dispatch]:
    """Give shards to workers that hold nothing, of whatever type, to those whose node goes last; where all hold something, to any."""
    stopping = state.stopping
    while stopping.to_keep:
        workers = [
            (
                bool(held),
                any(state.in_flight[id].task == "keep" for id in held),
                worker in state.leaving,
                worker,
                worker_type,
            )
            for worker_type, there in enumerate(state.workers)
            for worker, held in there.items()
        ]
        shard = stopping.to_keep[0]
        order = None if shard not in state.shards else _order(state, shard)  # its commit may have been answered
        if order is None or not workers:
            stopping.to_keep.pop(0)
            if order is not None:
                stopping.thrown_away += len(order.rows)
                stopping.reason = "no worker is left"
            continue
        _, keeps, _, order.worker, worker_type = min(workers)
        if keeps:  # all have one to write
            return
        stopping.to_keep.pop(0)
        order.stage = state.worker_types[worker_type].stages[0]
        yield state.given(order)


def _order(state: DriverState, number: int) -> Dispatch | None:
    """The order to keep a shard's rows; None if there is nothing to keep."""
    shard = state.shards[number]
    found = [(stage, slice_) for stage, slice_ in _waiting(state) if slice_.rows[0] // state.rows_per_shard == number]
    found += [(len(state.stages), slice_) for slice_ in shard.packed]
    attempt_of = {row: attempt for row in state.shard_rows(number) if (attempt := state.attempt_of[row])}
    if not found and not shard.filtered and not attempt_of:
        return None
    rows = [row for _, slice_ in found for row in slice_.rows]
    order = Dispatch(-1, "keep", 0, -1, rows, [slice_ for _, slice_ in found], number, stages=[at for at, _ in found])
    order.filtered, order.attempt_of = shard.filtered, attempt_of
    return order


def _waiting(state: DriverState) -> Iterator[tuple[int, TableSlice]]:
    """What waits for each stage but the first, or is there with a worker that doesn't answer: of one shard each."""
    for stage in range(1, len(state.stages)):
        queue = state.queues[stage]
        slices = [slice_ for waiting in queue.slices.values() for slice_ in waiting]
        slices += [slice_ for retry in queue.retries for slice_ in retry.slices]
        slices += [slice_ for suspect in state.suspects(stage) for slice_ in suspect.dispatch.slices]
        for dispatch in state.in_flight.values():
            if dispatch.task == "batch" and dispatch.stage == stage:
                slices += dispatch.slices
        for slice_ in slices:
            for part in by_shard(state, slice_):
                yield stage, part


def by_shard(state: DriverState, slice_: TableSlice) -> Iterator[TableSlice]:
    """The parts of a slice that are of one shard each."""
    start = 0
    for at in range(1, len(slice_.rows) + 1):
        if (
            at == len(slice_.rows)
            or slice_.rows[at] // state.rows_per_shard != slice_.rows[start] // state.rows_per_shard
        ):
            yield slice_.sub(start, at)
            start = at

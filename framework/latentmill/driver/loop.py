"""The loop of a driver: decide, dispatch, collect, until every shard is committed. And how it is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set
from typing import Protocol

from latentmill import progress
from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.leases import Leases
from latentmill.driver.messages import CheckDataset, Claim, CountRows, DatasetChecked, Event, PoolOrder, RowsCounted
from latentmill.driver.signals import Signals
from latentmill.driver.state import DriverState, finished
from latentmill.errors import BusyError, OutputError, RunError
from latentmill.plan import Plan


class Pool(Protocol):
    """Where the work is done: Ray's actors, this process, or a simulation."""

    def submit(self, order: PoolOrder) -> None: ...

    def collect(self, timeout: float) -> list[Event]: ...

    def release(self, block: int) -> None: ...

    def close(self, leave: bool = False) -> None:
        """``leave``: workers that have nothing to do may stay for the next run."""


def drive(
    state: DriverState,
    pool: Pool,
    show: Callable[[], None],
    leases: Leases | None = None,
    worked: Callable[[int], bool] = lambda stage: False,
    signals: Signals | None = None,
    stored: Callable[[Set[int]], Mapping[int, int]] = lambda shards: {},
) -> None:
    """The loop. Raises RunError if the state says that the job can't go on, and BusyError if places are lacking for too long. It may end
    sooner: ``state.stopping`` says ``stopped``.
    """
    signals, lacks = signals or Signals(), None
    with signals.heard_by(lambda: bool(state.blocks or state.in_flight)):
        while not finished(state) and state.stopping.how != "stopped":
            if stop := signals.stop():
                apply(state, stop)
            try:
                turn(state, pool, leases, worked, stored)
            except BusyError as error:  # what is half done is kept, by workers that are there
                lacks = error if signals.stop_for("no places") else lacks
            if signals.interrupted:  # and a library has caught it: what came of that is no row's fault, nor a worker's
                raise KeyboardInterrupt
            show()
            if state.failed:
                raise (OutputError if state.output_failed else RunError)(state.failed)
            if state.leased_by_others and not state.in_flight and not state.starting:
                time.sleep(0.2)  # there is nothing to do but to wait for other drivers
    if lacks is not None and not finished(state):
        raise lacks


def turn(
    state: DriverState,
    pool: Pool,
    leases: Leases | None = None,
    worked: Callable[[int], bool] = lambda stage: False,
    stored: Callable[[Set[int]], Mapping[int, int]] = lambda shards: {},
) -> None:
    """Decide, dispatch, collect, once.

    ``worked`` says of a stage whether the dataset shows that it has worked before, and ``stored`` of shards how many rows each stores.
    """
    while True:
        answered = False
        for order in decide(state):
            if isinstance(order, Claim):
                assert leases is not None
                apply(state, leases.claim(order.shard))
                answered = True
            elif isinstance(order, CheckDataset):
                apply(state, DatasetChecked(order.stage, worked(order.stage)))
                answered = True
            elif isinstance(order, CountRows):
                apply(state, RowsCounted(stored(order.shards)))
                answered = True
            else:
                pool.submit(order)
        if not answered:
            break
    for event in pool.collect(timeout=0.5):
        apply(state, event)
    if leases is not None:
        leases.keep({*state.shards, *state.claimed})
        if seen := leases.look(state.leased_by_others):
            apply(state, seen)
    if (
        state.stopping.how != "keep"
    ):  # a late answer makes blocks superfluous that an order to keep rows names: the end is near
        for block in state.released:
            pool.release(block)
        state.released.clear()


def view(state: DriverState, plan: Plan, seconds: float) -> progress.View:
    """What a person is shown of a state."""
    stages = [
        progress.StageView(
            name=spec.name,
            done=state.finished_rows[at],
            queued=state.rows_queued(at) if at else sum(map(len, state.to_read)),
            workers=len(state.workers_of(at)),
            busy=state.busy[at],
            ended_before=sum(state.ended_rows[before] for before in range(at))
            - sum(state.drawn_again[later] for later in range(at, len(state.stages))),
            failed=state.failed_rows[at],
            queued_bytes=state.rows_queued(at) * state.bytes_of_row[at - 1] if at else 0,
        )
        for at, spec in enumerate(state.stages)
    ]
    others = plan.rows_in(state.done)
    return progress.View(
        stages=stages,
        planned=plan.rows,
        finished=others
        + state.committed_ok
        + state.committed_failed
        + state.committed_filtered
        + state.committed_not_needed,
        failed=state.committed_failed,
        filtered=state.committed_filtered,
        seconds=seconds,
        shards_done=len(state.done) + state.committed_shards,
        shards=plan.shards,
        leased_by_others=len(state.leased_by_others),
        others=others,
        accepted=0 if state.accept_rows is None else sum(state.accepted.values()),
        wanted=state.accept_rows,
    )

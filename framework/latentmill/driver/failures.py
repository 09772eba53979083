"""What becomes of what goes wrong: the ladder from a retry to the end of the job, as ``latentmill.driver`` says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentmill.driver.ended import lost, quarantine
from latentmill.driver.limits import (
    MAX_CONSECUTIVE_FAILURES,
    MAX_DEATHS_PER_REPLICA,
    MAX_LOSSES_PER_ROW,
    MAX_QUARANTINED_ON_TRUST,
)
from latentmill.driver.messages import CheckDataset, Died, Dispatch, StopWorker, TableSlice
from latentmill.driver.state import DriverState, Suspect, WorkerRecord
from latentmill.driver.waiting import Retry

# ------------------------------------------------------------------------------------ a batch: retry, halves, row


def dispatch_failed(state: DriverState, dispatch: Dispatch, reason: str, least: int = 0) -> None:
    """Try a dispatch again; in halves after its stage's retries, or after ``least`` if that is more; or suspect its one row."""
    failures, retries = dispatch.failures + 1, max(state.stages[dispatch.stage].retries, least)
    if dispatch.task in ("keep", "take up"):
        try_again(state, dispatch, failures, reason)
    elif dispatch.task == "commit":
        shard = state.shards[dispatch.shard]
        shard.failures += 1
        if shard.failures > retries:
            state.failed, state.output_failed = f"shard {dispatch.shard} can't be committed: {reason}", True
        try_again(state, dispatch, failures)
    elif failures <= retries:
        try_again(state, dispatch, failures)
    elif len(dispatch.rows) > 1:
        _split(state, dispatch, failures=max(retries, 1))
    elif dispatch.worker in state.workers_of(dispatch.stage):
        state.records.setdefault((dispatch.stage, dispatch.worker), WorkerRecord()).suspects.append(
            Suspect(dispatch, reason)
        )
    elif dispatch.stage in state.worked_stages:  # its worker died, and it was all that the worker held
        _quarantine_suspect(state, Suspect(dispatch, reason))
    else:
        state.fatal_suspects.append(Suspect(dispatch, reason))


def store_failed(state: DriverState, dispatch: Dispatch, reason: str) -> None:
    """A store that is read from failed, and no row is to blame: after its stage's retries the job ends. The store's client has tried often."""
    spec = state.stages[dispatch.stage]
    if dispatch.failures >= spec.retries and not state.failed:
        state.failed = f"stage {spec.name}: {reason}"
    try_again(state, dispatch, dispatch.failures + 1)


def try_again(state: DriverState, dispatch: Dispatch, failures: int, reason: str = "") -> None:
    """Give a dispatch out anew, as it is. What is half done helps, and nobody tries twice for its sake."""
    if dispatch.task == "commit":
        state.complete.setdefault(dispatch.shard)
    elif dispatch.task == "take up":
        state.to_read.append(dispatch.rows)
    elif dispatch.task == "keep":
        state.stopping.thrown_away += len(dispatch.rows)
        state.stopping.reason = reason or "its worker is gone"
    else:
        state.queues[dispatch.stage].try_again(Retry(dispatch.rows, dispatch.slices, failures))


def _split(state: DriverState, dispatch: Dispatch, failures: int) -> None:
    half = len(dispatch.rows) // 2
    for side in (slice(half, None), slice(None, half)):
        retry = Retry(dispatch.rows[side], rows_of(dispatch.slices, side), failures)
        state.queues[dispatch.stage].try_again(retry, first=True)


def rows_of(slices: Sequence[TableSlice], side: slice) -> list[TableSlice]:
    """Rows ``side`` of what the slices hold one after another, as slices."""
    total = sum(len(slice_.rows) for slice_ in slices)
    start, stop, _ = side.indices(total)
    out, at = [], 0
    for slice_ in slices:
        first, end = max(start - at, 0), min(stop - at, len(slice_.rows))
        if first < end:
            out.append(slice_.sub(first, end))
        at += len(slice_.rows)
    return out


# ---------------------------------------------------------------------------------- a row: suspect, quarantine


def settle_suspects(state: DriverState) -> CheckDataset | None:
    """Only suspects are left. The rows are to blame where their stage has worked; else the stage is, and the job ends.

    A run that goes on where another stopped may find a bad row alone. So a few rows are to blame where the dataset shows that the
    stage has worked before; what is returned is the question whether it does.
    """
    left = {stage: state.suspects(stage) for stage in {*range(len(state.stages))} - state.worked_stages}
    left = {stage: suspects for stage, suspects in left.items() if suspects}
    for stage in left.keys() - state.worked_before.keys():
        return CheckDataset(stage)
    for stage, suspects in left.items():
        state.quarantined_on_trust[stage] += len(suspects)
        if not state.worked_before[stage] or state.quarantined_on_trust[stage] > MAX_QUARANTINED_ON_TRUST:
            count = "the only row" if len(suspects) == 1 else f"each of {len(suspects)} rows"
            state.failed = (
                f"stage {state.stages[stage].name} failed for {count} that it was given: {suspects[-1].reason}"
            )
            return None
    for stage, worker in list(state.records):
        _quarantine_suspects_of(state, stage, worker)
    _quarantine_fatal_suspects(state)
    return None


def _quarantine_suspect(state: DriverState, suspect: Suspect) -> None:
    dispatch = suspect.dispatch
    for slice_ in dispatch.slices:
        state.drop(slice_)
    state.rows_done(dispatch.stage, dispatch.rows)
    quarantine(state, dispatch.rows[0], dispatch.stage, suspect.reason)


def _quarantine_suspects_of(state: DriverState, stage: int, worker: int) -> None:
    """A worker does a stage well: what failed on it failed for its own sake."""
    for suspect in state.records.pop((stage, worker), WorkerRecord()).suspects:
        _quarantine_suspect(state, suspect)


def _quarantine_fatal_suspects(state: DriverState, stage: int | None = None) -> None:
    """A stage works, or all do: the rows ended its workers."""
    suspects = [suspect for suspect in state.fatal_suspects if stage in (None, suspect.dispatch.stage)]
    state.fatal_suspects = [suspect for suspect in state.fatal_suspects if suspect not in suspects]
    for suspect in suspects:
        _quarantine_suspect(state, suspect)


# ------------------------------------------------------------------- a worker: consecutive failures, load, death


def count_success(state: DriverState, dispatch: Dispatch, has_done_a_row: bool) -> None:
    """A dispatch is done: its stage's deaths count no more, and what failed on its worker was the rows' fault."""
    state.deaths[dispatch.stage].clear()
    if has_done_a_row and dispatch.stage not in state.worked_stages:
        state.worked_stages.add(dispatch.stage)
        _quarantine_fatal_suspects(state, dispatch.stage)
    if dispatch.stage in state.worked_stages:
        _quarantine_suspects_of(state, dispatch.stage, dispatch.worker)


def count_failure(state: DriverState, dispatch: Dispatch, reason: str) -> None:
    """Note that a worker failed; replace it if it fails at everything."""
    record = state.records.setdefault((dispatch.stage, dispatch.worker), WorkerRecord())
    rows = set(dispatch.rows)
    if all(rows.isdisjoint(before) for before in record.consecutive_failures):
        record.consecutive_failures.append(rows)
    is_there = dispatch.worker in state.workers_of(dispatch.stage)
    if len(record.consecutive_failures) >= MAX_CONSECUTIVE_FAILURES and is_there:
        _stop_worker(state, dispatch.stage, dispatch.worker, reason)


def load_failed(state: DriverState, dispatch: Dispatch, reason: str) -> None:
    """A worker can't load weights that it first needs now. Another may, if any of the stage has worked; not time and again."""
    spec = state.stages[dispatch.stage]
    state.load_failures[dispatch.stage] += 1
    too_often = state.load_failures[dispatch.stage] > MAX_DEATHS_PER_REPLICA * state.most_replicas_so_far(
        dispatch.stage
    )
    if dispatch.stage not in state.worked_stages or too_often:
        state.failed = f"stage {spec.name} can't start: {reason}"
    try_again(state, dispatch, dispatch.failures)
    if not state.failed and dispatch.worker in state.workers_of(dispatch.stage):
        _stop_worker(state, dispatch.stage, dispatch.worker, reason)


def worker_died(state: DriverState, event: Died) -> None:
    """Replace a worker that is gone, and try again what it held, each dispatch alone."""
    was_starting = (event.worker_type, event.worker) in state.starting
    there = event.worker in state.workers[event.worker_type] or was_starting
    state.starting.discard((event.worker_type, event.worker))
    if was_starting and not event.with_node and _is_one_too_many(state, event.worker_type):
        state.targets[event.worker_type] -= 1
        state.most_replicas[event.worker_type] = state.targets[event.worker_type]
        return
    stages = state.worker_types[event.worker_type].stages
    if event.wrong or (event.at_start and event.worker_type not in state.loaded_types):
        names = ", ".join(state.stages[stage].name for stage in stages)
        what = ": a worker is not what the plan says" if event.wrong else " can't start"
        state.failed = f"stage {names}{what}: {event.reason}"
        return
    if not there:  # it was stopped a moment ago, and has been replaced
        return
    held = state.worker_gone(event.worker_type, event.worker)
    if event.with_node:
        state.losses.update(row for dispatch in held for row in dispatch.rows)
    # It may have been any stage that it had work for; if it had none, any that it hosts.
    rows = {
        stage: {row for d in held if d.stage == stage for row in d.rows} for stage in {d.stage for d in held} or stages
    }
    _replace_worker(state, event.worker_type, event.worker, {} if event.with_node else rows, event.reason)
    for dispatch in held:
        if event.with_node and max((state.losses[row] for row in dispatch.rows), default=0) <= MAX_LOSSES_PER_ROW:
            _give_to_another(state, dispatch)
            continue
        # Of several it may have been any: each is tried again alone, whatever the stage's retries. And one row alone
        # twice more, since workers die for other reasons, too.
        least = 2 if len(dispatch.rows) == 1 else int(len(held) > 1)
        dispatch_failed(state, dispatch, f"its worker died: {event.reason}", least)


def _is_one_too_many(state: DriverState, worker_type: int) -> bool:
    """Whether a worker that could not start is one that the job can do without, where others of its type could.

    The nodes seemed to have room for it; say a GPU's memory had none, or no place came free.
    """
    hosts = state.worker_types[worker_type]
    enough = 1 if hosts.replicas is None else hosts.fewest
    return enough is not None and worker_type in state.loaded_types and state.targets[worker_type] > enough


def _stop_worker(state: DriverState, stage: int, worker: int, reason: str) -> None:
    """Replace a worker that lives, since it fails at a stage. What it held is given out anew."""
    worker_type = state.type_of[stage]
    state.worker_orders.append(StopWorker(worker_type, worker, reason))
    held = state.worker_gone(worker_type, worker)
    _replace_worker(state, worker_type, worker, {stage: set()}, reason)
    for dispatch in held:
        _give_to_another(state, dispatch)


def _give_to_another(state: DriverState, dispatch: Dispatch) -> None:
    """Give a dispatch out anew that did not fail: its worker is gone for other reasons."""
    if dispatch.task == "take up":
        state.to_take_up.appendleft((dispatch.shard, dispatch.file, dispatch.rows))
    else:
        try_again(state, dispatch, dispatch.failures)


def suspects_of_gone(state: DriverState, worker_type: int, worker: int) -> None:
    """Let others try the suspects of a worker that is gone."""
    for stage in state.worker_types[worker_type].stages:
        for suspect in state.records.pop((stage, worker), WorkerRecord()).suspects:
            try_again(state, suspect.dispatch, max(state.stages[stage].retries, 1))


def _replace_worker(
    state: DriverState, worker_type: int, worker: int, deaths: Mapping[int, set[int]], reason: str
) -> None:
    """Start another worker in the place of one that is gone. It tries the suspects of the first.

    ``deaths``: the stages for which it counts as one of the deaths that end a job, each with the rows that it had of it.
    """
    suspects_of_gone(state, worker_type, worker)
    for stage, rows in deaths.items():
        before = state.deaths[stage]
        if all(rows.isdisjoint(others) for others in before):
            before.append(rows)
        if len(before) > MAX_DEATHS_PER_REPLICA * state.most_replicas_so_far(stage):
            state.failed = f"stage {state.stages[stage].name}: its workers fail one after another: {reason}"
    if state.leaving.pop(worker, None) is None:
        state.start_worker(worker_type)


# --------------------------------------------------------------------------------------------- a node and its data


def data_lost(state: DriverState, dispatch: Dispatch, reason: str) -> None:
    """The data of these rows is gone with a node: they begin again, each with the attempt that it is at."""
    rows = list(dispatch.rows)
    if dispatch.task == "commit":
        shard = state.shards[dispatch.shard]
        rows = [row for slice_ in shard.packed for row in slice_.rows]
        shard.missing.update(rows)
        shard.packed = []
        if not shard.missing:  # none of its rows was to be stored
            state.complete.setdefault(dispatch.shard)
    for slice_ in dispatch.slices:
        state.drop(slice_)
    again = []
    for row in rows:
        state.losses[row] += 1
        if state.losses[row] > MAX_LOSSES_PER_ROW:
            quarantine(state, row, dispatch.stage, f"lost {MAX_LOSSES_PER_ROW} times with its node: {reason}")
            continue
        again.append(row)
    if again and dispatch.task == "take up":
        state.to_take_up.append((dispatch.shard, dispatch.file, again))
    elif again:
        lost(state, dispatch.stage, again)

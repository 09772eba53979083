"""How a row ends that is not stored, and how one begins again.

In a job with ``accept`` a row that is filtered is drawn anew: it begins again from the source, with the seed of its next attempt, until
one of its samples passes or the last attempt is made. What becomes of a row hangs on that row alone: not on workers, drivers or order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentmill.driver.limits import error_rate_exceeded
from latentmill.driver.state import DriverState
from latentmill.plugin import Filtered


def quarantine(state: DriverState, row: int, stage: int, reason: str) -> None:
    """A row ends in the error table. Ends the job if no row may fail, or too many have."""
    name = state.stages[stage].name
    about: dict[str, Any] = {"row": row, "stage": name, "reason": reason}
    if state.attempt_of[row]:
        about["attempt"] = state.attempt_of[row]
    state.shards[row // state.rows_per_shard].errors.append(about)
    _end(state, row, stage)
    state.quarantined += 1
    state.failed_rows[stage] += 1
    if state.failed:
        return
    if state.stop_on_error:
        state.failed = f"row {state.row_name(row)} failed in {name}, and on_error is stop: {reason}"
    elif too_many := error_rate_exceeded(state):
        state.failed = f"{too_many}; the last was row {state.row_name(row)}, in {name}: {reason}"


def filtered(state: DriverState, stage: int, rows: Sequence[tuple[int, Filtered]]) -> None:
    """A stage does not want these rows. Nobody is to blame, however many there are: each is drawn anew, or ends."""
    again = []
    for row, why in rows:
        if stage >= state.drawn_in and state.attempt_of[row] + 1 < (state.attempts or 1):
            state.attempt_of[row] += 1
            state.losses.pop(row, None)  # of the sample before
            again.append(row)
        else:
            _filter_out(state, row, stage, why)
    state.drawn_again[stage] += len(again)
    if not state.fixed:
        if again:
            begin_again(state, stage, again)
        return
    for row in again:
        number = row // state.rows_per_shard
        state.shards[number].again.append(row)
        _account(state, row, stage)
        settle(state, number)


def begin_again(state: DriverState, stage: int, rows: Sequence[int]) -> None:
    """Rows that had come to a stage begin again from the source, and first of all."""
    _comes_back(state, stage, rows)
    state.to_read.appendleft(rows)


def lost(state: DriverState, stage: int, rows: Sequence[int]) -> None:
    """What rows were that had come to a stage is gone: they go on from where a driver left them half done, if one did and it is the same
    sample; else they begin again from the source.
    """
    _comes_back(state, stage, rows)
    kept: dict[int, list[int]] = {}
    from_source = []
    for row in rows:
        number = row // state.rows_per_shard
        if number in state.taken_up and state.taken_up[number].attempt_of.get(row) == state.attempt_of[row]:
            kept.setdefault(number, []).append(row)
        else:
            from_source.append(row)
    state.to_take_up.extend((number, state.taken_up[number].file, some) for number, some in kept.items())
    if from_source:
        state.to_read.appendleft(from_source)


def _comes_back(state: DriverState, stage: int, rows: Sequence[int]) -> None:
    for row in rows if state.fixed else ():
        for before in range(1, stage + 1):
            state.queues[before].account(state.chunk(before, row), -1)


def settle(state: DriverState, number: int) -> None:
    """Of a shard fewer rows are under way: commit it if that are none, or draw those again that wait for it.

    They begin together: else it would hang on who arrives first which of them share a batch.
    """
    shard = state.shards[number]
    if not shard.missing:
        state.complete.setdefault(number)
    elif len(shard.missing) == len(shard.again):
        rows, shard.again = sorted(shard.again), []
        begin_again(state, state.last_stage, rows)


def _filter_out(state: DriverState, row: int, stage: int, why: Filtered) -> None:
    about: dict[str, Any] = {"row": row, "stage": state.stages[stage].name, "reason": why.reason, "scores": why.scores}
    if state.attempts is not None:
        about["attempts"] = state.attempt_of[row] + 1
    filtered_before(state, about, stage)


def filtered_before(state: DriverState, about: Mapping[str, Any], stage: int) -> None:
    """A row is filtered for good, as ``about`` tells, now or by a driver that stopped before its shard was committed."""
    row = about["row"]
    state.shards[row // state.rows_per_shard].filtered.append({**about})
    _end(state, row, stage)
    state.filtered += 1


def _end(state: DriverState, row: int, stage: int) -> None:
    number = row // state.rows_per_shard
    state.shards[number].missing.discard(row)
    state.ended_rows[stage] += 1
    _account(state, row, stage)
    settle(state, number)


def _account(state: DriverState, row: int, stage: int) -> None:
    """A row doesn't come to the stages behind this one, or not yet: where batches are fixed, nothing there waits for it."""
    if state.fixed:
        for later in range(stage + 1, len(state.stages)):
            state.queues[later].account(state.chunk(later, row), 1)

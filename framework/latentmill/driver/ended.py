"""How a row ends that is not stored, and how one begins again.

In a job with ``accept`` a row that is filtered is drawn anew: it begins again from the source, with the seed of its next attempt, until
one of its samples passes or the last attempt is made. What becomes of a row hangs on that row alone: not on workers, drivers or order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentmill.driver.limits import error_rate_exceeded
from latentmill.driver.state import DriverState
from latentmill.plugin import Filtered


def quarantine(state: DriverState, row: int, stage: int, reason: str) -> None:
    """A row ends in the error table. Ends the job if no row may fail, or too many have."""
    name = state.stages[stage].name
    state.shards[row // state.rows_per_shard].errors.append({"row": row, "stage": name, "reason": reason})
    _end(state, row, stage)
    state.quarantined += 1
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
        if stage >= state.drawn_in and state.attempt_of[row] + 1 < state.attempts:
            state.attempt_of[row] += 1
            again.append(row)
        else:
            _filter_out(state, row, stage, why)
    if again:
        state.drawn_again[stage] += len(again)
        begin_again(state, stage, again)


def begin_again(state: DriverState, stage: int, rows: Sequence[int]) -> None:
    """Rows that had come to a stage begin again from the source, and first of all."""
    for row in rows:
        for before in range(1, stage + 1) if state.fixed else ():
            state.queues[before].account(state.chunk(before, row), -1)
    state.to_read.appendleft(rows)


def _filter_out(state: DriverState, row: int, stage: int, why: Filtered) -> None:
    about: dict[str, Any] = {"row": row, "stage": state.stages[stage].name, "reason": why.reason, "scores": why.scores}
    if state.attempts > 1:
        about["attempts"] = state.attempt_of[row] + 1
    state.shards[row // state.rows_per_shard].filtered.append(about)
    _end(state, row, stage)
    state.filtered += 1


def _end(state: DriverState, row: int, stage: int) -> None:
    number = row // state.rows_per_shard
    shard = state.shards[number]
    shard.missing.discard(row)
    if not shard.missing:
        state.complete.setdefault(number)
    state.ended_rows[stage] += 1
    if state.fixed:
        for later in range(stage + 1, len(state.stages)):
            state.queues[later].account(state.chunk(later, row), 1)

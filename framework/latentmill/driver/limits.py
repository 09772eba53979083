"""How much may wait, how much may fail, and how often something may be lost: every number that bounds a run."""

from __future__ import annotations

from math import inf

from latentmill.driver.state import DriverState

MAX_LOSSES_PER_ROW = 20
"""How often a node may take a row's data, or the worker that has the row, away."""
MAX_DEATHS_PER_REPLICA = 3
"""Deaths of a stage's workers, for each replica, over rows that have none in common and with no batch finished in between. One
more ends the job. One row that kills, in smaller and smaller batches until it is found, counts once."""
MAX_CONSECUTIVE_FAILURES = 3
"""Batches that have no row in common and fail on one worker in a row: then it is the worker, and not the rows."""
MAX_QUARANTINED_ON_TRUST = 3
"""Rows of a stage that has done nothing in this run which may be quarantined since the dataset shows that it worked before."""
MIN_ROWS_FOR_ERROR_RATE = 100
"""Rows from which on a share of them says something about the rest."""


def queue_limit(state: DriverState, stage: int) -> int:
    """Rows that may wait for a stage: as many batches as its workers hold, and one more for each worker."""
    spec = state.stages[stage]
    return spec.batch_size * state.replicas(stage) * (spec.batches_per_worker + 1)


def has_room(state: DriverState, stage: int, rows: int) -> bool:
    """Whether the next stage's queue can take what this one would add to it.

    What the stage's own workers can hold is room besides: a fast stage of one worker must not keep a slow stage of
    eight from working all at once.
    """
    if stage == state.last_stage:
        return True  # what leaves the last stage waits in its shard, and open shards are bounded
    spec = state.stages[stage]
    room = queue_limit(state, stage + 1) + spec.batch_size * state.replicas(stage) * spec.batches_per_worker
    coming = state.rows_queued(stage + 1) + state.rows_in_flight[stage] + len(state.suspects(stage + 1))
    if coming == 0:
        return True
    if coming + rows > room:
        return False
    if state.max_bytes_in_flight == inf:  # nothing to reckon
        return True
    return state.bytes_held + state.bytes_to_come() + rows * state.bytes_of_row[stage] <= state.max_bytes_in_flight


def max_open_shards(state: DriverState) -> int:
    """Shards that may be open at a time: the rows of all stages, and what waits for the rest of its shard."""
    return 2 + sum(queue_limit(state, stage) for stage in range(1, len(state.stages))) // state.rows_per_shard


def error_rate_exceeded(state: DriverState) -> str:
    """Why too many rows have failed; "" if not too many have.

    They are a share of those that were read, each counted once however often it is drawn: what fails is known long before what
    succeeds has arrived.
    """
    ended = max(state.rows_read, state.quarantined + state.filtered + state.arrived)
    if state.quarantined <= state.max_error_rate * max(ended, MIN_ROWS_FOR_ERROR_RATE):
        return ""
    return f"{state.quarantined} of {ended} rows failed, more than max_error_rate={state.max_error_rate:g} allows"

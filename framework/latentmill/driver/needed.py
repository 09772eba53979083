"""Which rows are needed where a dataset ends with so many accepted ones: those are the accepted rows of the smallest numbers.

Of the shard with the last of them, all is needed up to the row before the next accepted one; of the shards behind it nothing is, and
they are committed without rows. So what a shard holds hangs on the rows before it, and it waits for shards of this driver to say how many
those are. For others' it waits no longer than there is something to do: what turns out to be too much is made anew at the end
(``Inventory.out_of_step``).
"""

from __future__ import annotations

from collections.abc import Set

from latentmill.driver.limits import max_open_shards
from latentmill.driver.state import DriverState


def shards_done(state: DriverState, shards: Set[int]) -> None:
    """Others have committed these."""
    state.done |= shards
    if state.accept_rows is not None:
        state.uncounted |= shards - state.accepted.keys()


def shards_taken_out(state: DriverState, shards: Set[int]) -> None:
    """These are in the dataset no more. All others are counted anew: of those, too, one may have been taken out and made again since, by a
    driver that had ended when this one asked, or another was first to commit one.
    """
    state.done -= shards
    if shards and state.accept_rows is not None:
        state.uncounted = (state.uncounted | state.accepted.keys()) - shards
        state.accepted.clear()
        state.first_uncounted = state.accepted_before_that = 0


def accepted_before(state: DriverState, shard: int) -> tuple[int, int]:
    """How many accepted rows the shards before this one have, at least and at most."""
    while state.first_uncounted in state.accepted:
        state.accepted_before_that += state.accepted[state.first_uncounted]
        state.first_uncounted += 1
    begun = state.first_uncounted <= shard
    least = most = state.accepted_before_that if begun else 0
    for before in range(state.first_uncounted if begun else 0, shard):
        known = state.accepted.get(before)
        least += known or 0
        most += len(state.shard_rows(before)) if known is None else known
    return least, most


def is_needed(state: DriverState, shard: int) -> bool:
    """Whether any row of a shard may be needed, by what is known."""
    return state.accept_rows is None or accepted_before(state, shard)[0] < state.accept_rows


def rows_not_needed(state: DriverState, number: int) -> int | None:
    """How many rows at the end of a complete shard are not needed; None: it is to wait for shards before it."""
    if state.accept_rows is None:
        return 0
    rows = state.shard_rows(number)
    least, most = accepted_before(state, number)
    if least >= state.accept_rows:
        return len(rows)
    accepted = [row for slice_ in state.shards[number].packed for row in slice_.rows]
    if most + len(accepted) <= state.accept_rows:
        return 0
    if least == most:
        return rows.stop - sorted(accepted)[state.accept_rows - least]
    # Where as many shards are open as may be, one that waited might wait for one that can't be opened.
    waits = any(other < number for other in state.shards) or len(state.shards) < max_open_shards(state)
    return None if waits else 0

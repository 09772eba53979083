"""Rows that are filtered and drawn again, in the driver alone: what is counted, and which rows share a batch."""

import random

import pytest

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import (
    CountRows,
    Dispatch,
    Failed,
    Finished,
    RowsCounted,
    StageSpec,
    Started,
    StartWorker,
    TakenOut,
)
from latentmill.driver.state import DriverState, finished
from latentmill.plugin import Filtered


def run(state, becomes, pick=lambda pending: 0, lost=lambda order, attempts: False):
    """Carry out what is ordered, the oldest first or as ``pick`` says. ``becomes(stage, row, attempt)``: why a row goes no further.

    Returns what was done: of each batch its stage, and its rows with their attempts; and what each commit says.
    """
    pending, batches, told = [], [], []
    for _ in range(20_000):
        if finished(state) or state.failed:
            return batches, told
        for order in decide(state):
            if isinstance(order, StartWorker):
                apply(state, Started(order.worker_type, order.worker))
            elif isinstance(order, Dispatch):
                pending.append((order, tuple(state.attempt_of[row] for row in order.rows)))
        if not pending:
            continue
        order, attempts = pending.pop(pick(pending))
        if order.task == "commit":
            told += [*order.errors, *order.filtered]
            apply(state, Finished(order.id))
        elif order.slices and lost(order, attempts):
            apply(state, Failed(order.id, "lost", "its node is gone"))
        else:
            batches.append((order.stage, tuple(sorted(zip(order.rows, attempts)))))  # as a worker sorts them
            rejected = {r: why for r, k in zip(order.rows, attempts) if (why := becomes(order.stage, r, k))}
            wanted = [tuple(r for r in order.rows if r not in rejected and r % 2 == odd) for odd in (0, 1)]
            apply(state, Finished(order.id, [("even", wanted[0]), ("odd", wanted[1])], [*rejected.items()]))
    raise AssertionError("not finished")


def job(rows, sizes, **settings):
    names = ("read", "denoise", *(f"filter {k}" for k in range(len(sizes) - 3)), "write")
    stages = tuple(StageSpec(name, batch_size=size, batches_per_worker=2) for name, size in zip(names, sizes))
    return DriverState(stages, rows, settings.pop("rows_per_shard", rows), drawn_in=1, **settings)


@pytest.mark.parametrize("attempts", [1, 3])
def test_rows_that_wait_to_be_drawn_again_are_rows_that_were_read(attempts):
    """Of a thousand rows fifty fail, and all others are filtered once: five per cent have failed, and eight are allowed."""

    def becomes(stage, row, attempt):
        if stage != 2:
            return None
        return "bad" if row % 20 == 1 else Filtered("unwanted") if attempt == 0 else None

    state = job(1000, (500, 500, 500, 500), attempts=attempts, max_error_rate=0.08)

    def first_samples_first(pending):
        return min(range(len(pending)), key=lambda at: (any(pending[at][1]), pending[at][0].stage))

    run(state, becomes, first_samples_first)
    assert not state.failed and state.committed_failed == 50
    assert (state.committed_ok, state.committed_filtered) == ((0, 950) if attempts == 1 else (950, 0))


def test_samples_that_are_drawn_again_are_no_more_rows_that_could_fail():
    """Of a hundred and fifty fifteen may fail, and each is drawn eight times before thirty do."""

    def becomes(stage, row, attempt):
        if stage == 2 and attempt < 7:
            return Filtered("unwanted")
        return "bad" if stage == 2 and row % 5 == 0 else None

    state = job(150, (50, 50, 50, 50), attempts=8, max_error_rate=0.1)
    run(state, becomes)
    assert "16 of 150 rows failed, more than max_error_rate=0.1 allows" in state.failed


@pytest.mark.parametrize("seed", range(20))
def test_fixed_batches_of_rows_that_are_drawn_again_depend_on_the_rows_alone(seed):
    """Filters of several batch sizes tell of rows of one batch at different times."""
    draw = random.Random("which pass").random
    passes = {row: next(k for k in range(9) if draw() < 0.5 or k == 8) for row in range(30)}

    def becomes(stage, row, attempt):
        return Filtered("unwanted") if stage == 2 + row % 3 and attempt < passes[row] else None

    done = []
    dice = random.Random(seed)
    for pick in (lambda pending: 0, lambda pending: dice.randrange(len(pending))):
        state = job(30, (4, 4, 2, 3, 5, 4), rows_per_shard=9, attempts=6, fixed=True)
        batches, told = run(state, becomes, pick)
        assert not state.failed and {row["row"] for row in told} == {row for row in passes if passes[row] > 5}
        assert all(row["attempts"] == 6 for row in told)
        done.append(sorted(batch for batch in batches if batch[0]))  # what is read has no slots
    assert done[0] == done[1]
    assert len({attempt for _, rows in done[0] for _, attempt in rows}) > 3  # else it would show nothing


def test_what_was_lost_of_one_sample_is_not_counted_against_the_next():
    """Ten times of each of three, and twenty are the most for a row."""
    left = {attempt: 10 for attempt in range(3)}

    def lost(order, attempts):
        if order.stage != 1 or not left[attempts[0]]:
            return False
        left[attempts[0]] -= 1
        return True

    state = job(1, (1, 1, 1, 1), attempts=4)
    run(state, lambda stage, row, k: Filtered("unwanted") if stage == 2 and k < 2 else None, lost=lost)
    assert not any(left.values()) and (state.committed_ok, state.committed_failed) == (1, 0)


def test_an_error_row_says_at_which_attempt_it_failed():
    def becomes(stage, row, attempt):
        if stage == 2:
            return "bad" if attempt == row else Filtered("unwanted")
        return None

    _, told = run(job(3, (1, 1, 1, 1), attempts=3), becomes)
    wanted = [
        {"row": 0, "stage": "filter 0", "reason": "bad"},
        {"row": 1, "stage": "filter 0", "reason": "bad", "attempt": 1},
        {"row": 2, "stage": "filter 0", "reason": "bad", "attempt": 2},
    ]
    assert sorted(told, key=lambda row: row["row"]) == wanted


def test_all_shards_are_counted_anew_once_one_has_ended_elsewhere_than_the_dataset():
    """The first had no accepted row when it was counted, and was made anew since, with four: else the last is cut wrongly for ever."""
    state = job(12, (2, 2, 2), rows_per_shard=4, accept_rows=6, done={0}, accepted={0: 0})
    run(state, lambda stage, row, attempt: None)
    assert (state.committed_ok, state.committed_not_needed, state.accepted) == (6, 2, {0: 0, 1: 4, 2: 2})
    apply(state, TakenOut(frozenset({1, 2})))
    assert decide(state) == [CountRows(frozenset({0}))]
    apply(state, RowsCounted({0: 4}))
    run(state, lambda stage, row, attempt: None)
    assert (state.committed_ok, state.committed_not_needed, state.accepted) == (6 + 2, 2 + 2 + 4, {0: 4, 1: 2, 2: 0})

"""What a whole job is reckoned to take: exact answers from made-up rounds."""

import math

import pytest

from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.estimates import Left, Round, Spread, estimate, line, spread

STAGES = [StageSpec("read", 10), StageSpec("denoise", 10), StageSpec("write", 10)]


def a_round(denoise, computing=math.nan):
    """100 rows, of which each takes 1 ms to be read, and 2 ms to be packed. A shard takes 1 s, and 10 ms a row; so of bytes."""
    return Round(100, computing, [0.1, 100 * denoise, 0.2], [(100, 2.0)], [100.0, 2e5, 1e3], [(100, 70_000.0)])


WARMED = Round(100, 9.9, [9.9] * 3, [(75, 9.9), (25, 1.25)], [0.0] * 3, [(75, 55_000.0), (25, 25_000.0)])


def left(types, nodes, gpus):
    return Left(10_000, 10, 1000, STAGES, types, nodes, gpus)


def test_the_slowest_workers_say_how_long_it_takes_and_get_all_room():
    """Four GPUs of which each row wants 0.4 s: ten rows a second. Commits take 1 s + 1000 x 10 ms a shard: 11 ms a row, and 2 to pack."""
    types = [
        WorkerType((0,), 1, {"CPU": 1.0}),
        WorkerType((1,), None, {"CPU": 1.0, "GPU": 1.0}),
        WorkerType((2,), 1, {"CPU": 1.0}),
    ]
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
    found = estimate([a_round(0.4)] * 3, left(types, nodes, [0.0, 1.0, 0.0]), 20.0, WARMED)
    assert list(found.workers) == [1, 4, 1] and found.slowest == 1
    assert found.row_seconds == pytest.approx([0.001, 0.4, 0.013])
    assert found.rows_a_second == pytest.approx((10.0, 10.0, 10.0))
    filling = 10 * 0.001 + 10 * 0.013 + 11.0  # the first batch is read; the last is packed, and its shard committed
    filling += 10 * 0.4 * 3 / 4  # three of the four may have to wait for a batch of the fourth
    assert found.seconds == pytest.approx((1000 + filling,) * 3)
    assert found.start == pytest.approx(20 * 1.75)  # one worker, and then three more, of which the first does a quarter
    assert found.gpu_hours.value == pytest.approx(4 * (1000 + filling + 35) / 3600)
    assert found.bytes == pytest.approx((10 * 10_000 + 10_000 * 600.0,) * 3)


def test_one_process_computes_one_thing_at_a_time():
    types = [WorkerType((0,)), WorkerType((1,)), WorkerType((2,))]
    found = estimate([a_round(0.4, computing=50.0)], left(types, [], [0, 0, 0]), 1.0, WARMED)
    assert found.rows_a_second.value == pytest.approx(2.0) and list(found.workers) == [1, 1, 1]


def test_rounds_that_differ_make_the_spread():
    types = [WorkerType((0,)), WorkerType((1,)), WorkerType((2,))]
    rounds = [a_round(seconds, computing=100 * seconds) for seconds in (0.4, 0.5, 0.6)]
    found = estimate(rounds, left(types, [], [0, 0, 0]), 1.0, WARMED)
    beside = 2.920 * 0.1 / math.sqrt(3)
    assert found.rows_a_second == pytest.approx((1 / 0.5, 1 / (0.5 + beside), 1 / (0.5 - beside)))
    assert found.seconds.low < found.seconds.value < found.seconds.high


def test_no_room_is_no_estimate():
    types = [WorkerType((0,)), WorkerType((1,), 1, {"GPU": 1.0}), WorkerType((2,))]
    with pytest.raises(ValueError, match="no room"):
        estimate([a_round(0.4)], left(types, [{"CPU": 8.0}], [0, 1, 0]), 1.0, WARMED)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(4, 14.0), (12, 22.0)], (10.0, 1.0)),
        ([(4, 22.0), (12, 14.0)], (14.0, 0.0)),  # the few took longer: nothing is said of a row
        ([(4, 1.0), (12, 100.0)], (0.0, 100 / 12)),  # no shard costs less than nothing
        ([(10, 20.0), (10, 20.0)], (0.0, 2.0)),
    ],
)
def test_what_a_shard_costs_and_what_its_rows(points, expected):
    assert line(points) == pytest.approx(expected)


def test_nine_in_ten():
    assert spread([1.0, 2.0, 3.0], 2.0) == pytest.approx(Spread(2.0, 2 - 2.92 / math.sqrt(3), 2 + 2.92 / math.sqrt(3)))
    assert spread([1.0], 1.0) == (1.0, 1.0, 1.0)

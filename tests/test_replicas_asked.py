"""What is asked of an autoscaler: no more than what is lacking, and than what has longer to work than it takes to come."""

import pytest
from tests.test_replicas import Cluster

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.loop import Pool, drive
from latentmill.driver.messages import (
    AskFor,
    Dispatch,
    Finished,
    NodesSeen,
    StageSpec,
    Started,
    StartWorker,
    Stop,
    StopWorker,
    WorkerType,
)
from latentmill.driver.replicas import COMES_IN, MOST_ASKED
from latentmill.driver.state import DriverState
from latentmill.errors import BusyError

ROWS = 100_000


def asks(orders):
    return [order.more for order in orders if isinstance(order, AskFor)]


def test_what_is_lacking_of_a_number_is_asked_for_until_it_is_there():
    types = (WorkerType((0,), 4, {"CPU": 1.0}, fewest=1), WorkerType((1,), 2, {"CPU": 1.0}))
    state = DriverState((StageSpec("read", 8), StageSpec("write", 8)), ROWS, 1000, worker_types=types)
    decide(state)
    assert state.targets == [1, 2]
    apply(state, NodesSeen(({"CPU": 3.0},), more_come=True))
    assert asks(decide(state)) == [(3, 0)] and asks(decide(state)) == []
    apply(state, NodesSeen(({"CPU": 3.0}, {"CPU": 2.0}), more_come=True))
    assert asks(decide(state)) == [(1, 0)] and state.targets == [3, 2]
    apply(state, NodesSeen(({"CPU": 8.0},), more_come=True))
    assert asks(decide(state)) == [(0, 0)] and state.targets == [4, 2]
    apply(state, NodesSeen(({"CPU": 3.0},), more_come=True))
    assert asks(decide(state)) == [(3, 0)] and state.targets == [1, 2]


def test_nobody_is_asked_where_no_nodes_come():
    types = (WorkerType((0,), 4, {"CPU": 1.0}, fewest=1), WorkerType((1,), 2, {"CPU": 1.0}))
    state = DriverState((StageSpec("read", 8), StageSpec("write", 8)), ROWS, 1000, worker_types=types)
    apply(state, NodesSeen(({"CPU": 3.0},)))
    assert asks(decide(state)) == []


@pytest.mark.parametrize(("rows", "asked"), [(400, False), (80_000, True)])
def test_as_many_are_asked_for_as_have_longer_to_work_than_they_take_to_come(rows, asked):
    """Of those whose number is found. Denoise takes half a second a row: 400 rows are 200 s of one worker, 80,000 are 40,000 s."""
    cluster = Cluster(3, [0.01, 0.01, 4.0, 0.01, 0.01], rows=rows)
    apply(cluster.state, NodesSeen(({"GPU": 3.0},), more_come=True))
    cluster.run(lambda: len(cluster.decoded) >= 20)
    [_, _, more, *_] = cluster.state.asked_for or (0,) * 5
    wanted, in_time = cluster.state.targets[2] + more, 0.5 * rows / (COMES_IN + cluster.loading)
    assert wanted <= max(1, in_time) and (not asked or wanted > 0.8 * in_time)


def test_in_the_end_nothing_is_asked_for():
    """The last rows are done before a node could come, though the job gives a number and fewer are there."""
    types = (WorkerType((0,), 8, {"CPU": 1.0}, fewest=1), WorkerType((1,), 1, {"CPU": 1.0}))
    state = DriverState((StageSpec("read", 8), StageSpec("write", 8)), 16, 16, worker_types=types)
    apply(state, NodesSeen(({"CPU": 2.0},), more_come=True))
    assert asks(decide(state)) == [(7, 0)]
    for worker_type, worker in sorted(state.starting):
        apply(state, Started(worker_type, worker, seconds=10.0))
    told = []
    while not any(told):
        orders = decide(state)
        told += [not any(more) for more in asks(orders)]
        dispatches = list(state.in_flight.values())
        assert dispatches or any(told)
        for order in dispatches:
            tables = () if order.task == "commit" else [("a", tuple(order.rows))]
            apply(state, Finished(order.id, tables, seconds=1.0))


def few_of(count, asks, rows=ROWS):
    """The state of a job that wants ``count`` readers and begins with one, and has one node."""
    types = (WorkerType((0,), count, asks, fewest=1), WorkerType((1,), 1, {"CPU": 1.0}))
    state = DriverState((StageSpec("read", 8), StageSpec("write", 8)), rows, 1000, worker_types=types)
    decide(state)
    apply(state, NodesSeen(({"CPU": 2.0},), more_come=True))
    return state


def test_who_stops_asks_for_nothing_any_more_and_starts_nobody_on_what_comes():
    state = few_of(4, {"CPU": 1.0})
    assert asks(decide(state)) == [(3, 0)]
    apply(state, Stop("finish"))
    apply(state, NodesSeen(({"CPU": 8.0},), more_come=True))
    orders = decide(state)
    assert asks(orders) == [(0, 0)] and state.targets == [1, 1]
    assert not any(isinstance(order, StartWorker) for order in orders)


def test_what_came_and_was_taken_by_others_is_asked_for_again():
    """A place that has come is given free: a job that gets none of it would ask for one less each time."""
    state = few_of(4, {"CPU": 1.0})
    assert asks(decide(state)) == [(3, 0)]
    apply(state, NodesSeen(({"CPU": 2.0}, {"CPU": 0.5}), more_come=True))
    assert asks(decide(state)) == [(3, 0)]


def test_for_thousands_it_is_asked_bit_by_bit():
    state = few_of(2_000, {"CPU": 1.0})
    assert asks(decide(state)) == [(MOST_ASKED, 0)]
    apply(state, NodesSeen(({"CPU": 501.0},), more_come=True))
    assert asks(decide(state)) == [(500, 0)] and state.targets == [500, 1]


def test_no_node_is_asked_for_workers_that_ask_for_nothing():
    state = few_of(4, {})
    apply(state, NodesSeen((), more_come=True))
    assert not any(map(any, asks(decide(state)))) and state.targets == [1, 1]


def test_a_guess_of_the_memory_that_workers_will_take_ends_nobody():
    """Where one type computes, the first look reckons with twice of what has been seen."""
    types = (WorkerType((0,), 1), WorkerType((1,), 8, {"CPU": 1.0}, fewest=2), WorkerType((2,), 1))
    specs = tuple(StageSpec(name, 8) for name in ("read", "encode", "write"))
    state = DriverState(specs, ROWS, 1000, worker_types=types)
    decide(state)
    apply(state, Started(1, 1, seconds=1.0, memory=10))
    apply(state, NodesSeen(({"CPU": 8.0, "memory": 100.0},)))
    orders = decide(state)
    assert state.targets == [1, 8, 1] and not any(isinstance(order, StopWorker) for order in orders)


def test_a_job_that_has_waited_too_long_keeps_what_is_half_done():
    """Workers that are there are given the shards that are open, before it ends for lack of places."""
    types = (WorkerType((0,), 1), WorkerType((1,), 1), WorkerType((2,), 1))
    specs = tuple(StageSpec(name, 8) for name in ("read", "encode", "write"))
    state = DriverState(specs, 16, 16, worker_types=types)

    class Waits(Pool):
        """One whose stage `encode` has no worker, and which is out of patience when all rows are read."""

        def __init__(self):
            self.events, self.kept = [], []

        def submit(self, order):
            if isinstance(order, StartWorker):
                self.events += [Started(order.worker_type, order.worker)] * (order.worker_type != 1)
            elif isinstance(order, Dispatch) and order.task == "keep":
                self.kept += order.rows
                self.events.append(Finished(order.id))
            elif isinstance(order, Dispatch):
                self.events.append(Finished(order.id, [("a", tuple(order.rows))], bytes=1))

        def collect(self, timeout):
            if not self.events:
                raise BusyError("waited 3 s for places")
            events, self.events = self.events, []
            return events

        def release(self, block):
            pass

        def close(self):
            pass

    pool = Waits()
    with pytest.raises(BusyError, match="waited 3 s for places"):
        drive(state, pool, lambda: None)
    assert sorted(pool.kept) == list(range(16)) and state.stopping.kept == 16

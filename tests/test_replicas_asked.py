"""What is asked of an autoscaler: no more than what is lacking, and than what has longer to work than it takes to come."""

import pytest
from tests.test_replicas import Cluster

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import AskFor, Finished, NodesSeen, StageSpec, Started, WorkerType
from latentmill.driver.replicas import COMES_IN
from latentmill.driver.state import DriverState

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

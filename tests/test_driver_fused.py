"""The driver, without Ray, where workers host several stages."""

from collections import Counter

import pytest
from tests.driver_world import World, state

from latentmill.driver import failures
from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import Died, Dispatch, Failed, Finished, Started, StartWorker, WorkerType

FUSED = (WorkerType((0,), 1), WorkerType((1, 2, 3), 2), WorkerType((4,), 1))
ALL_IN_ONE = (WorkerType((0, 1, 2, 3, 4), 1),)


@pytest.mark.parametrize("hosted", [FUSED, ALL_IN_ONE], ids=["fused", "all in one"])
@pytest.mark.parametrize("seed", range(8))
def test_every_row_ends_once_where_workers_host_several_stages(hosted, seed):
    world = World(
        state(worker_types=hosted, running=1 + seed % 2), seed, reject={5}, poison={33, 34}, flaky=0.02, losses=0.01
    ).run()
    assert not world.state.failed
    assert Counter(world.ok() + list(world.failed())) == Counter(range(100))
    assert {5, 33, 34} <= world.failed().keys()


def test_deaths_count_for_the_stage_that_had_the_work():
    """The stages before decode do well on the same workers all the time, and the job ends all the same."""
    world = World(state(rows=1000, worker_types=FUSED), seed=3)
    carry_out = world.carry_out

    def decode_kills(order):
        if not (isinstance(order, Dispatch) and order.stage == 3):
            return carry_out(order)
        world.orders = [o for o in world.orders if not (isinstance(o, Dispatch) and o.worker == order.worker)]
        return Died(1, order.worker, "killed")

    world.carry_out = decode_kills
    assert world.run().state.failed == "stage decode: its workers fail one after another: killed"
    assert not world.committed


def test_a_stage_that_does_well_clears_no_other_of_its_worker():
    """Encode succeeds on a worker on which decode fails for all rows: no row is to blame for that."""
    world = World(state(rows=200, worker_types=FUSED), seed=3)
    carry_out = world.carry_out

    def decode_fails(order):
        broken = isinstance(order, Dispatch) and order.stage == 3
        return Failed(order.id, "raised", "CUDA error") if broken else carry_out(order)

    world.carry_out = decode_fails
    assert "decode" in world.run().state.failed
    assert not world.failed()


def test_a_worker_that_was_stopped_and_dies_is_replaced_once():
    """Its third failure and its end are told of together."""
    given = state(worker_types=FUSED)
    for order in decide(given):
        apply(given, Started(order.worker_type, order.worker))
    stopped = next(iter(given.workers[1]))
    failures._stop_worker(given, 2, stopped, "CUDA error")
    apply(given, Died(1, stopped, "killed"))
    workers = len(given.workers[1]) + sum(isinstance(o, StartWorker) for o in given.worker_orders)
    assert workers == FUSED[1].replicas
    assert [len(deaths) for deaths in given.deaths] == [0, 0, 1, 0, 0]


def test_a_block_of_a_worker_that_was_given_up_is_released():
    given = state(worker_types=FUSED)
    apply(given, Finished(99, [("a", (1, 2))]))
    assert given.released == [99]

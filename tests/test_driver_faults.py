"""The driver, without Ray: what failures and deaths cost, and when they end the job."""

from collections import Counter

import pytest
from tests.driver_world import World, stage_of, state

from latentmill.driver import limits
from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import (
    Died,
    Dispatch,
    Draining,
    Failed,
    Finished,
    HandedOver,
    HandOver,
    Started,
    StartWorker,
    Stop,
    TakenUp,
)


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_are_replaced_and_the_row_that_kills_is_found(seed):
    world = World(state(), seed, fatal={41}, deaths=0.02).run()
    if world.state.failed:  # many deaths in a row are a reason to stop, never to lose count
        assert "fail one after another" in world.state.failed
        return
    assert Counter(world.ok() + list(world.failed())) == Counter(range(100))
    assert "killed" in world.failed()[41]


@pytest.mark.parametrize("seed", range(20))
def test_what_a_dying_worker_only_held_is_not_quarantined_with_it(seed):
    """Even where the stage asks for no second try: of the batches that it held any may be the one."""
    world = World(state(sizes=(1,) * 5, retries=0), seed, fatal={41}).run()
    assert set(world.failed()) == {41}


def test_a_stage_whose_workers_always_die_ends_the_job():
    world = World(state(), deaths=1.0).run()
    assert "fail one after another" in world.state.failed


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_a_broken_worker_is_replaced_and_quarantines_no_row(seed, fixed):
    """A worker whose GPU is gone fails in no time, is idle at once, and would get everything."""
    world = World(state(rows=400, fixed=fixed), seed, poison={33, 34})
    denoisers = [order.worker for order in world.state.worker_orders if order.worker_type == 2]
    world.broken = lambda worker: worker == denoisers[0]
    world.run()
    assert not world.state.failed
    assert set(world.failed()) == {33, 34} and len(world.ok()) == 398


def test_a_stage_of_broken_workers_ends_the_job_and_quarantines_no_row():
    world = World(state(rows=400), seed=1)
    world.broken = lambda worker: True
    world.run()
    assert world.state.failed == "stage read: its workers fail one after another: CUDA error"
    assert not world.failed()


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_that_fail_at_the_very_end_are_quarantined_though_nothing_succeeds_after_them(fixed):
    world = World(state(rows=3, rows_per_shard=1, fixed=fixed), seed=1, poison={0, 1, 2})
    world.made_before = True
    assert set(world.run().failed()) == {0, 1, 2} and not world.state.failed


@pytest.mark.parametrize("rows_per_shard", [1, 5, 12])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_stage_that_does_no_row_of_a_small_job_ends_it_and_no_row_is_blamed(fixed, rows_per_shard):
    """Whether it raises or takes its workers with it, and whatever an earlier stage rejects."""
    for faults in ({"poison": range(12)}, {"poison": range(12), "reject": {4, 5}}, {"fatal": range(12)}):
        world = World(state(rows=12, rows_per_shard=rows_per_shard, fixed=fixed), seed=2, **faults).run()
        assert world.state.failed.startswith("stage ") and not {"boom", "killed"} & {*world.failed().values()}
    alone = World(state(rows=1), poison={0}).run()
    assert alone.state.failed == "stage denoise failed for the only row that it was given: boom" and not alone.committed


def test_of_a_stage_that_has_done_nothing_in_this_run_few_rows_are_blamed_because_of_an_earlier_one():
    """Whatever the dataset holds: it may have been made where the stage was whole."""
    for rows_per_shard in (1, 2, 12):
        world = World(state(rows=12, rows_per_shard=rows_per_shard), seed=2, poison=range(12))
        world.made_before, world.asked = True, 9
        world.run()
        assert world.state.failed.startswith("stage denoise") and len(world.failed()) <= limits.MAX_QUARANTINED_ON_TRUST


@pytest.mark.parametrize("cause", ["unloaded", "contract"])
def test_what_is_the_stage_s_own_fault_ends_the_job_at_once(cause):
    world = World(state(), seed=1)
    carry_out, told = world.carry_out, []

    def broken(order):
        if isinstance(order, Dispatch) and order.stage == 1:
            told.append(order)
            return Failed(order.id, cause, "vae x: no weights")
        return carry_out(order)

    world.carry_out = broken
    wrong = {"unloaded": "stage encode can't start: vae x: no weights", "contract": "stage encode: vae x: no weights"}
    assert world.run().state.failed == wrong[cause]
    assert len(told) == 1 and not world.committed


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize("worked", [False, True])
def test_a_store_that_fails_ends_the_job_after_the_retries_and_blames_no_row(retries, worked):
    """Not even where the stage has worked, and one row alone was asked for."""
    world = World(state(sizes=(1,) * 5, retries=retries), seed=3)
    carry_out, told = world.carry_out, []

    def broken(order):
        if isinstance(order, Dispatch) and order.stage == 0 and (not worked or 7 in order.rows):
            told.append(order.rows)
            return Failed(order.id, "store", "s3://b/x: no answer")
        return carry_out(order)

    world.carry_out = broken
    assert world.run().state.failed == "stage read: s3://b/x: no answer"
    assert max(Counter(told).values()) == 1 + retries and not world.failed()


def test_a_store_that_fails_for_a_while_costs_no_row():
    world = World(state(retries=2), seed=3)
    carry_out, told = world.carry_out, Counter()

    def broken(order):
        if isinstance(order, Dispatch) and order.task == "read" and told[order.rows] < 2:
            told[order.rows] += 1
            return Failed(order.id, "store", "s3://b/x: no answer")
        return carry_out(order)

    world.carry_out = broken
    assert len(world.run().ok()) == 100 and not world.failed()


def test_a_worker_that_cannot_load_a_part_is_replaced_where_another_could():
    world = World(state(replicas=(1, 2, 1, 1, 1)), seed=4)
    carry_out, unable = world.carry_out, []

    def broken(order):
        if isinstance(order, Dispatch) and order.stage == 1 and world.state.worked_stages >= {1}:
            if not unable:
                unable.append(order.worker)
            if order.worker == unable[0]:
                return Failed(order.id, "unloaded", "no memory")
        return carry_out(order)

    world.carry_out = broken
    assert len(world.run().ok()) == 100 and unable
    never = World(state(), seed=4)
    carry_out_never = never.carry_out

    def later(order):
        if isinstance(order, Dispatch) and order.stage == 1 and never.state.worked_stages >= {1} and 50 in order.rows:
            return Failed(order.id, "unloaded", "no memory")
        return carry_out_never(order)

    never.carry_out = later
    assert never.run().state.failed == "stage encode can't start: no memory"


def test_one_row_that_kills_is_found_in_a_batch_of_any_size():
    sizes = (64, 64, 64, 64, 64)
    for row in (0, 37, 63):
        world = World(state(rows=128, rows_per_shard=64, sizes=sizes, replicas=(1,) * 5), fatal={row}).run()
        assert not world.state.failed and set(world.failed()) == {row}


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_batch_is_tried_again_as_often_as_the_stage_says(retries):
    world = World(state(rows=6, replicas=(1,) * 5, retries=retries), poison={2})
    tried = Counter()

    def carry_out(order, given=world.carry_out):
        if isinstance(order, Dispatch) and order.stage == 2:
            tried[tuple(order.rows)] += 1
        return given(order)

    world.carry_out = carry_out
    world.run()
    assert set(world.failed()) == {2}
    assert tried[0, 1, 2, 3, 4, 5] == 1 + retries and tried[0, 1, 2] == 1  # then halves, once each, down to the row
    assert tried[2,] == 1


def test_the_first_row_that_fails_ends_a_job_that_is_to_stop():
    world = World(state(stop_on_error=True, row_name=lambda row: f"{row:03d}"), poison={33}).run()
    assert world.state.failed == "row 033 failed in denoise, and on_error is stop: boom"
    assert not world.failed()


def test_a_job_of_which_too_much_fails_is_stopped():
    world = World(state(rows=2000, max_error_rate=0.5), seed=1, reject=range(400, 2000)).run()
    assert "rows failed, more than max_error_rate=0.5 allows; the last was row " in world.state.failed
    quarantined, ended = (int(world.state.failed.split()[k]) for k in (0, 2))
    assert quarantined == ended // 2 + 1  # at once
    ok = World(state(rows=2000, max_error_rate=0.5), seed=1, reject=range(1200, 2000)).run()
    assert not ok.state.failed and len(ok.failed()) == 800
    few = World(state(rows=60, max_error_rate=0.5), seed=1, reject=range(50)).run()  # of 60 rows a share says little
    assert not few.state.failed and len(few.failed()) == 50


def test_rows_under_way_are_not_taken_for_failed_ones():
    """Those that fail are known long before those that succeed have arrived."""

    class Slow(World):
        def pick(self):  # of the last stages nothing is done as long as there is something else
            return min(range(len(self.orders)), key=lambda i: stage_of(self.orders[i]))

    many = state(rows=2000, rows_per_shard=2000, sizes=(8, 8, 400, 8, 8), max_error_rate=0.5)
    world = Slow(many, seed=1, reject=range(0, 2000, 4)).run()
    assert not world.state.failed and len(world.failed()) == 500


def test_one_replacement_that_finds_no_place_does_not_hold_up_the_others():
    """Its node went, and none came: the rest is done without it, the suspect that waits for a success included."""

    class Homeless(World):
        def pick(self):
            choices = [
                i
                for i, o in enumerate(self.orders)
                if not (isinstance(o, StartWorker) and o.worker_type == 2 and o.worker > lost)
            ]
            assert choices, "everybody waits for the one that never comes"
            return self.random.choice(choices)

    world = Homeless(state(rows=8, replicas=(1, 1, 2, 1, 1)), seed=1, poison={7})
    denoisers = [order.worker for order in world.state.worker_orders if order.worker_type == 2]
    lost = denoisers[0]
    assert set(world.run().failed()) == {7} and len(world.ok()) == 7


def test_a_node_that_goes_takes_nobody_s_rows_with_it():
    """Of a batch of one row, as often as machines are taken away."""
    world = World(state(sizes=(1,) * 5, retries=0), seed=3)
    carry_out, gone = world.carry_out, Counter()

    def preempted(order):
        if isinstance(order, Dispatch) and order.task == "batch" and order.stage == 2 and gone[order.rows[0]] < 4:
            gone[order.rows[0]] += 1
            world.orders = [o for o in world.orders if not (isinstance(o, Dispatch) and o.worker == order.worker)]
            return Died(order.stage, order.worker, "its node has died", with_node=True)
        return carry_out(order)

    world.carry_out = preempted
    world.run()
    assert not world.state.failed and not world.failed() and len(world.ok()) == 100


@pytest.mark.parametrize("fixed", [False, True])
def test_a_worker_on_a_node_that_is_drained_hands_over_and_others_do_that(fixed):
    """It is given nothing more, another is started in its place at once, and it ends when it holds nothing."""
    world = World(state(fixed=fixed), seed=3)
    carry_out, told = world.carry_out, []

    def drained(order):
        if isinstance(order, Dispatch) and order.task == "batch" and order.stage == 2 and not told:
            told.append(order.worker)
            world.orders.append(order)  # it is still at work
            return Draining(2, order.worker)
        if isinstance(order, HandOver):
            assert any(isinstance(other, StartWorker) and other.worker_type == 2 for other in world.orders)
            told.append(order.worker)
            held = [o for o in world.orders if isinstance(o, Dispatch) and o.worker == order.worker]
            world.orders = [other for other in world.orders if other not in held]
            for other in held[1:]:
                apply(world.state, HandedOver(other.id))
            return HandedOver(held[0].id, begun=True)
        if isinstance(order, Dispatch) and len(told) == 2:
            assert order.worker != told[0]
        return carry_out(order)

    world.carry_out = drained
    world.pick = lambda: next((i for i, order in enumerate(world.orders) if isinstance(order, HandOver)), 0)
    world.run()
    assert told[0] == told[1] and len(world.ok()) == 100 and not world.failed()
    assert not world.state.leaving and told[0] not in world.state.workers[2]
    assert not any(world.state.losses.values()) and not world.state.deaths[2]
    assert not world.state.stopping.begun_again, "what was done again is no news of a driver that stops later"


def test_half_done_rows_are_written_by_workers_whose_nodes_stay():
    there = state()
    for order in decide(there):
        apply(there, Started(order.worker_type, order.worker))
    for read in decide(there):
        apply(there, Finished(read.id, [("a", tuple(read.rows))]))
    apply(there, Draining(0, 0))
    apply(there, Stop("keep"))
    [keep] = decide(there)
    assert keep.task == "keep" and keep.worker > 0


def test_what_is_lost_of_rows_that_were_half_done_is_taken_up_again():
    """And nothing else of their shard: of one row a step has been made since, and another is a new sample by now."""

    def next_take_up():
        return next(order for order in decide(there) if isinstance(order, Dispatch) and order.task == "take up")

    there = state(sizes=(8, 4, 4, 4, 8), replicas=(9, 2, 3, 1, 1), half_done={0: "00000-1-abcdef01.arrow"})
    for order in decide(there):
        apply(there, Started(order.worker_type, order.worker))
    first = next_take_up()
    tables = [(2, "a", (0, 1, 5, 6)), (3, "a", (7, 8)), (5, "a", (9,))]
    apply(there, TakenUp(first.id, tables))
    [batch] = [order for order in decide(there) if isinstance(order, Dispatch) and order.stage == 2]
    assert tuple(batch.rows) == (0, 1, 5, 6)
    there.attempt_of[5] = 1
    apply(there, Failed(batch.id, "lost", "its node is gone"))
    again = next_take_up()
    assert (again.shard, again.file, [*again.rows]) == (0, first.file, [0, 1, 6])
    assert [5] in [[*order.rows] for order in there.in_flight.values() if order.task == "read"] + [*there.to_read]
    apply(there, Failed(again.id, "lost", "its node is gone, too"))
    again = next_take_up()
    apply(there, TakenUp(again.id, tables))
    waiting = [slice_ for slices in there.queues[2].slices.values() for slice_ in slices]
    assert [(slice_.block, slice_.start, slice_.rows) for slice_ in waiting] == [
        (again.id, 0, (0, 1)),
        (again.id, 3, (6,)),
    ]
    apply(there, Died(0, again.worker, "its node has died", with_node=True))
    assert there.blocks[again.id] == 3 and not there.to_take_up


def test_a_worker_that_goes_with_its_node_as_it_takes_rows_up_leaves_that_to_another():
    there = state(half_done={0: "00000-1-abcdef01.arrow"})
    for order in decide(there):
        apply(there, Started(order.worker_type, order.worker))
    [take_up] = [order for order in decide(there) if isinstance(order, Dispatch) and order.task == "take up"]
    apply(there, Died(0, take_up.worker, "its node has died", with_node=True))
    assert [*there.to_take_up] == [(0, take_up.file, range(16))] and range(16) not in there.to_read


def test_what_a_worker_that_was_given_up_has_taken_up_is_released():
    there = state(half_done={0: "00000-1-abcdef01.arrow"})
    for order in decide(there):
        apply(there, Started(order.worker_type, order.worker))
    [take_up] = [order for order in decide(there) if isinstance(order, Dispatch) and order.task == "take up"]
    apply(there, Died(0, take_up.worker, "it hangs"))
    apply(there, TakenUp(take_up.id, [(2, "a", (0, 1))]))
    assert there.released == [take_up.id]


def test_one_row_alone_is_not_quarantined_for_a_death_or_two():
    world = World(state(sizes=(1,) * 5, retries=0), seed=3)
    carry_out, deaths = world.carry_out, Counter()

    def killed(order):
        if isinstance(order, Dispatch) and order.stage == 2 and 41 in order.rows and deaths[41] < 2:
            deaths[41] += 1
            world.orders = [o for o in world.orders if not (isinstance(o, Dispatch) and o.worker == order.worker)]
            return Died(order.stage, order.worker, "killed: out of memory")
        return carry_out(order)

    world.carry_out = killed
    assert not world.run().failed() and deaths[41] == 2


def test_a_replacement_that_cannot_start_does_not_end_a_stage_that_works():
    """The first of a stage that can't shows that none can; a later one, that something is wrong with it."""
    world = World(state(replicas=(1, 1, 2, 1, 1)), seed=1)
    carry_out, events = world.carry_out, []

    def no_gpu(order):
        if isinstance(order, StartWorker) and order.worker > 5 and len(events) == 1:
            events.append(Died(order.worker_type, order.worker, "No CUDA GPUs are available", at_start=True))
            return events[-1]
        if isinstance(order, Dispatch) and order.stage == 2 and not events:
            world.orders = [o for o in world.orders if not (isinstance(o, Dispatch) and o.worker == order.worker)]
            events.append(Died(order.stage, order.worker, "killed"))
            return events[-1]
        return carry_out(order)

    world.carry_out = no_gpu
    assert len(world.run().ok()) == 100 and len(events) == 2
    first = World(state(), seed=1)
    first.carry_out = lambda order: Died(order.worker_type, order.worker, "no weights", at_start=True)
    assert first.run().state.failed.endswith("can't start: no weights")

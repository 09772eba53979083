"""The driver, without Ray: every row ends once, whatever order, failures and deaths come in."""

import random
from collections import Counter

import pytest

from latentmill.driver import limits
from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import (
    CheckDataset,
    DatasetChecked,
    Died,
    Dispatch,
    Failed,
    Finished,
    StageSpec,
    Started,
    StartWorker,
    StopWorker,
    WorkerType,
)
from latentmill.driver.state import DriverState, finished


def stage_of(order):
    """The stage that an order is for. Here each has workers of its own."""
    return order.worker_type if isinstance(order, StartWorker) else order.stage


class World:
    """Carries out what the driver orders, in a random order, with faults, and checks what comes by."""

    def __init__(self, state, seed=0, shapes=1, reject=(), poison=(), fatal=(), flaky=0.0, deaths=0.0, losses=0.0):
        self.state, self.random, self.shapes = state, random.Random(seed), shapes
        self.reject, self.poison, self.fatal = set(reject), set(poison), set(fatal)
        self.flaky, self.deaths, self.losses = flaky, deaths, losses
        self.orders, self.blocks, self.committed, self.batches = [], {}, {}, []
        self.broken = lambda worker: False  # whether a worker fails at whatever it is given
        self.made_before, self.asked = (
            False,
            1,
        )  # whether the dataset holds a row that is ok, and how often that may be asked

    def run(self, limit=200_000):
        for _ in range(limit):
            if finished(self.state) or self.state.failed:
                return self
            for order in decide(self.state):
                if isinstance(order, CheckDataset):
                    apply(self.state, DatasetChecked(self.made_before))
                elif isinstance(order, StopWorker):
                    self.orders = [other for other in self.orders if other.worker != order.worker]
                else:
                    self.orders.append(order)
            if not self.orders:
                assert finished(self.state) or self.state.failed or self.asked > 0, "deadlock: nothing to do"
                self.asked -= 1
                continue
            self.check_bounds()
            order = self.orders.pop(self.pick())
            apply(self.state, self.carry_out(order))
            for block in self.state.released:
                self.blocks.pop(block, None)
            self.state.released.clear()
        raise AssertionError("not finished")

    def pick(self):
        return self.random.randrange(len(self.orders))

    def carry_out(self, order):
        if isinstance(order, StartWorker):
            return Started(order.worker_type, order.worker)
        for slice_ in order.slices:  # what the driver believes to be in a block is in it
            assert self.blocks[slice_.block][slice_.table][slice_.start : slice_.stop] == list(slice_.rows)
        rows = list(order.rows)
        if order.task != "commit":
            if self.random.random() < self.deaths or self.fatal & set(rows):
                for other in [o for o in self.orders if isinstance(o, Dispatch) and o.worker == order.worker]:
                    self.orders.remove(other)
                return Died(self.state.type_of[order.stage], order.worker, "killed")
            if self.broken(order.worker):
                return Failed(order.id, "raised", "CUDA error")
            if self.random.random() < self.flaky or (order.stage == 2 and self.poison & set(rows)):
                return Failed(order.id, "raised", "boom")
        if order.slices and self.random.random() < self.losses:
            return Failed(order.id, "lost", "its node is gone")
        if order.task == "commit":
            assert order.shard not in self.committed
            self.committed[order.shard] = (sorted(r for p in order.slices for r in p.rows), order.errors)
            return Finished(order.id)
        self.batches.append((order.stage, rows))
        kept = [row for row in rows if not (order.stage == 1 and row in self.reject)]
        parts = [[row for row in kept if row % self.shapes == shape] for shape in range(self.shapes)]
        self.blocks[order.id] = parts
        said = [(f"shape{shape}", tuple(part)) for shape, part in enumerate(parts)]
        return Finished(order.id, said, [(row, "unfit") for row in rows if row not in kept])

    def check_bounds(self):
        for stage, spec in enumerate(self.state.stages):
            for all_held in self.state.workers_of(stage).values():
                held = [id for id in all_held if self.state.in_flight[id].stage == stage]
                if spec.running_batches == 1:
                    assert len(held) <= spec.batches_per_worker
                    continue
                dispatches = [self.state.in_flight[id] for id in held]
                of_key = Counter()
                for dispatch in dispatches:
                    of_key[dispatch.stack_key] += len(dispatch.rows)
                # one more may be given while there is room for a row
                assert all(count < (spec.batches_per_worker + 1) * spec.batch_size for count in of_key.values())
                assert sum(of_key.values()) < (spec.batches_per_worker * spec.running_batches + 1) * spec.batch_size
        assert len(self.state.shards) <= 2 + 400 // self.state.rows_per_shard

    def ok(self):
        return sorted(row for rows, _ in self.committed.values() for row in rows)

    def failed(self):
        return {error["row"]: error["reason"] for _, errors in self.committed.values() for error in errors}


def state(
    rows=100, rows_per_shard=16, sizes=(8, 4, 6, 4, 8), replicas=(1, 2, 3, 1, 1), running=1, retries=1, **settings
):
    names = ("read", "encode", "denoise", "decode", "write")
    stages = [
        StageSpec(*spec, running_batches=running if spec[0] == "denoise" else 1, retries=retries)
        for spec in zip(names, sizes, replicas)
    ]
    return DriverState(tuple(stages), rows, rows_per_shard, **settings)


@pytest.mark.parametrize(("fixed", "running"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize("seed", range(40))
def test_every_row_ends_once(seed, fixed, running):
    world = World(
        state(fixed=fixed, running=running),
        seed,
        shapes=1 + seed % 3,
        reject={5, 17, 99},
        poison={33, 34},
        flaky=0.02,
        losses=0.01,
    ).run()
    assert not world.state.failed
    failed = world.failed()
    assert Counter(world.ok() + list(failed)) == Counter(range(100))
    assert {5, 17, 99, 33, 34} <= set(failed)
    assert failed[5] == "unfit" and failed[33] == "boom"
    assert len(world.blocks) == 0, "blocks that nobody needs are kept"
    assert world.state.committed_ok + world.state.committed_failed == 100


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


def test_many_shapes_don_t_take_turns():
    """Fifty keys of which none fills: while no more may come, no worker waits for what is not to come."""

    class Crowded(World):
        def check_bounds(self):
            super().check_bounds()
            sizes = [stage.batch_size for stage in self.state.stages]
            if not limits.has_room(self.state, 1, sizes[1]) and limits.has_room(self.state, 2, sizes[2]):
                idle = not all(self.state.workers[2].values())
                assert not (idle and self.state.rows_queued(2)), "an idle worker before a full queue"

    world = Crowded(state(rows=3000, rows_per_shard=3000, replicas=(1, 1, 4, 1, 1)), seed=2, shapes=50).run()
    assert len(world.ok()) == 3000


def test_a_worker_that_works_on_several_batches_at_once_holds_some_of_each_key():
    """Four shapes come mixed: whenever a denoiser has finished something, it still has rows of several."""

    class Watched(World):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.keys = Counter()

        def check_bounds(self):
            super().check_bounds()
            for held in self.state.workers[2].values():
                self.keys[len({self.state.in_flight[id].stack_key for id in held})] += 1

        def pick(self):  # denoise is what takes long
            return next((i for i, order in enumerate(self.orders) if stage_of(order) != 2), 0)

    world = Watched(state(rows=2000, rows_per_shard=500, replicas=(1, 1, 1, 1, 1), running=4), seed=5, shapes=4).run()
    assert len(world.ok()) == 2000
    assert world.keys[3] + world.keys[4] > 0.8 * world.keys.total()  # with one key at a time: never


def test_nothing_is_kept_of_what_is_committed():
    world = World(state(rows=400, fixed=True), seed=1, reject={5}, poison={33}, losses=0.01).run()
    assert (
        not any(queue.accounted for queue in world.state.queues) and not world.state.shards and not world.state.blocks
    )


def test_a_slow_stage_holds_back_those_before_it():
    class Slow(World):
        def pick(self):
            return next((i for i, order in enumerate(self.orders) if stage_of(order) != 2), 0)

        def check_bounds(self):
            super().check_bounds()
            # batch x replicas x (in flight + 1) of the slow stage, and what the one before can hold
            before = self.state.stages[1]
            held = before.batch_size * before.replicas * before.batches_per_worker
            assert self.state.rows_queued(2) + self.state.rows_in_flight[1] <= 6 * 3 * 3 + held

    world = Slow(state(rows=2000, rows_per_shard=2000), seed=3).run()
    assert len(world.ok()) == 2000


def test_a_fast_stage_of_one_worker_lets_all_workers_before_it_work():
    """Eight slow workers, one fast after them: whenever there is input for all, all have something to do."""

    class Slow(World):
        seen = 0

        def pick(self):
            others = [i for i, order in enumerate(self.orders) if stage_of(order) != 2]
            held = [len(held) for held in self.state.workers[2].values()]
            self.seen = max(self.seen, sum(count > 0 for count in held))
            return others[0] if others else self.random.randrange(len(self.orders))

    world = Slow(state(rows=2000, rows_per_shard=2000, replicas=(1, 1, 8, 1, 1)), seed=3).run()
    assert world.seen == 8


def test_committed_shards_are_not_done_again():
    world = World(state(done={0, 3})).run()
    assert sorted(world.committed) == [1, 2, 4, 5, 6]
    assert not {0, 15, 48, 63} & {row for _, rows in world.batches for row in rows}


def test_batches_are_full_while_there_are_rows():
    world = World(state(rows=960, rows_per_shard=96), seed=1).run()
    denoised = [len(rows) for stage, rows in world.batches if stage == 2]
    assert sum(denoised) == 960 and denoised.count(6) >= len(denoised) - 1


@pytest.mark.parametrize("seed", range(10))
def test_fixed_batches_depend_on_the_plan_alone(seed):
    batches = World(state(fixed=True), seed, shapes=2).run().batches
    undisturbed = World(state(fixed=True, replicas=(1, 1, 1, 1, 1)), 0, shapes=2).run().batches
    of_stage = [{frozenset(rows) for stage, rows in each if stage in (1, 2, 3)} for each in (batches, undisturbed)]
    assert of_stage[0] == of_stage[1]


def test_the_same_events_give_the_same_decisions():
    runs = [World(state(), 7, flaky=0.1).run().batches for _ in range(2)]
    assert runs[0] == runs[1]


def test_an_event_of_the_past_changes_nothing():
    fresh = state(rows=4)
    decide(fresh)
    apply(fresh, Started(0, 0))
    [read] = [order for order in decide(fresh) if isinstance(order, Dispatch)]
    apply(fresh, Died(0, 0, "killed"))
    apply(fresh, Finished(read.id, [("a", tuple(read.rows))]))
    assert fresh.rows_queued(1) == 0


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


def test_what_goes_alone_is_not_starved_by_the_other_stages_of_its_workers():
    """Row 41 fails in decode; it has been tried alone, and is in the errors, long before the last rows are through."""
    world = World(
        state(rows=2000, rows_per_shard=100, worker_types=(FUSED[0], WorkerType((1, 2, 3), 1), FUSED[2])), seed=1
    )
    carry_out, when = world.carry_out, []

    def fails(order):
        if isinstance(order, Dispatch) and order.stage == 3 and 41 in order.rows:
            return Failed(order.id, "raised", "boom")
        if not when and world.state.quarantined:
            when.append(world.state.finished_rows[0])
        return carry_out(order)

    world.carry_out = fails
    world.run()
    assert world.failed() == {41: "boom"}
    assert when[0] < 600

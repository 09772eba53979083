"""The driver, without Ray: every row ends once, in whatever order things come, and workers have something to do."""

from collections import Counter

import pytest
from tests.driver_world import World, stage_of, state

from latentmill.driver import limits
from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import (
    Died,
    Dispatch,
    Finished,
    Started,
)


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
            held = before.batch_size * self.state.replicas(1) * before.batches_per_worker
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

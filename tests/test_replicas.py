"""How many workers the driver finds, on virtual time, beside the best numbers that a search finds."""

import heapq
import os
import random
from collections import deque

import pytest

from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.messages import (
    AskFor,
    Died,
    Failed,
    Finished,
    NodesSeen,
    StageSpec,
    Started,
    StartWorker,
    StopWorker,
    TakenOut,
    WorkerType,
)
from latentmill.driver.replicas import allocate, work_left
from latentmill.driver.state import DriverState

BATCH, LOADING = 8, 20.0
"""Rows, and seconds."""
NAMES = ("read", "encode", "denoise", "decode", "write")
SPLIT = ((0,), (1,), (2,), (3,), (4,))


class Cluster:
    """Workers of one GPU each, which answer after a time that is drawn. Reading and writing ask for none and take no time."""

    def __init__(self, gpus, seconds, hosted=SPLIT, replicas=None, rows=10**7, memory=0, loading=LOADING):
        """``seconds``: of a batch in each stage. ``memory``: what a worker has held when it is ready, after ``loading``."""
        self.dice, self.seconds, self.memory, self.loading = random.Random(1), list(seconds), memory, loading
        self.free, self.now, self.started = gpus, 0.0, 0
        self.events, self.alive, self.waiting, self.busy_until = [], {}, deque(), {}
        self.fails_to_start, self.raises = lambda worker_type: False, True
        self.warms_up, self.noise = 0.0, lambda: self.dice.uniform(0.9, 1.1)
        """Seconds that a worker's first batch takes besides, and what times differ by."""
        self.decoded = []
        """When each batch left decode."""
        types = tuple(
            WorkerType(hosts, (replicas or {}).get(hosts), {"GPU": 1.0} if 0 < hosts[0] < 4 else {}) for hosts in hosted
        )
        self.state = DriverState(tuple(StageSpec(name, BATCH) for name in NAMES), rows, 1000, worker_types=types)
        self.sees(*[8] * (gpus // 8), *[gpus % 8][: gpus % 8])

    def sees(self, *gpus, memory=None):
        """The nodes have so many GPUs now."""
        more = {} if memory is None else {"memory": memory}
        apply(self.state, NodesSeen(tuple({"GPU": float(count), **more} for count in gpus)))

    def run(self, until):
        """Go on until then."""
        while not until():
            for order in decide(self.state):
                self.take(order)
            self.place()
            assert self.events, "nothing is to come"
            self.now = self.events[0][0]
            while self.events and self.events[0][0] <= self.now:
                _, _, worker, event = heapq.heappop(self.events)
                if isinstance(event, Started | Died) or worker in self.alive:
                    self.decoded += [self.now] * (
                        isinstance(event, Finished) and self.state.in_flight[event.id].stage == 3
                    )
                    apply(self.state, event)
            self.state.released.clear()
        return self

    def take(self, order):
        if isinstance(order, StartWorker):
            self.waiting.append(order)
            self.started += 1
        elif isinstance(order, StopWorker):
            self.waiting = deque(start for start in self.waiting if start.worker != order.worker)
            if order.worker in self.alive:
                self.free += self.alive.pop(order.worker)
        elif not isinstance(order, AskFor):
            begins, warm = max(self.now, self.busy_until.get(order.worker, 0.0)), order.worker in self.busy_until
            seconds = 0.0 if order.task == "commit" else self.seconds[order.stage] * self.noise()
            seconds += self.warms_up if not warm and self.alive[order.worker] else 0.0
            ends = self.busy_until[order.worker] = begins + seconds
            tables = () if order.task == "commit" else [("a", tuple(order.rows))]
            self.later(ends, order.worker, Finished(order.id, tables, seconds=seconds))

    def place(self):
        """Start workers that wait for a GPU where one is free."""
        for order in list(self.waiting):
            gpus = int(self.state.worker_types[order.worker_type].asks.get("GPU", 0))
            if gpus > self.free:
                continue
            self.waiting.remove(order)
            if self.fails_to_start(order.worker_type):
                self.later(
                    self.now + self.loading,
                    order.worker,
                    Died(order.worker_type, order.worker, "CUDA", at_start=self.raises),
                )
                continue
            self.free -= gpus
            self.alive[order.worker] = gpus
            self.later(
                self.now + self.loading,
                order.worker,
                Started(order.worker_type, order.worker, self.loading, self.memory),
            )

    def later(self, when, worker, event):
        heapq.heappush(self.events, (when, len(self.events) + self.dice.random(), worker, event))

    def counts(self):
        """Workers with a GPU of each type, wanted now."""
        return [n for n, hosts in zip(self.state.targets, self.state.worker_types) if hosts.asks]

    def rate(self, batches):
        """Batches a second, over so many to come."""
        before, started = len(self.decoded), self.now
        self.run(lambda: len(self.decoded) >= before + batches)
        return (len(self.decoded) - before) / (self.now - started)


def best(gpus, seconds):
    """The most batches a second that any numbers of workers could make, by trying all."""
    encode, denoise, decode = seconds[1:4]
    return max(
        min(first / encode, second / denoise, (gpus - first - second) / decode)
        for first in range(1, gpus - 1)
        for second in range(1, gpus - first)
    )


def profile(seed):
    dice = random.Random(seed)
    return dice.randint(8, 64), [0.01, *(10 ** dice.uniform(-0.5, 1) for _ in range(3)), 0.01]


@pytest.mark.parametrize("seed", range(0, 30, 1 if os.environ.get("FAULTS") == "all" else 3))
def test_numbers_that_are_found_are_within_five_percent_of_the_best(seed):
    gpus, seconds = profile(seed)
    cluster = Cluster(gpus, seconds)
    cluster.run(lambda: len(cluster.decoded) >= 20 * max(cluster.counts()))
    assert cluster.rate(6 * gpus) >= 0.95 * best(gpus, seconds)


def settled(cluster, batches=20):
    """Go on until each worker of the slowest stage has had so many batches."""
    target = len(cluster.decoded) + batches * max(cluster.counts())
    return cluster.run(lambda: len(cluster.decoded) >= target)


@pytest.mark.parametrize("seed", range(8))
def test_numbers_follow_what_stages_take_within_twenty_batches(seed):
    """Encode becomes slower and denoise faster, say since prompts and sizes changed: others have to give their places away."""
    gpus, before = profile(seed)
    cluster = settled(Cluster(gpus, before))
    cluster.seconds[1:4] = after = [before[3] * 3, before[1], before[2] / 2]
    settled(cluster)
    assert cluster.rate(6 * gpus) >= 0.93 * best(gpus, [0, *after])


def test_numbers_follow_nodes_that_come_and_go():
    cluster = settled(Cluster(8, [0.01, 1, 4, 1, 0.01]))
    assert sum(cluster.counts()) <= 8
    cluster.free += 16
    cluster.sees(8, 8, 8)
    settled(cluster)
    assert cluster.rate(100) >= 0.95 * best(24, [0, 1, 4, 1])


def test_places_of_a_node_that_went_are_taken_from_all():
    """Two of three nodes go, and with them each worker of decode: what is left is shared, or nothing would go on."""
    cluster = settled(Cluster(24, [0.01, 1, 4, 1, 0.01]))
    cluster.sees(8)
    gone = [worker for worker, gpus in cluster.alive.items() if gpus and worker in cluster.state.workers[3]]
    gone += [worker for worker, gpus in cluster.alive.items() if gpus and worker not in gone][: 16 - len(gone)]
    for worker in gone:
        del cluster.alive[worker]
        apply(
            cluster.state, Died(next(t for t in range(5) if worker in cluster.state.workers[t]), worker, with_node=True)
        )
    cluster.free = 0
    settled(cluster)
    assert sum(cluster.counts()) == 8 and cluster.rate(60) >= 0.95 * best(8, [0, 1, 4, 1])


def test_one_type_has_all_there_is_and_a_number_that_is_given_holds():
    hosted = ((0,), (1, 2, 3), (4,))
    cluster = Cluster(16, [0.01, 1, 4, 1, 0.01], hosted)
    assert cluster.run(lambda: len(cluster.decoded) >= 64).counts() == [16]
    cluster = Cluster(16, [0.01, 1, 4, 1, 0.01], hosted, replicas={(1, 2, 3): 5})
    assert cluster.run(lambda: len(cluster.decoded) >= 64).counts() == [5]
    cluster = settled(Cluster(16, [0.01, 1, 4, 1, 0.01], replicas={(3,): 1}))
    assert cluster.counts()[2] == 1
    assert sum(cluster.counts()) < 16, "decode's one worker is the slowest: more of others are of no use"


FUSED = ((0,), (1, 2, 3), (4,))


@pytest.mark.parametrize(("loading", "wanted"), [(5.0, 8), (20.0, 1)])
def test_where_one_type_computes_all_start_as_soon_as_one_is_loaded_soon(loading, wanted):
    """Nobody waits for its first batch, which takes minutes, unless loading takes long, too."""
    cluster = Cluster(8, [0.01, 100.0, 100.0, 100.0, 0.01], FUSED, loading=loading)
    cluster.run(lambda: 1 in cluster.state.loaded_types and cluster.now > loading)
    assert cluster.counts() == [wanted] and not cluster.decoded
    cluster.run(lambda: len(cluster.decoded) > 20)
    assert cluster.counts() == [8] and cluster.started == 10


def test_where_several_types_compute_each_begins_with_one():
    """Which of them needs more is not known yet."""
    cluster = Cluster(8, [0.01, 100.0, 100.0, 100.0, 0.01], loading=5.0)
    cluster.run(lambda: cluster.now > 5.0)
    assert cluster.counts() == [1, 1, 1]


def test_workers_that_start_before_a_batch_is_done_take_no_more_than_there_are_rows_or_memory_for():
    cluster = Cluster(8, [0.01, 100.0, 100.0, 100.0, 0.01], FUSED, rows=3 * BATCH, loading=5.0)
    cluster.run(lambda: cluster.now > 5.0)
    assert cluster.counts() == [3]
    cluster = Cluster(8, [0.01, 100.0, 100.0, 100.0, 0.01], FUSED, memory=10, loading=5.0)
    cluster.sees(8, memory=110.0)  # each may take twice what it holds when it is loaded: two that read and write, too
    cluster.run(lambda: cluster.now > 5.0)
    assert cluster.counts() == [3]


def test_few_rows_start_few_workers():
    """Of three batches none waits for a fourth worker, and the last batch is not worth a worker that takes longer to load."""
    fused = ((0,), (1, 2, 3), (4,))
    many = Cluster(16, [0.01, 50, 100, 50, 0.01], fused, rows=3 * BATCH)
    many.run(lambda: len(many.decoded) >= 1)
    assert many.counts() <= [3]
    short = Cluster(16, [0.01, 0.1, 0.5, 0.1, 0.01], fused, rows=20 * BATCH)
    short.run(lambda: len(short.decoded) >= 20)
    assert short.counts() == [1]


def test_memory_bounds_what_no_number_does():
    """A node has room for three workers of what the first one has been seen to hold."""
    cluster = Cluster(8, [0.01, 1, 4, 1, 0.01], ((0,), (1, 2, 3), (4,)), memory=10)
    cluster.sees(8, memory=35 + 20)  # reading and writing hold as much
    cluster.run(lambda: len(cluster.decoded) >= 64)
    assert cluster.counts() == [3]


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "is killed"])
def test_a_worker_too_many_ends_no_job(raises):
    """The nodes seem to have room for 16; of more than four each fails as it loads its models, and four go on."""
    cluster = Cluster(16, [0.01, 1, 4, 1, 0.01], ((0,), (1, 2, 3), (4,)))
    cluster.raises = raises
    cluster.fails_to_start = lambda worker_type: worker_type == 1 and sum(cluster.alive.values()) >= 4
    cluster.run(lambda: len(cluster.decoded) >= 200)
    assert not cluster.state.failed and len(cluster.state.workers[1]) == 4
    assert cluster.started < 3 + 15 + 20, "each may be tried again now and then"


def test_a_stage_that_has_nothing_more_to_do_gives_its_places_away():
    """Decode is slow at the end: all that encode has encoded waits for it."""
    cluster = settled(Cluster(12, [0.001, 1, 1, 1, 0.001], rows=2000 * BATCH), 5)
    cluster.seconds[3] = 60
    cluster.run(lambda: len(cluster.decoded) >= 2000)
    assert cluster.counts()[2] >= 8


@pytest.mark.parametrize("seed", [3, 11])
def test_workers_that_warm_up_or_rows_that_differ_do_not_make_numbers_swing(seed):
    gpus, seconds = profile(seed)
    warm = Cluster(gpus, seconds)
    warm.warms_up = 30.0
    settled(warm)
    before = warm.started
    assert warm.rate(20 * gpus) >= 0.95 * best(gpus, seconds)
    assert warm.started == before
    mixed = Cluster(gpus, seconds)
    mixed.noise = lambda: mixed.dice.choice((1, 1, 4, 16)) / 5.5
    settled(mixed)
    before = mixed.started
    assert mixed.rate(20 * gpus) >= 0.85 * best(gpus, seconds)
    assert mixed.started - before <= 2 * gpus


def test_a_share_of_a_gpu_is_of_one_gpu():
    """Of 0.7 and 0.5 no two of these are on one GPU, but two of the second are."""
    types = (WorkerType((0,), None, {"GPU": 0.7}), WorkerType((1,), None, {"GPU": 0.5}))
    assert allocate(types, [1.0, 1.0], [99, 99], [{"GPU": 8.0}]) in ([5, 5], [5, 6])
    assert allocate(types, [1.0, 1.0], [99, 99], [{"GPU": 1.0}]) is None
    whole = (WorkerType((0,), None, {"GPU": 2.0}), WorkerType((1,), None, {"GPU": 0.5}))
    assert allocate(whole, [3.0, 1.0], [99, 99], [{"GPU": 4.0}, {"GPU": 1.0}]) == [2, 1]


def test_what_asks_for_nothing_in_particular_leaves_special_nodes_to_those_that_ask():
    types = (WorkerType((0,), None, {"GPU": 1.0}), WorkerType((1,), None, {"GPU": 1.0, "accelerator_type:H100": 0.001}))
    nodes = [{"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 8.0}]
    assert allocate(types, [1.0, 1.0], [99, 99], nodes) == [8, 8]
    assert allocate(types, [1.0, 9.0], [99, 99], nodes)[1] == 8
    fuller = [{"GPU": 4.0, "accelerator_type:H100": 1.0}, {"GPU": 8.0}]
    assert allocate(types, [1.0, 1.0], [99, 99], fuller) == [5, 4]
    assert allocate((WorkerType((0,), None, {}),), [1.0], [99], nodes) == [1]


def test_failures_are_held_against_the_most_workers_that_there_were():
    """Ten workers of sixteen could not load what they needed later; then a node goes, and two are left."""
    cluster = Cluster(16, [0.01, 1, 4, 1, 0.01], ((0,), (1, 2, 3), (4,)))
    cluster.run(lambda: len(cluster.decoded) >= 64)
    state = cluster.state
    for _ in range(10):
        failed = next(order for order in state.in_flight.values() if order.stage == 2)
        apply(state, Failed(failed.id, "unloaded", "no such file"))
    assert state.load_failures[2] == 10 and not state.failed
    state.targets[1] = 2
    failed = next(order for order in state.in_flight.values() if order.stage == 2)
    apply(state, Failed(failed.id, "unloaded", "no such file"))
    assert not state.failed


def test_shards_that_this_run_made_and_somebody_took_out_are_work():
    cluster = Cluster(4, [0.01, 1, 4, 1, 0.01], ((0,), (1, 2, 3), (4,)), rows=3000)
    cluster.run(lambda: cluster.state.committed_shards == 3)
    assert work_left(cluster.state) == [0.0, 0.0, 0.0]
    apply(cluster.state, TakenOut(frozenset({0, 2})))
    took = cluster.state.stage_times[2].of_row
    assert work_left(cluster.state)[1] >= 2000 * took


def test_a_node_that_goes_before_anything_was_measured_leaves_room_for_each_type():
    """Seven workers of the type that computes were wanted; on the node that is left they would keep the readers from a place."""
    hosted = ((0,), 2), ((1, 2, 3), None), ((4,), None)
    types = tuple(WorkerType(stages, replicas, {"CPU": 1.0}) for stages, replicas in hosted)
    state = DriverState(tuple(StageSpec(name, BATCH) for name in NAMES), 1000, 1000, worker_types=types)
    apply(state, NodesSeen(({"CPU": 5.0}, {"CPU": 5.0})))
    [computes] = [order for order in decide(state) if isinstance(order, StartWorker) and order.worker_type == 1]
    apply(state, Started(1, computes.worker, seconds=0.1))
    decide(state)
    assert state.targets == [2, 7, 1]
    apply(state, NodesSeen(({"CPU": 5.0},)))
    stopped = [order for order in decide(state) if isinstance(order, StopWorker)]
    assert state.targets == [2, 1, 1] and [order.worker_type for order in stopped] == [1] * 6

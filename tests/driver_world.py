"""What the driver orders, carried out without Ray, in a random order, with faults."""

import random
from collections import Counter

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
                    apply(self.state, DatasetChecked(order.stage, self.made_before))
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
        for spec in zip(names, sizes)
    ]
    settings.setdefault("worker_types", tuple(WorkerType((stage,), count) for stage, count in enumerate(replicas)))
    return DriverState(tuple(stages), rows, rows_per_shard, **settings)

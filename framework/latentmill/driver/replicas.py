"""How many workers of each type: those that the job says, or as many as are of use and the nodes have room for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from latentmill.driver.failures import suspects_of_gone
from latentmill.driver.messages import StopWorker, WorkerType
from latentmill.driver.state import DriverState

GAIN = 0.95
"""What is left must be done in no more than this share of the time, or the workers stay as they are."""


class Room:
    """What is free on the nodes. Nodes that are alike are looked at once, however many they are."""

    def __init__(self, nodes: Sequence[Mapping[str, float]]) -> None:
        self.named = {name for node in nodes for name in node}
        self.free = Counter(_sorted(node) for node in nodes)

    def take(self, asks: Mapping[str, float]) -> bool:
        """Take a worker's place, on the first node that has one. False if none has. What no node names is not asked for."""
        asks = {name: amount for name, amount in asks.items() if name != "memory" or name in self.named}
        for node in self.free:
            has = dict(node)
            if all(has.get(name, 0.0) + 1e-6 >= amount for name, amount in asks.items()):
                self.free[node] -= 1
                if not self.free[node]:
                    del self.free[node]
                self.free[_sorted({name: has[name] - asks.get(name, 0.0) for name in has})] += 1
                return True
        return False


def _sorted(node: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, round(amount, 6)) for name, amount in node.items()))


def allocate(
    types: Sequence[WorkerType], work: Sequence[float], most: Sequence[float], nodes: Sequence[Mapping[str, float]]
) -> list[int]:
    """How many workers of each type do the work soonest.

    ``work``: for each type, the seconds that one worker would take for what is left; ``most``: how many are of use. Each type has
    one worker, or as many as are given. Then whoever takes longest gets one more, as long as there is room. No other choice
    is faster: it would have fewer of a type that takes longest.
    """
    counts = [1 if hosts.replicas is None else hosts.replicas for hosts in types]
    room = Room(nodes)
    for hosts, count in zip(types, counts):
        for _ in range(count):
            room.take(hosts.asks)
    while True:
        slowest = max(range(len(types)), key=lambda number: work[number] / counts[number])
        hosts = types[slowest]
        if not work[slowest] or hosts.replicas is not None or counts[slowest] >= most[slowest]:
            return counts
        if not room.take(hosts.asks):
            return counts
        counts[slowest] += 1


def adjust(state: DriverState) -> None:
    """End workers that are to go and hold nothing. From time to time, look whether other numbers would be better by now."""
    for worker, worker_type in list(state.leaving.items()):
        if not state.workers[worker_type][worker]:
            _end(state, worker_type, worker)
    if state.nodes is None or all(hosts.replicas is not None for hosts in state.worker_types):
        return
    if state.measured_batches < state.batches_to_measure:
        return
    work = work_left(state)
    if work is None:
        return
    state.measured_batches, state.batches_to_measure = 0, max(4, sum(state.targets) // 2)
    counts = allocate(_with_memory(state), work, _of_use(state), state.nodes)
    if not _is_better(state, work, counts):
        return
    for worker_type, count in enumerate(counts):
        for _ in range(count - state.targets[worker_type]):
            state.start_worker(worker_type)
        for worker in _least_wanted(state, worker_type)[: max(0, state.targets[worker_type] - count)]:
            if (worker_type, worker) in state.starting:
                state.starting.discard((worker_type, worker))
                state.worker_orders.append(StopWorker(worker_type, worker))
            else:
                state.leaving[worker] = worker_type
    state.targets = counts


def work_left(state: DriverState) -> list[float] | None:
    """For each worker type, the seconds that one worker would take for what is left; None as long as nobody can tell."""
    seconds = [time.of_row for time in state.stage_times]
    rows = _rows_left(state)
    if any(one is None for one, left in zip(seconds, rows) if left):
        return None
    return [sum((seconds[stage] or 0.0) * rows[stage] for stage in hosts.stages) for hosts in state.worker_types]


def _rows_left(state: DriverState) -> list[int]:
    """For each stage, the rows that it has still to do, if no other driver takes them."""
    elsewhere = len(state.done) + state.committed_shards + len(state.leased_by_others) + len(state.shards)
    left = (state.shard_count - elsewhere) * state.rows_per_shard + sum(map(len, state.to_read))
    found = []
    for stage in range(len(state.stages)):
        left += state.rows_queued(stage) + state.rows_in_flight[stage]
        found.append(max(0, left))
    return found


def _of_use(state: DriverState) -> list[float]:
    """How many workers of each type there are batches for, and how many could be started."""
    rows = _rows_left(state)
    batches = [math.ceil(left / spec.batch_size) for left, spec in zip(rows, state.stages)]
    return [
        max(1, min(most, max(batches[stage] for stage in hosts.stages)))
        for hosts, most in zip(state.worker_types, state.most_replicas)
    ]


def _with_memory(state: DriverState) -> list[WorkerType]:
    """The worker types, each asking for as much memory as one of them has been seen to take."""
    return [
        WorkerType(hosts.stages, hosts.replicas, {**hosts.asks, "memory": max(hosts.asks.get("memory", 0.0), seen)})
        for hosts, seen in zip(state.worker_types, state.memory_seen)
    ]


def _is_better(state: DriverState, work: Sequence[float], counts: Sequence[int]) -> bool:
    """Whether other numbers are worth it: what they save is more than what the new workers take to load their models."""
    assert state.nodes is not None
    if list(counts) == state.targets:
        return False
    room = Room(state.nodes)
    if not all(room.take(hosts.asks) for hosts, n in zip(state.worker_types, state.targets) for _ in range(n)):
        return True  # some that are wanted find no place
    now, then = (max(map(lambda seconds, n: seconds / n, work, of)) for of in (state.targets, counts))
    loading = [seconds for seconds, more, n in zip(state.loading_seconds, counts, state.targets) if more > n]
    return then <= GAIN * now and now - then > max(loading, default=0.0)


def _least_wanted(state: DriverState, worker_type: int) -> list[int]:
    """The workers of a type that stay: those first that are not there yet, then the newest."""
    starting = sorted((worker for of, worker in state.starting if of == worker_type), reverse=True)
    there = sorted((worker for worker in state.workers[worker_type] if worker not in state.leaving), reverse=True)
    return starting + there


def _end(state: DriverState, worker_type: int, worker: int) -> None:
    del state.leaving[worker]
    state.worker_gone(worker_type, worker)
    suspects_of_gone(state, worker_type, worker)
    state.worker_orders.append(StopWorker(worker_type, worker))

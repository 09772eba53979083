"""How many workers of each type: those that the job says, or as many as are of use and the nodes have room for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import TypeAlias

from latentmill.driver.failures import suspects_of_gone
from latentmill.driver.messages import AskFor, StopWorker, WorkerType
from latentmill.driver.state import DriverState

COMES_IN = 180.0
"""Seconds that a node takes to come where there is an autoscaler, about."""
GAIN = 0.95
"""What is left must be done in no more than this share of the time, or the workers stay as they are."""
SOON = 10.0
"""Seconds of loading that are worth while before anybody knows how long a batch takes."""
MOST_ASKED = 256
"""Workers of a type for which nodes are asked at a time, if fewer than that are there: who asks for thousands gets no more, and sooner."""
FORGIVEN = 20
"""Looks after which a worker is tried once more where one could not start."""

Free: TypeAlias = tuple[tuple[float, ...], tuple[tuple[str, float], ...]]
"""What a node has free: a share of each of its GPUs, and so much of all else."""


class Room:
    """What is free on nodes. Nodes that are alike are looked at once, however many they are."""

    def __init__(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """``nodes``: what each has, in Ray's words. Of memory nothing is asked where no node names it."""
        self.names_memory = any("memory" in node for node in nodes)
        self.free: Counter[Free] = Counter()
        for node in nodes:
            whole, share = divmod(node.get("GPU", 0.0), 1)
            gpus = (1.0,) * int(whole) + ((share,) if share > 1e-6 else ())
            self.free[_free(gpus, {name: amount for name, amount in node.items() if name != "GPU"})] += 1

    def take(self, asks: Mapping[str, float]) -> bool:
        """Take a worker's place: on the fullest node that has one, of those with the least that it doesn't ask for. False if none has."""
        asked = tuple((name, amount) for name, amount in asks.items() if name != "memory" or self.names_memory)
        found = [(node, kept) for node in self.free if (kept := _left(node, asked))]
        if not found:
            return False
        node, (*_, left) = min(found, key=itemgetter(1))
        self.free[node] -= 1
        if not self.free[node]:
            del self.free[node]
        self.free[left] += 1
        return True


@lru_cache(4096)
def _left(node: Free, asked: tuple[tuple[str, float], ...]) -> tuple[int, float, Free] | None:
    """How many things a node has that a worker doesn't ask for, how much of GPUs it would leave, and all that it would; None if it has
    no room. A share of a GPU is of one GPU; more than one are whole ones.
    """
    gpus, others, asks = list(node[0]), dict(node[1]), dict(asked)
    wanted = asks.get("GPU", 0.0)
    for share in [wanted] if wanted <= 1 else [1.0] * math.ceil(wanted):
        fits = [gpu for gpu in gpus if gpu + 1e-6 >= share]
        if share and not fits:
            return None
        if share:
            gpus.remove(min(fits))
            gpus.append(min(fits) - share)
    for name, amount in asks.items():
        if name != "GPU" and others.get(name, 0.0) + 1e-6 < amount:
            return None
    left = _free(gpus, {name: amount - asks.get(name, 0.0) for name, amount in others.items()})
    return len(others.keys() - asks.keys()), sum(left[0]), left


def _free(gpus: Sequence[float], others: Mapping[str, float]) -> Free:
    return tuple(sorted(round(gpu, 6) for gpu in gpus)), tuple(sorted((n, round(a, 6)) for n, a in others.items()))


def allocate(
    types: Sequence[WorkerType], work: Sequence[float], most: Sequence[float], nodes: Sequence[Mapping[str, float]]
) -> list[int] | None:
    """How many workers of each type do the work soonest; None if there is no room for the fewest.

    ``work``: for each type, the seconds that one worker would take for what is left; ``most``: how many are of use. Each type has
    one worker, or as many as are given; those beyond the fewest by turns, where there is room. Then whoever takes longest gets one
    more, as long as there is room. Where workers ask for the same, no other choice is faster: it would have fewer of a type that takes longest.
    """
    counts = [_fewest(hosts) for hosts in types]
    room = Room(nodes)
    if not _take(room, types, counts):
        return None
    while growing := [
        number for number, hosts in enumerate(types) if counts[number] < min(_given(hosts), most[number])
    ]:
        least = min(growing, key=lambda number: counts[number])
        if not room.take(types[least].asks):
            most = [counts[number] if number == least else count for number, count in enumerate(most)]
        else:
            counts[least] += 1
    while True:
        slowest = max(range(len(types)), key=lambda number: work[number] / counts[number])
        hosts = types[slowest]
        if not work[slowest] or hosts.replicas is not None or counts[slowest] >= most[slowest]:
            return counts
        if not hosts.asks or not room.take(hosts.asks):  # of those that ask for nothing there would be no end
            return counts
        counts[slowest] += 1


def _fewest(hosts: WorkerType) -> int:
    """How many workers of a type there are at least."""
    return (hosts.replicas or 1) if hosts.fewest is None else hosts.fewest


def _given(hosts: WorkerType) -> int:
    """How many workers of a type are wanted whatever is measured."""
    return hosts.replicas or 1


def _take(room: Room, types: Sequence[WorkerType], counts: Sequence[int]) -> bool:
    """Take the places of so many workers, those first that ask for most; whether there are places for all."""
    largest_first = sorted(zip(types, counts), key=lambda each: max(each[0].asks.values(), default=0.0), reverse=True)
    return all(room.take(hosts.asks) for hosts, count in largest_first for _ in range(count))


def adjust(state: DriverState) -> None:
    """End workers that are to go and hold nothing. From time to time, look whether other numbers would be better by now."""
    for worker, worker_type in list(state.leaving.items()):
        if not state.workers[worker_type][worker]:
            _end(state, worker_type, worker)
    if state.nodes is None:
        return
    if state.stopping.how:  # for what comes now there is nothing to do
        _order_nodes(state, (0,) * len(state.targets))
        return
    before = list(state.targets), state.room_changed, state.looks
    _adjust_numbers(state)
    if state.more_come and before != (state.targets, state.room_changed, state.looks):
        _ask(state)


def _adjust_numbers(state: DriverState) -> None:
    assert state.nodes is not None
    if state.to_follow:
        state.to_follow = False
        _follow(state)
    if not state.looks and not state.measured_batches and (all_of_one := _all_of_one(state)):
        state.looks = 1
        guess = allocate(_with_memory(state, 2.0), all_of_one, _of_use(state), state.nodes) or state.targets
        _change(state, list(map(max, guess, state.targets)))  # it ends nobody
    if state.measured_batches < state.batches_to_measure:
        return
    work = work_left(state)
    if work is None:
        _make_room(state)
        return
    state.measured_batches, state.batches_to_measure = 0, max(4, sum(state.targets) // 2)
    state.looks += 1
    if state.looks % FORGIVEN == 0:
        state.most_replicas = [most + 1 for most in state.most_replicas]
    types = _with_memory(state)
    counts = allocate(types, work, _of_use(state), state.nodes)
    lacks_room = state.room_changed and not _take(Room(state.nodes), types, state.targets)
    state.room_changed = False
    if counts is None or counts == state.targets or not (lacks_room or _is_better(state, work, counts)):
        return
    _change(state, counts)


def _follow(state: DriverState) -> None:
    """Start workers of types whose number is given as nodes come, up to that number, and end some as nodes go, down to the fewest.

    Where even the fewest have no room, all are kept that are there: who has none waits.
    """
    assert state.nodes is not None
    types = _with_memory(state)
    counts = allocate(types, [0.0] * len(types), _of_use(state), state.nodes)
    if counts is not None:
        _change(
            state,
            [state.targets[number] if hosts.fewest is None else counts[number] for number, hosts in enumerate(types)],
        )


def _ask(state: DriverState) -> None:
    """Say how many more workers would be of use if nodes came: what is lacking of numbers that the job gives, and as many of those that
    are found as have longer to work than they take to come.
    """
    types, work, most = state.worker_types, work_left(state), _of_use(state)
    wanted = [hosts.replicas or count for hosts, count in zip(types, state.targets)]
    if work is not None:
        in_time = [seconds / (COMES_IN + loading) for seconds, loading in zip(work, state.loading_seconds)]
        wanted = [max(now, min(want, int(some))) for want, now, some in zip(wanted, state.targets, in_time)]
    while work is not None:
        slowest = max(range(len(types)), key=lambda number: work[number] / wanted[number])
        hosts, enough = types[slowest], min(in_time[slowest], most[slowest])
        if hosts.replicas is not None or not hosts.asks or wanted[slowest] + 1 > enough:
            break
        wanted[slowest] += 1
    _order_nodes(
        state,
        tuple(
            max(0, min(want - count, max(MOST_ASKED, count))) if hosts.asks else 0
            for hosts, want, count in zip(types, wanted, state.targets)
        ),
    )


def _order_nodes(state: DriverState, more: tuple[int, ...]) -> None:
    """Ask for nodes for so many more workers of each type, if that is new, or what was asked for may have come and gone."""
    if more != state.asked_for:
        state.worker_orders.append(AskFor(more))
        state.asked_for = more


def _make_room(state: DriverState) -> None:
    """Where nodes went before anything was measured, and with them the room for all that are wanted: want the fewest, or those that are
    left may be all of one type, and wait for others that have no place.
    """
    assert state.nodes is not None
    if not state.room_changed:
        return
    state.room_changed, types = False, _with_memory(state)
    fewest = allocate(types, [0.0] * len(types), _of_use(state), state.nodes)
    if fewest is not None and not _take(Room(state.nodes), types, state.targets):
        _change(state, fewest)


def _all_of_one(state: DriverState) -> list[float]:
    """Work of the one worker type that computes, of no matter how much, once the first of its workers was loaded soon; else none.

    It needs no measurement: no other type could have the room.
    """
    computes = {state.type_of[stage] for stage in range(1, state.last_stage)}
    if len(computes) > 1 or not computes <= state.loaded_types:
        return []
    if any(state.loading_seconds[worker_type] > SOON for worker_type in computes):
        return []
    return [float(number in computes) for number in range(len(state.worker_types))]


def _change(state: DriverState, counts: list[int]) -> None:
    """Start and end workers until there are so many of each type."""
    for worker_type, count in enumerate(counts):
        for _ in range(count - state.targets[worker_type]):
            state.start_worker(worker_type)
        for worker in _to_go(state, worker_type)[: max(0, state.targets[worker_type] - count)]:
            if (worker_type, worker) in state.starting:
                state.starting.discard((worker_type, worker))
                state.worker_orders.append(StopWorker(worker_type, worker))
            else:
                state.leaving[worker] = worker_type
    state.targets = counts
    state.largest_targets = list(map(max, state.largest_targets, counts))


def work_left(state: DriverState) -> list[float] | None:
    """For each worker type, the seconds that one worker would take for what is left; None as long as nobody can tell.

    What the last stage takes may be unknown: it waits for the first full batch of what all others make.
    """
    seconds = [time.of_row for time in state.stage_times]
    rows = _rows_left(state)
    if any(one is None for one, left in zip(seconds[:-1], rows) if left):
        return None
    return [sum((seconds[stage] or 0.0) * rows[stage] for stage in hosts.stages) for hosts in state.worker_types]


def _rows_left(state: DriverState) -> list[int]:
    """For each stage, the rows that it has still to do, if no other driver takes them."""
    if state.cursor < state.shard_count:
        others = len(state.done) + state.committed_shards + len(state.leased_by_others) + len(state.shards)
        shards = state.shard_count - others
    else:
        shards = len(state.free_shards) + len(state.claimed)
    left = max(0, shards) * state.rows_per_shard + sum(map(len, state.to_read))
    for shard in {*state.short, state.shard_count - 1}:
        if (state.cursor <= shard and shard not in state.done) or shard in state.free_shards or shard in state.claimed:
            left -= state.rows_per_shard - len(state.shard_rows(shard))  # it may have fewer
    found = []
    for stage in range(len(state.stages)):
        left += state.rows_queued(stage) + state.rows_in_flight[stage]
        found.append(left)
    return found


def _of_use(state: DriverState) -> list[float]:
    """How many workers of each type there are batches for, and how many could be started."""
    rows = _rows_left(state)
    batches = [math.ceil(left / spec.batch_size) for left, spec in zip(rows, state.stages)]
    return [
        max(_fewest(hosts), min(most, math.inf if hosts.replicas else max(batches[stage] for stage in hosts.stages)))
        for hosts, most in zip(state.worker_types, state.most_replicas)
    ]


def _with_memory(state: DriverState, more: float = 1.0) -> list[WorkerType]:
    """The worker types, each asking for as much memory as one of them has been seen to take, times ``more``."""
    return [
        WorkerType(
            hosts.stages,
            hosts.replicas,
            {**hosts.asks, "memory": max(hosts.asks.get("memory", 0.0), more * seen)},
            hosts.fewest,
        )
        if seen
        else hosts
        for hosts, seen in zip(state.worker_types, state.memory_seen)
    ]


def _is_better(state: DriverState, work: Sequence[float], counts: Sequence[int]) -> bool:
    """Whether other numbers are worth it: what they save is more than what the new workers take to load their models."""
    now, then = (max(seconds / n for seconds, n in zip(work, of)) for of in (state.targets, counts))
    loading = [seconds for seconds, more, n in zip(state.loading_seconds, counts, state.targets) if more > n]
    return then <= GAIN * now and now - then > max(loading, default=0.0)


def _to_go(state: DriverState, worker_type: int) -> list[int]:
    """The workers of a type in the order in which they go: those first that are not there yet, then the newest."""
    starting = sorted((worker for of, worker in state.starting if of == worker_type), reverse=True)
    there = sorted((worker for worker in state.workers[worker_type] if worker not in state.leaving), reverse=True)
    return starting + there


def _end(state: DriverState, worker_type: int, worker: int) -> None:
    del state.leaving[worker]
    state.worker_gone(worker_type, worker)
    suspects_of_gone(state, worker_type, worker)
    state.worker_orders.append(StopWorker(worker_type, worker))

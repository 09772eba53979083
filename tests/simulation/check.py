"""What holds at every moment of a run."""

from __future__ import annotations

import copy
import math
from collections import Counter

from tests.simulation.settings import LARGEST_ROW, Wrong

from latentmill.driver import needed
from latentmill.driver.limits import max_open_shards, queue_limit
from latentmill.driver.messages import Dispatch, StartWorker
from latentmill.driver.state import DriverState


def check(state: DriverState, largest: list[int], resumes: bool = False) -> None:
    """That each row of each open shard is in exactly one place, that what the driver has counted is so, and that nothing grows
    beyond its bound. ``largest``: for each worker type the most workers that were wanted, which is noted; ``resumes``: what was half
    done has been taken up, a shard at a time. Raises Wrong.
    """
    if state.failed:
        return
    check_counts(state)
    check_room(state)
    largest[:] = map(max, largest or state.targets, state.targets)
    state = copy.copy(state)
    state.targets = largest  # where fewer are wanted now, there may be as much as there was
    found: list[int] = []
    for rows in state.to_read:
        found += rows
    for *_, rows in state.to_take_up:
        found += rows
    for stage in range(len(state.stages)):
        for queue in state.queues[stage].slices.values():
            for slice_ in queue:
                found += slice_.rows
        for retry in state.queues[stage].retries:
            found += retry.rows
    held = [order for order in state.in_flight.values() if order.task not in ("commit", "keep")]
    held += [order for record in state.records.values() for order, _ in record.suspects]
    held += [order for order, _ in state.fatal_suspects]
    for order in held:
        found += order.rows
    for shard in state.shards.values():
        for slice_ in shard.packed:
            found += slice_.rows
        found += [row["row"] for row in (*shard.errors, *shard.filtered)]
        found += shard.again
    places = Counter(found)
    passed_over = {
        n
        for n, shard in state.shards.items()
        if not shard.missing and not shard.packed and not places.keys() & {*state.shard_rows(n)}
    }
    if any(needed.is_needed(state, shard) for shard in passed_over):
        raise Wrong(f"shards {passed_over} are to be committed without rows")
    planned = {row for shard in state.shards.keys() - passed_over for row in state.shard_rows(shard)}
    if wrong := {row for row in planned if places[row] != 1} | (places.keys() - planned):
        raise Wrong(f"rows {sorted(wrong)} are in {[places[row] for row in sorted(wrong)]} places")
    for stage, spec in enumerate(state.stages[1:], start=1):
        before = state.stages[stage - 1]
        most = queue_limit(state, stage) + before.batch_size * (
            state.replicas(stage - 1) * before.batches_per_worker + 1
        )
        most += (
            spec.batch_size * state.replicas(stage) * spec.batches_per_worker * spec.running_batches
        )  # what its own workers gave back
        most += state.rows_per_shard * resumes
        # Where batches are fixed, one may wait for rows that others have to pass: open shards bound them.
        if state.rows_queued(stage) > most and not state.fixed:
            raise Wrong(f"{state.rows_queued(stage)} rows wait for {spec.name}, and {most} is the most")
    # One batch a worker may come that nobody could foresee, and one a stage that has nothing before it.
    most = state.max_bytes_in_flight + sum(
        LARGEST_ROW * spec.batch_size * (state.replicas(stage) * spec.batches_per_worker * spec.running_batches + 1)
        for stage, spec in enumerate(state.stages)
    )
    if state.bytes_held > most:
        raise Wrong(f"{state.bytes_held} bytes are between stages, and {most} is the most")
    if left := {row for row in state.attempt_of if row // state.rows_per_shard not in state.shards}:
        raise Wrong(f"rows {sorted(left)} are of no open shard, and their attempts are kept")
    if len(state.shards) > max_open_shards(state):
        raise Wrong(f"{len(state.shards)} shards are open")


def check_room(state: DriverState) -> None:
    """Where the nodes have room for all workers that a job gives the number of, they are wanted. Each asks for one CPU. And where more
    nodes come for who asks, it is asked for no more than that number. Raises Wrong.
    """
    types, targets = state.worker_types, state.targets
    lacking = [h.replicas - (h.fewest or h.replicas) if h.replicas else math.inf for h in types]
    if any(asked > most for asked, most in zip(state.asked_for, lacking)) or (
        any(state.asked_for) and not state.more_come
    ):
        raise Wrong(f"{state.asked_for} more workers are asked for, and {lacking} are the most")
    if state.nodes is None or state.room_changed or any(most < math.inf for most in state.most_replicas):
        return
    if sum(node["CPU"] for node in state.nodes) < sum(h.replicas or n for h, n in zip(types, targets)):
        return
    if missing := {h.stages: (h.replicas, n) for h, n in zip(types, targets) if h.fewest and h.replicas != n}:
        raise Wrong(f"there is room for all workers, and not all are wanted: {missing}")


def check_counts(state: DriverState) -> None:
    """What the driver knows without counting is what it would count, and who is said to hold the least does. Raises Wrong."""
    found: dict[str, object] = {}
    known: dict[str, object] = {}
    orders_of: list[list[Dispatch]] = [[] for _ in state.stages]
    for order in state.in_flight.values():
        orders_of[order.stage].append(order)
    committing = {order.shard for order in state.in_flight.values() if order.task == "commit"}
    starts = Counter(order.worker_type for order in state.worker_orders if isinstance(order, StartWorker))
    starts.update(worker_type for worker_type, _ in state.starting)
    found["complete"] = {number for number, shard in state.shards.items() if not shard.missing} - committing
    known["complete"] = {*state.complete}
    for number, hosts in enumerate(state.worker_types):
        there = state.workers[number].keys() - state.leaving
        found[f"workers {hosts.stages}"] = len(there) + starts[number]
        known[f"workers {hosts.stages}"] = state.targets[number]
    found["bytes"] = sum(state.block_bytes[block] for block in state.blocks if block in state.block_bytes)
    known["bytes"] = state.bytes_held
    for stage, spec in enumerate(state.stages):
        queue = state.queues[stage]
        rows = {key: sum(len(slice_.rows) for slice_ in slices) for key, slices in queue.slices.items()}
        found[f"queued {spec.name}"] = sum(rows.values()) + sum(len(retry.rows) for retry in queue.retries)
        known[f"queued {spec.name}"] = queue.rows
        if not state.fixed:
            found[f"full {spec.name}"] = {key for key, count in rows.items() if count >= spec.batch_size}
            known[f"full {spec.name}"] = {*queue.full}
        orders = orders_of[stage]
        found[f"in flight {spec.name}"] = sum(
            len(order.rows) for order in orders if order.task not in ("commit", "keep")
        )
        known[f"in flight {spec.name}"] = state.rows_in_flight[stage]
        found[f"busy {spec.name}"] = len({order.worker for order in orders})
        known[f"busy {spec.name}"] = state.busy[stage]
        for key, ranking in state.rankings[stage].items():
            ranks = [rank for worker in state.workers_of(stage) if (rank := ranking.rank(worker))]
            found[f"least loaded {spec.name} {key}"] = min(ranks, default=None)
            known[f"least loaded {spec.name} {key}"] = ranking.first()
    if wrong := {name for name in found if found[name] != known[name]}:
        raise Wrong(f"the driver knows {[(name, known[name], found[name]) for name in sorted(wrong)]}")

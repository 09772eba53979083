"""What holds at every moment of a run."""

from __future__ import annotations

from collections import Counter

from tests.simulation.settings import Wrong

from latentmill.driver.limits import max_open_shards, queue_limit
from latentmill.driver.state import DriverState


def check(state: DriverState) -> None:
    """That each row of each open shard is in exactly one place, and that nothing grows beyond its bound. Raises Wrong."""
    if state.failed:
        return
    places = Counter(row for rows in state.to_read for row in rows)
    for stage in range(len(state.stages)):
        for queue in state.queues[stage].values():
            places.update(row for slice_ in queue for row in slice_.rows)
        places.update(row for retry in state.retries[stage] for row in retry.rows)
    places.update(row for order in state.in_flight.values() if order.task != "commit" for row in order.rows)
    places.update(row for record in state.records.values() for order, _ in record.suspects for row in order.rows)
    places.update(row for order, _ in state.fatal_suspects for row in order.rows)
    for shard in state.shards.values():
        places.update(row for slice_ in shard.packed for row in slice_.rows)
        places.update(error["row"] for error in shard.errors)
    planned = {row for shard in state.shards for row in state.shard_rows(shard)}
    if wrong := {row for row in planned if places[row] != 1} | (places.keys() - planned):
        raise Wrong(f"rows {sorted(wrong)} are in {[places[row] for row in sorted(wrong)]} places")
    for stage, spec in enumerate(state.stages[1:], start=1):
        before = state.stages[stage - 1]
        most = queue_limit(state, stage) + before.batch_size * (before.replicas * before.batches_per_worker + 1)
        most += (
            spec.batch_size * spec.replicas * spec.batches_per_worker * spec.running_batches
        )  # what its own workers gave back
        # Where batches are fixed, one may wait for rows that others have to pass: open shards bound them.
        if state.rows_queued(stage) > most and not state.fixed:
            raise Wrong(f"{state.rows_queued(stage)} rows wait for {spec.name}, and {most} is the most")
    if len(state.shards) > max_open_shards(state):
        raise Wrong(f"{len(state.shards)} shards are open")

"""What a whole job takes, reckoned from a few rounds of its rows. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev
from typing import NamedTuple

from latentmill.driver.messages import StageSpec, WorkerType
from latentmill.driver.replicas import allocate

STUDENT = (math.inf, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895)
"""Of Student's t, by degrees of freedom, what 9 of 10 lie within, both ways."""


class Spread(NamedTuple):
    """A number that is not known for sure: 9 in 10 of what may be lie from ``low`` to ``high``."""

    value: float
    low: float
    high: float

    def times(self, factor: float, more: float = 0.0) -> Spread:
        """Each of the three times ``factor``, and ``more``."""
        return Spread(*(factor * each + more for each in self))


@dataclass(frozen=True)
class Round:
    """Rows that went through all stages together, after others had."""

    rows: int
    computing: float
    """Seconds in which a process that hosts all stages between the first and the last (``cluster=inline``) had work for itself;
    nan if each worker has a process."""
    stages: Sequence[float]
    """Seconds that each stage computed; of the last without commits."""
    commits: Sequence[tuple[int, float]]
    """Rows and seconds of each commit."""
    blocks: Sequence[float]
    """Bytes that each stage made."""
    files: Sequence[tuple[int, float]]
    """Rows and bytes of each shard, with its side files."""


@dataclass(frozen=True)
class Left:
    """What is to be done."""

    rows: int
    shards: int
    rows_per_shard: int
    stages: Sequence[StageSpec]
    types: Sequence[WorkerType]
    nodes: Sequence[Mapping[str, float]]
    """What each node has, in Ray's words; none: one process."""
    gpus: Sequence[float]
    """Of a worker of each type."""


@dataclass(frozen=True)
class Estimate:
    """What a job is reckoned to take. Seconds, hours and bytes."""

    rows_a_second: Spread
    seconds: Spread
    """From the first row to the last."""
    start: float
    """Seconds before the first row."""
    gpu_hours: Spread
    bytes: Spread
    """Of the dataset's shards."""
    object_store: float
    """Bytes that wait between stages, and for the rest of their shards, at most."""
    workers: Sequence[int]
    """Of each type."""
    slowest: int
    """The type that all others wait for."""
    row_seconds: Sequence[float]
    """Of each stage, for one row in one worker."""


def estimate(rounds: Sequence[Round], left: Left, loading: float, warmed: Round | None = None) -> Estimate:
    """``loading``: seconds until the first workers were ready; ``warmed``: the round before, of which the smallest shard counts, so that what a
    shard costs and what its rows cost can be told apart. Raises ValueError if there is no room for the fewest workers.
    """
    small = [min(points) for points in (warmed.commits, warmed.files)] if warmed else []
    of_commit = line([*small[:1], *(each for r in rounds for each in r.commits)])
    of_file = line([*small[1:], *(each for r in rounds for each in r.files)])
    all_rows = sum(r.rows for r in rounds)
    last, commit = len(left.stages) - 1, of_commit[0] / left.rows_per_shard + of_commit[1]

    def stage(number: int, some: Sequence[Round]) -> float:
        seconds = sum(r.stages[number] for r in some) / sum(r.rows for r in some)
        return seconds + commit * (number == last)

    def work(some: Sequence[Round]) -> list[float]:
        if not left.nodes:
            rows = sum(r.rows for r in some)
            between = [sum(r.computing for r in some) / rows] * (len(left.types) - 2)
            return [stage(0, some), *between, stage(last, some)]
        return [sum(stage(number, some) for number in hosts.stages) for hosts in left.types]

    of_all = work(rounds)
    batches = [math.ceil(left.rows / spec.batch_size) for spec in left.stages]
    of_use = [max(1.0, *(batches[number] for number in hosts.stages)) for hosts in left.types]
    counts = allocate(left.types, of_all, of_use, left.nodes) if left.nodes else [1] * len(left.types)
    if counts is None:
        raise ValueError("the cluster has no room for the job's workers")

    def of_row(some: Sequence[Round]) -> float:
        return max(seconds / count for seconds, count in zip(work(some), counts))

    row = spread([of_row([r]) for r in rounds], of_row(rounds))
    slowest = max(range(len(counts)), key=lambda number: of_all[number] / counts[number])
    stages = [stage(number, rounds) for number in range(len(left.stages))]
    filling = sum(
        stages[number] * min(spec.batch_size, left.rows)
        for number, spec in enumerate(left.stages)
        if number not in left.types[slowest].stages
    )
    filling += of_commit[0] + of_commit[1] * min(left.rows_per_shard, left.rows)
    # At the end some of the slowest workers have one batch more than others, which wait.
    batch = sum(
        stages[number] * min(left.stages[number].batch_size, left.rows) for number in left.types[slowest].stages
    )
    filling += batch * (1 - 1 / counts[slowest])
    more = max((1 - 1 / n for n, hosts in zip(counts, left.types) if hosts.replicas is None), default=0.0)
    seconds, start = row.times(left.rows, filling), loading * (1 + more)
    held = sum(gpus * count for gpus, count in zip(left.gpus, counts))
    per_row = spread(
        [(sum(size for _, size in r.files) - len(r.files) * of_file[0]) / r.rows for r in rounds], of_file[1]
    )
    blocks = [sum(r.blocks[number] for r in rounds) / all_rows for number in range(len(left.stages))]
    return Estimate(
        Spread(1 / row.value, 1 / row.high, 1 / row.low if row.low > 0 else math.inf),
        seconds, start, seconds.times(held / 3600, held * start / 3600), per_row.times(left.rows, left.shards * of_file[0]),
        _waiting(left, counts, blocks), counts, slowest, stages,
    )  # fmt: skip


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """What of ``points`` of rows and an amount is the same for any number of rows, and what comes with each row: neither is negative.

    >>> line([(4, 14.0), (12, 22.0)])
    (10.0, 1.0)
    """
    sizes = sorted({rows for rows, _ in points})
    few, many = (median(amount for rows, amount in points if rows == size) for size in (sizes[0], sizes[-1]))
    if len(sizes) == 1:
        return 0.0, many / sizes[0]
    each = min(max(0.0, (many - few) / (sizes[-1] - sizes[0])), many / sizes[-1])
    return many - each * sizes[-1], each


def spread(found: Sequence[float], value: float) -> Spread:
    """Around ``value``, by how much ``found`` differ from one another: of their mean 9 in 10 are within."""
    degrees = len(found) - 1
    if not degrees:
        return Spread(value, value, value)
    beside = (STUDENT[degrees] if degrees < len(STUDENT) else 1.8) * stdev(found) / math.sqrt(len(found))
    return Spread(value, max(0.0, value - beside), value + beside)


def _waiting(left: Left, counts: Sequence[int], blocks: Sequence[float]) -> float:
    """What ``driver.limits`` lets wait: batches for each stage, as many as its workers hold and one more, and open shards."""
    of_stage = {number: count for count, hosts in zip(counts, left.types) for number in hosts.stages}
    most = [
        spec.batch_size * of_stage[number] * (spec.batches_per_worker + 1) for number, spec in enumerate(left.stages)
    ]
    shards = 2 + sum(most[1:]) // left.rows_per_shard
    packed = blocks[-1] * min(left.rows, shards * left.rows_per_shard)
    return packed + sum(size * min(left.rows, rows) for size, rows in zip(blocks[:-1], most[1:]))

"""What a seed draws: a job, and how bad its world is."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TypeAlias

from latentmill.driver.messages import StageSpec, WorkerType

LARGEST_ROW = 9
"""Bytes."""
NAMES = ("read", "encode", "denoise", "decode", "write")
DRAWS = 2
"""The stage that draws samples, and may itself filter them, as those behind it may."""
EARLY = 1
"""The stage that filters rows for good."""
TROUBLED = 120.0
"""Virtual seconds until troubles end."""
LONGEST = 5_000.0
"""Virtual seconds after which a world that isn't finished never will be: of hundreds of seeds the longest takes a quarter of that."""

Row: TypeAlias = tuple[int, int]
"""A row's number, and what has been made of it."""


class Wrong(AssertionError):
    """Something happened that must not."""


class Gone(Exception):
    """A process ended here."""


@dataclass
class Settings:
    """What a seed draws: a job, and how bad its world is."""

    rows: int
    """The number behind the last row's."""
    begun: int
    """The same of the plan that the dataset is begun with: it grows, or not."""
    grows_at: float
    """From then on drivers that begin have the whole plan."""
    rows_per_shard: int
    stages: tuple[StageSpec, ...]
    worker_types: tuple[WorkerType, ...]
    fixed: bool
    max_bytes: float
    shapes: int
    drivers: int
    nodes: int
    node_size: float
    """Workers that a node has room for."""
    slowness: list[float]
    """How many times as long as others each stage takes, until that changes."""
    loading: float
    """What the driver is told that a worker takes to load, as a share of what it takes."""
    rejected: set[int]
    """Rows that a stage rejects."""
    raising: dict[int, int]
    """Rows on which a stage raises, each with the attempt at which it does, if the row comes to it."""
    killing: set[int]
    hanging: set[int]
    """Rows on which a stage dies, or hangs, each time: for good."""
    attempts: int
    """Samples of a row that are drawn at most."""
    passes_at: dict[int, int]
    """The attempt, from 0, at which a row passes the filter: at none that is made, if that is none of ``attempts``."""
    filters: list[int]
    """The stages that filter what was drawn: a row by turns."""
    early: set[int]
    """Rows that are filtered before anything is drawn."""
    rates: dict[str, float]
    """Chance of a trouble for each dispatch, commit, or use of the store."""
    comes: list[float]
    """Seconds after a driver's begin at which it gets one more node."""
    goes: list[float]
    """The same at which it loses one."""
    scales: bool = False
    """Nodes come to who asks for them, one at a time."""
    accept_rows: int | None = None
    """Accepted rows that the dataset ends with, if not with the last that is planned."""
    calm: bool = False
    """Nothing happens but that nodes come and go: no driver may give up."""

    @property
    def fewest(self) -> int:
        """Workers without which nothing moves, all types together."""
        return sum((hosts.replicas or 1) if hosts.fewest is None else hosts.fewest for hosts in self.worker_types)

    @property
    def short(self) -> dict[int, int]:
        """The last shards of both generations, where they have fewer rows than others."""
        ends = (self.begun, self.rows)
        return {end // self.rows_per_shard: end % self.rows_per_shard for end in ends if end % self.rows_per_shard}

    @property
    def numbers(self) -> list[int]:
        """Of all rows."""
        second = -(-self.begun // self.rows_per_shard) * self.rows_per_shard
        return [*range(self.begun), *range(second, self.rows)]

    @property
    def bad(self) -> set[int]:
        """Rows that can't be done."""
        raising = {row for row, attempt in self.raising.items() if attempt <= self.passes_at[row]}
        return self.rejected | raising | self.killing | self.hanging

    @property
    def filtered(self) -> dict[int, int]:
        """Rows that nobody wants, each with how many of its samples are drawn."""
        never = {row: self.attempts for row, attempt in self.passes_at.items() if attempt >= self.attempts}
        wanted = never | dict.fromkeys(self.early, 1)
        return {row: drawn for row, drawn in wanted.items() if row not in self.bad}

    @classmethod
    def draw(cls, dice: random.Random) -> Settings:
        """Draw them."""
        fixed, rows = dice.random() < 0.4, dice.randint(1, 70)
        running = 1 if fixed else dice.choice((1, 1, 3))
        stages = [
            StageSpec(
                name,
                batch_size=dice.randint(1, 9),
                batches_per_worker=dice.choice((1, 2, 2)),
                running_batches=running if name == "denoise" else 1,
                retries=dice.choice((0, 1, 1, 2)),
            )
            for name in NAMES
        ]
        every = tuple(range(len(NAMES)))
        split = tuple((stage,) for stage in every)
        hosted = dice.choice((split, split, (every,), (every[:1], every[1:-1], every[-1:]), (every[:-1], every[-1:])))
        # Numbers of workers that the driver finds for itself, on nodes that have room for a few more than the fewest.
        finds = dice.random() < 0.5
        numbers = [dice.choice((None, 1, 2, 3)) if finds else dice.randint(1, 3) for _ in hosted]
        node_size = sum(number or 1 for number in numbers) + dice.randint(0, 6) if None in numbers else math.inf
        often = ("torn", "dies before", "dies after", "zombie", "misheard")
        seldom = ("raise", "load", "die", "hang", "node", "late", "store", "driver", "pause")
        wrecked = dice.choice((0.0, 0.0, 0.3, 0.6))
        bad = dice.sample(range(rows), min(rows, dice.choice((0, 0, 1, 3))))
        kinds_of_bad: list[set[int]] = [set(), set(), set(), set()]
        for row in bad:
            dice.choice(kinds_of_bad).add(row)
        size, begun = dice.randint(1, 25), rows
        grows = random.Random(f"{rows} of {size} grow")  # of its own, so that worlds that don't grow stay as they were
        if grows.random() < 0.3:  # the second generation begins with a shard of its own
            second = -(-begun // size) * size
            rows = second + grows.randint(1, 40)
            if grows.random() < 0.3:
                grows.choice(kinds_of_bad).add(grows.randrange(second, rows))
        drawn = cls(
            rows,
            begun,
            grows.uniform(0, 100),
            size,
            tuple(stages),
            tuple(WorkerType(hosts, number, {"CPU": 1.0}) for hosts, number in zip(hosted, numbers)),
            fixed,
            dice.choice((math.inf, 50, 500)),
            shapes=dice.choice((1, 1, 2, 4)),
            drivers=dice.choice((1, 1, 2, 3)),
            nodes=dice.randint(1, 3),
            node_size=node_size,
            slowness=[dice.choice((0.2, 1.0, 6.0)) for _ in stages],
            loading=dice.choice((0.0, 1.0)),
            rejected=kinds_of_bad[0],
            raising=dict.fromkeys(kinds_of_bad[1], 0),
            killing=kinds_of_bad[2],
            hanging=kinds_of_bad[3],
            rates={
                **{name: dice.choice((0.0, 0.0, 0.01, 0.04)) for name in seldom},
                **{name: dice.choice((0.0, 0.1, 0.3)) for name in often},
                "wrecked": wrecked,
            },
            comes=[],
            goes=[],
            attempts=1,
            passes_at={},
            filters=[],
            early=set(),
        )
        # Last of all: what was drawn before is as it was when there were no filters.
        share, drawn.attempts = dice.choice((0.0, 0.0, 0.3, 0.7, 1.0)), dice.choice((1, 1, 2, 4))
        for row in drawn.numbers:
            drawn.passes_at[row] = next((k for k in range(drawn.attempts) if dice.random() >= share), drawn.attempts)
        drawn.filters = dice.sample((DRAWS, DRAWS + 1, DRAWS + 2), dice.choice((1, 1, 2, 3)))
        drawn.raising = {row: dice.randrange(drawn.attempts) for row in drawn.raising}
        drawn.rates["stop"] = random.Random(f"{rows} of {size} stop").choice((0.0, 0.0, 0.02, 0.1))
        drawn.early = {row for row in drawn.numbers if row not in drawn.bad and dice.random() < share / 5}
        ends = random.Random(f"{rows} of {size} end")
        if ends.random() < 0.3:
            drawn.accept_rows = ends.randint(1, len(drawn.numbers))
        drawn._draw_nodes(random.Random(f"{rows} of {size} on nodes that come and go"))
        return drawn

    def _draw_nodes(self, dice: random.Random) -> None:
        """In a share of the worlds types have a fewest number, and nodes come late, go, and come back. With dice of its own: other
        worlds stay as they were.
        """
        if dice.random() >= 0.3:
            return
        types = []
        for hosts in self.worker_types:
            number = dice.choice((None, 1, 2, 4, 6))
            fewest = dice.randint(1, number) if number and dice.random() < 0.8 else None
            types.append(WorkerType(hosts.stages, number, hosts.asks, fewest))
        self.worker_types = tuple(types)
        self.node_size = float(dice.randint(1, self.fewest + 4))
        least = math.ceil(self.fewest / self.node_size)
        self.nodes = dice.randint(0, least + 1)
        self.comes = [dice.uniform(0, 60) for _ in range(max(0, least - self.nodes) + dice.randint(0, 3))]
        self.goes = [dice.uniform(0, 90) for _ in range(dice.randint(0, 8))]
        self.scales = dice.random() < 0.4
        if dice.random() < 0.6 and not self.bad:
            self.calm, self.rates = True, dict.fromkeys(self.rates, 0.0)


def value(row: int, stage: int, attempt: int = 0) -> int:
    """What a row is behind a stage: it depends on the row and its attempt, and on nothing else."""
    return row * 1_000_003 + attempt * 10 + stage + 1


def attempt_of(row: int, made: int) -> int:
    """The attempt of a row of which this was made."""
    return (made - row * 1_000_003) // 10

"""What the driver says of its workers as it happens: who came, who is gone and why, and what they said. Limited in rate."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from latentmill.text import hidden, one_line
from latentmill.workers.speech import MINUTE, WorkerName

logger = logging.getLogger("latentmill")

LINES = 60
"""Of all workers together, that are put into the driver's log in a minute."""
DEATHS = 10
"""Of those that say that a worker is gone, or that another has taken its place."""


class Limited:
    """So many lines a minute; what is more is counted."""

    def __init__(self, most: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``what`` the lines are, of which it says how many more there were."""
        self.most, self.what, self.clock = most, what, clock
        self.since, self.count, self.more = clock(), 0, 0

    def warn(self, text: str) -> None:
        """Put a line into the log, unless there were too many."""
        if self.clock() - self.since >= MINUTE:
            if self.more:
                logger.warning(f"{self.more:,} more {self.what}")
            self.since, self.count, self.more = self.clock(), 0, 0
        if self.count < self.most:
            self.count += 1
            logger.warning(text)
        else:
            self.more += 1


@dataclass
class _Seen:
    name: WorkerName
    worker_type: int
    node: str = ""

    def __str__(self) -> str:
        return f"{self.name.short} on {self.node}" if self.node else self.name.short


@dataclass
class Watch:
    """A run's workers, by their numbers."""

    job: str = "job"
    output: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    clock: Callable[[], float] = time.monotonic
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:6])
    """Told from other runs by this: names of Ray's actors must differ, and so must files of logs."""

    def __post_init__(self) -> None:
        self._told: set[tuple[str, str]] = set()
        self._workers: dict[int, _Seen] = {}
        self._numbers: Counter[int] = Counter()
        self._gone: dict[int, deque[str]] = {}
        """By worker type, those in whose place another is to come."""
        self._lines = Limited(LINES, f"lines of workers are in logs/*@{self.run}.log", self.clock)
        self._deaths = Limited(DEATHS, "workers were gone, or came in another's place", self.clock)

    def called(self, worker: int, worker_type: int, stages: Sequence[str]) -> WorkerName:
        """Give a worker that is to start its name."""
        number = self._numbers[worker_type]
        self._numbers[worker_type] += 1
        name = WorkerName(f"{'+'.join(stages)}-{number}", self.run, self.output, self.secrets)
        self._workers[worker] = _Seen(name, worker_type)
        return name

    def full(self, name: str) -> str:
        """How Ray and its dashboard call what is called ``name`` here: ``txt2img/denoise-3@1f2e3d``."""
        return f"{self.job}/{name}@{self.run}"

    def ready(self, worker: int, node: str) -> None:
        """A worker can be given work."""
        if seen := self._workers.get(worker):
            seen.node = node
            if gone := self._gone.get(seen.worker_type):
                self._deaths.warn(f"{seen} has come in the place of {gone.popleft()}")

    def gone(self, worker: int, reason: str, replaced: bool = True) -> None:
        """A worker is no more. ``replaced``: another is to come."""
        if seen := self._workers.pop(worker, None):
            self._deaths.warn(f"{seen} is gone: {hidden(one_line(reason), self.secrets)}")
            if replaced:
                self._gone.setdefault(seen.worker_type, deque()).append(seen.name.short)

    def left(self, worker: int) -> None:
        """A worker has ended since it was not wanted any more."""
        self._workers.pop(worker, None)

    def heard(self, stage: str, messages: Sequence[str], worker: int | None = None) -> None:
        """Libraries' messages and warnings while a stage was loaded or computed: each once for a stage."""
        for text in messages:
            if (stage, text) not in self._told:
                self._told.add((stage, text))
                seen = self._workers.get(worker) if worker is not None else None
                self._say(f"{stage} ({seen})" if seen else stage, text)

    def said(self, worker: int, lines: Sequence[str]) -> None:
        """What a worker printed."""
        for text in lines:
            self._say(str(self._workers.get(worker, "a worker")), text)

    def _say(self, who: str, text: str) -> None:
        self._lines.warn(f"{who}: {hidden(text, self.secrets)}")

"""What the driver says of its workers as it happens: who came, who is gone and why, and what they said. Limited in rate."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from latentmill.progress import Shown
from latentmill.text import hidden, one_line
from latentmill.usage import GroupUsage, Usage, together
from latentmill.workers.speech import MINUTE, WorkerName

logger = logging.getLogger("latentmill")

LINES_OF_ALL = 60
"""Of all workers together, that are put into the driver's log in a minute."""
STALE = 300.0
"""Seconds after which what a worker used says nothing more of it."""
DEATHS_TOLD = 10
"""Of those that say that a worker is gone, or that another has taken its place."""


class Limited:
    """So many lines a minute; what is more is counted."""

    def __init__(self, most: int, what: str, lately: deque[str], clock: Callable[[], float]) -> None:
        """``what`` the lines are, of which it says how many more there were; the last ones are in ``lately``."""
        self.most, self.what, self.lately, self.clock = most, what, lately, clock
        self.since, self.count, self.more = clock(), 0, 0

    def warn(self, text: str) -> None:
        """Put a line into the log, unless there were too many."""
        self.look()
        if self.count < self.most:
            self.count += 1
            self.lately.append(text)
            logger.warning(text)
        else:
            self.more += 1

    def look(self, ends: bool = False) -> None:
        """Say how many more there were, once their minute is over, or the run ``ends``."""
        if self.clock() - self.since >= MINUTE or ends:
            if self.more:
                logger.warning(f"{self.more:,} more {self.what}")
            self.since, self.count, self.more = self.clock(), 0, 0


@dataclass(frozen=True)
class Notice:
    """What a worker lets the driver know beside its rows, with an answer that it gives anyway."""

    said: Sequence[str] = ()
    """What was printed in it since the last."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the stage has counted since the last, by ``tally``'s names."""
    usage: Usage | None = None
    """What its process has used, now and then."""


@dataclass
class _Seen:
    name: WorkerName
    worker_type: int
    stages: str
    node: str = ""
    was_ready: bool = False
    usage: Usage | None = None
    used_at: float = 0.0

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
        self.counts: Counter[tuple[str, str]] = Counter()
        """What stages have counted: by ``tally``'s name and the stage's."""
        self.deaths: Counter[str] = Counter()
        """Workers that are gone, by the names of their stages."""
        self.lately: deque[str] = deque(maxlen=5)
        """What was said last."""
        self._gone: dict[int, deque[str]] = {}
        """By worker type, those in whose place another is to come."""
        self._lines = Limited(LINES_OF_ALL, f"lines of workers are in logs/*@{self.run}.log", self.lately, self.clock)
        self._deaths = Limited(DEATHS_TOLD, "workers were gone, or came in another's place", self.lately, self.clock)

    def called(self, worker: int, worker_type: int, stages: Sequence[str]) -> WorkerName:
        """Give a worker that is to start its name."""
        number = self._numbers[worker_type]
        self._numbers[worker_type] += 1
        name = WorkerName(f"{'+'.join(stages)}-{number}", self.run, self.output, self.secrets)
        self._workers[worker] = _Seen(name, worker_type, "+".join(stages))
        return name

    def full(self, name: str) -> str:
        """How Ray and its dashboard call what is called ``name`` here: ``txt2img/denoise-3@1f2e3d``."""
        return f"{self.job}/{name}@{self.run}"

    def runs(self, worker: int, node: str) -> None:
        """A worker runs there."""
        if seen := self._workers.get(worker):
            seen.node = node

    def ready(self, worker: int) -> None:
        """A worker can be given work."""
        seen = self._workers.get(worker)
        if seen is None:
            return
        seen.was_ready = True
        if gone := self._gone.get(seen.worker_type):
            self._deaths.warn(f"{seen} has come in the place of {gone.popleft()}")

    def gone(self, worker: int, reason: str, replaced: bool = True) -> None:
        """A worker is no more. ``replaced``: another is to come."""
        if seen := self._workers.pop(worker, None):
            self.deaths[seen.stages] += 1
            reason = reason.partition(" Some common causes include:")[0]  # Ray's list, the same each time
            self._deaths.warn(f"{seen} is gone: {one_line(hidden(reason, self.secrets), 400)}")
            if replaced and seen.was_ready:  # else its place is that of one before it, or was nobody's yet
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

    def noticed(self, worker: int, stage: str, notice: Notice) -> None:
        """What a worker lets us know with an answer; ``stage`` has done what it counted."""
        seen = self._workers.get(worker)
        if seen is None:
            return
        for text in notice.said:
            self._say(str(seen), text)
        for what, number in notice.counts.items():
            self.counts[what, stage] += number
        if notice.usage is not None:
            seen.usage, seen.used_at = notice.usage, self.clock()

    def usage(self) -> list[GroupUsage]:
        """What the workers use that are there, of all that host the same stages together. Another thread may ask."""
        found: dict[str, list[Usage]] = {}
        for seen in list(self._workers.values()):
            if seen.usage is not None and self.clock() - seen.used_at < STALE:
                found.setdefault(seen.stages, []).append(seen.usage)
        return [together(stages, each) for stages, each in found.items()]

    def onto(self, shown: Shown) -> Shown:
        """How a run stands, with what is known of its workers. Another thread may ask."""
        counts: dict[str, dict[str, int]] = {}
        for (what, stage), number in list(self.counts.items()):
            counts.setdefault(stage, {})[what] = number
        for stage, number in list(self.deaths.items()):
            counts.setdefault(stage, {})["deaths"] = number
        return replace(shown, usage=self.usage(), counts=counts, lately=list(self.lately))

    def look(self, ends: bool = False) -> None:
        """Say how many lines there were beyond those that were told, once that is due, or the run ``ends``."""
        self._lines.look(ends)
        self._deaths.look(ends)

    def _say(self, who: str, text: str) -> None:
        self._lines.warn(f"{who}: {hidden(text, self.secrets)}")

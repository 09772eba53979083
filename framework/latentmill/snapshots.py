"""How a run stands, for whoever looks from elsewhere: a small file of each driver in ``live/`` of the output.

The driver puts it there every few seconds, whole, and takes it away at the end. What can't be put changes nothing: it is told, not done.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from latentmill.progress import Live, Shown, StageView, View
from latentmill.storage import Bucket, Storage
from latentmill.storage.store import DAY
from latentmill.usage import GroupUsage, History, added_up

LIVE = "live"
"""The folder in the output."""
LOGS = "logs"
"""The folder in the output that has a file for each worker of a cluster."""
KEEP_EVERY = 0.5
"""Seconds between two moments that are kept of what workers use."""
PUT_EVERY, PUT_EVERY_IN_STORE = 5.0, 30.0
"""Seconds between two files of a driver, in a folder and in an object store."""
LOGS_KEPT = 30 * DAY
"""Seconds for which a worker's file stays after its last line; then the next driver removes it."""
SILENT = 60.0
"""Seconds after which a driver that should have said more is said to be silent."""


@dataclass(frozen=True)
class Snapshot:
    """What a driver has said of itself."""

    driver: str
    """``HOST-PROCESS-RUN``"""
    at: float
    """Seconds since 1970, by its clock."""
    every: float
    """Seconds after which it says more."""
    shown: Shown

    def silent_for(self, now: float) -> float | None:
        """Seconds for which it has said nothing though it should have; None if it speaks."""
        passed = now - self.at
        return passed if passed > SILENT + self.every else None


class Snapshots:
    """Looks at a run every now and then, in a thread of its own, and lets others see it."""

    def __init__(self, store: Storage, live: Live, run: str, others: Sequence[Callable[[Shown], None]] = ()) -> None:
        """``run`` tells this one from others of this process; ``others`` are told every few seconds, too."""
        self.store, self.live, self.others = store, live, others
        self.driver = f"{socket.gethostname()}-{os.getpid()}-{run}"
        self.every = PUT_EVERY_IN_STORE if isinstance(store, Bucket) else PUT_EVERY
        self.history = History()
        """What workers have used."""
        self._ended = threading.Event()
        self._there = False
        self._keeping = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="live", daemon=True)

    def __enter__(self) -> Snapshots:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)  # a store that doesn't answer is not waited for
        if self._there:
            with suppress(Exception):
                self.store.delete(self._name)

    @property
    def _name(self) -> str:
        return f"{LIVE}/{self.driver}.json"

    def keep(self) -> None:
        """Take in what workers use now."""
        with suppress(Exception), self._keeping:
            shown = self.live.shown()
            self.history.add(shown.view.seconds, shown.usage)

    def _look(self) -> None:
        next_tell = next_put = time.monotonic() + 2 * KEEP_EVERY
        while not self._ended.wait(KEEP_EVERY):
            self.keep()
            now = time.monotonic()
            if now < next_tell or not self.live.pace.views:
                continue
            next_tell = now + PUT_EVERY
            with suppress(Exception):
                shown = self.live.shown()
                for other in self.others:
                    other(shown)
            if now >= next_put:
                self._put()
                next_put = now + self.every

    def _put(self) -> None:
        with suppress(Exception):
            first, self._there = not self._there, True
            now = Snapshot(self.driver, time.time(), self.every, self.live.shown())
            self.store.put(self._name, json.dumps(asdict(now)).encode())
            if first:  # of drivers that were killed, and of workers long ago
                for folder, seconds in ((LIVE, DAY), (LOGS, LOGS_KEPT)):
                    for name in self.store.older(folder, seconds):
                        self.store.delete(f"{folder}/{name}")


def read_all(store: Storage) -> dict[str, Snapshot]:
    """What drivers have said of themselves, by the files' names. One that is gone by now, or of another kind, is passed over.

    Raises OSError if the store does not answer.
    """
    names = [f"{LIVE}/{name}" for name in sorted(store.names(LIVE)) if name.endswith(".json")]

    def read(name: str) -> Snapshot | None:
        with suppress(FileNotFoundError, PermissionError, ValueError, TypeError, KeyError):
            return _read(json.loads(store.read(name)))
        return None

    return {name: found for name, found in zip(names, store.each(read, names)) if found}


def _read(found: Mapping[str, Any]) -> Snapshot:
    shown = found["shown"]
    view = shown["view"]
    view = _made(View, {**view, "stages": [_made(StageView, stage) for stage in view["stages"]]})
    usage = [_made(GroupUsage, group) for group in shown["usage"]]
    return _made(Snapshot, {**found, "shown": _made(Shown, {**shown, "view": view, "usage": usage})})


_Kind = TypeVar("_Kind")


def _made(kind: type[_Kind], found: Mapping[str, Any]) -> _Kind:
    """Of what this version knows: a driver of a later one says more."""
    return kind(**{name: found[name] for name in (field.name for field in fields(kind)) if name in found})  # type: ignore[arg-type]


SUMS = ("done", "queued", "workers", "busy", "ended_before", "failed", "queued_bytes")
"""Numbers of a stage that are counted by each driver for itself."""


def added(drivers: Sequence[Shown]) -> Shown:
    """What several drivers do together on one output, one at least. Each knows of all shards that were there when it last looked."""
    first = max(drivers, key=lambda each: each.view.finished)
    if len(drivers) == 1:
        return first
    views = [each.view for each in drivers]
    speeds = [1 / each.left for each in drivers if each.left]
    finished = first.view.finished
    under_way = sum(each.rows - each.view.finished for each in drivers)
    stages = [
        replace(same[0], **{name: sum(getattr(each, name) for each in same) for name in SUMS})
        for same in zip(*(view.stages for view in views))
    ]
    view = replace(
        first.view,
        stages=stages,
        failed=sum(view.failed for view in views),
        filtered=sum(view.filtered for view in views),
        seconds=max(view.seconds for view in views),
        leased_by_others=0,
    )
    at = range(len(stages))
    return Shown(
        first.job,
        view,
        min(view.planned, finished + under_way),
        1 / sum(speeds) if speeds else None,
        [sum(each.rates[k] for each in drivers) for k in at],
        [_busy(drivers, k) for k in at],
        added_up(group for each in drivers for group in each.usage),
        _counts(drivers),
        lately=[line for each in drivers for line in each.lately],
    )


def _busy(drivers: Sequence[Shown], stage: int) -> float:
    """The share of the time of all drivers' workers."""
    workers = [each.view.stages[stage].workers for each in drivers]
    return sum(each.busy[stage] * many for each, many in zip(drivers, workers)) / (sum(workers) or 1)


def _counts(drivers: Sequence[Shown]) -> dict[str, dict[str, int]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each in drivers:
        for stage, more in each.counts.items():
            counts[stage].update(more)
    return {stage: dict(of) for stage, of in counts.items()}

"""Workers that one run of a sweep leaves to the next, each with its models loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LeftWorker:
    """A worker that has nothing to do."""

    alike: tuple[Any, ...]
    """What a worker must be to take its place: ``WorkerSetup.alike``, and of which pool it is."""
    worker: Any
    """Of Ray an actor, else a Worker."""
    end: Callable[[], None] = lambda: None
    """Let it go, and its models with it."""
    place: Any = None
    """Of Ray the placement group that is its own, if one is."""
    node: str = ""
    """Ray's id of its node."""
    loading: float = 0.0
    """Seconds that one like it takes to be ready that begins anew."""


class LeftWorkers:
    """What the last run has left. The next one takes what it can use, and lets the rest go before it loads anything."""

    def __init__(self) -> None:
        self.workers: list[LeftWorker] = []

    def take(self, alike: tuple[Any, ...]) -> LeftWorker | None:
        """One that is so, if there is one: those with a place of their own first."""
        found = sorted(self.of(alike), key=lambda each: each.place is None)
        if found:
            self.workers.remove(found[0])
        return next(iter(found), None)

    def of(self, alike: tuple[Any, ...]) -> list[LeftWorker]:
        """All that are so."""
        return [each for each in self.workers if each.alike == alike]

    def keep(self, wanted: Mapping[tuple[Any, ...], int | None]) -> None:
        """Keep as many of each kind as are wanted, of None all, and let go all others."""
        stay = list[LeftWorker]()
        for alike, most in wanted.items():
            stay += sorted(self.of(alike), key=lambda each: each.place is None)[:most]
        self.end(lambda each: each not in stay)

    def end(self, which: Callable[[LeftWorker], bool] = lambda each: True) -> None:
        """Let some go, or all."""
        ended = [each for each in self.workers if which(each)]
        self.workers = [each for each in self.workers if each not in ended]
        for each in ended:
            each.end()


@contextmanager
def shared_workers() -> Iterator[LeftWorkers]:
    """What is left, from run to run; at the end nothing."""
    left = LeftWorkers()
    try:
        yield left
    finally:
        left.end()

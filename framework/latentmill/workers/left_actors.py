"""Actors that the run before has left, for this one's pool: with the places that they are at, and the room that they take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from latentmill.driver.messages import StartWorker
from latentmill.workers.left import LeftWorker, LeftWorkers
from latentmill.workers.places import PATIENCE, Places
from latentmill.workers.worker import WorkerSetup


class LeftActors:
    """Those that this run can use; all others are ended as it is made."""

    def __init__(self, setups: Sequence[WorkerSetup], left: LeftWorkers | None) -> None:
        self.left = left or LeftWorkers()
        self.kinds = {("ray", *setup.alike): setup for setup in setups}
        self.left.keep({kind: setup.replicas for kind, setup in self.kinds.items()})
        self.until = time.monotonic() + PATIENCE
        """Who isn't asked for by then is let go: others may want the room."""
        self.loading: dict[int, float] = {}
        """Of each worker that was left, and is this run's now, the seconds that one takes to be ready that begins anew."""

    def places(self) -> dict[int, list[PlacementGroup]]:
        """By worker type, the places of their own that they are at."""
        return {
            number: [each.place for each in self.left.of(kind) if each.place is not None]
            for number, kind in enumerate(self.kinds)
        }

    def take(self, order: StartWorker, places: Places) -> Any:
        """An actor for a worker that is to start; None if there is none."""
        found = self.left.take([*self.kinds][order.worker_type])
        if found is None:
            return None
        if not places.take_left(order.worker_type, order.worker, found.place):
            found.end()
            return None
        self.loading[order.worker] = found.loading
        return found.worker

    def make_room(self) -> None:
        """Let those go that are at no place of their own: a worker that has none either may need the room."""
        self.left.end(lambda each: each.place is None)

    def look(self, places: Places) -> None:
        """Let go who isn't asked for."""
        if self.left.workers and time.monotonic() > self.until:
            self.let_go(places)

    def let_go(self, places: Places) -> None:
        """Let all of them go: where they are is no place for others."""
        for each in self.left.workers:
            places.forget(each.place)
        self.left.end()

    def reserved(self, by_places: Callable[[], Mapping[str, Counter[str]]]) -> Mapping[str, Counter[str]]:
        """What is taken of each node by places, and by those that are at none."""
        found = {node: Counter(taken) for node, taken in by_places().items()}
        for each in self.left.workers:
            if each.place is None:
                found.setdefault(each.node, Counter()).update(cast(Any, self.kinds[each.alike].asks))
        return found

    def leave(self, actor: Any, worker_type: int, place: PlacementGroup | None, node: str, loading: float) -> None:
        """Leave an actor to the next run."""

        def end() -> None:
            with suppress(RayError):
                ray.kill(actor)
                if place is not None:
                    remove_placement_group(place)

        self.left.workers.append(LeftWorker([*self.kinds][worker_type], actor, end, place, node, loading))

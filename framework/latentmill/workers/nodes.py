"""What the nodes of a cluster have, and whether a job's workers fit on them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from latentmill.driver.messages import Event, NodesSeen
from latentmill.driver.replicas import Room
from latentmill.errors import BusyError, PlacementError
from latentmill.workers.worker import WorkerSetup

PATIENCE = 60.0
"""Seconds to wait for room on a cluster that would have it if others didn't use it."""
SEE_EVERY = 5.0
"""Seconds between two looks for nodes that have come or gone."""

Resources: TypeAlias = Mapping[str, float]


def alive() -> dict[str, Resources]:
    """What each node has in all, by its id."""
    return {node["NodeID"]: node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]}


class Places:
    """Places on the nodes that are reserved before anything starts: all of them, or none.

    Of a type whose number is given there are as many, and a worker's place is its replacement's. Of one whose number is found there
    is one, for the first: where that ends, others go on elsewhere, and nobody must wait for just this place.
    """

    def __init__(self, setups: Sequence[WorkerSetup], name: Callable[[str], str]) -> None:
        """``name`` makes the name by which people find a place. Raises BusyError if others hold the cluster for longer than PATIENCE."""
        self.free: dict[int, list[PlacementGroupSchedulingStrategy]] = {}
        """By worker type."""
        self.taken: dict[int, tuple[int, PlacementGroupSchedulingStrategy]] = {}
        """Of each worker that has one, its type and place."""
        given = [(number, setup.asks) for number, setup in enumerate(setups) for _ in range(setup.replicas or 0)]
        found = [(number, setup.asks) for number, setup in enumerate(setups) if setup.replicas is None]
        self.found = {number for number, _ in found}
        together = [[(number, asks) for number, asks in given if asks], *[[each] for each in found if each[1]]]
        self.groups = {}
        for bundles in filter(None, together):
            types = sorted({number for number, _ in bundles})
            called = name(f"places of {'+'.join(stage.name for of in types for stage in setups[of].stages)}")
            self.groups[placement_group([asks for _, asks in bundles], strategy="PACK", name=called)] = bundles
        until = time.monotonic() + PATIENCE
        for group, bundles in self.groups.items():
            if not group.wait(max(0.01, until - time.monotonic())):
                self.close()
                raise _busy(setups)
            for place, (number, _) in enumerate(bundles):
                self.free.setdefault(number, []).append(PlacementGroupSchedulingStrategy(group, place))

    def take(self, worker_type: int, worker: int) -> PlacementGroupSchedulingStrategy | None:
        """A place for a worker, if one is free."""
        if not self.free.get(worker_type):
            return None
        place = self.free[worker_type].pop()
        self.taken[worker] = worker_type, place
        return place

    def give_back(self, worker: int) -> None:
        """A worker is no more."""
        worker_type, place = self.taken.pop(worker, (None, None))
        if worker_type is None or place is None:
            return
        if worker_type in self.found:
            remove_placement_group(place.placement_group)
            del self.groups[place.placement_group]
        else:
            self.free[worker_type].append(place)

    def by_node(self) -> dict[str, Counter[str]]:
        """What is reserved on each node."""
        found: dict[str, Counter[str]] = {}
        for group, bundles in self.groups.items():
            for place, node in placement_group_table(group)["bundles_to_node_id"].items():
                found.setdefault(node, Counter()).update(bundles[int(place)][1])
        return found

    def close(self) -> None:
        """Give all of them back."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups.clear()


class Nodes:
    """The nodes, as they come and go. What others use of one is theirs: what they used when nothing of ours was outside its place."""

    def __init__(self, places: Places, watch: bool) -> None:
        """``watch``: whether others may be there, come or go."""
        self.places, self.watch = places, watch
        self.ours: dict[str, Resources] = {}
        self.told: dict[str, Resources] = {}
        self.looked = -SEE_EVERY

    def news(self, only_places: bool) -> list[Event]:
        """What the nodes have for us, if that is new. ``only_places``: no worker of ours is outside the places that are reserved."""
        now = time.monotonic()
        if now - self.looked <= SEE_EVERY or (self.told and not self.watch):
            return []
        self.looked = now
        try:
            found = alive()
            if self.watch and only_places:
                self.ours = self._without_others(found)
        except RayError:  # whoever keeps the list of nodes is away for a moment
            return []
        self.ours = {node: self.ours[node] if node in self.ours else _shared(has) for node, has in found.items()}
        if self.ours == self.told:
            return []
        self.told = self.ours
        return [NodesSeen(tuple(self.ours.values()))]

    def _without_others(self, found: Mapping[str, Resources]) -> dict[str, Resources]:
        free, reserved = cast(Any, available_resources_per_node)(), self.places.by_node()
        return {
            node: {
                name: min(amount, free[node].get(name, 0.0) + reserved.get(node, Counter()).get(name, 0.0))
                for name, amount in _shared(has).items()
            }
            for node, has in found.items()
            if node in free
        }


def _busy(setups: Sequence[WorkerSetup]) -> BusyError:
    there = cast(Any, ray).available_resources()
    wants = ", ".join(f"{setup.name} {setup.replicas or 1} x ({_amounts(setup.asks)})" for setup in setups)
    has = ", ".join(
        f"{name} {there.get(name, 0):g}" for name in sorted({name for setup in setups for name in setup.asks})
    )
    return BusyError(
        f"the cluster is large enough, but others have been using it for {PATIENCE:g} s: wanted {wants}; free {has}"
    )


def _amounts(demand: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in demand.items())


def _shared(resources: Resources) -> Resources:
    """Without a node's own name, so that nodes that are alike look alike."""
    return {name: amount for name, amount in resources.items() if not name.startswith("node:")}


def check_placement(setups: Sequence[WorkerSetup], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise PlacementError unless all workers fit on the nodes together, the largest first."""
    room = Room(nodes)
    wanted = [(work, work.asks) for work in setups for _ in range(work.replicas or 1)]
    for work, demand in sorted(wanted, key=lambda each: max(each[1].values(), default=0.0), reverse=True):
        if not room.take(demand):
            asks = _amounts(demand)
            names = {name for _, each in wanted for name in each}
            has = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in sorted(names)) for node in nodes)
            alone = any(Room([node]).take(demand) for node in nodes)
            why = "do not fit beside the other stages' workers" if alone else "fit on no node"
            raise PlacementError(
                f"stage {work.name} asks for {work.replicas or 1} x ({asks}), which {why}; the cluster's nodes have: {has}"
            )

"""What the nodes of a cluster have, and whether a job's workers fit on them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from latentmill.driver.messages import Event, NodesSeen
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


class Nodes:
    """The nodes, as they come and go. What others use of one when we first see it is theirs."""

    def __init__(self, found: Mapping[str, Resources], watch: bool) -> None:
        """``watch``: whether others may come or go."""
        free = cast(Any, available_resources_per_node)() if watch else found
        self.ours = {node: _shared(free.get(node, has)) for node, has in found.items()}
        self.watch, self.told, self.looked = watch, False, time.monotonic()

    def news(self) -> list[Event]:
        """What the nodes have for us: said at first, and again when one has come or gone."""
        now = time.monotonic()
        if self.watch and now - self.looked > SEE_EVERY:
            self.looked = now
            found = alive()
            self.told = self.told and found.keys() == self.ours.keys()
            self.ours = {node: self.ours.get(node) or _shared(has) for node, has in found.items()}
        if self.told:
            return []
        self.told = True
        return [NodesSeen(tuple(self.ours.values()))]


def reserve(setups: Sequence[WorkerSetup]) -> tuple[PlacementGroup | None, list[list[int]]]:
    """Reserve a place for every worker, all or none, so that no stage takes what another needs, and their numbers by stage.

    Of a type whose number is found as the job runs one is reserved. Raises BusyError if others hold the cluster for longer
    than PATIENCE.
    """
    bundles: list[dict[str, float]] = []
    free: list[list[int]] = []
    for work in setups:
        asks = work.asks
        free.append([])
        for _ in range(work.replicas or 1 if asks else 0):
            free[-1].append(len(bundles))
            bundles.append(asks)
    if not bundles:
        return None, free
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(PATIENCE):
        remove_placement_group(group)
        there = cast(Any, ray).available_resources()
        wants = ", ".join(f"{w.name} {w.replicas or 1} x ({_amounts(w.asks)})" for w in setups)
        has = ", ".join(f"{name} {there.get(name, 0):g}" for name in sorted({n for b in bundles for n in b}))
        raise BusyError(
            f"the cluster is large enough, but others have been using it for {PATIENCE:g} s: wanted {wants}; free {has}"
        )
    return group, free


def _amounts(demand: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in demand.items())


def _shared(resources: Resources) -> Resources:
    """Without a node's own name, so that nodes that are alike look alike."""
    return {name: amount for name, amount in resources.items() if not name.startswith("node:")}


def check_placement(setups: Sequence[WorkerSetup], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise PlacementError unless all workers fit on the nodes together (first fit, the largest first)."""
    free = [dict(node) for node in nodes]
    wanted = [(work, work.asks) for work in setups for _ in range(work.replicas or 1)]
    for work, demand in sorted(
        wanted, key=lambda w: sorted(w[1].items(), key=lambda d: -d[1])[:1] and -max(w[1].values())
    ):
        for node in free:
            if all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in demand.items()):
                for name, amount in demand.items():
                    node[name] -= amount
                break
        else:
            asks = _amounts(demand)
            names = {name for _, each in wanted for name in each}
            has = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in sorted(names)) for node in nodes)
            alone = any(all(node.get(n, 0.0) + 1e-6 >= a for n, a in demand.items()) for node in nodes)
            why = "do not fit beside the other stages' workers" if alone else "fit on no node"
            raise PlacementError(
                f"stage {work.name} asks for {work.replicas or 1} x ({asks}), which {why}; the cluster's nodes have: {has}"
            )

"""What the nodes of a cluster have, and whether a job's workers fit on them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, TypeAlias, cast

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import available_resources_per_node
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

from latentmill.driver.messages import Event, NodesSeen
from latentmill.driver.replicas import Room
from latentmill.errors import PlacementError
from latentmill.workers.worker import WorkerSetup

SEE_EVERY = 5.0
"""Seconds between two looks for nodes that have come or gone."""
TOLD_WITHIN = 5.0

Resources: TypeAlias = Mapping[str, float]


def alive(drained: Set[str] | None = None) -> dict[str, Resources]:
    """What each node has in all, by its id: of those that stay. ``drained``: the others, if they are known."""
    drained = draining() if drained is None else drained
    found = (node for node in cast(Any, ray).nodes() if node["Alive"] and node["NodeID"] not in drained)
    return {node["NodeID"]: node["Resources"] for node in found}


def draining(before: Set[str] = frozenset()) -> Set[str]:
    """The ids of nodes that are about to be taken away: preempted ones, and those on which ``ray start`` was told to end. Where nobody
    answers for ``TOLD_WITHIN`` seconds: those of ``before``.

    Ray has no public word for it. Ray Serve asks so, too; ``ray._private.state`` would end this process if the answer was an error.
    """
    with suppress(RayError):
        return frozenset(cast(Any, internal_kv_get_gcs_client)().get_draining_nodes(timeout=TOLD_WITHIN))
    return before


def has_autoscaler() -> bool:
    """Whether more nodes come to the cluster if they are wanted.

    Ray has no public word for it. Each cluster has a monitor, which writes down what it sees; one that starts no nodes calls each
    node's type by the node's own id.
    """
    if is_autoscaler_v2(fetch_from_server=True):
        return True
    told = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    seen = (json.loads(told).get("autoscaler_report") or {}) if told else {}
    return any(not name.startswith("node_") for name in seen.get("active_nodes") or ())


class Nodes:
    """The nodes, as they come and go. What others use of one is theirs: what they used when nothing of ours was outside its place."""

    def __init__(self, reserved: Callable[[], Mapping[str, Counter[str]]], watch: bool) -> None:
        """``reserved`` says what this job's places take of each node; ``watch``: whether others may be there, come or go."""
        self.reserved, self.watch = reserved, watch
        self.ours: dict[str, Resources] = {}
        self.told: dict[str, Resources] = {}
        self.more_come = False
        self.looked = -SEE_EVERY

    def news(self, only_places: bool, drained: Set[str]) -> list[Event]:
        """What the nodes have for us, if that is new. ``only_places``: no worker of ours is outside the places that are reserved;
        ``drained``: nodes of which the workers have been told that they leave. Not of others: which workers go would be left to chance.
        """
        now = time.monotonic()
        if now - self.looked <= SEE_EVERY or (self.told and not self.watch):
            return []
        self.looked = now
        try:
            found, more_come = alive(drained), self.watch and (self.more_come or has_autoscaler())
            if self.watch and only_places:
                self.ours = self._without_others(found)
        except RayError:  # whoever keeps the list of nodes is away for a moment
            return []
        self.ours = {node: self.ours[node] if node in self.ours else _shared(has) for node, has in found.items()}
        if (self.ours, more_come) == (self.told, self.more_come):
            return []
        self.told, self.more_come = self.ours, more_come
        return [NodesSeen(tuple(self.ours.values()), more_come)]

    def _without_others(self, found: Mapping[str, Resources]) -> dict[str, Resources]:
        free, reserved = cast(Any, available_resources_per_node)(), self.reserved()
        return {
            node: {
                name: min(amount, free[node].get(name, 0.0) + reserved.get(node, Counter()).get(name, 0.0))
                for name, amount in _shared(has).items()
            }
            for node, has in found.items()
            if node in free
        }


def amounts_text(demand: Mapping[str, float]) -> str:
    """``CPU 1, GPU 0.5``."""
    return ", ".join(f"{name} {amount:g}" for name, amount in demand.items())


def _shared(resources: Resources) -> Resources:
    """Without a node's own name, so that nodes that are alike look alike."""
    return {name: amount for name, amount in resources.items() if not name.startswith("node:")}


def check_placement(setups: Sequence[WorkerSetup], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise PlacementError unless the workers that a job needs to begin fit on the nodes together, the largest first."""
    room = Room(nodes)
    wanted = [(work, work.asks) for work in setups for _ in range(work.fewest)]
    for work, demand in sorted(wanted, key=lambda each: max(each[1].values(), default=0.0), reverse=True):
        if not room.take(demand):
            asks = amounts_text(demand)
            names = {name for _, each in wanted for name in each}
            has = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in sorted(names)) for node in nodes)
            alone = any(Room([node]).take(demand) for node in nodes)
            why = "do not fit beside the other stages' workers" if alone else "fit on no node"
            raise PlacementError(
                f"stage {work.name} asks for {work.fewest} x ({asks}), which {why}; the cluster's nodes have: {has}"
            )

"""Nodes that are about to be taken away: who works on them, and what lies on them alone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.experimental import get_object_locations

from latentmill.text import plural
from latentmill.workers.nodes import SEE_EVERY, draining

logger = logging.getLogger("latentmill")

BROUGHT_WITHIN = 60.0
"""Seconds in which what lies on such nodes is brought to the driver's. Who drains a node gives it one or two minutes."""


class DrainedNodes:
    """Finds such nodes, and the workers on them; meanwhile what they have made is copied to the driver's node."""

    def __init__(self, blocks: Callable[[], Sequence[Any]]) -> None:
        """``blocks``: references of all that is between stages and there."""
        self.blocks = blocks
        self.nodes: set[str] = set()
        """Their ids."""
        self.node_of: dict[int, str] = {}
        """Of each worker that is ready the id of its node."""
        self._told: set[int] = set()
        self._looked = -SEE_EVERY
        self._brings: threading.Thread | None = None

    def news(self) -> list[int]:
        """Workers on them of which nothing was said before."""
        if time.monotonic() - self._looked <= SEE_EVERY:
            return []
        self._looked = time.monotonic()
        with suppress(RayError):  # whoever keeps the list of nodes is away for a moment
            self.nodes = draining()
        found = [worker for worker, node in self.node_of.items() if node in self.nodes and worker not in self._told]
        if found:
            there = len({self.node_of[worker] for worker in found})
            logger.warning(
                f"{plural(there, 'node')} will be taken away: {plural(len(found), 'worker')} there will hand over to others"
            )
        self._told.update(found)
        if self.nodes and (self._brings is None or not self._brings.is_alive()):
            self._brings = threading.Thread(target=_bring, args=(self.blocks(), frozenset(self.nodes)), daemon=True)
            self._brings.start()
        return found

    def gone(self, worker: int) -> None:
        """A worker is no more."""
        self.node_of.pop(worker, None)
        self._told.discard(worker)


def _bring(blocks: Sequence[Any], nodes: frozenset[str]) -> None:
    """Copy what lies on those nodes alone to this one. Ray takes the copy when they are gone."""
    with suppress(RayError, TimeoutError):
        where = get_object_locations(list(blocks)) if blocks else {}
        wanted = [block for block, at in where.items() if at["node_ids"] and nodes.issuperset(at["node_ids"])]
        if wanted:
            cast(Any, ray).wait(wanted, num_returns=len(wanted), timeout=BROUGHT_WITHIN, fetch_local=True)

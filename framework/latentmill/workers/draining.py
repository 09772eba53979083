"""Nodes that are about to be taken away: who works on them, and what lies on them alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.experimental import get_local_object_locations

from latentmill.text import plural
from latentmill.workers.nodes import SEE_EVERY, draining

logger = logging.getLogger("latentmill")


class DrainedNodes:
    """Finds such nodes, and the workers on them; meanwhile what they have made is copied to the driver's node."""

    def __init__(self, blocks: Callable[[], Sequence[Any]]) -> None:
        """``blocks``: references of all that is between stages and there."""
        self.blocks = blocks
        self.nodes: Set[str] = frozenset()
        """Their ids."""
        self.node_of: dict[int, str] = {}
        """Of each worker that is ready the id of its node."""
        self.told: set[int] = set()
        """Workers on them that are known to leave."""
        self._looked = -SEE_EVERY

    def news(self) -> list[int]:
        """Workers on them of which nothing was said before."""
        if time.monotonic() - self._looked <= SEE_EVERY:
            return []
        self._looked = time.monotonic()
        self.nodes = draining(self.nodes)
        found = [worker for worker, node in self.node_of.items() if node in self.nodes and worker not in self.told]
        if found:
            there = len({self.node_of[worker] for worker in found})
            logger.warning(
                f"{plural(there, 'node')} will be taken away: {plural(len(found), 'worker')} there will hand over to others"
            )
        self.told.update(found)
        if self.nodes:
            self._bring()
        return found

    def gone(self, worker: int) -> None:
        """A worker is no more."""
        self.node_of.pop(worker, None)
        self.told.discard(worker)

    def _bring(self) -> None:
        """Have what lies on those nodes alone copied to this one. Nobody waits: Ray goes on with it, and takes the copy when they are gone."""
        with suppress(RayError):
            where = get_local_object_locations(list(self.blocks()))
            wanted = [block for block, at in where.items() if at["node_ids"] and self.nodes >= {*at["node_ids"]}]
            if wanted:
                cast(Any, ray).wait(wanted, num_returns=len(wanted), timeout=0, fetch_local=True)

"""A worker that is made up."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentmill.driver.messages import Dispatch


@dataclass(eq=False)
class Actor:
    """A worker on a node, and what it has been given."""

    worker_type: int
    id: int
    node: int
    orders: list[Dispatch] = field(default_factory=list)
    busy: bool = False

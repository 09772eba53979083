"""What a stage counts of its own accord while it computes: evaluations of the network, and what did not fit into memory.

Whoever calls the stage takes the counts: ``with counting(into): ...``. Where nobody does, nothing is counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

EVALUATIONS, HALVINGS = "evaluations", "halvings"
"""Evaluations of the network, one for each row and pass; how often fewer rows are given to a stage from then on, since memory ran out."""

_here = threading.local()


@contextmanager
def counting(into: Counter[str]) -> Iterator[None]:
    """Add what this thread counts meanwhile."""
    before = getattr(_here, "into", None)
    _here.into = into
    try:
        yield
    finally:
        _here.into = before


def count(what: str, number: int = 1) -> None:
    """There were so many more."""
    into: Counter[str] | None = getattr(_here, "into", None)
    if into is not None:
        into[what] += number

"""How far a driver is that was told to stop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Stopping:
    """What a driver that stops has done, and has still to do."""

    how: Literal["", "finish", "hand over", "keep", "stopped"] = ""
    """As ``Stop`` says; "" as long as nobody wants it to stop, ``stopped`` when nothing is left to do."""
    asked: set[int] = field(default_factory=set)
    """Workers that were told to hand over what they hold."""
    to_keep: list[int] = field(default_factory=list)
    """Shards whose half-done rows are to be kept."""
    kept: int = 0
    """Rows that were kept half done."""
    begun_again: Counter[str] = field(default_factory=Counter)
    """Of each stage the rows that it was at work on: they are kept as they came to it, and it does them again."""
    thrown_away: int = 0
    """Rows that had been read, and could not be kept."""
    reason: str = ""
    """Why the last of them could not."""

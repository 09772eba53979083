"""How many evaluations a call of the network has: as many as the job says, or as many as make it faster."""

from __future__ import annotations

PAYS_OFF = 0.95
"""A call of twice as many must take no more than this share of the time for each of them."""
TIMED = 5
"""Calls of one size that are timed. The shortest counts: the first warms up, and others are disturbed."""


class CallSize:
    """The size of the calls for latents of one shape. Out of memory, it is halved and grows no more."""

    def __init__(self, size: int, grows: bool) -> None:
        """``grows``: ``size`` is the first one to be tried, and is doubled for as long as that makes a call faster."""
        self.size, self.grows = size, grows
        self._smaller: float | None = None
        """Seconds for each evaluation, in calls of half the size."""
        self._seconds: list[float] = []

    def room(self, waiting: int) -> int:
        """Evaluations of the next call, of ``waiting`` that could be made. A larger size is tried once it can be filled."""
        if self.grows and len(self._seconds) == TIMED and waiting >= 2 * self.size:
            self._smaller, self._seconds = min(self._seconds), []
            self.size *= 2
        return self.size

    def is_timed(self, evaluations: int) -> bool:
        """Whether somebody wants to know how long a call of so many takes: one that is not full says nothing of its size."""
        return self.grows and len(self._seconds) < TIMED and evaluations > 0.9 * self.size

    def took(self, seconds: float, evaluations: int) -> None:
        """A call took so long. A size that gains too little is given up for the one before."""
        self._seconds.append(seconds / evaluations)
        if len(self._seconds) == TIMED and self._smaller is not None and min(self._seconds) > PAYS_OFF * self._smaller:
            self.size, self.grows = self.size // 2, False

    def was_too_large(self, evaluations: int) -> None:
        """There was no memory for so many."""
        self.size, self.grows = max(1, evaluations // 2), False

"""How many evaluations a call of the network has: as many as the job says, or as many as make it faster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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

    @contextmanager
    def timing(self, evaluations: int, device: torch.device) -> Iterator[None]:
        """Time a call of so many if that is of use: one that is not full says nothing of its size. Only then a GPU is waited for."""
        if not self.grows or len(self._seconds) == TIMED or evaluations <= 0.9 * self.size:
            yield
            return
        _wait(device)
        started = time.perf_counter()
        yield
        _wait(device)
        self._took(time.perf_counter() - started, evaluations)

    def _took(self, seconds: float, evaluations: int) -> None:
        """A size that gains too little is given up for the one before."""
        self._seconds.append(seconds / evaluations)
        if len(self._seconds) == TIMED and self._smaller is not None and min(self._seconds) > PAYS_OFF * self._smaller:
            self.size, self.grows = self.size // 2, False

    def was_too_large(self, evaluations: int) -> None:
        """There was no memory for so many."""
        self.size, self.grows = max(1, evaluations // 2), False


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

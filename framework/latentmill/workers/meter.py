"""What this process uses: its share of the processors, its memory, and its GPU."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from latentmill.usage import Usage

EVERY = 0.5
"""Seconds, at least, over which it is measured."""
LOOK = 1.0
"""Seconds between two looks at the GPU, which says how busy it was just now."""


def memory_held() -> int:
    """The bytes of memory that are this process's alone: what it sees of Ray's object store, or of mapped weights, is not. 0 where
    the system doesn't say.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class Meter:
    """Measures from one time that it is asked to the next; at first since it was made."""

    def __init__(self, gpu: bool) -> None:
        """``gpu``: whether the process computes on one."""
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._gpu = gpu and _has_gpu()
        self._busy: list[int] = []
        self._has_told = False
        if self._gpu:
            threading.Thread(target=self._look, name="meter", daemon=True).start()

    def _look(self) -> None:
        import torch

        with suppress(Exception):  # without nvidia-ml-py nobody can say
            while True:
                self._busy.append(torch.cuda.utilization())
                time.sleep(LOOK)

    def take(self) -> Usage | None:
        """What was used since the last time; None if that was just now."""
        now, cpu = time.monotonic(), time.process_time()
        passed = now - self._wall
        if self._has_told and passed < EVERY:
            return None
        share = (cpu - self._cpu) / max(passed, 1e-3)
        self._wall, self._cpu, self._has_told = now, cpu, True
        if not self._gpu:
            return Usage(share, memory_held())
        import torch

        busy, self._busy = self._busy, []
        gpu = sum(busy) / len(busy) / 100 if busy else None
        return Usage(share, memory_held(), gpu, torch.cuda.memory_reserved())

"""Who computes on a device of a node: whoever comes there loads nothing before the process is gone that was there before.

Ray counts a device as free as soon as its worker is told to end. The process may live on for seconds, and its model with it: the next
worker's would not fit beside it. What ends a worker is Ray's affair, so each says itself where it is, in a file of its node. Wherever Ray gives a
device away whose processes hold more than there is, one of them is on its way out.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from latentmill.workers.node_folder import node_folder

LEAVES_WITHIN = 30.0
"""Seconds that a process has to be gone: after five Ray kills it. One that is not gone then hangs in the device's driver."""


@dataclass(frozen=True)
class Process:
    """A process that has a share of a device."""

    number: int
    began: str
    """By its machine's clock: numbers are used again."""
    share: float

    @property
    def line(self) -> str:
        """How it stands in the file."""
        return f"{self.number} {self.began} {self.share:g}\n"


def wait_for(node: str, devices: Sequence[str], share: float, within: float = LEAVES_WITHIN) -> tuple[float, str]:
    """Take a share of each of a node's devices, and wait until those are gone that had it before. The share is this process's until it ends.

    ``node`` and ``devices`` are Ray's names. Returns the seconds that it took, and the first device of which others still have too much.
    """
    began, number = time.monotonic(), os.getpid()
    for device in devices:
        before = _enter(node, device, Process(number, _began(number) or "", share))
        with _seen(before) as ends:
            while sum(process.share for process in ends.values()) + share > 1 + 1e-6:
                left = began + within - time.monotonic()
                poll = select.poll()
                for descriptor in ends:
                    poll.register(descriptor, select.POLLIN)
                ended = poll.poll(1000 * left) if left > 0 else []
                if not ended:
                    return time.monotonic() - began, device
                for descriptor, _ in ended:
                    del ends[descriptor]
    return time.monotonic() - began, ""


def _enter(node: str, device: str, process: Process) -> list[Process]:
    """Write a process into a device's file, and return those that stood in it and live."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{node}-{device}")
    with (node_folder("devices") / name).open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system ends it with the process
        file.seek(0)
        found = [Process(int(words[0]), words[1], float(words[2])) for words in map(str.split, file) if len(words) == 3]
        others = [other for other in found if other.number != process.number and _began(other.number) == other.began]
        file.truncate(0)
        file.write("".join(each.line for each in (*others, process)))
    return others


@contextmanager
def _seen(processes: Sequence[Process]) -> Iterator[dict[int, Process]]:
    """Those that live, each by a descriptor that can be read once it is gone: all its threads, and what they held of a device."""
    with ExitStack() as stack:
        seen = {}
        for process in processes:
            try:
                descriptor = os.pidfd_open(process.number)
            except ProcessLookupError:
                continue
            stack.callback(os.close, descriptor)
            if _began(process.number) == process.began:
                seen[descriptor] = process
        yield seen


def _began(number: int) -> str | None:
    """When a process of this machine began; None if there is none."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None

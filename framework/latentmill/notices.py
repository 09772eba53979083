"""Notices: the signals that schedulers of clusters send before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NOTICES = ("SIGTERM", "SIGUSR1")
"""Slurm is told which: ``--signal=USR1@90``. It sends SIGTERM after it, as the time is up, and leaves some seconds still: that is no
second thought, but the end of what may be finished.
"""


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """A notice ends what goes on as Ctrl-C does, with KeyboardInterrupt. Python hears signals in its main thread alone."""
    heard = [number for number in signal.Signals if number.name in NOTICES]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

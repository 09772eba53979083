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
    """A notice ends what goes on as Ctrl-C does, with KeyboardInterrupt, wherever that is. A library that is amid something may make an
    error of its own of it, as torch does ("could not determine the shape of object"): out of here it is KeyboardInterrupt again.

    Python hears signals in its main thread alone.
    """
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    numbers = heard() if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard() -> list[signal.Signals]:
    """The notices that there are on this machine, and Ctrl-C, unless it is ignored, as a shell's background jobs do."""
    numbers = [number for number in signal.Signals if number.name in NOTICES]
    return numbers if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else [*numbers, signal.SIGINT]

"""What a driver is told from outside: to stop, by SIGTERM, SIGUSR1 or Ctrl-C; and how much time each leaves it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from latentmill.driver.messages import Stop
from latentmill.notices import NOTICES, heard

logger = logging.getLogger("latentmill")

RESERVE = 10.0
"""Seconds of ``grace`` that are kept for handing over what is half done, and for writing it; of a short grace, half of it."""
HAND_OVER = 5.0
"""Seconds that workers have to hand over what they hold."""


class Signals:
    """The first signal asks the driver to stop, and the second ends it at once. So does the first if nothing would be lost."""

    def __init__(self, grace: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """``grace``: seconds that the machine stays after a notice."""
        self.clock = clock
        self.finishing = max(grace - RESERVE, grace / 2)
        self.asked: tuple[str, float] | None = None
        """The first signal, and when it came."""
        self.interrupted = False
        """Whether a signal has ended what went on at once, with KeyboardInterrupt. Where that was raised it may have been caught."""
        self._told: dict[str, float] = {}
        """What the driver was told, each with when."""
        self._holds: Callable[[], bool] | None = None
        self._numbers: list[signal.Signals] = []
        """Those that are heard."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hear them, until the end. Nothing is done in any thread but the main one, which is where Python hears signals.

        Raises KeyboardInterrupt in place of the error that a library has made of one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._numbers = heard()
        before = {number: signal.getsignal(number) for number in self._numbers}
        self.listen()
        try:
            yield
        except Exception as error:
            if self.interrupted:
                raise KeyboardInterrupt from error
            raise
        finally:
            self._numbers = []
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Hear them again: Ray, as it begins, puts handlers of its own in their place."""
        for number in self._numbers:
            signal.signal(number, self._came)

    @contextmanager
    def heard_by(self, holds: Callable[[], bool]) -> Iterator[None]:
        """While a loop asks ``stop``. ``holds`` says whether something would be lost if the driver ended now."""
        self.listen()
        self._holds = holds
        try:
            yield
        finally:
            self._holds = None

    def stop(self) -> Stop | None:
        """What the driver is to be told now, if that is new."""
        if self.asked is None:
            return None
        name, when = self.asked
        finishing = self.finishing if name in NOTICES else 0.0
        now = self.clock()
        how: Literal["finish", "hand over", "keep"] = "finish" if now < when + finishing else "hand over"
        if now >= self._told.get("hand over", now) + HAND_OVER:
            how = "keep"
        if how in self._told:
            return None
        if not self._told:
            first = f"what has begun goes on for {finishing:.0f} s, and then " if how == "finish" else ""
            again = "Ctrl-C" if name == "SIGINT" else name
            logger.warning(f"{again}: {first}what is half done is kept; once more ends at once, and loses it")
        self._told[how] = now
        return Stop(how)

    def stop_for(self, why: str) -> bool:
        """Ask the driver to stop at once, for a reason of its own; whether nobody had asked it before."""
        if self.asked is not None:
            return False
        self.asked = why, self.clock()
        return True

    def _came(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked is not None and (self.asked[0], name) == NOTICES[::-1]:
            self.asked = name, self.clock() - self.finishing
            return
        if self.asked is not None or self._holds is None or not self._holds():
            self.interrupted = True
            raise KeyboardInterrupt
        self.asked = name, self.clock()

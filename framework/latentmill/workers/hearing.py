"""What libraries say in a worker while they load and compute, so that a person hears it: workers' own logs are read by nobody."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

from latentmill.text import hidden, one_line

logger = logging.getLogger("latentmill")
Taken = TypeVar("Taken")

EACH = 3
"""How many messages of one line of code are heard; it may have another for every row."""
DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
"""Warnings for who writes a library, not for who runs a job."""
NOT_HEARD = ("latentmill", "ray", "asyncio")
"""Loggers, with those below them, that are heard elsewhere or are none of a row's business."""


def drained(there: deque[Taken]) -> Iterator[Taken]:
    """All that is there now, and each only for one of the threads that ask, while others add."""
    with suppress(IndexError):
        while True:
            yield there.popleft()


class Hearing:
    """Keeps what is logged at WARNING or above, or warned of, while ``on``, each message once.

    Several may be on at a time, each in a thread of its own. What another thread says, one that a library has started, is
    heard by the one that was turned on last.
    """

    def __init__(self) -> None:
        self.messages: deque[str] = deque()
        self._known: set[str] = set()
        self._of_line: Counter[tuple[str, int]] = Counter()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hear what this thread, and others that hear for nobody, log and warn of; it still goes where it went before."""
        before = getattr(_here, "hearing", None)
        _here.hearing = self
        _hook.add(self)
        try:
            yield
        finally:
            _hook.remove(self)
            _here.hearing = before

    def take(self) -> list[str]:
        """What was heard since the last time."""
        return list(drained(self.messages))

    def _hear(self, text: str, line: tuple[str, int]) -> None:
        text = one_line(without_colours(hidden(text, _hook.secrets)), 500)
        if text not in self._known and self._of_line[line] < EACH:
            self._of_line[line] += 1
            self._known.add(text)
            self.messages.append(text)


class _Hook:
    """Stands between libraries and Python's logs and warnings, as long as anyone hears."""

    def __init__(self) -> None:
        self.on: list[Hearing] = []
        self.lately: deque[str] = deque(maxlen=64)
        """Lines of messages that were heard: they are printed, too, as a rule."""
        self.secrets: dict[str, str] = {}
        self.lock = threading.Lock()
        self.factory, self.show = logging.getLogRecordFactory(), warnings.showwarning

    def add(self, hearing: Hearing) -> None:
        with self.lock:
            if not self.on:
                # One may be ours still: a library that kept it for a while has put it back after we had gone.
                if logging.getLogRecordFactory() != self.record:
                    self.factory = logging.getLogRecordFactory()
                if warnings.showwarning != cast(Any, self.shown):
                    self.show = warnings.showwarning
                logging.setLogRecordFactory(self.record)
                warnings.showwarning = self.shown  # type: ignore[assignment]
            self.on.append(hearing)

    def remove(self, hearing: Hearing) -> None:
        with self.lock:
            self.on.remove(hearing)
            if not self.on:
                logging.setLogRecordFactory(self.factory)
                warnings.showwarning = self.show

    def record(self, *args: Any, **named: Any) -> logging.LogRecord:
        made = self.factory(*args, **named)
        with suppress(Exception):  # of a message that can't be put together its handler complains
            self._record(made)
        return made

    def _record(self, made: logging.LogRecord) -> None:
        top = made.name.partition(".")[0]
        # A library that sorts its messages out by a filter has sorted them out for us, too.
        if made.levelno >= logging.WARNING and top not in NOT_HEARD and logging.getLogger(made.name).filter(made):
            message = made.getMessage()
            said = hidden(message, self.secrets).splitlines()[:8]
            self.lately.extend(line for line in map(one_line, said) if line)
            self.hear(f"{made.name}: {message}", (made.pathname, made.lineno))

    def shown(self, message: Any, category: type[Warning], file: str, line: int, *more: Any, **named: Any) -> None:
        with suppress(Exception):
            if not issubclass(category, DEVELOPERS):
                self.hear(f"{category.__name__}: {message}", (file, line))
        _here.shows = True
        try:
            self.show(message, category, file, line, *more, **named)
        finally:
            _here.shows = False

    def hear(self, text: str, line: tuple[str, int]) -> None:
        here = getattr(_here, "hearing", None) or next(iter(self.on[-1:]), None)
        if here is not None:
            here._hear(text, line)


_here = threading.local()
_hook = _Hook()


def keep_secret(secrets: Mapping[str, str]) -> None:
    """What is heard in this process from now on is without these, each replaced by what stands for it."""
    _hook.secrets = {**_hook.secrets, **secrets}


KNOWN_BY = 8
"""Characters of a message at least, by which it is known in a line that has more: others have a bracket or a number, too."""


def is_heard(line: str) -> bool:
    """Whether a line that this thread prints now is one of a message that was heard."""
    return getattr(_here, "shows", False) or any(
        known == line or (len(known) >= KNOWN_BY and known in line) for known in tuple(_hook.lately)
    )


def without_colours(text: str) -> str:
    """What some programs print, without what makes a terminal show it in colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)

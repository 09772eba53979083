"""What a worker of a cluster says: all of it in a file in the output, and so much of it to the driver as a person wants to read.

Workers' own outputs are Ray's, in folders of their nodes that nobody looks into and that go with the nodes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from latentmill import storage
from latentmill.text import hidden, one_line
from latentmill.workers import hearing

LOGS = "logs"
"""The folder in the output that has a file for each worker."""
SECRET_VARIABLES = ("AWS_", "GOOGLE_", "GCS_", "AZURE_", "HF_TOKEN", "RAY_AUTH_TOKEN")
"""How the names of environment variables begin that may hold keys."""
LINES_A_MINUTE, MINUTE = 10, 60.0
"""Lines of one worker that the driver is told in so many seconds."""
MOST_BYTES = 1 << 20
"""Of a worker's file in a folder; then it begins anew, and the one before is kept beside it."""
LAST_BYTES = 1 << 18
"""Of what is kept of it in an object store: the last."""
FIRST_UPLOAD, UPLOAD_EVERY = 5.0, 60.0
"""Seconds after the first line, and between two puts to an object store, which can't append."""
RAYS_OWN = (":actor_name:", ":task_name:", ":job_id:")
"""How the lines begin that Ray writes for itself."""


@dataclass(frozen=True)
class WorkerName:
    """What a worker of a cluster is called, and where it puts what it says."""

    short: str
    """Its stages and number: ``denoise-3``."""
    run: str
    """Of the driver's run."""
    output: str
    """Where the dataset lies."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What must not be read, each with what stands for it."""

    @property
    def log(self) -> str:
        """Its file in the output."""
        return f"{LOGS}/{self.short}@{self.run}.log"


class Speech:
    """Takes over this process's ``sys.stdout`` and ``sys.stderr``. Nothing that goes wrong here is anybody's error."""

    def __init__(self, name: WorkerName, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.clock = name, clock
        self._lock = threading.RLock()
        self._said: list[str] = []
        self._since, self._count, self._more, self._told = clock(), 0, 0, False
        self._file: _LogFile | _LogObject = _LogObject(name) if "://" in name.output else _LogFile(name)

    def begin(self) -> None:
        """Hear what is printed from now on, by logs and warnings too."""
        sys.stdout, sys.stderr = _Tee(sys.stdout, self.line), _Tee(sys.stderr, self.line)

    def note(self, text: str) -> None:
        """A line for the file alone."""
        with suppress(Exception), self._lock:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {hidden(text, self.name.secrets)}\n")

    def line(self, text: str) -> None:
        """A line that was printed."""
        with suppress(Exception):
            text = one_line(hearing.without_colours(text.rpartition("\r")[2]), 2000)
            if not text or text.startswith(RAYS_OWN):
                return
            self.note(text)
            if hearing.is_heard(text):  # the driver is told of it as a message, once
                return
            with self._lock:
                if self.clock() - self._since >= MINUTE and not self._more:
                    self._begin_minute()
                if self._count < LINES_A_MINUTE:
                    self._count += 1
                    self._said.append(one_line(hidden(text, self.name.secrets), 500))
                else:
                    self._more += 1

    def take(self) -> list[str]:
        """What the driver is told since the last time; of more than LINES_A_MINUTE how many there are."""
        with self._lock:
            over = self.clock() - self._since >= MINUTE
            if self._more and (over or not self._told):
                self._said.append(f"{self._more:,} more line{'s' * (self._more > 1)} in {self.name.log}")
                self._more, self._told = 0, True
            if over:
                self._begin_minute()
            taken, self._said = self._said, []
            return taken

    def _begin_minute(self) -> None:
        self._since, self._count, self._told = self.clock(), 0, False

    def end(self) -> None:
        """Put down what is not in the file yet."""
        with suppress(Exception):
            self._file.close()


class _Tee:
    """A standard stream that is heard, line by line."""

    def __init__(self, stream: Any, hear: Callable[[str], None]) -> None:
        self._stream, self._hear, self._begun = stream, hear, ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with suppress(Exception), self._lock:
            *lines, rest = (self._begun + text).split("\n")
            self._begun = rest[-4096:]
            for line in lines:
                self._hear(line)
        written: int = self._stream.write(text)
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LogFile:
    """In a folder, where a line is there as soon as it is written. Only beside a plan: the output may be another disk here."""

    def __init__(self, name: WorkerName) -> None:
        self.path, self.size = os.path.join(name.output, name.log), 0
        self.plan = name.output and os.path.join(name.output, "plan.json")
        self._file: int | None = None

    def write(self, line: str) -> None:
        if self._file is not None and self.size + len(line) > MOST_BYTES:
            os.close(self._file)
            os.replace(self.path, self.path.removesuffix(".log") + ".before.log")
            self._file, self.size = None, 0
        if self._file is None:
            if not os.path.exists(self.plan):
                return
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.size += os.write(self._file, line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        pass


class _LogObject:
    """In an object store, put there whole now and then."""

    def __init__(self, name: WorkerName) -> None:
        self.name, self.size = name, 0
        self.lines: deque[str] = deque()
        self.changed = threading.Event()
        self.thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        self.lines.append(line)
        self.size += len(line)
        while self.size > LAST_BYTES:
            self.size -= len(self.lines.popleft())
        self.changed.set()
        if self.thread is None:
            self.thread = threading.Thread(target=self._live, name="log", daemon=True)
            self.thread.start()

    def _live(self) -> None:
        pause = FIRST_UPLOAD
        while True:
            self.changed.wait()
            time.sleep(pause)
            pause = UPLOAD_EVERY
            with suppress(Exception):  # the next time
                self.close()

    def close(self) -> None:
        if self.changed.is_set():
            self.changed.clear()
            content = "".join(tuple(self.lines)).encode("utf-8", "backslashreplace")
            storage.at(self.name.output).put(self.name.log, content)

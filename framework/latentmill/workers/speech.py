"""What a worker of a cluster says: all of it in a file in the output, and so much of it to the driver as a person wants to read.

Workers' own outputs are Ray's, in folders of their nodes that nobody looks into and that go with the nodes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from latentmill import storage
from latentmill.snapshots import LOGS
from latentmill.text import hidden, one_line
from latentmill.workers import hearing

LINES_A_MINUTE, MINUTE = 10, 60.0
"""Lines of one worker that the driver is told in so many seconds."""
MOST_BYTES = 1 << 20
"""Of a worker's file in a folder; then it begins anew, and the one before is kept beside it."""
LAST_BYTES = 1 << 18
"""Of what is kept of it in an object store: the last."""
FIRST_UPLOAD, UPLOAD_EVERY = 5.0, 60.0
"""Seconds after the first line, and between two puts to an object store, which can't append."""
OF_A_LINE = 8192
"""Characters of a line that are looked at."""
TURN_WITHIN = 1.0
"""Seconds that a thread waits for another that speaks. It may never end: it waits for a lock that this one holds, or for a disk that
does not answer. Then this line is not heard."""
AGAIN_AFTER = 60.0
"""Seconds for which a file that could not be written is left alone: each line would cost as much again."""
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
        hearing.keep_secret(self.name.secrets)
        sys.stdout, sys.stderr = _Tee(sys.stdout, self), _Tee(sys.stderr, self)
        os.register_at_fork(after_in_child=self._forked)

    def go_on_as(self, name: WorkerName) -> None:
        """From now on it is another run's worker that speaks."""
        hearing.keep_secret(name.secrets)
        self.end()
        with self.turn():
            self._file.leave()
            self.name = name
            self._said, self._since, self._count, self._more, self._told = [], self.clock(), 0, 0, False
            self._file = _LogObject(name) if "://" in name.output else _LogFile(name)

    def _forked(self) -> None:
        self._lock = threading.RLock()  # who held it is not here

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """One thread at a time; False if it can't be had."""
        lock = self._lock
        ours = lock.acquire(timeout=TURN_WITHIN)
        try:
            yield ours
        finally:
            if ours:
                lock.release()

    def note(self, text: str) -> None:
        """A line for the file alone."""
        with suppress(Exception), self.turn() as ours:
            if ours:
                self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {hidden(text, self.name.secrets)}\n")

    def line(self, text: str) -> None:
        """A line that was printed, by who has the turn."""
        text = hidden(text.rstrip("\r").rpartition("\r")[2], self.name.secrets)  # before it is cut
        text = one_line(hearing.without_colours(text[:OF_A_LINE]), 2000)
        if not text or text.startswith(RAYS_OWN):
            return
        self.note(text)
        if hearing.is_heard(text):  # the driver is told of it as a message, once
            return
        if self.clock() - self._since >= MINUTE and not self._more:
            self._begin_minute()
        if self._count < LINES_A_MINUTE:
            self._count += 1
            self._said.append(one_line(text, 500))
        else:
            self._more += 1

    def take(self) -> list[str]:
        """What the driver is told since the last time; of more than LINES_A_MINUTE how many there are."""
        with self.turn() as ours:
            if not ours:
                return []
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

    def __init__(self, stream: Any, speech: Speech) -> None:
        self._stream, self._speech, self._begun = stream, speech, ""

    def write(self, text: str) -> int:
        with suppress(Exception), self._speech.turn() as ours:
            if ours:
                *lines, rest = (self._begun + text).split("\n")
                self._begun = rest[-OF_A_LINE:]
                for line in lines:
                    self._speech.line(line)
        written: int = self._stream.write(text)
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __reduce__(self) -> Any:  # who copies what holds it, or sends it to another process
        return _standard, ("stderr" if self is sys.stderr else "stdout",)


def _standard(name: str) -> Any:
    return getattr(sys, name)


class _LogFile:
    """In a folder, where a line is there as soon as it is written. Only beside a plan: the output may be another disk here."""

    def __init__(self, name: WorkerName) -> None:
        self.path, self.size = os.path.join(name.output, name.log), 0
        self.plan = name.output and os.path.join(name.output, "plan.json")
        self.not_before = 0.0
        self._file: int | None = None

    def write(self, line: str) -> None:
        if time.monotonic() < self.not_before:
            return
        try:
            self._write(line)
        except OSError:
            self.not_before = time.monotonic() + AGAIN_AFTER

    def _write(self, line: str) -> None:
        if self._file is not None and self.size + len(line) > MOST_BYTES:
            file, self._file, self.size = self._file, None, 0  # closed once: its number may soon be another's
            os.close(file)
            with suppress(FileNotFoundError):  # somebody has deleted it
                os.replace(self.path, self.path.removesuffix(".log") + ".before.log")
        if self._file is None:
            os.stat(self.plan)
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.size += os.write(self._file, line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        file, self._file, self.size = self._file, None, 0
        if file is not None:
            os.close(file)

    leave = close


class _LogObject:
    """In an object store, put there whole now and then."""

    def __init__(self, name: WorkerName) -> None:
        self.name, self.size = name, 0
        self.lines: deque[str] = deque()
        self.changed, self.left = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self._putting = threading.Lock()

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
        while not self.left.is_set():
            self.changed.wait()
            self.left.wait(pause)
            pause = UPLOAD_EVERY
            with suppress(Exception):  # the next time
                self.close()

    def close(self) -> None:
        with self._putting:  # what is newer is put later
            if not self.changed.is_set():
                return
            self.changed.clear()
            content = "".join(tuple(self.lines)).encode("utf-8", "backslashreplace")
            try:
                storage.at(self.name.output).put(self.name.log, content)
            except Exception:
                self.changed.set()
                raise

    def leave(self) -> None:
        """No more lines come: its thread puts down what is there, and ends."""
        self.left.set()
        self.changed.set()

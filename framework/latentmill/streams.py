"""stdout and stderr of the command: what can't be written there stops nobody."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WAIT = 1.0
"""Seconds to wait for a reader of stderr that doesn't read."""


class Stream(io.FileIO):
    """A standard stream whose disk may be full and whose reader may be gone: what can't be written is dropped."""

    def __init__(self, number: int, wait: float | None = None) -> None:
        super().__init__(number, "w", closefd=False)
        self.wait = wait
        self.failing = False
        """The last write could not be done."""
        self.error: OSError | None = None
        """Why the first could not, of those that could not."""

    def write(self, data: ReadableBuffer, /) -> int:
        content = memoryview(data)
        try:
            if self.wait is not None:
                if not select.select([], [self], [], 0.0 if self.failing else self.wait)[1]:
                    raise TimeoutError("its reader does not read")
                content = content[: select.PIPE_BUF]  # so much is taken at once
            written = super().write(content)
            self.failing = False
            return len(content) if written is None else written
        except OSError as error:
            self.failing, self.error = True, self.error or error
            return len(content)


def guard() -> Stream | None:
    """Make stdout and stderr of this process streams that never fail, once and for all: Python writes to them at exit, too.

    Returns stdout; None if it isn't the process's own. A stream that is closed becomes the null device, since the next
    file that is opened would get its number, and with it what libraries in C print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, out = _guarded(sys.stdout, 1, None)
    sys.stderr, _ = _guarded(sys.stderr, 2, WAIT)
    return out


def _guarded(stream: Any, number: int, wait: float | None) -> tuple[Any, Stream | None]:
    if stream is None:
        return open(os.devnull, "w"), None
    try:
        ours = stream.fileno() == number
    except (OSError, ValueError):  # somebody caught it: a test, a notebook
        ours = False
    if not ours:
        return stream, None
    stream.flush()
    raw = Stream(number, wait)
    lines = number == 2 or raw.isatty()
    text = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=lines)
    return text, raw

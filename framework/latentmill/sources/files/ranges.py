"""A file in a store, read by ranges: several at a time, ahead of whoever reads on."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, cast

RANGE = 512 << 10
"""Bytes that one request brings, where the store says nothing else."""
LAST_RANGE = 64 << 10
"""Bytes at the end that are a piece of their own: there a Parquet file's footer is, and often it is all that is wanted."""
RANGES_AHEAD = 16
"""Ranges, at most, that are asked for before they are wanted: what an open file holds in memory is these and a few more. Larger ones are fewer."""
RANGES_BEHIND = 4
"""Ranges that are kept after they were read."""
REQUESTS = 64
"""Requests that a process makes at a time."""

Fetch: TypeAlias = Callable[[int, int], bytes]
"""Brings a file's bytes from one place to another, as many as that are. Raises StorageError."""


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, "latentmill source")


def threads() -> ThreadPoolExecutor:
    """Those that wait for requests: what they are given waits for nothing else."""
    return _threads(os.getpid())


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A file in a store, as readers know it: a ``Path`` does as well."""

    url: str
    size: int
    tag: str
    """Another once the file holds something else."""
    fetch: Fetch
    range: int = RANGE
    """Bytes of a request."""
    first: dict[int, bytes] = field(default_factory=dict, repr=False)
    """Its first piece, once that is there: whoever looks at a file begins with it, time and again."""

    @property
    def is_tagged(self) -> bool:
        """Whether the tag is the store's own, and no date."""
        return not self.tag.startswith("@")

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.url.rpartition("/")[2]

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """A file of its own, to read and seek in."""
        return opened(self.fetch, self.size, self.first, self.range)

    def __str__(self) -> str:
        return self.url


SourceFile: TypeAlias = Path | StoredFile


def opened(fetch: Fetch, size: int, first: dict[int, bytes], range: int = RANGE) -> BinaryIO:
    """A file of so many bytes that are fetched as they are wanted. ``first`` has those of its beginning that are there, or will."""
    return cast(BinaryIO, io.BufferedReader(_Ranges(fetch, size, first, range), 64 << 10))


class _Ranges(io.RawIOBase):
    """While it is read from one piece to the next it is further and further ahead. What raised is asked for anew."""

    def __init__(self, fetch: Fetch, size: int, first: dict[int, bytes], range: int) -> None:
        self.fetch, self.size, self.first, self.range = fetch, size, first, range
        self.most_ahead = max(4, RANGES_AHEAD * RANGE // range)
        self.at = 0
        self.pieces: dict[int, Future[bytes]] = {}
        """Those that were asked for, by their first byte."""
        self.current, self.following = -1, 0
        """The first byte of the piece that was last read, and of the one behind it."""
        self.run = 0
        """Pieces to be ahead."""
        self.behind: deque[int] = deque(maxlen=max(1, RANGES_BEHIND * RANGE // range))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.at >= self.size or not len(buffer):
            return 0
        first = self.first.get(0, b"")
        start, piece = (0, first) if self.at < len(first) else self._piece(len(buffer))
        got = piece[self.at - start : self.at - start + len(buffer)]
        buffer[: len(got)] = got
        self.at += len(got)
        return len(got)

    def _bounds(self, at: int) -> tuple[int, int]:
        """First byte and end of the piece that has a byte."""
        tail = max(0, self.size - LAST_RANGE)
        start = at - at % self.range
        return (tail, self.size) if at >= tail else (start, min(start + self.range, tail))

    def _piece(self, wanted: int) -> tuple[int, bytes]:
        start, stop = self._bounds(self.at)
        if start != self.current:
            follows = self.current >= 0 and 0 <= start - self.following <= 2 * self.range
            self.run = min(max(1, 2 * self.run), self.most_ahead) if follows else 0
            if self.current >= 0:
                self.behind.append(self.current)
            self.current, self.following = start, stop
        # All that is read at once is asked for at once, as far as that goes.
        ahead = max(self.run, min(-(-(self.at + wanted - stop) // self.range), self.most_ahead))
        window = dict(self._window(start, ahead))
        for first, end in window.items():
            if first not in self.pieces:
                self.pieces[first] = threads().submit(self.fetch, first, end)
        if len(self.pieces) > self.most_ahead + len(self.behind):
            self._drop({*window, *self.behind})
        try:
            piece = self.pieces[start].result()
        except BaseException:
            self._drop(set())
            raise
        if not start:
            self.first[0] = piece
        return start, piece

    def _window(self, start: int, ahead: int) -> Iterator[tuple[int, int]]:
        for _ in range(1 + ahead):
            if start >= self.size:
                return
            bounds = self._bounds(start)
            yield bounds
            start = bounds[1]

    def _drop(self, kept: set[int]) -> None:
        for first in self.pieces.keys() - kept:
            self.pieces.pop(first).cancel()

    def close(self) -> None:
        self._drop(set())
        super().close()

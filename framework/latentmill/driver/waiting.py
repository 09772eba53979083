"""What waits: the rows before a stage, and the workers that can be given some. Neither is counted or searched through."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from latentmill.driver.messages import TableSlice

WINDOW = 16
"""Batches that say how long a stage takes, or half as many of each of its workers."""

Chunk: TypeAlias = tuple[int, int]
"""A shard, and the place of a batch in it."""


@dataclass
class Retry:
    """Work that failed and is tried again as one unit."""

    rows: Sequence[int]
    slices: list[TableSlice]
    failures: int


class StageQueue:
    """The rows that wait for a stage: by stack key those that can be stacked, and what is to be tried again."""

    def __init__(self, batch_size: int, chunk_rows: Callable[[Chunk], int] | None = None) -> None:
        """``chunk_rows`` where batches are fixed: how many rows a chunk has. The stack keys begin with their chunk there."""
        self.batch_size, self.chunk_rows = batch_size, chunk_rows
        self.slices: dict[Any, deque[TableSlice]] = {}
        self.full: dict[Any, None] = {}
        """The stack keys of which a full batch waits, in the order in which they became full."""
        self.retries: deque[Retry] = deque()
        self.accounted: Counter[Chunk] = Counter()
        """Where batches are fixed: how many rows of a chunk have reached the stage, or ended before it: failed, filtered, or waiting to be drawn again."""
        self._rows_of: Counter[Any] = Counter()
        self._keys_of: dict[Chunk, dict[Any, None]] = {}
        self._waiting = self._retried = 0

    @property
    def rows(self) -> int:
        """Rows that wait, those included that are to be tried again."""
        return self._waiting + self._retried

    def put(self, key: Any, slice_: TableSlice) -> None:
        """Rows come."""
        if key not in self.slices:
            self.slices[key] = deque()
            if self.chunk_rows:
                self._keys_of.setdefault(key[:2], {})[key] = None
        self.slices[key].append(slice_)
        self._rows_of[key] += len(slice_.rows)
        self._waiting += len(slice_.rows)
        self._note(key)

    def take(self, key: Any) -> list[TableSlice]:
        """The rows of the next batch of a stack key: as many as there are, and no more than fill it."""
        queue, slices, room = self.slices[key], [], self.batch_size
        while queue and room:
            slice_ = queue.popleft()
            if len(slice_.rows) > room:
                queue.appendleft(slice_.sub(room, None))
                slice_ = slice_.sub(0, room)
            slices.append(slice_)
            room -= len(slice_.rows)
        taken = self.batch_size - room
        self._rows_of[key] -= taken
        self._waiting -= taken
        if not queue:
            del self.slices[key], self._rows_of[key]
            if self.chunk_rows and key[:2] in self._keys_of:
                self._keys_of[key[:2]].pop(key, None)
                if not self._keys_of[key[:2]]:
                    del self._keys_of[key[:2]]
        self._note(key)
        return slices

    def account(self, chunk: Chunk, rows: int) -> None:
        """So many rows more of a chunk have reached the stage or ended before it; fewer, if they begin again."""
        self.accounted[chunk] += rows
        for key in self._keys_of.get(chunk, ()):
            self._note(key)

    def forget(self, chunk: Chunk) -> None:
        """A chunk is through."""
        self.accounted.pop(chunk, None)

    def largest_first(self) -> list[Any]:
        """All stack keys, that of the most rows first."""
        return sorted(self.slices, key=self._rows_of.__getitem__, reverse=True)

    def try_again(self, retry: Retry, first: bool = False) -> None:
        """Rows that failed wait to be tried again."""
        (self.retries.appendleft if first else self.retries.append)(retry)
        self._retried += len(retry.rows)

    def next_retry(self) -> Retry:
        """Take what is to be tried again next."""
        retry = self.retries.popleft()
        self._retried -= len(retry.rows)
        return retry

    def _note(self, key: Any) -> None:
        if key in self.slices and self._is_full(key):
            self.full.setdefault(key)
        else:
            self.full.pop(key, None)

    def _is_full(self, key: Any) -> bool:
        if self.chunk_rows:
            return self.accounted[key[:2]] == self.chunk_rows(key[:2])
        return self._rows_of[key] >= self.batch_size


@dataclass
class StageTime:
    """How long a stage takes for a row, by what its workers have done lately."""

    seconds: float = 0.0
    rows: float = 0.0
    first: float | None = None
    """What a row took in the very first batch."""
    seen: set[int] = field(default_factory=set)
    """Workers that have done a batch."""

    def add(self, seconds: float, rows: int, worker: int, workers: int) -> None:
        """A worker has done a batch of so many rows, or a commit, of none. Several of each worker say what is so lately.

        A worker's first is not counted: it warms up. Where new workers were taken for slow ones, they would bring still more.
        """
        if not rows:
            self.seconds += seconds
        elif worker not in self.seen:
            self.seen.add(worker)
            self.first = seconds / rows if self.first is None else self.first
        else:
            kept = 1 - 1 / max(WINDOW, WINDOW // 2 * workers)
            self.seconds, self.rows = self.seconds * kept + seconds, self.rows * kept + rows

    @property
    def of_row(self) -> float | None:
        """Seconds; None as long as none is done."""
        return self.seconds / self.rows if self.rows else self.first


Rank: TypeAlias = tuple[int, ...]


class Ranking:
    """Workers by what they hold, the least first. Finding one costs the same however many there are.

    A heap of ranks, of which some are out of date. A worker that was given more is put in its place when it comes to the
    top; one that has finished something must be told of at once, by ``add``.
    """

    def __init__(self, rank: Callable[[int], Rank | None], workers: Iterable[int]) -> None:
        """``rank`` of a worker, with the worker's number at its end; None if it can be given nothing."""
        self.rank = rank
        self._heap: list[Rank] = []
        self._newest: dict[int, Rank] = {}
        """Each worker's rank in the heap. All others of it there count for nothing."""
        for worker in workers:
            self.add(worker)

    def add(self, worker: int) -> None:
        """A worker has come, or holds less than before."""
        rank = self.rank(worker)
        if rank is None or self._newest.get(worker) == rank:
            return
        self._newest[worker] = rank
        heapq.heappush(self._heap, rank)
        if len(self._heap) > 2 * len(self._newest) + 8:
            self._heap = sorted(self._newest.values())

    def first(self) -> Rank | None:
        """The rank of the worker that holds the least."""
        while self._heap:
            told = self._heap[0]
            worker = told[-1]
            if self._newest.get(worker) != told:
                heapq.heappop(self._heap)
            elif (rank := self.rank(worker)) == told:
                return told
            elif rank is None:
                heapq.heappop(self._heap)
                del self._newest[worker]
            else:
                self._newest[worker] = rank
                heapq.heapreplace(self._heap, rank)
        return None

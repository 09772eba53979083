"""Ids that a source declares: whether two of its rows have the same one, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from latentmill.plugin import Fragment, Source

SORT_FILES = 64
"""The hashes are sorted in so many parts, one at a time."""
CHUNK = 1 << 16


@dataclass(frozen=True)
class Twice:
    """Two rows with one id: fragment, and index in it from 0 on."""

    id: str
    first: tuple[str, int]
    second: tuple[str, int]

    def __str__(self) -> str:
        (a, i), (b, j) = self.first, self.second
        return f"id {self.id!r:.80} is there twice: row {i} of {a} and row {j} of {b}, counted from 0"


def find_twice(source: Source, fragments: Sequence[Fragment], called: Callable[[str], str] = str) -> Twice | None:
    """Two rows of ``source`` with one id, or of whose ids ``called`` makes one; None if there are none. Reads all ids once, and again
    if hashes agree.

    Of each id a hash of 8 bytes goes into a temporary file, by its upper bits; memory holds one part in 64 at a time.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(SORT_FILES)]
        for hashes in _hashes(source, fragments, called):
            part = (hashes >> np.uint64(58)).astype(np.uint8)
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(1, SORT_FILES))
            for file, piece in zip(files, np.split(hashes[order], ends)):
                file.write(piece.tobytes())
        for file in files:
            file.seek(0)
            part = np.sort(np.frombuffer(file.read(), np.uint64))
            suspects = {int(value) for value in part[1:][part[1:] == part[:-1]]}
            if suspects and (found := _same(source, fragments, called, suspects)):
                return found
    return None


def _hashes(
    source: Source, fragments: Sequence[Fragment], called: Callable[[str], str]
) -> Iterator[npt.NDArray[np.uint64]]:
    ids = (called(id) for fragment in fragments for id in source.ids(fragment) if id is not None)
    while chunk := list(islice(ids, CHUNK)):
        yield np.fromiter(map(hash, chunk), np.int64, len(chunk)).view(np.uint64)


def _same(
    source: Source, fragments: Sequence[Fragment], called: Callable[[str], str], suspects: set[int]
) -> Twice | None:
    seen: dict[str, tuple[str, int]] = {}
    for fragment in fragments:
        for index, given in enumerate(source.ids(fragment)):
            id = given if given is None else called(given)
            if id is not None and hash(id) % 2**64 in suspects:
                place = fragment.name, index
                if (first := seen.setdefault(id, place)) != place:
                    return Twice(id, first, place)
    return None

"""What all places for a dataset have in common."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, BinaryIO, ClassVar, TypeVar

from latentmill.errors import StorageError

DAY = 86_400
"""Seconds."""
Item = TypeVar("Item")
Found = TypeVar("Found")


class Storage(ABC):
    """A dataset's files by name."""

    in_flight: ClassVar[int] = 16
    """Requests that are worth making at a time."""

    def __init__(self, url: str, single_writer: bool = False) -> None:
        self.url, self.single_writer = url, single_writer

    @abstractmethod
    def aside(self, name: str) -> Any:
        """A context with a local path at which to write what ``create`` is to publish.

        Or to make a folder there, for several files. It is removed at the end.
        """

    @abstractmethod
    def create(self, name: str, content: str | bytes) -> bool:
        """Publish bytes, or the local file of that path, durably, under a name that is free. False if it is taken."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Put a small file in place whole; one of that name is replaced."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a file. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in. Raises FileNotFoundError."""

    def peek(self, name: str) -> BinaryIO:
        """The same of a file of which little is wanted, of its beginning or its end: one request for either.

        FileNotFoundError may come with the first that is read.
        """
        return self.open(name)

    def each(self, ask: Callable[[Item], Found], items: Iterable[Item], in_flight: int = 0) -> Iterator[Found]:
        """What ``ask`` says of each item, in their order: so many at a time, ``self.in_flight`` if none are given.

        It is some steps ahead of whoever takes them, and holds no more than those.
        """
        from concurrent.futures import ThreadPoolExecutor

        asked, many = iter(items), in_flight or self.in_flight
        if len(first := list(islice(asked, 2))) < 2:  # not worth a thread
            yield from map(ask, first)
            return
        left = chain(first, asked)
        with ThreadPoolExecutor(many) as threads:
            while some := list(islice(left, 16 * many)):
                yield from threads.map(ask, some)

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files right in a folder, without it; none if it is not there."""

    def holds_any(self, folder: str) -> bool:
        """Whether there is a file right in a folder."""
        return bool(self.names(folder))

    def tags(self, folder: str) -> dict[str, str]:
        """The same names, each with a text that is another once another file has the name; "" in a store that has none."""
        return dict.fromkeys(self.names(folder), "")

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name; one of that name is replaced."""

    def older(self, folder: str, seconds: float) -> list[str]:
        """Of ``names`` those of files that nobody has written for so long; none in a store that can't say."""
        return []

    def sweep(self) -> None:
        """Remove what processes that were killed left a day ago and before: younger files may be in use.

        That is what was written aside, and signs of life in ``leases/``, which whoever lives makes anew every few seconds.
        """
        for name in self.older("leases", DAY):
            if name.endswith(".alive"):
                self.delete(f"leases/{name}")

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.size(name) is not None

    def clear(self) -> None:
        """Remove all that is in it, whoever put it there."""
        raise NotImplementedError

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Of what is made here meanwhile no empty folder stays."""
        yield

    def check(self) -> None:
        """Raise StorageError unless ``create`` can keep its promise here. Leaves nothing behind."""
        if self.single_writer:
            return
        probe = f".tmp/{uuid.uuid4().hex}-probe"
        try:
            self.create(probe, b"first")  # an answer that was lost on the way, and asked for again, may be wrong
            kept = not self.create(probe, b"second") and self.read(probe) == b"first"
            why = "a second create of one name succeeded"
        except NotImplementedError as error:
            kept, why = False, str(error)
        finally:
            self.delete(probe)
        if not kept:
            raise StorageError(
                f"{self.url} can't create a file only if its name is free ({why}), on which exactly-once rests; "
                "set single_writer=true if no other driver writes there"
            )

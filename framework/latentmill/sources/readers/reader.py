"""What a reader of one kind of file can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from latentmill.plugin import RowError


class FileReader(ABC):
    """One file, and its rows by number. It is made from a path and the ``ReaderSettings``; a bad file raises ValueError.

    A row is a dict with the names of our columns, those that the file has; of pictures it has the path or the bytes. It
    has ``id``, as text, if the settings name an ``id_column``; and ``kept``, a dict, if the job keeps columns.
    """

    pictures: bool
    """Whether its rows may name pictures in other files; known once the rows are counted."""

    says_seeds: bool
    """Whether it has seeds, and reading its rows reads no pictures; known once the rows are counted."""

    @abstractmethod
    def count(self) -> int:
        """The number of its rows. Raises ValueError if the file can't be used."""

    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The names of all its columns, as the file has them."""

    @abstractmethod
    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        """The types of the columns ``names``, of those that the file has. The job keeps these columns."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start`` to ``stop``, in order. A row that can't be read is a RowError in its place."""

    def texts(self, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """The rows up to ``stop``. Only their prompts and negative prompts are looked at."""
        return self.read(0, stop)

    def ids(self) -> Iterator[str | None]:
        """The ids of all rows, in order; None for a row that has no good one."""
        return (None if isinstance(row, RowError) else row["id"] for row in self.read(0, self.count()))

    def ends(self, rows: int) -> Sequence[int]:
        """Bytes, ascending, behind which the file may have ended when it had so many rows; none if rows can't be added to its end."""
        return ()

    @abstractmethod
    def notices(self) -> Iterator[str]:
        """What people should know about the file, a line each. Asked once the rows are counted."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open of the file."""

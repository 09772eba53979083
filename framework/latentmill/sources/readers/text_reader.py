"""Rows of text files by number: marks say which row starts where. What a row is, the kinds of text files say."""

from __future__ import annotations

import codecs
import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from latentmill.plugin import RowError
from latentmill.sources.files import SourceFile
from latentmill.sources.kept import types_of_values
from latentmill.sources.readers.reader import FileReader
from latentmill.sources.readers.settings import ReaderSettings
from latentmill.sources.text import READ_BYTES, Lines, TextFile, count_lines, is_blank, is_utf8, loose

LONGEST = 16 << 20
"""Bytes in which a quote of a CSV file must be closed, and beyond which a row of JSON is not waited for."""


class TextReader(FileReader):
    """A text file. A row is a line that is not blank, if the kind of file says nothing else.

    Marks every few hundred kilobytes say which row starts where. So counting is one pass, without looking into the rows;
    and reading from the middle doesn't start at the top again. A file that has to be unpacked or decoded has no marks:
    then reading on is all that is fast.

    A kind of file says how its rows are parsed (``parse``), and where they begin (``begin``). If they are no lines, it
    says how they are found (``items``), and how they are counted (``rows_in`` or ``measure``).
    """

    MARK = 1 << 19
    """Bytes from one mark to the next, or somewhat more."""

    pictures = says_seeds = False
    names: Sequence[str] = ()
    """The names of its columns."""

    def __init__(self, path: SourceFile, settings: ReaderSettings) -> None:
        self.path, self.settings = path, settings
        self.file = TextFile(path, settings.encoding)
        self.marked = self.file.plain
        self.whole = self.broken = False
        self._reading: tuple[int, Lines, Iterator[Any]] | None = None
        with self.file.open() as opened:
            lines = Lines(opened)
            self.begin(lines)
            self.rows, self.places = [0], [(lines.offset, lines.number)]

    # ------------------------------------------------------------------------------------- what a kind of file says

    def begin(self, lines: Lines) -> None:
        """Read what comes before the rows. Raises ValueError if the file can't be used."""

    def look(self, chunk: bytes) -> None:
        """Note what must be known of the file before its rows are read. It is given all of the file."""

    def rows_in(self, chunk: bytes, lines: Lines) -> int:
        """The number of rows in whole lines, which were read from ``lines``. It may read on, or put some back."""
        return count_lines(chunk)

    def items(self, lines: Lines) -> Iterator[Any]:
        """The rows from here on, not parsed yet."""
        return (line for line in lines if not is_blank(loose(line)))

    @abstractmethod
    def parse(self, item: Any) -> dict[str, Any]:
        """The row that an item is. Raises RowError."""

    def measure(self, lines: Lines) -> int:
        """Read on, to the end of a row, and say how many rows that was."""
        chunk = lines.chunk(self.MARK)
        self.look(chunk)
        if not self.broken and self.file.encoding == "utf-8" and not chunk.isascii():
            self.broken = not is_utf8(chunk)
        return self.rows_in(chunk, lines)

    # ------------------------------------------------------------------------------------------ what a reader can do

    def count(self) -> int:
        if not self.whole:
            if not self.marked:
                del self.rows[1:], self.places[1:]
            lines = self._open(len(self.rows) - 1)
            with lines.file:
                while not self.whole:
                    self._mark(lines)
        return self.rows[-1]

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        row, lines, items = self._at(start)
        for item in islice(items, start - row, stop - row):
            try:
                yield self.parse(item)
            except RowError as error:
                yield error
        self.close()
        self._reading = stop, lines, items

    def ends(self, rows: int) -> Sequence[int]:
        if not self.marked or not rows:
            return ()
        row, lines, items = self._at(rows - 1)
        with lines.file:
            if sum(1 for _ in islice(items, rows - row)) < rows - row:
                return ()
            found = {lines.offset}
            while is_blank(loose(line := lines.line())) and line:  # it may have ended with some
                found.add(lines.offset)
        with self.file.open() as opened:
            if self.settings.encoding is None and not _are_utf8(opened, max(found)):
                return ()  # alone it may have been taken for another encoding
            return sorted(end - less for end in found for less in range(1 + _end_of_line(opened, end)))

    def columns(self) -> Sequence[str]:
        return self.names

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        return iter(types_of_values(self.path, names, self._kept_rows()).items())

    def _kept_rows(self) -> Iterator[dict[str, Any]]:
        return (row["kept"] for row in self.read(0, self.count()) if not isinstance(row, RowError) and "kept" in row)

    def notices(self) -> Iterator[str]:
        yield from self.file.notices()
        if self.broken:
            yield "lines that are not UTF-8 will be error rows: if it is another encoding, source.encoding=NAME names it"

    def close(self) -> None:
        if self._reading is not None:
            self._reading[1].file.close()
            self._reading = None

    def _at(self, start: int) -> tuple[int, Lines, Iterator[Any]]:
        """A row, ``start`` or one before it, and the lines and items from there on."""
        if self._reading is not None:
            row = self._reading[0]
            if row == start or (row < start and not self.marked):
                reading, self._reading = self._reading, None
                return reading
        if self.marked and not self.whole and self.rows[-1] <= start:
            lines = self._open(len(self.rows) - 1)
            with lines.file:
                while not self.whole and self.rows[-1] <= start:
                    self._mark(lines)
        at = bisect_right(self.rows, start) - 1 if self.marked else 0
        lines = self._open(at)
        return self.rows[at], lines, self.items(lines)

    def _open(self, mark: int) -> Lines:
        """The file's lines from a mark on."""
        opened = self.file.open()
        if self.marked:
            offset, number = self.places[mark]
            opened.seek(offset)
            return Lines(opened, offset, number)
        lines = Lines(opened)
        self.begin(lines)
        return lines

    def _mark(self, lines: Lines) -> None:
        rows = self.measure(lines)
        self.whole = lines.offset == self.places[-1][0]
        if not self.whole:
            self.rows.append(self.rows[-1] + rows)
            self.places.append((lines.offset, lines.number))


def _are_utf8(opened: BinaryIO, size: int) -> bool:
    """Whether so many bytes of a file are, from its start on."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while size > 0 and (piece := opened.read(min(size, READ_BYTES))):
            decoder.decode(piece)
            size -= len(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _end_of_line(opened: BinaryIO, end: int) -> int:
    """Of how many bytes the end of the line is that ends there: it may have come later than the line. 0 if the file ends, and the line doesn't."""
    opened.seek(max(0, end - 2))
    last = opened.read(min(2, end))
    return 2 if last == b"\r\n" else int(last.endswith(b"\n"))


def is_json(text: str) -> bool:
    """Whether the text is one whole value of JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

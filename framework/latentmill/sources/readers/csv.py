"""CSV and TSV: a header, then a row in each record."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from latentmill.fields import parse_text
from latentmill.plugin import RowError
from latentmill.sources import as_id
from latentmill.sources.files import SourceFile
from latentmill.sources.kept import require_once, types_of_texts
from latentmill.sources.readers.names import listed
from latentmill.sources.readers.text_reader import LONGEST, TextReader
from latentmill.sources.text import BOM, Lines, count_lines, is_blank, loose, strict

csv.field_size_limit(max(csv.field_size_limit(), 2 * LONGEST))  # the module's own, 131,072, would part a longer cell


class CSVReader(TextReader):
    """CSV, or another separator that the header shows. Quotes are as RFC 4180 has them, and a stray one costs its row."""

    separators = ",;\t|"

    def begin(self, lines: Lines) -> None:
        self.separator = self.separators[0]
        first = self._line(lines)
        self.header: list[str] = []
        if declared := re.fullmatch(r"sep=(.)\s*", loose(first)):  # Excel's
            self.separator = declared[1]
        else:
            lines.unread([first])
            self.separator = max(self.separators, key=lambda separator: self._score(first, separator))
        header = self._record(lines)
        if isinstance(header, RowError):
            raise ValueError(f"{self.path}: the header can't be read: {header}")
        self.header = header or []
        self.names = [_name(self.path, name.strip()) for name in self.header]
        self.pictures = not self.settings.pictures.isdisjoint(self.names)
        self.settings.require(self.path, self.names)
        id_column = self.settings.id_column
        if id_column is not None and self.names.count(id_column) != 1:
            raise ValueError(f"{self.path} has no one column {id_column} (id_column), only {listed(self.names)}")
        self.says_seeds = self.settings.column_of.get("seed") in self.names
        wanted = {"id": id_column, **self.settings.column_of}
        self.wanted = [(name, self.names.index(column)) for name, column in wanted.items() if column in self.names]

    def rows_in(self, chunk: bytes, lines: Lines) -> int:
        quick = self._quick(chunk)
        if quick is not None:
            return quick
        lines.unread(io.BytesIO(chunk).readlines())
        rows = 0
        while lines.pending and self._record(lines) is not None:
            rows += 1
        return rows

    def items(self, lines: Lines) -> Iterator[Any]:
        return iter(lambda: self._record(lines), None)

    def parse(self, item: list[str] | RowError) -> dict[str, Any]:
        if isinstance(item, RowError):
            raise item
        if len(item) != len(self.header):
            quotes = ": text with a comma needs quotes" if len(self.header) == 1 else ""
            raise RowError(f"the row has {len(item)} fields, the header {len(self.header)}{quotes}")
        if item == self.header:
            raise RowError("the header once more: are these several files in one?")
        row: dict[str, Any] = {}
        for name, at in self.wanted:
            text = strict(item[at], "the id" if name == "id" else name)
            if name == "id":
                row[name] = as_id(text)
            elif text or name == "prompt":
                row[name] = text if (field := self.settings.known[name]) is None else parse_text(field, text)
        if self.settings.kept:
            places = [(column, self.names.index(column)) for column in self.settings.kept if column in self.names]
            row["kept"] = {column: strict(item[at], column) or None for column, at in places}
        return row

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        require_once(self.path, self.names, names)
        return iter(types_of_texts(self._kept_rows()).items())

    def notices(self) -> Iterator[str]:
        yield from super().notices()
        if self.separator != self.separators[0]:
            yield f"columns are parted by {_SPELT.get(self.separator, self.separator)}"
        yield from self.settings.notices(self.names)

    def _score(self, header: bytes, separator: str) -> int:
        """How many columns that a source could mean a header names, if this is the separator."""
        try:
            names = [name.strip() for name in _split([loose(header)], separator)]
        except csv.Error:
            return 0
        return self.settings.recognized(names)

    def _line(self, lines: Lines) -> bytes:
        """The next line that is not blank, without a byte order mark; nothing at the end."""
        for line in lines:
            if not is_blank(loose(self._cells(line))):
                return line.removeprefix(BOM)
        return b""

    def _cells(self, text: bytes) -> bytes:
        """Lines in which tabs between empty cells are no white space."""
        return text.replace(b"\t", b",") if self.separator == "\t" else text

    def _record(self, lines: Lines) -> list[str] | RowError | None:
        """The next row; None at the end. A row whose quotes are wrong ends with its first line: the next row is the next line."""
        first = self._line(lines)
        if not first:
            return None
        began, taken = lines.number, [first]

        def text() -> Iterator[str]:
            size = 0
            while taken[-1]:
                yield loose(taken[-1])
                size += len(taken[-1])
                if size > LONGEST:
                    raise ValueError(
                        f"{self.path}: line {began} has a quote that is not closed within {LONGEST >> 20} MiB:"
                        ' close it, or double it ("") if the text has it'
                    )
                taken.append(lines.line())

        try:
            return _split(text(), self.separator)
        except csv.Error as error:
            said = str(error).partition(" - ")[0]
        lines.unread(line for line in taken[1:] if line)
        if not taken[-1]:
            return RowError(f"a quote that is never closed, from line {began} on")
        if len(taken) > 1:
            return RowError(f"a quote that is not closed in its cell, from line {began} on")
        return RowError(
            'a quote within a quoted cell must be doubled ("")' if "expected after" in said else f"not CSV: {said}"
        )

    def _quick(self, chunk: bytes) -> int | None:
        """The number of rows in whole lines, faster than by ``_record``; None if it could be another."""
        if b"\r" in chunk and b"\r" in chunk.replace(b"\r\n", b""):  # alone it is an error in one row
            return None
        if b'"' not in chunk:
            return count_lines(self._cells(chunk))
        if BOM in chunk:
            return None
        rows = 0
        try:
            for record in csv.reader(loose(chunk).split("\n"), delimiter=self.separator, strict=True):
                if len(record) == 1 and is_blank(record[0]):  # an empty cell in quotes is a row, a blank line is none
                    return None
                rows += bool(record)
        except csv.Error:
            return None
        return rows


class TSVReader(CSVReader):
    """TSV, or another separator that the header shows."""

    separators = "\t,;|"


_SPELT = {"\t": "tabs", ";": "semicolons", ",": "commas"}


def _split(lines: Iterable[str], separator: str) -> list[str]:
    """The first record. Raises csv.Error."""
    return next(csv.reader(lines, delimiter=separator, strict=True))


def _name(path: SourceFile, name: str) -> str:
    """The name of a column. Raises ValueError if it is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: the header is not UTF-8") from None
    return name

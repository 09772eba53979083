"""Prompts, and whatever else a row may override, from text, CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from latentmill.plugin import Fragment, RowError, Source
from latentmill.sources import ParquetRows, as_id, find, fingerprint, is_small, is_text, locate, plain, root, shown
from latentmill.sources.images import MAX_PIXELS, Pixels, decode, read_picture

TEXTS = ("prompt", "negative_prompt", "scheduler")
WHOLE = ("seed", "steps", "width", "height")
REAL = ("guidance_scale", "guidance_rescale", "guidance_from", "guidance_until", "strength")
PICTURES = ("image", "mask")
COLUMNS = (*TEXTS, *WHOLE, *REAL, *PICTURES)
"""The columns that mean something. Pictures are paths below the file's folder; in Parquet they may be bytes as well."""


class Prompts(Source):
    """Rows of ``.txt``, ``.csv``, ``.jsonl`` and ``.parquet`` files, each file a fragment.

    A line of text is a prompt, without the white space around it; blank lines are no rows, in text, CSV and JSON lines
    alike. An empty field of a CSV file stands for the job's value, but an empty prompt is an empty prompt; null is the
    job's value everywhere except in ``prompt``, where it is an error. A table must have a ``prompt`` or an ``image``.
    ``max_pixels`` and ``follow_links`` are for pictures, as in the source ``images``. ``id_column`` names the column, of
    text or whole numbers, that tells the rows apart.
    """

    def __init__(
        self, path: str, max_pixels: int = MAX_PIXELS, follow_links: bool = False, id_column: str | None = None
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, not {max_pixels}")
        self.path, self.max_pixels, self.follow_links, self.id_column = path, max_pixels, follow_links, id_column
        self._files: dict[str, _File] = {}

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if nothing is there, a file can't be read as what it is called, or a column is missing."""
        names = find(self.path, FORMATS)
        contents = is_small(self._root, names)
        found = [Fragment(name, self._file(name).count(), fingerprint(self._root, [name], contents)) for name in names]
        if not any(fragment.rows for fragment in found):
            raise ValueError(f"{self.path} has no rows")
        return found

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        file = self._file(fragment)
        for row in file.read(start, stop):
            if isinstance(row, RowError):
                yield row
                continue
            try:
                yield self._row(row, (self._root / fragment).parent)
            except RowError as error:
                yield error

    def ids(self, fragment: Fragment) -> Iterator[str | None]:
        return self._file(fragment.name).ids()

    def reads_from(self, folder: str) -> bool:
        return locate(self.path).is_dir() and Path(folder).resolve() == locate(self.path).resolve()

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        file = self._file(fragment.name)
        told = file.texts() if isinstance(file, _Parquet) else file.read(0, fragment.rows)
        for row in told:
            found = ((None if isinstance(row, RowError) else row.get(name)) for name in ("prompt", "negative_prompt"))
            prompt, negative = (text if isinstance(text, str) else None for text in found)
            yield prompt, negative

    @cached_property
    def _root(self) -> Path:
        return root(self.path)

    def _file(self, name: str) -> _File:
        if name not in self._files:
            self._files.clear()  # one file's marks, or its footer and a row group, are enough to keep
            self._files[name] = FORMATS[os.path.splitext(name)[1].lower()](self._root / name, self.id_column)
        return self._files[name]

    def _row(self, row: dict[str, Any], folder: Path) -> Mapping[str, Any]:
        if "prompt" in row and row["prompt"] is None:
            raise RowError("prompt is null")
        if "prompt" not in row and row.get("image") is None:
            raise RowError("the row has neither prompt nor image")
        for name in PICTURES:
            if row.get(name) is not None:
                row[name] = self._picture(name, row[name], folder)
        return row

    def _picture(self, name: str, value: Any, folder: Path) -> Pixels:
        if isinstance(value, Mapping):  # as Hugging Face datasets stores pictures
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            try:
                return read_picture(folder, value, self.max_pixels, self.follow_links)
            except RowError as error:
                raise RowError(f"{name} {value!r}: {error}") from error
        if isinstance(value, bytes):
            try:
                return decode(value, self.max_pixels)
            except RowError as error:
                raise RowError(f"{name}: {error}") from error
        raise RowError(f"{name} must be a path, not {value!r:.80}")


class _File(Protocol):
    def count(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]: ...

    def ids(self) -> Iterator[str | None]: ...


class _Lines:
    """A text file, a row a line. Marks every few hundred kilobytes say which row starts where.

    So counting is one pass, without looking into the rows; and reading from the middle doesn't start at the top again.
    """

    MARK = 1 << 19

    def __init__(self, path: Path, id_column: str | None = None) -> None:
        self.path, self.id_column = path, id_column
        with path.open("rb") as file:
            start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(start)
            self.begin(file)
            self.rows, self.offsets = [0], [file.tell()]
        self.whole = False

    def begin(self, file: BinaryIO) -> None:
        """Read what comes before the rows."""
        if self.id_column is not None:
            raise ValueError(f"{self.path}: lines of text have no columns, and id_column is {self.id_column}")

    def measure(self, file: BinaryIO) -> int:
        """Read on, to the end of a row, and say how many rows that was."""
        return _count_lines(file.read(self.MARK) + file.readline())

    def items(self, file: BinaryIO) -> Iterator[Any]:
        """The rows from here on, not looked into yet."""
        return (line for line in file if line.strip())

    def parse(self, item: Any) -> dict[str, Any]:
        """Raises RowError."""
        return {"prompt": _text(item).strip()}

    def count(self) -> int:
        with self.path.open("rb") as file:
            while not self.whole:
                self._mark(file)
        return self.rows[-1]

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        with self.path.open("rb") as file:
            while not self.whole and self.rows[-1] <= start:
                self._mark(file)
            at = bisect_right(self.rows, start) - 1
            file.seek(self.offsets[at])
            for item in islice(self.items(file), start - self.rows[at], stop - self.rows[at]):
                try:
                    yield self.parse(item)
                except RowError as error:
                    yield error

    def ids(self) -> Iterator[str | None]:
        return (None if isinstance(row, RowError) else row["id"] for row in self.read(0, self.count()))

    def _mark(self, file: BinaryIO) -> None:
        file.seek(self.offsets[-1])
        rows = self.measure(file)
        self.whole = file.tell() == self.offsets[-1]
        if not self.whole:
            self.rows.append(self.rows[-1] + rows)
            self.offsets.append(file.tell())


class _JSONLines(_Lines):
    def begin(self, file: BinaryIO) -> None:
        pass

    def parse(self, item: bytes) -> dict[str, Any]:
        text = _text(item).rstrip("\r\n")
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise RowError(f"not JSON: {error.msg} at character {error.pos}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
            raise RowError(f"not JSON that can be read: {error}") from error
        if not isinstance(row, dict):
            raise RowError("the line is JSON, but no object in braces")
        kept = {name: row[name] for name in COLUMNS if name in row}
        return kept if self.id_column is None else {**kept, "id": as_id(row.get(self.id_column))}


class _CSV(_Lines):
    def begin(self, file: BinaryIO) -> None:
        header = next(_records(file), [])
        if isinstance(header, csv.Error):
            raise ValueError(f"{self.path}: the header can't be read: {header}")
        self.header = [_name(self.path, name.strip()) for name in header]
        _require_columns(self.path, self.header)
        if twice := [name for name in COLUMNS if self.header.count(name) > 1]:
            raise ValueError(f"{self.path}: there are two columns {twice[0]}")
        if self.id_column is not None and self.header.count(self.id_column) != 1:
            there = f"only {', '.join(self.header)[:200]}"
            raise ValueError(f"{self.path} has no one column {self.id_column} (id_column), {there}")

    def measure(self, file: BinaryIO) -> int:
        start = file.tell()
        chunk = file.read(self.MARK) + file.readline()
        if b'"' not in chunk and b"\r" not in chunk.replace(b"\r\n", b""):
            return _count_lines(chunk)
        end = file.tell()
        file.seek(start)
        rows = 0
        for _ in self.items(file):  # between quotes a record goes on over the end of a line, and a lone CR is an error
            rows += 1
            if file.tell() >= end:
                break
        return rows

    def items(self, file: BinaryIO) -> Iterator[Any]:
        return _records(file)

    def parse(self, item: list[str] | csv.Error) -> dict[str, Any]:
        if isinstance(item, csv.Error):
            raise RowError(f"not CSV: {item}")
        if len(item) != len(self.header):
            raise RowError(f"the row has {len(item)} fields, the header {len(self.header)}")
        row: dict[str, Any] = {}
        for name, text in zip(self.header, item):
            if name == self.id_column:
                row["id"] = as_id(_text(text.encode("utf-8", "surrogateescape"), "the id"))
            if name in COLUMNS and (text or name == "prompt"):
                text = _text(text.encode("utf-8", "surrogateescape"), name)
                row[name] = text if name in (*TEXTS, *PICTURES) else _number(name, text)
        return row


class _Parquet:
    """A Parquet file."""

    def __init__(self, path: Path, id_column: str | None = None) -> None:
        self.table, self.id_column = ParquetRows(path), id_column
        names = self.table.schema.names
        _require_columns(path, names)
        if twice := [name for name in (*COLUMNS, id_column) if names.count(name) > 1]:
            raise ValueError(f"{path}: there are two columns {twice[0]}")
        self.columns = [name for name in COLUMNS if name in self.table.schema.names]
        for name in self.columns:
            type = self.table.schema.field(name).type
            if not any(fits(type) for fits in _TYPES[name]):
                raise ValueError(f"{path}: column {name} is {type}, which it can't be")
        self.table.require_ids(id_column)

    def count(self) -> int:
        return self.table.rows

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        also = [] if self.id_column is None or self.id_column in self.columns else [self.id_column]
        for piece in self.table.read(start, stop, [*self.columns, *also]):
            yield from piece if isinstance(piece, list) else self._rows(piece, also)

    def _rows(self, table: pa.Table, also: list[str]) -> Iterator[dict[str, Any] | RowError]:
        columns = {name: plain(table.column(name)) for name in [*self.columns, *also]}
        for i in range(len(table)):
            row: dict[str, Any] = {}
            try:
                for name, column in columns.items():
                    value = column[i].as_py()
                    text = is_text(table.schema.field(name).type)
                    row[name] = _text(value, name) if text and value is not None else value
                if self.id_column is not None:
                    row["id"] = as_id(row[self.id_column])
                    for name in also:
                        del row[name]
                yield row
            except RowError as error:
                yield error

    def texts(self) -> Iterator[dict[str, Any] | RowError]:
        """The rows, of their text columns alone."""
        columns = [name for name in self.columns if name in ("prompt", "negative_prompt")]
        for piece in self.table.read(0, self.table.rows, columns):
            yield from piece if isinstance(piece, list) else _texts(piece)

    def ids(self) -> Iterator[str | None]:
        assert self.id_column is not None
        return self.table.ids(self.id_column)


def _texts(table: pa.Table) -> Iterator[dict[str, Any]]:
    columns = {name: plain(table.column(name)).to_pylist() for name in table.column_names}
    for i in range(len(table)):
        yield {name: value[i] and value[i].decode("utf-8", "replace") for name, value in columns.items()}


FORMATS: Mapping[str, type[_Lines | _Parquet]] = {
    ".txt": _Lines,
    ".csv": _CSV,
    ".jsonl": _JSONLines,
    ".parquet": _Parquet,
}


def _is_binary(type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type))


def _is_picture(type: pa.DataType) -> bool:
    return bool(pa.types.is_struct(type) and {field.name for field in type} >= {"bytes", "path"})


_TYPES: dict[str, Sequence[Any]] = {
    **{name: (is_text,) for name in TEXTS},
    **{name: (pa.types.is_integer, pa.types.is_floating, pa.types.is_null) for name in (*WHOLE, *REAL)},
    **{name: (is_text, _is_binary, _is_picture) for name in PICTURES},
}


def _require_columns(path: Path, names: Sequence[str]) -> None:
    if not {"prompt", "image"} & set(names):
        there = f"only {shown(', '.join(names)[:200])}" if any(names) else "none"
        raise ValueError(f"{path} has no column prompt or image, {there}")


def _name(path: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: the header is not UTF-8") from None
    return name


def _count_lines(chunk: bytes) -> int:
    return sum(map(bool, map(bytes.strip, chunk.split(b"\n"))))


def _records(file: BinaryIO) -> Iterator[list[str] | csv.Error]:
    reader = csv.reader(line.decode("utf-8", "surrogateescape") for line in file)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error
            continue
        # Blank is what bytes.strip() finds blank, as in _count_lines: the two must count alike.
        if len(record) > 1 or (record and record[0].strip(" \t\n\r\x0b\x0c")):
            yield record


def _text(text: bytes, name: str = "the line") -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"{name} is not UTF-8, at byte {error.start}") from error


def _number(name: str, text: str) -> int | float | None:
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise RowError(f"{name} must be a number, not {text!r:.80}") from error

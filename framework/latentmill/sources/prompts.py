"""Prompts, and whatever else a row may override, from text, CSV, JSON and Parquet."""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from latentmill.columns import unified
from latentmill.fields import FROM_SOURCE, PICTURES, parse_text, python_type
from latentmill.plugin import Fragment, RowError, RowField, Source
from latentmill.sources import (
    ParquetRows,
    as_id,
    changed,
    find,
    fingerprint,
    is_small,
    is_text,
    locate,
    plain,
    root,
    suffix,
)
from latentmill.sources.kept import guess_types, rows_kept, type_of_texts, type_of_values
from latentmill.sources.pictures import MAX_PIXELS, Pixels, decode, read_picture
from latentmill.sources.text import BOM, READ_BYTES, Lines, TextFile, count_lines, is_blank, is_utf8, loose, strict
from latentmill.text import escaped

COLUMNS: Mapping[str, RowField | None] = {
    **{field.name: field for field in FROM_SOURCE if field.name != "warning"},
    **dict.fromkeys(PICTURES),
}
"""The columns that mean something. Pictures are paths below the file's folder; in Parquet they may be bytes as well."""

LIKE = {**{field.name: field.also for field in FROM_SOURCE}, **PICTURES}
"""What other tools call the columns. Such a column is named to people, and never taken for ours."""

PEEK = 1000
"""Rows of JSON whose keys are looked at before a job starts: each row may have others."""

TWINS = 100_000
"""Rows that are looked at, before a job starts, for two that will be the same picture."""

LONGEST = 16 << 20
"""Bytes in which a quote of a CSV file must be closed."""

csv.field_size_limit(max(csv.field_size_limit(), 2 * LONGEST))  # the module's own, 131,072, would part a longer cell


class Prompts(Source):
    """Rows of ``.txt``, ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` and ``.parquet`` files, each file a fragment.

    A line of text is a prompt, without the white space around it; blank lines are no rows, in text, CSV and JSON lines
    alike. An empty field of a CSV file stands for the job's value, but an empty prompt is an empty prompt; null is the
    job's value everywhere except in ``prompt``, where it is an error. A table must have a ``prompt`` or an ``image``.

    ``max_pixels`` and ``follow_links`` are for pictures, as in the source ``images``. ``id_column`` names the column, of
    text or whole numbers, that tells the rows apart; the job's ``source.keep`` names columns that travel. ``columns`` says what the file calls a column of ours:
    ``{prompt: caption}``. ``encoding`` is that of all text files; without it they are UTF-8, UTF-16, or else cp1252.
    """

    contract = 2

    def __init__(
        self,
        path: str,
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
        id_column: str | None = None,
        columns: Mapping[str, str] | None = None,
        encoding: str | None = None,
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, not {max_pixels}")
        self.path, self.max_pixels, self.follow_links, self.id_column = path, max_pixels, follow_links, id_column
        self._given, self._encoding = _checked({} if columns is None else columns), _known(encoding)
        self._files: dict[str, _File] = {}
        self._said: dict[str, list[str]] = {}

    def columns(self) -> list[str]:
        """Of all files; of JSON, all keys that there are."""
        found = (self._file(name).columns() for name in find(self.path, READERS))
        return list(dict.fromkeys(name for names in found for name in self._table.unused(names)))

    def column_types(self, names: Sequence[str]) -> pa.Schema:
        """Those that a Parquet file says; of text, those that all values have: whole numbers, numbers, bools, or text."""
        self.kept = pa.schema([(name, pa.null()) for name in names])
        files = find(self.path, READERS)
        return unified((file, name, type) for file in files for name, type in self._file(file).types(names))

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if nothing is there, a file can't be read as what it is called, or a column is missing."""
        names = find(self.path, READERS)
        contents = is_small(self._root, names)
        found, pictures = [], False
        self._said.clear()
        for name in names:
            file = self._file(name)
            found.append(Fragment(name, file.count(), fingerprint(self._root, [name], contents)))
            pictures = pictures or file.pictures
            for line in file.notices():
                self._said.setdefault(line, []).append(name)
        # Elsewhere other pictures may lie beside the file, of which no fingerprint knows.
        self.fingerprinted = ("path",) if contents and not pictures else ()
        if not any(fragment.rows for fragment in found):
            raise ValueError(f"{self.path} has no rows")
        if twins := self._twins(found):
            self._said[twins] = []
        return found

    def notices(self) -> list[str]:
        def which(names: Sequence[str]) -> str:
            more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
            return f"{escaped(names[0])}{more}: " if names else ""

        return [f"source prompts: {which(names)}{line}" for line, names in self._said.items()]

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

    def changed(self, fragment: Fragment) -> bool:
        return changed(self._root, [fragment.name], fragment.fingerprint)

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

    @cached_property
    def _table(self) -> _Columns:
        known = {**COLUMNS, **{field.name: field for field in self.job_fields}}
        if wrong := [name for name in self._given if name not in known]:
            raise ValueError(f"columns: {wrong[0]} is no column of ours; there are: {', '.join(known)}")
        return _Columns(self._given, self.id_column, self._encoding, known, self)

    def _file(self, name: str) -> _File:
        if name not in self._files:
            for file in self._files.values():
                file.close()
            self._files.clear()  # one file's marks, or its footer and a row group, are enough to keep
            self._files[name] = READERS[suffix(name)](self._root / name, self._table)
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

    def _twins(self, fragments: Sequence[Fragment]) -> str | None:
        """How many rows repeat another's prompt, seed and all else, and so its picture."""
        seen: set[bytes] = set()
        looked = twins = 0
        for fragment in fragments:
            file = self._file(fragment.name)
            if not file.says_seeds:
                continue
            for row in file.read(0, min(fragment.rows, TWINS - looked)):
                looked += 1
                if isinstance(row, RowError) or row.get("seed") in (None, -1):
                    continue
                row.pop("id", None)
                row.pop("kept", None)
                key = hashlib.blake2b(repr(sorted(row.items())).encode("utf-8", "replace"), digest_size=8).digest()
                twins += key in seen
                seen.add(key)
            if looked == TWINS:
                break
        if not twins:
            return None
        among = f"the first {looked:,} rows" if looked == TWINS else f"{looked:,} rows"
        return f"{twins:,} of {among} have prompt, seed and all else of a row before them, and will be the same picture"


@dataclass(frozen=True)
class _Columns:
    """What the source's settings say of all its files."""

    given: Mapping[str, str]
    id_column: str | None
    encoding: str | None
    known: Mapping[str, RowField | None]
    """Our columns, and those of the job's plugins."""
    source: Source

    @property
    def kept(self) -> list[str]:
        """The columns that travel as they are."""
        return list(self.source.kept.names)

    @cached_property
    def theirs(self) -> dict[str, str]:
        """Each column of ours, and what the files call it."""
        return {name: self.given.get(name, name) for name in self.known if name in self.given or name not in self.taken}

    @cached_property
    def pictures(self) -> set[str]:
        """What the files call our columns of pictures."""
        return {column for name, column in self.theirs.items() if name in PICTURES}

    @cached_property
    def taken(self) -> set[str]:
        return set(self.given.values())

    def require(self, path: Path, names: Sequence[str], rows: str = "") -> None:
        """Raise ValueError if a table with columns of these names can't be used."""
        where = f"{path} has no column"
        there = f"{rows}, only {_list(names)}" if any(names) else f"{rows}, none"
        if lost := [name for name in self.given.values() if name not in names]:
            raise ValueError(f"{where} {lost[0]} (source.columns){there}")
        if not {self.theirs.get("prompt"), self.theirs.get("image")} & {*names}:
            like = self.like(names)
            hint = f"; write {like}" if like else ""
            if not like and path.name.lower().endswith((".csv", ".tsv")):
                hint = "; its first line must name the columns"
            raise ValueError(f"{where} prompt or image{there}{hint}")
        if twice := [name for name in (*self.theirs.values(), *self.kept) if names.count(name) > 1]:
            raise ValueError(f"{path}: there are two columns {twice[0]}")

    def unused(self, names: Iterable[str]) -> list[str]:
        used = {*self.theirs.values(), *self.kept, self.id_column, ""}
        return [name for name in names if name not in used]

    def like(self, names: Sequence[str]) -> str:
        """The setting that would take columns with other tools' names for ours; nothing if there are none."""
        free = self.unused(names)
        found = {}
        for name in self.known:
            if self.theirs.get(name, name) not in names:
                for other in (name, *LIKE.get(name, "").split()):
                    if match := [column for column in free if _bare(column) == _bare(other)]:
                        found[name] = match[0]
                        break
                else:
                    if match := difflib.get_close_matches(_bare(name), map(_bare, free), n=1, cutoff=0.8):
                        found[name] = next(column for column in free if _bare(column) == match[0])
        return (
            f"source.columns={{{', '.join(f'{name}: {escaped(column)}' for name, column in found.items())}}}"
            if found
            else ""
        )

    def notices(self, names: Sequence[str], rows: str = "") -> Iterator[str]:
        if unused := self.unused(names):
            like = self.like(names)
            yield f"columns not used{rows}: {_list(unused)}" + (f" (did you mean {like}?)" if like else "")


class _File(Protocol):
    pictures: bool
    """Whether its rows may name pictures in other files; known once they are counted."""

    says_seeds: bool
    """Whether it has seeds, and reading its rows reads no pictures."""

    def count(self) -> int: ...

    def columns(self) -> Sequence[str]:
        """The names of all its columns."""
        ...

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        """The types of those of the columns that it has. The source keeps them."""
        ...

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]: ...

    def ids(self) -> Iterator[str | None]: ...

    def notices(self) -> Iterator[str]:
        """What there is to say of it, once its rows are counted."""
        ...

    def close(self) -> None: ...


class _Text:
    """A text file, a row a line. Marks every few hundred kilobytes say which row starts where.

    So counting is one pass, without looking into the rows; and reading from the middle doesn't start at the top again,
    unless the file has to be unpacked: then reading on is all that is fast.
    """

    MARK = 1 << 19

    pictures = says_seeds = False
    names: Sequence[str] = ()
    first = b""
    said = staticmethod(type_of_values)
    """The type of a column's values."""

    def __init__(self, path: Path, table: _Columns) -> None:
        self.path, self.table = path, table
        self.file = TextFile(path, table.encoding)
        self.marked = self.file.plain
        self.whole = self.broken = False
        self._reading: tuple[int, Lines, Iterator[Any]] | None = None
        with self.file.open() as opened:
            lines = Lines(opened)
            self.begin(lines)
            self.rows, self.places = [0], [(lines.offset, lines.number)]

    def begin(self, lines: Lines) -> None:
        """Read what comes before the rows."""
        if self.table.id_column is not None:
            raise ValueError(f"{self.path}: lines of text have no columns, and id_column is {self.table.id_column}")
        if self.table.given:
            raise ValueError(f"{self.path}: lines of text have no columns, and source.columns names some")
        self.first = next(self.items(lines), b"")
        lines.unread([self.first] if self.first else [])

    def measure(self, lines: Lines) -> int:
        """Read on, to the end of a row, and say how many rows that was."""
        chunk = lines.chunk(self.MARK)
        self.look(chunk)
        if not self.broken and self.file.encoding == "utf-8" and not chunk.isascii():
            self.broken = not is_utf8(chunk)
        return count_lines(chunk)

    def look(self, chunk: bytes) -> None:
        """Note what is to be known of a file before its rows are."""

    def items(self, lines: Lines) -> Iterator[Any]:
        """The rows from here on, not looked into yet."""
        return (line for line in lines if not is_blank(loose(line)))

    def parse(self, item: Any) -> dict[str, Any]:
        """Raises RowError."""
        return {"prompt": strict(item, "the line").strip().removeprefix("\ufeff").strip()}

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

    def ids(self) -> Iterator[str | None]:
        return (None if isinstance(row, RowError) else row["id"] for row in self.read(0, self.count()))

    def columns(self) -> Sequence[str]:
        return self.names

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        rows = (row["kept"] for row in self.read(0, self.count()) if not isinstance(row, RowError) and "kept" in row)
        return iter(guess_types(self.path, names, rows, self.said).items())

    def notices(self) -> Iterator[str]:
        yield from self.file.notices()
        if self.broken:
            yield "lines that are not UTF-8 will be error rows: if it is another encoding, source.encoding=NAME names it"
        first = loose(self.first).strip()
        if first.startswith("{") and _is_json(first):
            yield "lines of JSON are taken for prompts: let its name end in .jsonl"
        elif first and {_bare(name) for name in re.split("[,;\t]", first)} <= {
            _bare(name) for name in self.table.known
        }:
            yield f"the first line, {escaped(first)}, is taken for a prompt: if it is a table's header, let its name end in .csv or .tsv"

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


class _JSONLines(_Text):
    """JSON, an object a line."""

    def begin(self, lines: Lines) -> None:
        pass

    def look(self, chunk: bytes) -> None:
        self.pictures = self.pictures or any(f'"{name}"'.encode() in chunk for name in self.table.pictures)

    def parse(self, item: bytes) -> dict[str, Any]:
        row = self.object(item)
        if not isinstance(row, dict):
            raise RowError("the line is JSON, but no object in braces")
        kept = {name: row[column] for name, column in self.table.theirs.items() if column in row}
        if not {"prompt", "image"} & kept.keys():
            raise RowError(f"the row has neither prompt nor image, only {_list(row)}")
        if self.table.kept:
            kept["kept"] = {column: row[column] for column in self.table.kept if column in row}
        return kept if self.table.id_column is None else {**kept, "id": as_id(row.get(self.table.id_column))}

    def object(self, item: Any) -> Any:
        """What a row holds, an object if all is well. Raises RowError."""
        text = strict(item, "the line").strip().removeprefix("\ufeff")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise RowError(f"not JSON: {error.msg} at character {error.pos}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
            raise RowError(f"not JSON that can be read: {error}") from error

    def count(self) -> int:
        rows = super().count()
        self._peek()
        return rows

    def columns(self) -> Sequence[str]:
        names: dict[str, None] = {}
        _, lines, items = self._at(0)
        with lines.file:
            for item in items:
                try:
                    names |= dict.fromkeys(row if isinstance(row := self.object(item), dict) else ())
                except RowError:
                    continue
        return list(names)

    def notices(self) -> Iterator[str]:
        yield from super().notices()
        yield from self.table.notices(self.names, self.seen)

    def _peek(self) -> None:
        """Look at the first rows. Raises ValueError if none of them has a prompt or an image."""
        _, lines, items = self._at(0)
        objects = []
        with lines.file:
            for item in islice(items, PEEK):
                try:
                    objects.append(self.object(item))
                except RowError:
                    continue
        objects = [row for row in objects if isinstance(row, dict)]
        self.names = list(dict.fromkeys(name for row in objects for name in row))
        self.seen = f" in the first {PEEK:,} rows" if self.rows[-1] > PEEK else ""
        self.says_seeds = self.table.theirs.get("seed") in self.names
        if objects:
            self.table.require(self.path, self.names, self.seen)
        columns = [name for row in objects[:1] for name, value in row.items() if isinstance(value, (list, dict))]
        if self.rows[-1] == 1 and self.table.theirs.get("prompt") in columns:
            raise ValueError(
                f"{self.path} is one object of whole columns: write a list of rows (pandas: orient='records')"
            )


class _JSON(_JSONLines):
    """JSON, objects in an array or one after the other, over as many lines as they like. A text in the array is a prompt."""

    def __init__(self, path: Path, table: _Columns) -> None:
        super().__init__(path, table)
        self.marked = False

    def measure(self, lines: Lines) -> int:
        rows = 0
        for item in self.items(lines):
            rows += 1
            self.pictures = self.pictures or (isinstance(item, dict) and not self.table.pictures.isdisjoint(item))
        return rows

    def items(self, lines: Lines) -> Iterator[Any]:
        return _elements(self.path, lines)

    def object(self, item: Any) -> Any:
        return {self.table.theirs["prompt"]: item} if isinstance(item, str) and "prompt" in self.table.theirs else item


def _json(path: Path, table: _Columns) -> _JSONLines:
    """A file of JSON, as its first line has it."""
    file = TextFile(path, table.encoding)
    with file.open() as opened:
        first = next((line for line in Lines(opened) if not is_blank(loose(line))), b"")
    text = loose(first).strip().removeprefix("\ufeff").strip()
    loosely = suffix(path.name).startswith(".json") and not suffix(path.name).startswith(".jsonl")
    if text.startswith("[") or text == "{" or (loosely and text.startswith("{") and not _is_json(text)):
        return _JSON(path, table)
    return _JSONLines(path, table)


def _elements(path: Path, lines: Lines) -> Iterator[Any]:
    """The elements of an array, or values one after the other. Raises ValueError, naming the line, where they are none."""
    decoder = json.JSONDecoder()
    text, at, number, size = "", 0, 1, READ_BYTES
    pieces = codecs.iterdecode(iter(partial(lines.take, READ_BYTES), b""), "utf-8", "surrogateescape")
    inside: bool | None = None  # in an array; None: before the first character
    comma = over = False

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}: line {number + text.count(chr(10), 0, at)}: {what}")

    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        value: Any = None
        end = None
        if at < len(text):
            mark = text[at]
            if inside is None:
                inside = mark == "["
                at += inside
                continue
            if inside and mark == "]":
                if loose(lines.take(READ_BYTES)).strip() or text[at + 1 :].strip():
                    raise wrong("something stands behind the array")
                return
            if inside and comma:
                if mark != ",":
                    raise wrong("a comma was expected between two rows")
                at, comma = at + 1, False
                continue
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if over or len(text) - at > LONGEST:
                    at = error.pos
                    raise wrong(f"not JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
                raise wrong(f"not JSON that can be read: {error}") from error
        if end is not None and (over or end < len(text)):
            yield value
            at, comma = end, True
            continue
        if over:
            if inside:
                raise wrong("the file ends within the array: is it cut off?")
            return
        number += text.count("\n", 0, at)
        more = "".join(islice(pieces, max(1, size // READ_BYTES)))
        over = not more
        size = 2 * size if at == 0 else READ_BYTES
        text, at = text[at:] + more, 0


_SPACE = re.compile("[\\s\ufeff]*")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _CSV(_Text):
    """CSV, or another separator that the header shows. Quotes are as RFC 4180 has them, and a stray one costs its row."""

    separators = ",;\t|"
    said = staticmethod(type_of_texts)

    def begin(self, lines: Lines) -> None:
        self.separator = self.separators[0]
        first = self._line(lines)
        self.header: list[str] = []
        if told := re.fullmatch(r"sep=(.)\s*", loose(first)):  # Excel's
            self.separator = told[1]
        else:
            lines.unread([first])
            self.separator = max(self.separators, key=lambda separator: self._score(first, separator))
        header = self._record(lines)
        if isinstance(header, RowError):
            raise ValueError(f"{self.path}: the header can't be read: {header}")
        self.header = header or []
        self.names = [_name(self.path, name.strip()) for name in self.header]
        self.pictures = not self.table.pictures.isdisjoint(self.names)
        self.table.require(self.path, self.names)
        id_column = self.table.id_column
        if id_column is not None and self.names.count(id_column) != 1:
            raise ValueError(f"{self.path} has no one column {id_column} (id_column), only {_list(self.names)}")
        self.says_seeds = self.table.theirs.get("seed") in self.names
        wanted = {"id": id_column, **self.table.theirs}
        self.wanted = [(name, self.names.index(column)) for name, column in wanted.items() if column in self.names]

    def measure(self, lines: Lines) -> int:
        chunk = lines.chunk(self.MARK)
        if not self.broken and self.file.encoding == "utf-8" and not chunk.isascii():
            self.broken = not is_utf8(chunk)
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
                row[name] = text if (field := self.table.known[name]) is None else parse_text(field, text)
        if self.table.kept:
            places = [(column, self.names.index(column)) for column in self.table.kept if column in self.names]
            row["kept"] = {column: strict(item[at], column) or None for column, at in places}
        return row

    def notices(self) -> Iterator[str]:
        yield from super().notices()
        if self.separator != self.separators[0]:
            yield f"columns are parted by {_SPELT.get(self.separator, self.separator)}"
        yield from self.table.notices(self.names)

    def _score(self, header: bytes, separator: str) -> int:
        """How many columns a header names that a source could mean, were this the separator."""
        try:
            names = [name.strip() for name in _split([loose(header)], separator)]
        except csv.Error:
            return 0
        known = {_bare(name) for name in (*self.table.known, *" ".join(LIKE.values()).split())}
        known |= {_bare(name) for name in (*self.table.given.values(), self.table.id_column or "prompt")}
        return sum(_bare(name) in known for name in names)

    def _line(self, lines: Lines) -> bytes:
        """The next line that is not blank, without a byte order mark; nothing at the end."""
        for line in lines:
            if not is_blank(loose(self._cells(line))):
                return line.removeprefix(BOM)
        return b""

    def _cells(self, text: bytes) -> bytes:
        """Lines in which empty cells are none the less no white space."""
        return text.replace(b"\t", b",") if self.separator == "\t" else text

    def _record(self, lines: Lines) -> list[str] | RowError | None:
        """The next row; None at the end. If its quotes are wrong it is its first line, and the next row is the line behind."""
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
        """The rows of whole lines, if no doubt is possible: the answer of ``_record``, sooner."""
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


class _TSV(_CSV):
    separators = "\t,;|"


_SPELT = {"\t": "tabs", ";": "semicolons", ",": "commas"}


def _split(lines: Iterable[str], separator: str) -> list[str]:
    """The first record. Raises csv.Error."""
    return next(csv.reader(lines, delimiter=separator, strict=True))


class _Parquet:
    """A Parquet file."""

    def __init__(self, path: Path, table: _Columns) -> None:
        self.file, self.table = ParquetRows(path), table
        names = self.file.schema.names
        self.pictures = not table.pictures.isdisjoint(names)
        table.require(path, names)
        if table.id_column is not None and names.count(table.id_column) > 1:
            raise ValueError(f"{path}: there are two columns {table.id_column}")
        self.ours = {name: column for name, column in table.theirs.items() if column in names}
        types = {name: self.file.schema.field(column).type for name, column in self.ours.items()}
        for name, type in types.items():
            if not pa.types.is_null(type) and not _fits(table.known[name], type):
                raise ValueError(f"{path}: column {self.ours[name]} is {type}, which it can't be")
        if "prompt" in types and pa.types.is_null(types["prompt"]):
            raise ValueError(f"{path}: column {self.ours['prompt']} holds nulls and nothing else")
        self.file.require_ids(table.id_column)
        self.says_seeds = "seed" in types and all(is_text(types[name]) for name in PICTURES if name in types)

    def count(self) -> int:
        return self.file.rows

    def columns(self) -> Sequence[str]:
        return list(self.file.schema.names)

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        return ((name, self.file.schema.field(name).type) for name in names if name in self.file.schema.names)

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        kept = [name for name in self.table.kept if name in self.file.schema.names]
        ours = [*self.ours.values(), *([self.table.id_column] if self.table.id_column else [])]
        for piece in self.file.read(start, stop, list(dict.fromkeys([*ours, *kept]))):
            if isinstance(piece, list):
                yield from piece
                continue
            beside = rows_kept(piece, kept) if self.table.kept else repeat({})
            for row, more in zip(self._rows(piece.select(list(dict.fromkeys(ours)))), beside):
                yield row if isinstance(row, RowError) or not self.table.kept else {**row, "kept": more}

    def _rows(self, table: pa.Table) -> Iterator[dict[str, Any] | RowError]:
        columns = {
            name: (plain(table.column(name)), is_text(table.schema.field(name).type)) for name in table.schema.names
        }
        for i in range(len(table)):
            values: dict[str, Any] = {}
            try:
                for name, (column, text) in columns.items():
                    value = column[i].as_py()
                    values[name] = strict(value, name) if text and value is not None else value
                row = {name: values[column] for name, column in self.ours.items()}
                yield row if self.table.id_column is None else {**row, "id": as_id(values[self.table.id_column])}
            except RowError as error:
                yield error

    def texts(self) -> Iterator[dict[str, Any] | RowError]:
        """The rows, of their text columns alone."""
        ours = {name: column for name, column in self.ours.items() if name in ("prompt", "negative_prompt")}
        for piece in self.file.read(0, self.file.rows, list(dict.fromkeys(ours.values()))):
            if isinstance(piece, list):
                yield from piece
                continue
            columns = {name: plain(piece.column(column)).to_pylist() for name, column in ours.items()}
            for i in range(len(piece)):
                yield {name: value[i] and value[i].decode("utf-8", "replace") for name, value in columns.items()}

    def ids(self) -> Iterator[str | None]:
        assert self.table.id_column is not None
        return self.file.ids(self.table.id_column)

    def notices(self) -> Iterator[str]:
        yield from self.table.notices(self.file.schema.names)

    def close(self) -> None:
        self.file.file.close()


_OPEN: Mapping[str, Callable[[Path, _Columns], _File]] = {
    ".txt": _Text,
    ".csv": _CSV,
    ".tsv": _TSV,
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
}
READERS: Mapping[str, Callable[[Path, _Columns], _File]] = {
    **{name + packed: file for packed in ("", ".gz", ".zst") for name, file in _OPEN.items()},
    ".parquet": _Parquet,
}


def _checked(columns: Mapping[str, str]) -> dict[str, str]:
    """The setting ``columns``. Raises ValueError."""
    if not isinstance(columns, Mapping):
        raise ValueError(f"columns must be as {{prompt: caption}}, not {columns!r}")
    for name, column in columns.items():
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns: {name} must be the name of a column in the file, not {column!r}")
    return dict(columns)


def _known(encoding: str | None) -> str | None:
    """The setting ``encoding``. Raises ValueError if Python has no such one for text."""
    if encoding is not None:
        try:
            "".encode(encoding)
        except LookupError as error:
            raise ValueError(f"encoding: there is none called {encoding}; cp1252, say, or utf-16") from error
    return encoding


def _list(names: Iterable[str]) -> str:
    """Names, in a line for people."""
    listed = [*names]
    return escaped(", ".join(listed[:12]))[:200] + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")


def _bare(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _is_binary(type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type))


def _is_picture(type: pa.DataType) -> bool:
    return bool(pa.types.is_struct(type) and {field.name for field in type} >= {"bytes", "path"})


def _fits(field: RowField | None, type: pa.DataType) -> bool:
    """Whether a column of this type may hold a field's values; None: pictures."""
    if field is None:
        return is_text(type) or _is_binary(type) or _is_picture(type)
    kind = python_type(field)
    if kind is str:
        return is_text(type)
    if kind is bool:
        return bool(pa.types.is_boolean(type))
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type))


def _name(path: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: the header is not UTF-8") from None
    return name

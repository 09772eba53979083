"""JSON: objects in an array or one after the other, or an object a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from latentmill.plugin import RowError
from latentmill.sources import as_id, suffix
from latentmill.sources.files import SourceFile
from latentmill.sources.readers.names import listed
from latentmill.sources.readers.settings import ReaderSettings
from latentmill.sources.readers.text_reader import LONGEST, TextReader, is_json
from latentmill.sources.text import READ_BYTES, Lines, TextFile, is_blank, loose, strict

PEEK = 1000
"""Rows of JSON whose keys are looked at before a job starts: each row may have others."""


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError if a key is there twice, of which Python takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


class JSONLinesReader(TextReader):
    """JSON, an object a line."""

    def look(self, chunk: bytes) -> None:
        self.pictures = self.pictures or any(f'"{name}"'.encode() in chunk for name in self.settings.pictures)

    def parse(self, item: bytes) -> dict[str, Any]:
        row = self.object(item)
        if not isinstance(row, dict):
            raise RowError("the line is JSON, but no object in braces")
        ours = {name: row[column] for name, column in self.settings.column_of.items() if column in row}
        if self.settings.needs_prompt and not {"prompt", "image"} & ours.keys():
            raise RowError(f"the row has neither prompt nor image, only {listed(row)}")
        if self.settings.kept:
            ours["kept"] = {column: row[column] for column in self.settings.kept if column in row}
        return ours if self.settings.id_column is None else {**ours, "id": as_id(row.get(self.settings.id_column))}

    def object(self, item: Any) -> Any:
        """What a row holds, an object if all is well. Raises RowError."""
        text = strict(item, "the line").strip().removeprefix("\ufeff")
        try:
            return json.loads(text, object_pairs_hook=once)
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
        yield from self.settings.notices(self.names, self.seen)

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
        self.says_seeds = self.settings.column_of.get("seed") in self.names
        if objects:
            self.settings.require(self.path, self.names, self.seen)
        columns = [name for row in objects[:1] for name, value in row.items() if isinstance(value, (list, dict))]
        if self.rows[-1] == 1 and self.settings.column_of.get("prompt") in columns:
            raise ValueError(
                f"{self.path} is one object of whole columns: write a list of rows (pandas: orient='records')"
            )


class JSONReader(JSONLinesReader):
    """JSON, objects in an array or one after the other, over as many lines as they like. A text in the array is a prompt."""

    def __init__(self, path: SourceFile, settings: ReaderSettings) -> None:
        super().__init__(path, settings)
        self.marked = False

    def measure(self, lines: Lines) -> int:
        rows = 0
        for item in self.items(lines):
            rows += 1
            self.pictures = self.pictures or (isinstance(item, dict) and not self.settings.pictures.isdisjoint(item))
        return rows

    def items(self, lines: Lines) -> Iterator[Any]:
        return _elements(self.path, lines)

    def object(self, item: Any) -> Any:
        column = self.settings.column_of.get("prompt")
        return {column: item} if isinstance(item, str) and column is not None else item


def json_reader(path: SourceFile, settings: ReaderSettings) -> JSONLinesReader:
    """The reader of a file of JSON. Its first line says which: an object a line, or any other way."""
    file = TextFile(path, settings.encoding)
    with file.open() as opened:
        first = next((line for line in Lines(opened) if not is_blank(loose(line))), b"")
    text = loose(first).strip().removeprefix("\ufeff").strip()
    loosely = suffix(path.name).startswith(".json") and not suffix(path.name).startswith(".jsonl")
    if text.startswith("[") or text == "{" or (loosely and text.startswith("{") and not is_json(text)):
        return JSONReader(path, settings)
    return JSONLinesReader(path, settings)


def _elements(path: SourceFile, lines: Lines) -> Iterator[Any]:
    """The elements of an array, or values one after the other. Raises ValueError, with the line, for text that is neither."""
    decoder = json.JSONDecoder(object_pairs_hook=once)
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

"""Files of prompts, and of whatever else a row may say. The readers of each kind of file are in ``readers``."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from latentmill.buckets import PIXEL_WAYS
from latentmill.columns import unified
from latentmill.fields import PICTURES, parse, text
from latentmill.pixels import Pixels
from latentmill.plugin import Fragment, RowError, Source
from latentmill.sources import files, suffix
from latentmill.sources.as_comfyui import changed, masks_of
from latentmill.sources.files import Files
from latentmill.sources.picture_sizes import size_of
from latentmill.sources.pictures import MAX_PIXELS, decode
from latentmill.sources.readers import READERS
from latentmill.sources.readers.reader import FileReader
from latentmill.sources.readers.settings import COLUMNS, ReaderSettings
from latentmill.text import escaped

Opened = TypeVar("Opened", Pixels, tuple[int, int])
Told = TypeVar("Told")
Row: TypeAlias = "dict[str, Any] | RowError"

ROWS_AHEAD = 64
"""Rows, at most, of which the pictures are fetched together."""
HELD_AHEAD = 16 << 20
"""Bytes of pictures that rows bring themselves, at most, while others are waited for."""
OPENED = ("ours", "comfy")
"""Ways to open a picture that a source is told by its settings; ``size`` has more."""
TWINS = 100_000
"""Rows that are looked at, before a job starts, for two that will be the same picture."""


class Prompts(Source):
    """Rows of ``.txt``, ``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.parquet`` and ``.tar`` files, each file a fragment.

    A line of text is a prompt, without the white space around it; blank lines are no rows, in text, CSV and JSON lines
    alike. An empty field of a CSV file stands for the job's value, but an empty prompt is an empty prompt; null is the
    job's value everywhere except in ``prompt``, where it is an error. A table must have a ``prompt`` or an ``image``.

    ``max_pixels`` and ``follow_links`` are for pictures, as in the source ``images``. ``id_column`` names the column, of
    text or whole numbers, that tells the rows apart; the job's ``source.keep`` names columns that travel. ``columns``
    says what the file calls a column of ours: ``{prompt: caption}``. ``defaults`` are what a row says where the file doesn't, and pictures
    among them lie where their path says; with a ``prompt`` there, the file needs none. ``encoding`` is that of all text files; without
    it they are UTF-8, UTF-16, or else cp1252. ``opened: comfy`` opens pictures as ComfyUI does: transparent parts show the colours behind
    them, and not white. With it, ``masks`` says where a row's mask is: ``light``, how light its ``mask`` is; ``image``, where its picture
    is transparent; ``alpha``, ``red``, ``green`` or ``blue``, that channel of its ``mask``, of alpha where it is transparent. In a list changes may
    follow: ``[image, invert, {grow: 6, tapered: true}]`` turns it over, and lets it grow by 6 pixels, by less than 0 shrink.
    """

    contract = 2
    pixel_ways = (*PIXEL_WAYS,)

    def __init__(
        self,
        path: str,
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
        id_column: str | None = None,
        columns: Mapping[str, str] | None = None,
        encoding: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        opened: str = "ours",
        masks: Any = "light",
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, not {max_pixels}")
        self.path, self.max_pixels, self.follow_links, self.id_column = path, max_pixels, follow_links, id_column
        self._given, self._encoding = _checked({} if columns is None else columns), _known(encoding)
        if not isinstance(defaults, Mapping | None):
            raise ValueError(f"defaults must be as {{seed: 7}}, not {defaults!r}")
        if opened not in OPENED:
            raise ValueError(f"opened must be {' or '.join(OPENED)}, not {opened!r}")
        self.masks, self.mask_changes = masks_of(masks)
        if masks != "light" and opened != "comfy":
            raise ValueError(f"masks must be light, without changes, unless opened is comfy, not {masks!r}")
        self.defaults, self.pixels = dict(defaults or {}), opened
        self.needs_prompt = "prompt" not in self.defaults
        self._readers: dict[str, FileReader] = {}
        self._notices: dict[str, list[str]] = {}  # each line, and the files that it is of

    def columns(self) -> list[str]:
        """Of all files; of JSON, all keys that there are."""
        found = self._asked(self._files.find(READERS), lambda name, file: file.columns())
        return list(dict.fromkeys(name for names in found for name in self._settings.unused(names)))

    def column_types(self, names: Sequence[str]) -> pa.Schema:
        """Those that a Parquet file says; of text, those that all values have: whole numbers, numbers, bools, or text."""
        self.kept = pa.schema([(name, pa.null()) for name in names])
        found = self._files.find(READERS)
        types = self._asked(found, lambda name, file: [(name, *each) for each in file.types(names)])
        return unified(each for of_file in types for each in of_file)

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if nothing is there, a file can't be read as what it is called, or a column is missing."""
        names = self._files.find(READERS)
        contents = self._files.known_by_contents(names)
        found, pictures, with_seeds = [], False, []
        self._notices.clear()
        for name, about in zip(names, self._asked(names, _About.of)):
            found.append(Fragment(name, about.rows, self._files.fingerprint([name], contents)))
            pictures = pictures or about.pictures
            with_seeds += [found[-1]] if about.says_seeds else []
            for line in about.notices:
                self._notices.setdefault(line, []).append(name)
        # Elsewhere other pictures may lie beside the file, of which no fingerprint knows.
        self.fingerprinted = ("path",) if contents and (self._files.knows_neighbours or not pictures) else ()
        if not any(fragment.rows for fragment in found):
            raise ValueError(f"{self.path} has no rows")
        if twins := self._twins(with_seeds):
            self._notices[twins] = []
        return found

    def fingerprint(self) -> str:
        """Of the pictures that ``defaults`` names; of what isn't there nothing: its rows will say so."""
        names = [str(value) for name, value in sorted(self.defaults.items()) if name in PICTURES]
        found = []
        for folder, _, file in (name.rpartition("/") for name in names):
            with suppress(OSError, ValueError):
                there = files.at(folder or ".")
                found.append(there.fingerprint([file], there.known_by_contents([file])))
        return " ".join(found)

    def notices(self) -> list[str]:
        def which(names: Sequence[str]) -> str:
            more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
            return f"{escaped(names[0])}{more}: " if names else ""

        return [f"source prompts: {which(names)}{line}" for line, names in self._notices.items()]

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        folder = posixpath.dirname(fragment)
        for row in self._ahead(self._file(fragment).read(start, stop), folder):
            if isinstance(row, RowError):
                yield row
                continue
            try:
                yield self._row(row, folder)
            except RowError as error:
                yield error

    def sizes(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        folder = posixpath.dirname(fragment)
        for row in self._ahead(self._file(fragment).read(start, stop), folder, heads=True):
            if isinstance(row, RowError):
                yield row
                continue
            given, default = row.get("image"), self.defaults.get("image")
            found = {**self.defaults, **{name: value for name, value in row.items() if value is not None}}
            try:
                if given is not None:
                    found["image"] = self._picture("image", given, folder, size_of)
                elif default is not None:
                    found["image"] = self._default_picture("image", default, size_of)
            except RowError as error:
                yield error
            else:
                yield found

    def expect(self, fragment: Fragment) -> None:
        self._files.expect(fragment.fingerprint)

    def changed(self, fragment: Fragment) -> bool:
        return self._files.changed([fragment.name], fragment.fingerprint)

    def stamp(self, fragment: Fragment) -> str:
        return self._files.stamp([fragment.name])

    def still(self, fragment: Fragment, runs: Sequence[tuple[str, int, int]]) -> bool | None:
        if [*runs] != [(fragment.name, 0, fragment.rows)]:  # moved, and found by their ids
            return None
        if self._files.still([fragment.name], fragment.fingerprint):
            return True
        with suppress(FileNotFoundError, ValueError):  # it is no file of its kind any more
            ends = self._file(fragment.name).ends(fragment.rows)
            if self._files.began_as(fragment.name, ends, fragment.fingerprint):
                return True
        return None if self.id_column is not None else False

    def ids(self, fragment: Fragment) -> Iterator[str | None]:
        return self._file(fragment.name).ids()

    def reads_from(self, folder: str) -> bool:
        return self._files.below(folder) == "" and self._files.is_folder()  # files in folders below are not read

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        file = self._file(fragment.name)
        for row in file.texts(fragment.rows):
            found = ((None if isinstance(row, RowError) else row.get(name)) for name in ("prompt", "negative_prompt"))
            prompt, negative = (text if isinstance(text, str) else None for text in found)
            yield prompt, negative

    @cached_property
    def _files(self) -> Files:
        return files.at(self.path)

    @cached_property
    def _settings(self) -> ReaderSettings:
        known = {**COLUMNS, **{field.name: field for field in self.job_fields}}
        if wrong := [name for name in self._given if name not in known]:
            raise ValueError(f"columns: {wrong[0]} is no column of ours; there are: {', '.join(known)}")
        if wrong := [name for name in self.defaults if name not in known]:
            raise ValueError(f"defaults: {wrong[0]} is no column of ours; there are: {', '.join(known)}")
        for name, value in self.defaults.items():
            if value is None:
                continue
            try:
                field = known[name]
                text(name, value) if field is None else parse(field, value)
            except RowError as error:
                raise ValueError(f"defaults: {error}") from error
        return ReaderSettings(self._given, self.id_column, self._encoding, known, self, self.needs_prompt)

    def _file(self, name: str) -> FileReader:
        if name not in self._readers:
            for file in self._readers.values():
                file.close()
            self._readers.clear()  # one file's marks, or its footer and a row group, are enough to keep
            self._readers[name] = self._opened(name)
        return self._readers[name]

    def _opened(self, name: str) -> FileReader:
        return READERS[suffix(name)](self._files.file(name), self._settings)

    def _asked(self, names: Sequence[str], ask: Callable[[str, FileReader], Told]) -> Iterator[Told]:
        """What is asked of each file, in their order. Of a store's, many are open at a time, and none of them stays so."""
        if self._files.local is not None or len(names) == 1:
            yield from (ask(name, self._file(name)) for name in names)
            return

        def asked(name: str) -> Told:
            with closing(self._opened(name)) as file:
                return ask(name, file)

        yield from self._files.each(asked, names)

    def _ahead(self, rows: Iterator[Row], folder: str, heads: bool = False) -> Iterator[Row]:
        """The rows. The pictures that they name in a store are on their way before they come."""
        if self._files.local is not None:
            yield from rows
            return
        some: list[Row] = []
        paths: list[str] = []
        held = 0
        for row in rows:
            for value in () if isinstance(row, RowError) else map(_where, map(row.get, PICTURES)):
                if isinstance(value, str):
                    paths.append(value)
                held += len(value) if isinstance(value, bytes) else 0
            some.append(row)
            if len(some) == ROWS_AHEAD or held > HELD_AHEAD:
                self._files.ahead(paths, folder, heads)
                yield from some
                some, paths, held = [], [], 0
        if some:
            self._files.ahead(paths, folder, heads)
            yield from some

    def _row(self, row: dict[str, Any], folder: str) -> Mapping[str, Any]:
        """A reader's row with its pictures read. Raises RowError."""
        if self.needs_prompt and "prompt" in row and row["prompt"] is None:
            raise RowError("prompt is null")
        if self.needs_prompt and "prompt" not in row and row.get("image") is None:
            raise RowError("the row has neither prompt nor image")
        for name in PICTURES:
            if row.get(name) is not None:
                row[name] = self._picture(name, row[name], folder, decode)
        for name, value in self.defaults.items():
            if row.get(name) is None:
                row[name] = self._default_picture(name, value, decode) if name in PICTURES else value
        if self.masks == "image" and row.get("image") is not None:
            whole = row["image"]
            row |= {"image": whole[..., :3], "mask": np.repeat(whole[..., 3:], 3, axis=2)}
        if self.mask_changes and row.get("mask") is not None:
            row["mask"] = changed(row["mask"], self.mask_changes)
        return row

    def _way(self, name: str) -> str:
        """In which way a picture of that name is opened."""
        if self.masks != "light" and name == ("image" if self.masks == "image" else "mask"):
            return f"comfy.{self.masks}"
        return self.pixels

    def _default_picture(self, name: str, path: str, opener: Callable[..., Opened]) -> Opened:
        """The picture of rows that have none. Raises RowError."""
        folder, _, file = str(path).rpartition("/")
        try:
            with files.at(folder or ".").open(file, self.follow_links) as opened:
                return opener(opened, self.max_pixels, self._way(name))
        except RowError as error:
            raise RowError(f"{name} {path!r} of source.defaults: {error}") from error

    def _picture(self, name: str, value: Any, folder: str, opened: Callable[..., Opened]) -> Opened:
        """What ``opened`` makes of a file or of bytes, whichever the row has. Raises RowError."""
        value = _where(value)
        if isinstance(value, str) and value.lower().startswith(("http://", "https://")):
            raise RowError(
                f"{name} {value!r:.200} is on the web: img2dataset fetches pictures, and its .tar files are read here"
            )
        if isinstance(value, str):
            try:
                with self._files.open(value, self.follow_links, folder) as file:
                    return opened(file, self.max_pixels, self._way(name))
            except RowError as error:
                raise RowError(f"{name} {value!r}: {error}") from error
        if isinstance(value, bytes):
            try:
                return opened(value, self.max_pixels, self._way(name))
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
class _About:
    """What a plan must know of a file."""

    rows: int
    pictures: bool
    says_seeds: bool
    notices: Sequence[str]

    @classmethod
    def of(cls, name: str, file: FileReader) -> _About:
        rows = file.count()  # all else is known then
        return cls(rows, file.pictures, file.says_seeds, list(file.notices()))


def _where(value: Any) -> Any:
    """A picture's path or its bytes, where that is what a row has."""
    if isinstance(value, Mapping):  # as Hugging Face datasets stores pictures
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


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

"""Tar files of samples, as the library ``webdataset`` reads and ``img2dataset`` writes them: files of one name are one row."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from latentmill.plugin import RowError
from latentmill.sources import as_id
from latentmill.sources.files import SourceFile, StoredFile
from latentmill.sources.kept import types_of_values
from latentmill.sources.readers.json import PEEK, once
from latentmill.sources.readers.names import listed
from latentmill.sources.readers.reader import FileReader
from latentmill.sources.readers.settings import ReaderSettings
from latentmill.sources.readers.tar_index import remembered
from latentmill.sources.text import strict
from latentmill.text import first_line

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")
KEY = "__key__"
"""The column of a sample's name, as webdataset calls it."""


class Member(NamedTuple):
    """A file in a tar, by its suffix: all of its name behind the first dot."""

    suffix: str
    at: int
    size: int


class TarReader(FileReader):
    """A tar. Neighbours whose names are equal up to the first dot are a row.

    Its columns: ``image``, the first file of a picture; ``mask``, ``NAME.mask.png`` or the like; the keys of ``.json``; ``txt``, the
    text of ``.txt``, which is the ``prompt`` where no other column is; not ``width`` and ``height`` of img2dataset, which says them of the picture; ``__key__``, the name. Files without a suffix are passed over, and so
    is what has another one.
    """

    pictures = says_seeds = False

    def __init__(self, path: SourceFile, settings: ReaderSettings) -> None:
        self.path, self.settings = path, settings
        if isinstance(path, StoredFile):
            of_prompt = str(settings.column_of.get("prompt") == "prompt")
            found, self.names = remembered(path, of_prompt, self._look)
            self.samples = [(key, [Member(*member) for member in members]) for key, members in found]
        else:
            self.samples, self.names = self._look()
        if self.names:
            settings.require(path, self.names, self._where)

    @cached_property
    def file(self) -> BinaryIO:
        return self.path.open("rb")

    def _look(self) -> tuple[list[tuple[str, list[Member]]], list[str]]:
        """All rows, and the columns of the first ones."""
        self.samples = list(_samples(self.path))
        seen = [row for row in islice(map(self._seen, range(len(self.samples))), PEEK) if row is not None]
        return self.samples, list(dict.fromkeys(name for row in seen for name in row))

    def count(self) -> int:
        return len(self.samples)

    def columns(self) -> Sequence[str]:
        rows = (row for row in map(self._seen, range(len(self.samples))) if row is not None)
        return list(dict.fromkeys(name for row in rows for name in row))

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        rows = (row for row in map(self._seen, range(len(self.samples))) if row is not None)
        return iter(types_of_values(self.path, names, rows).items())

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        for number in range(start, stop):
            try:
                yield self._row(number, pictures=True)
            except RowError as error:
                yield error

    def texts(self, stop: int) -> Iterator[dict[str, Any] | RowError]:
        for number in range(stop):
            try:
                yield self._row(number, pictures=False)
            except RowError as error:
                yield error

    def ids(self) -> Iterator[str | None]:
        return (None if isinstance(row, RowError) else row["id"] for row in self.texts(len(self.samples)))

    def notices(self) -> Iterator[str]:
        yield from self.settings.notices([name for name in self.names if name not in (KEY, "txt")], self._where)

    def close(self) -> None:
        self.file.close()

    @property
    def _where(self) -> str:
        return f" in the first {PEEK:,} rows" if len(self.samples) > PEEK else ""

    def _seen(self, number: int) -> dict[str, Any] | None:
        try:
            return self._sample(number, pictures=False)
        except RowError:
            return None

    def _row(self, number: int, pictures: bool) -> dict[str, Any]:
        """A row with the names of our columns. Raises RowError."""
        sample = self._sample(number, pictures)
        ours = {name: sample[column] for name, column in self.settings.column_of.items() if column in sample}
        if self.settings.needs_prompt and not {"prompt", "image"} & ours.keys():
            raise RowError(f"the row has neither prompt nor image, only {listed(sample)}")
        if self.settings.kept:
            ours["kept"] = {column: sample[column] for column in self.settings.kept if column in sample}
        return ours if self.settings.id_column is None else {**ours, "id": as_id(sample.get(self.settings.id_column))}

    def _sample(self, number: int, pictures: bool) -> dict[str, Any]:
        """All columns of a row; of pictures, empty bytes unless they are asked for. Raises RowError."""
        key, members = self.samples[number]
        found: dict[str, Any] = {}
        by_suffix: dict[str, Member] = {}
        for member in members:
            if by_suffix.setdefault(member.suffix, member) is not member:
                raise RowError(f"{key}.{member.suffix} is there twice")
        if "json" in by_suffix:
            found = self._object(key, by_suffix["json"])
        size = ("width", "height") if "original_width" in found else ()  # img2dataset's are of the picture as it is
        found = {name: value for name, value in found.items() if name not in ("image", "mask", "txt", KEY, *size)}
        if "txt" in by_suffix:
            found["txt"] = strict(self._content(by_suffix["txt"]), f"{key}.txt").removesuffix("\n")
            prompt = self.settings.column_of.get("prompt")
            if prompt == "prompt":
                found.setdefault("prompt", found["txt"])
        for column, suffixes in (("image", PICTURE_SUFFIXES), ("mask", [f"mask.{each}" for each in PICTURE_SUFFIXES])):
            picture = next((member for member in members if member.suffix in suffixes), None)
            if picture is not None:
                found[column] = self._content(picture) if pictures else b""
        return {**found, KEY: key}

    def _object(self, key: str, member: Member) -> dict[str, Any]:
        text = strict(self._content(member), f"{key}.json")
        try:
            found = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{key}.json is not JSON: {first_line(error)}") from error
        if not isinstance(found, dict):
            raise RowError(f"{key}.json holds no object in braces")
        return found

    def _content(self, member: Member) -> bytes:
        self.file.seek(member.at)
        return self.file.read(member.size)


def _samples(path: SourceFile) -> Iterator[tuple[str, list[Member]]]:
    """The rows of a tar: their names, and where their files are. Raises ValueError if it is none, or is cut off."""
    key, members = "", list[Member]()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (found := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep one for each file
                name = found.name.removeprefix("./")
                folder, base = os.path.split(name)
                stem, _, suffix = base.partition(".")
                if not found.isreg() or found.issparse() or not suffix or not stem:
                    continue
                whole = f"{folder}/{stem}" if folder else stem
                if whole != key and members:
                    yield key, members
                    members = []
                key = whole
                members.append(Member(suffix.lower(), found.offset_data, found.size))
            _require_end(path, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is no whole tar: {first_line(error)}") from error
    if members:
        yield key, members


def _require_end(path: SourceFile, at: int) -> None:
    """Raise ValueError unless a tar's end stands there and nothing behind it: where a header is damaged or missing, tarfile ends."""
    with path.open("rb") as file:
        file.seek(at)
        if len(rest := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise ValueError(f"{path} is no whole tar: it is cut off at byte {at:,}")
        while rest:
            if rest.strip(b"\0"):
                raise ValueError(
                    f"{path} is no whole tar: what stands at byte {at:,} is no file of it, and not its end"
                )
            rest = file.read(1 << 20)

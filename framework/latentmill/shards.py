"""One shard as it is stored: the names of its files, its commit, and reading it back. Only here is a sink given a file.

The create of the shard's own file, ``data/00007.parquet``, decides everything about it. Side files, if its sink writes any,
are in ``files/`` before: under names with a token that no other writer has, and named, with sizes and hashes, in the metadata
of the file that commits. So files of two writers are never mixed; what a writer leaves that lost, or died, no shard names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa

from latentmill.plugin import RowError, Sink
from latentmill.storage import Storage

ERRORS_KEY = "latentmill.errors"
"""Metadata key of a shard's error rows, JSON."""
FILTERED_KEY = "latentmill.filtered"
"""Metadata key of a shard's rows that were filtered, JSON; not there if none was."""
NOT_NEEDED_KEY = "latentmill.not_needed"
"""Metadata key of how many of a shard's last rows are not needed, and not in it, of a job that ends with so many accepted rows; not
there if all are."""
WARNINGS_KEY = "latentmill.warnings"
"""Metadata key of how many of a shard's rows have which warning, JSON; not there if none has any."""
PLAN_KEY = "latentmill.plan"
"""Metadata key of the hash of the plan that a shard is of."""
SIDE_FILES_KEY = "latentmill.files"
"""Metadata key of a shard's side files, JSON; not there if it has none."""
FOLDER = "files"
"""Where side files are."""
COPIES = {"errors": ERRORS_KEY, "filtered": FILTERED_KEY}
"""Folders with a file for each shard, for people: a copy of what stands in the shard under a key."""


def data_name(shard: int, sink: Sink) -> str:
    """Where a shard's data is, or will be."""
    return f"data/{shard:05d}{sink.suffix}"


def copy_name(shard: int, folder: str) -> str:
    """Where a shard's errors are, if it has any, or what was filtered: ``folder`` is one of COPIES."""
    return f"{folder}/{shard:05d}.jsonl"


def shard_numbers(names: Iterable[str], suffix: str) -> dict[str, int]:
    """The shards that file names are of, by name."""
    # Just as we write them: 00007.parquet.partial, 7.parquet and 00007 (1).parquet are somebody else's.
    ours = re.compile(rf"(0\d{{4}}|[1-9]\d{{4,}}){re.escape(suffix)}", re.ASCII)
    return {name: int(match[1]) for name in names if (match := ours.fullmatch(name))}


def done_shards(store: Storage, suffix: str) -> set[int]:
    """The shards that are committed: what is in ``data/`` is the progress, and nothing else is."""
    return {*shard_numbers(store.names("data"), suffix).values()}


ToldRows: TypeAlias = Callable[[Mapping[str, str]], list[dict[str, Any]]]
"""What finds rows that are not stored, of one kind, in a shard's metadata: ``error_rows`` or ``filtered_rows``."""


def error_rows(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The error rows in a shard's metadata."""
    return _rows(metadata, ERRORS_KEY)


def filtered_rows(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows in a shard's metadata that were filtered."""
    return _rows(metadata, FILTERED_KEY)


def rows_not_needed(metadata: Mapping[str, str]) -> int:
    """How many rows at a shard's end are not needed, and not in it."""
    return int(metadata.get(NOT_NEEDED_KEY, "0"))


def _rows(metadata: Mapping[str, str], key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(metadata.get(key, "[]"))
    return found


def copy_lines(metadata: Mapping[str, str], folder: str) -> bytes:
    """What a shard's file in one of the folders of COPIES says: a line of JSON for each row."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(metadata, COPIES[folder]))
    return lines.encode("utf-8", "backslashreplace")  # JSON's own escape, of half a surrogate


def make_copies(store: Storage, shard: int, metadata: Mapping[str, str], folders: Iterable[str] = COPIES) -> None:
    """Make a shard's copies in these folders what its metadata says; no file, where that is nothing."""
    for folder in folders:
        name, content = copy_name(shard, folder), copy_lines(metadata, folder)
        if not content:
            store.delete(name)
        elif not store.create(name, content) and store.read(name) != content:  # of a file that was there before
            store.put(name, content)


@dataclass(frozen=True)
class SideFile:
    """One file of a shard beside its own."""

    name: str
    """What the sink calls it."""
    stored_as: str
    """What it is called in ``files/``."""
    bytes: int
    digest: str


def side_files(metadata: Mapping[str, str]) -> list[SideFile]:
    """The side files that a shard's metadata names."""
    return [SideFile(**found) for found in json.loads(metadata.get(SIDE_FILES_KEY, "[]"))]


def side_file_shard(stored_as: str) -> int | None:
    """The shard that a file in ``files/`` is of, by its name; None if it has no such name."""
    match = re.match(r"(\d{5,})-[0-9a-f]{12}-", stored_as, re.ASCII)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class ShardFile:
    """A shard's file, by its name. It remembers nothing; all raise FileNotFoundError if the file is not there."""

    store: Storage
    sink: Sink
    name: str

    def metadata(self) -> dict[str, str]:
        """What the sink wrote beside the rows."""
        with self.store.peek(self.name) as file:
            return dict(self.sink.metadata(file))

    def about(self) -> tuple[dict[str, str], pa.Schema, int]:
        """Metadata, the columns that can be read, and how many rows there are, without reading them."""
        with self.store.peek(self.name) as file:
            metadata = dict(self.sink.metadata(file))
            file.seek(0)
            schema = self.sink.schema(file)
            file.seek(0)
            return metadata, schema, self.sink.count(file)

    def read_whole(self) -> tuple[dict[str, str], list[str]]:
        """Metadata and row ids, after all bytes were looked at, those of side files included. Raises if one is wrong."""
        with self.store.open(self.name) as file:
            metadata = dict(self.sink.metadata(file))
            file.seek(0)
            row_ids = list(self.sink.row_ids(file))
        for side in side_files(metadata):
            try:
                with self.store.open(f"{FOLDER}/{side.stored_as}") as file:
                    found = _digest(file)
            except FileNotFoundError:
                raise ValueError(f"{FOLDER}/{side.stored_as}, which belongs to it, is not there") from None
            if found != (side.bytes, side.digest):
                raise ValueError(f"{FOLDER}/{side.stored_as}, which belongs to it, is not as it was written")
        return metadata, row_ids

    def read(self, columns: Sequence[str] | None, rows: Sequence[int]) -> Iterator[pa.Table | RowError]:
        """Rows by number, ascending, as they travelled; see ``Sink.read``."""
        if not len(rows):
            return
        with self.store.open(self.name) as file:
            named: dict[str, str] = {}

            def side_file(name: str) -> BinaryIO:
                if not named:
                    at = file.tell()
                    file.seek(0)
                    named.update({side.name: side.stored_as for side in side_files(self.sink.metadata(file))})
                    file.seek(at)
                return self.store.open(f"{FOLDER}/{named[name]}")

            yield from self.sink.read(file, columns, rows, side_file)


class SideFiles:
    """A shard's side files while it is committed: in the store, and not named by anybody yet."""

    def __init__(self, store: Storage, paths: Mapping[str, Path]) -> None:
        self.store, self.paths = store, paths
        self.kept = False
        self.metadata: dict[str, str] = {}
        """What the shard's own file must say of them."""

    def store_all(self) -> None:
        """Put them into the store, durably."""
        found = []
        for stored_as, path in self.paths.items():
            with path.open("rb") as file:
                size, digest = _digest(file)
            found.append(vars(SideFile(path.name, stored_as, size, digest)))
            self.store.create(f"{FOLDER}/{stored_as}", str(path))
        if found:
            self.metadata = {SIDE_FILES_KEY: json.dumps(found)}

    def keep(self) -> None:
        """The shard has been committed, and names them."""
        self.kept = True
        for stored_as, path in self.paths.items():
            # A driver that saw another's shard in this one's place, which has been taken out since, may have swept them.
            if not self.store.exists(f"{FOLDER}/{stored_as}"):
                self.store.create(f"{FOLDER}/{stored_as}", str(path))

    def settle(self, there: ShardFile) -> None:
        """Nobody has said that they are kept: they go if the shard that is there names others, and stay if it names them.

        A store may have made the shard although its answer was an error, or that it was there already. Where no shard can be read they stay, too:
        when the dataset is settled, those go that no shard names.
        """
        try:
            named = {side.stored_as for side in side_files(there.metadata())}
        except Exception:  # whatever a damaged file makes a sink say
            return
        if not named.isdisjoint(self.paths):
            self.keep()
            return
        for stored_as in self.paths:
            self.store.delete(f"{FOLDER}/{stored_as}")


@contextmanager
def with_side_files(store: Storage, sink: Sink, shard: int, table: pa.Table) -> Iterator[SideFiles]:
    """Write a shard's side files and put them into the store, for the time of its commit; unless they are kept, they go again."""
    if type(sink).write_side_files is Sink.write_side_files:
        yield SideFiles(store, {})
        return
    token = uuid.uuid4().hex[:12]
    with store.aside(f"{shard:05d}-{FOLDER}") as folder:
        os.mkdir(folder)
        sink.write_side_files(folder, table)
        files = SideFiles(store, {f"{shard:05d}-{token}-{path.name}": path for path in sorted(Path(folder).iterdir())})
        try:
            files.store_all()
            yield files
        finally:
            if not files.kept:
                files.settle(ShardFile(store, sink, data_name(shard, sink)))


def _digest(file: BinaryIO) -> tuple[int, str]:
    digest, size = hashlib.blake2b(digest_size=16), 0
    while piece := file.read(1 << 20):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()

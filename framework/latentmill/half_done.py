"""Rows that were half done when a driver stopped, in ``half_done/``: a file for each shard that was open.

A file is taken up by whoever opens its shard next, and stays until the shard is in the dataset: a driver that is killed after it
took one up leaves it to the next. That a row is done twice harms nothing, since it depends on itself alone and a commit happens
once. So a file is a help, and is never needed: one that is damaged, or of another plan, is passed over with a line.

A file is a line that says the format, the hash of all that comes behind it, and streams of Arrow's: the first has no rows and says in
its metadata what the file is of, each of the others has the rows of one schema that are to come to one stage next, bit by bit as they travelled.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from latentmill import storage
from latentmill.batch import shape_key
from latentmill.libraries import changed
from latentmill.plan import Plan
from latentmill.plugin import tensors
from latentmill.storage import Storage

HALF_DONE = "half_done"
HALF_DONE_FORMAT = b"latentmill half done 1\n"
DIGITS = 32
ABOUT = b"latentmill.about"


@dataclass(frozen=True)
class HalfDoneRows:
    """What is half done of a shard."""

    tables: Sequence[pa.Table]
    stages: Sequence[int]
    """For each table the stage that its rows come to next; the number of stages, if they wait for the rest of their shard."""
    filtered: Sequence[Mapping[str, Any]] = ()
    """The rows that were filtered, as a commit tells of them."""
    attempts: Mapping[int, int] = field(default_factory=dict)
    """The attempt that rows are at, of those that are not at their first."""


@dataclass(frozen=True)
class HalfDone:
    """The half-done rows of a plan's dataset, as a worker writes and reads them."""

    output: str
    single_writer: bool
    plan: Plan

    def keep(self, shard: int, rows: HalfDoneRows) -> None:
        """Write a shard's file, in place of one that was there. Raises OSError."""
        store = storage.at(self.output, self.single_writer)
        before = _names(store).get(shard, [])
        number = max(map(_number, before), default=0) + 1
        name = f"{HALF_DONE}/{shard:05d}-{number}-{uuid.uuid4().hex[:8]}.arrow"
        tables: dict[tuple[int, bytes], list[pa.Table]] = {}
        for stage, table in zip(rows.stages, rows.tables, strict=True):
            tables.setdefault((stage, table.schema.serialize().to_pybytes()), []).append(table)
        about = {
            "plan": self.plan.hash_of(shard),
            "shard": shard,
            "flow": self._flow(),
            "libraries": dict(self.plan.libraries),
            "stages": [stage for stage, _ in tables],
            "filtered": [*rows.filtered],
            "attempts": [*rows.attempts.items()],
        }
        with store.aside(name) as path:
            with open(path, "wb") as file:
                file.write(HALF_DONE_FORMAT + bytes(DIGITS))
                hashing = _Hashing(file)
                _write(hashing, [pa.table({}).replace_schema_metadata({ABOUT: json.dumps(about)})])
                for some in tables.values():
                    shared = any(tensors.is_shared(each) for each in some[0].schema)
                    _write(hashing, [tensors.concat(some)] if shared else some)
                file.seek(len(HALF_DONE_FORMAT))
                file.write(hashing.digest())
            store.create(name, path)
        for old in before:
            store.delete(f"{HALF_DONE}/{old}")

    def take_up(self, shard: int, name: str) -> HalfDoneRows:
        """What a shard's file holds. Raises ValueError unless it is whole, and of this plan's shard."""
        content = storage.at(self.output, self.single_writer).read(f"{HALF_DONE}/{name}")
        head = len(HALF_DONE_FORMAT) + DIGITS
        if content[: len(HALF_DONE_FORMAT)] != HALF_DONE_FORMAT:
            raise ValueError("it is no file of half-done rows that this version reads")
        if _digest(memoryview(content)[head:]) != content[len(HALF_DONE_FORMAT) : head]:
            raise ValueError("it is not as it was written")
        buffer = pa.BufferReader(pa.py_buffer(content).slice(head))
        first = pa.ipc.open_stream(buffer)
        first.read_all()
        about = json.loads(first.schema.metadata[ABOUT])
        if (about["plan"], about["shard"]) != (self.plan.hash_of(shard), shard):
            raise ValueError("it is of another plan")
        if about["flow"] != self._flow():
            raise ValueError("it is of another flow")
        if others := changed(about["libraries"], self.plan.libraries):
            # No row is half of one and half of the other, and what a stage left is for the version that left it.
            raise ValueError(f"it was written with {', '.join(f'{name} {was}' for name, was, _ in others)}")
        tables = []
        for stage in about["stages"]:
            table = pa.ipc.open_stream(buffer).read_all()
            # Where they lie in a file, tensors are not aligned as those that were just made.
            tables.append(table if stage == len(self.plan.stages) else table.take(list(range(len(table)))))
        found = HalfDoneRows(tables, about["stages"], about["filtered"], dict(about["attempts"]))
        self._require_each_once(shard, found)
        return found

    def _flow(self) -> list[str]:
        return [stage.name for stage in self.plan.stages]

    def _require_each_once(self, shard: int, found: HalfDoneRows) -> None:
        rows = [row for table in found.tables for row in table.column("row").to_pylist()]
        rows += [about["row"] for about in found.filtered]
        if len({*rows}) < len(rows) or not {*rows, *found.attempts} <= {*self.plan.shard_rows(shard)}:
            raise ValueError("it has other rows than the shard")


def newest(store: Storage, shard: int | None = None) -> dict[int, str]:
    """The file of each shard that has one, or of one shard."""
    return {of: max(names, key=_number) for of, names in _names(store).items() if shard in (None, of)}


def sweep(store: Storage, done: Set[int]) -> None:
    """Delete the files of shards that are in the dataset, or are to begin from the source."""
    for shard, names in _names(store).items():
        if shard in done:
            for name in names:
                store.delete(f"{HALF_DONE}/{name}")


def described(found: HalfDoneRows) -> list[tuple[int, str, tuple[int, ...]]]:
    """For each table its stage, its shape key and its row numbers: what a driver knows of it."""
    return [
        (stage, shape_key(table), tuple(table.column("row").to_pylist()))
        for stage, table in zip(found.stages, found.tables)
    ]


def _names(store: Storage) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in store.names(HALF_DONE):
        if match := re.fullmatch(r"(\d{5,})-\d+-[0-9a-f]{8}\.arrow", name, re.ASCII):
            found.setdefault(int(match[1]), []).append(name)
    return found


def _number(name: str) -> int:
    return int(name.split("-")[1])


def _write(file: Any, tables: Sequence[pa.Table]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(file, tables[0].schema, options=options) as stream:
        for table in tables:
            stream.write_table(table)


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGITS // 2).hexdigest().encode()


class _Hashing:
    """A file, and the hash of what is written to it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.blake2b(digest_size=DIGITS // 2)

    def write(self, piece: Any) -> int:
        self.hash.update(piece)
        return self.file.write(piece)

    def digest(self) -> bytes:
        return self.hash.hexdigest().encode()

    def flush(self) -> None:
        self.file.flush()

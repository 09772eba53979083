"""The write stage: pack batches, and commit a shard's rows and errors by one atomic create.

The create of the data file decides everything about a shard. The error rows travel inside it, in its metadata, and so do those
that were filtered: of two drivers whose rows ended differently one wins, with all of its. ``errors/00007.jsonl`` and
``filtered/00007.jsonl`` are only copies of what is in ``data/00007.parquet``, for people and ``grep``; whoever finds one missing
makes it again.
"""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import pyarrow as pa

from latentmill import checks, failpoints
from latentmill.batch import CONDITIONING, count_warnings, empty
from latentmill.columns import Columns
from latentmill.fields import OWN_FIELDS
from latentmill.plugin import CommittingStage, LatentSpec, Reject, Sink, StageContext
from latentmill.shards import (
    COPIES,
    ERRORS_KEY,
    FILTERED_KEY,
    NOT_NEEDED_KEY,
    PLAN_KEY,
    WARNINGS_KEY,
    ShardFile,
    data_name,
    make_copies,
    with_side_files,
)
from latentmill.storage import Storage
from latentmill.text import one_line, without_secrets


class Shards(Protocol):
    """What a plan knows of shards."""

    def hash_of(self, shard: int) -> str: ...
    @property
    def spec(self) -> LatentSpec | None: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def columns(self) -> Columns: ...

    def shard_rows(self, shard: int) -> range: ...

    def row_id(self, row: int) -> str: ...


class Write(CommittingStage):
    """Packs batches as the sink stores them; ``commit`` publishes a whole shard."""

    contract = 2
    needs = ("sink",)

    def prepare(self, context: StageContext) -> None:
        assert context.open_output is not None
        self.sink: Sink = context.plugin("sink")
        self.store: Storage = context.open_output()
        self.plan: Shards = context.plan
        self.stages, self.sampling = context.before, context.sampling

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        with checks.inside(self.sink):
            packed = self.sink.pack(batch)
        checks.same_rows(self.sink, batch, [packed])
        return packed

    def probe(self) -> str:
        """The name of a file that it has just made where shards go, for the driver to look for."""
        name = f".tmp/{uuid.uuid4().hex}-probe"
        self.store.create(name, b"")
        return name

    def commit(
        self,
        shard: int,
        packed: Sequence[pa.Table],
        errors: Sequence[Mapping[str, Any]],
        filtered: Sequence[Mapping[str, Any]] = (),
        not_needed: int = 0,
    ) -> bool:
        """See ``CommittingStage.commit``.

        Raises RuntimeError unless these are the shard's planned rows, each once, or if they don't read back so.
        """
        rows = self.plan.shard_rows(shard)
        planned, beyond = rows[: len(rows) - not_needed], rows[len(rows) - not_needed :]
        packed = [part for table in packed for part in _without(table, beyond)] if not_needed else packed
        failed, unwanted = (self._told([row for row in of if row["row"] not in beyond]) for of in (errors, filtered))
        _require_one_shape(packed)
        numbers = [number for table in packed for number in table.column("row").to_pylist()]
        _require_planned(shard, planned, [*numbers, *(row["row"] for row in (*failed, *unwanted))])
        table = pa.concat_tables(
            packed or [self.sink.pack(empty(self.stages, self.plan.spec, self.sampling, self.plan.columns.schema()))],
            promote_options="default",
        )
        if numbers != sorted(numbers):  # by slices, since take() would copy, and can't past 2 GB of pictures
            order = sorted(range(len(numbers)), key=numbers.__getitem__)
            table = pa.concat_tables([table.slice(at, 1) for at in order])
        unstored = [*(field.name for field in OWN_FIELDS if not field.stored), *self.plan.columns.unstored()]
        table = table.drop_columns([name for name in unstored if name in table.column_names])

        about = {PLAN_KEY: self.plan.hash_of(shard), ERRORS_KEY: json.dumps(failed)}
        if unwanted:
            about[FILTERED_KEY] = json.dumps(unwanted)
        if not_needed:
            about[NOT_NEEDED_KEY] = str(not_needed)
        if warnings := count_warnings(table):
            about[WARNINGS_KEY] = json.dumps(warnings)
        name, ids = data_name(shard, self.sink), [self.plan.row_id(number) for number in sorted(numbers)]

        def check(temporary: str) -> None:
            with open(temporary, "rb") as file:
                if list(self.sink.row_ids(file)) != ids:
                    raise RuntimeError(f"shard {shard}: the file just written has not the rows that were written")
                file.seek(0)
                found = self.sink.metadata(file)
                for key, what in ((ERRORS_KEY, "errors"), (FILTERED_KEY, "filtered rows"), (NOT_NEEDED_KEY, "end")):
                    if found.get(key) != about.get(key):
                        raise RuntimeError(f"shard {shard}: the file just written has not the {what} that were written")

        with with_side_files(self.store, self.sink, shard, table) as side_files:
            about |= side_files.metadata
            if first := publish(self.store, name, lambda path: self.sink.write(path, table, about), check):
                side_files.keep()
        with suppress(FileNotFoundError):  # the winner's has been taken out again, to be made anew
            winner = about if first else ShardFile(self.store, self.sink, name).metadata()
            make_copies(self.store, shard, winner, [folder for folder, key in COPIES.items() if key in winner])
        return first

    def _told(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows that are not stored, as their shard tells of them: by number, each with its name."""
        found, config = [], json.dumps(self.plan.config)
        for row in sorted(rows, key=lambda row: int(row["row"])):
            about = {"row": row["row"], "row_id": self.plan.row_id(row["row"]), "stage": row["stage"]}
            about["reason"] = one_line(without_secrets(row["reason"], config))
            about |= {name: row[name] for name in ("attempt", "attempts") if name in row}
            if "scores" in row:
                about["scores"] = {
                    name: score if math.isfinite(score) else None for name, score in row["scores"].items()
                }
            found.append(about)
        return found


def publish(store: Storage, name: str, write: Callable[[str], None], check: Callable[[str], None]) -> bool:
    """Write a file aside, check what is there, and give it its name if that is free; False if another was first.

    In this order: what has a name is right. ``write`` and ``check`` are given the temporary file's path.
    """
    with store.aside(name) as temporary:
        write(temporary)
        check(temporary)
        first = store.create(name, temporary)
        failpoints.reach("published")
    return first


def _require_one_shape(packed: Sequence[pa.Table]) -> None:
    """Conditioning that is stored has one shape and dtype, which stand in the file once. Raises RuntimeError."""
    found: dict[str, Any] = {}
    for field in (field for table in packed for field in table.schema if field.name.startswith(CONDITIONING)):
        if found.setdefault(field.name, field.metadata) != field.metadata:
            raise RuntimeError(f"{field.name} has several shapes or dtypes, and can't be stored")


def _without(table: pa.Table, rows: range) -> Iterator[pa.Table]:
    """The parts of a table that are none of these rows. Slices: see ``commit``."""
    start = 0
    for at, number in enumerate([*table.column("row").to_pylist(), None]):
        if number is None or number in rows:
            if at > start:
                yield table.slice(start, at - start)
            start = at + 1


def _require_planned(shard: int, planned: range, found: Sequence[int]) -> None:
    if sorted(found) != list(planned):
        twice = [row for row, count in Counter(found).items() if count > 1]
        missing, foreign = sorted(set(planned) - set(found)), sorted(set(found) - set(planned))
        wrong = ", ".join(
            f"{len(which)} {what} ({', '.join(map(str, which[:5]))})"
            for what, which in (("missing", missing), ("twice", twice), ("foreign", foreign))
            if which
        )
        raise RuntimeError(f"shard {shard} is not what was planned: rows {wrong}")

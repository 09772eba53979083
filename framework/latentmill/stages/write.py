"""The write stage: pack batches, and commit a shard's rows and errors by one atomic create.

The create of the data file decides everything about a shard. The error rows travel inside it, in its metadata: of two
drivers whose rows failed differently one wins, with its rows and its errors. ``errors/00007.jsonl`` is only a copy of
what is in ``data/00007.parquet``, for people and ``grep``; whoever finds it missing makes it again.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import pyarrow as pa
import torch

from latentmill import checks, failpoints, tensors
from latentmill.batch import count_warnings, with_latents
from latentmill.columns import Columns
from latentmill.fields import BATCH_SCHEMA, HALFWAY, ID, OURS
from latentmill.plugin import LatentSpec, Reject, Sink, Stage
from latentmill.shards import ERRORS_KEY, WARNINGS_KEY, ShardFile, copy_errors, data_name, error_lines, with_side_files
from latentmill.storage import Storage
from latentmill.text import one_line, without_secrets


class Shards(Protocol):
    """What a plan knows of shards."""

    @property
    def spec(self) -> LatentSpec | None: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def columns(self) -> Columns: ...

    def shard_rows(self, shard: int) -> range: ...

    def row_id(self, row: int) -> str: ...


class Write(Stage):
    """Packs batches as the sink stores them; ``commit`` publishes a whole shard."""

    contract = 2

    def __init__(self, sink: Sink, store: Storage, plan: Shards, metadata: Mapping[str, str]) -> None:
        self.sink, self.store, self.plan, self.metadata = sink, store, plan, metadata

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

    def commit(self, shard: int, packed: Sequence[pa.Table], errors: Sequence[Mapping[str, Any]]) -> bool:
        """Publish a shard; False if another driver had, whose rows and errors then stand.

        ``packed``: the rows that are ok, in any order; ``errors``: ``row``, ``stage`` and ``reason`` of the others.
        Raises RuntimeError unless these are the shard's planned rows, each once, or if they don't read back so.
        """
        failed = [
            {
                "row": e["row"],
                "row_id": self.plan.row_id(e["row"]),
                "stage": e["stage"],
                "reason": self._reason(e["reason"]),
            }
            for e in sorted(errors, key=lambda e: int(e["row"]))
        ]
        numbers = [number for table in packed for number in table.column("row").to_pylist()]
        _require_planned(shard, self.plan.shard_rows(shard), [*numbers, *(e["row"] for e in failed)])
        table = pa.concat_tables(packed or [self.sink.pack(self._empty())], promote_options="default")
        if numbers != sorted(numbers):  # by slices, since take() would copy, and can't past 2 GB of pictures
            order = sorted(range(len(numbers)), key=numbers.__getitem__)
            table = pa.concat_tables([table.slice(at, 1) for at in order])
        unstored = [*(field.name for field in OURS if not field.stored), *self.plan.columns.unstored()]
        table = table.drop_columns([name for name in unstored if name in table.column_names])

        about = {**self.metadata, ERRORS_KEY: json.dumps(failed)}
        if warnings := count_warnings(table):
            about[WARNINGS_KEY] = json.dumps(warnings)
        name, ids = data_name(shard, self.sink), [self.plan.row_id(number) for number in sorted(numbers)]

        def check(temporary: str) -> None:
            with open(temporary, "rb") as file:
                if list(self.sink.row_ids(file)) != ids:
                    raise RuntimeError(f"shard {shard}: the file just written has not the rows that were written")
                file.seek(0)
                if self.sink.metadata(file).get(ERRORS_KEY) != about[ERRORS_KEY]:
                    raise RuntimeError(f"shard {shard}: the file just written has not the errors that were written")

        with with_side_files(self.store, self.sink, shard, table) as side_files:
            about |= side_files.metadata
            if first := publish(self.store, name, lambda path: self.sink.write(path, table, about), check):
                side_files.keep()
        with suppress(FileNotFoundError):  # the winner's has been taken out again, to be made anew
            winner = about if first else ShardFile(self.store, self.sink, name).metadata()
            copy_errors(self.store, shard, error_lines(winner))
        return first

    def _reason(self, reason: str) -> str:
        return one_line(without_secrets(reason, json.dumps(self.plan.config)))

    def _empty(self) -> pa.Table:
        """No rows, with the columns of this job's rows: a shard in which all failed must fit beside the others."""
        flow = self.plan.config["flow"]
        batch = BATCH_SCHEMA.empty_table()
        if self.plan.config["source"].get("id_column") is not None:
            batch = batch.append_column(ID, pa.array([], ID.type))
        for column in self.plan.columns.schema():
            batch = batch.append_column(column, pa.array([], column.type))
        if "decode" in flow:
            if "encode" in flow and "denoise" not in flow:
                batch = batch.append_column("psnr", pa.array([], pa.float64()))
            name = self.plan.spec.decoded if self.plan.spec else "image"
            sides = (1, 1, 1, 3) if name == "video" else (1, 1, 3)
            batch = tensors.with_tensor(batch, name, torch.zeros(0, *sides, dtype=torch.uint8))
        elif self.plan.spec is not None:
            spec, sampling = self.plan.spec, self.plan.config["sampling"]
            height, width = (sampling[side] or spec.downscale for side in ("height", "width"))
            shape = spec.shape(height, width, 1 if spec.time_downscale else None)
            dtype = torch.float32 if sampling["until"] else getattr(torch, spec.dtype)
            batch = with_latents(batch, torch.zeros(0, *shape, dtype=dtype), spec)
            for column in HALFWAY if sampling["until"] else ():
                batch = batch.append_column(column, pa.array([], column.type))
        return batch


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

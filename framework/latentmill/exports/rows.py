"""A finished dataset's rows, as exports are given them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from latentmill.batch import CONDITIONING, PROMPT_PREFIX, plain_rows
from latentmill.buckets import SIZE_COLUMNS
from latentmill.dataset import Dataset
from latentmill.errors import ExportError, RowError, RunError
from latentmill.exports.formats import TENSORS, TEXTS, ExportRow
from latentmill.exports.spaces import VAEFamily, family_of
from latentmill.exports.texts import StoredText, stored_text
from latentmill.plan import Plan
from latentmill.plugin import tensors
from latentmill.shards import data_name
from latentmill.sources.images import SUFFIXES
from latentmill.text import escaped, unescaped

NAMED_BY = ("file", "id")
"""Columns that say what a picture is called, the first that a dataset has: ``source.keep=[file]``, ``source.id_column=path``."""
LONGEST_NAME = 255
"""Bytes of a file's name, on the disks that there are."""
NOT_READ = {*TENSORS, "video", "state:"}
"""Columns, beside those of conditioning, that are read only if a format wants them."""


@dataclass
class ExportSource:
    """The dataset, and which of its columns says what the pictures are called."""

    there: Dataset
    names: str | None = None
    """A column; None: the first of NAMED_BY that is there."""
    columns: list[str] = field(init=False)
    family: VAEFamily | None = field(init=False)
    resolutions: list[int] = field(init=False)
    """Of a dataset with several of each picture, in the order of a picture's samples."""
    of_size: frozenset[str] = field(init=False)
    """Columns that say what a job's ``size`` did."""

    def __post_init__(self) -> None:
        """Raises ExportError if it is not finished, has no rows, or no column ``names``."""
        url, plan = self.there.store.url, self.there.plan
        if missing := len(self.there.missing()):
            raise ExportError(f"{url} is not finished: {missing:,} of its {plan.shards:,} shards are missing")
        abouts = (self.there.shard(shard).about() for shard in range(plan.shards))
        columns = next((schema.names for _, schema, rows in abouts if rows), None)  # without rows it may not say all
        if columns is None:
            raise ExportError(f"{url} has no rows: latentmill status says what became of them")
        self.columns = columns
        self.names = named_by(self.names, self.columns, url)
        self.family = family_of(plan.spec) if plan.spec is not None else None
        self.resolutions = resolutions_of(plan.config)
        self.of_size = of_size(plan)

    @cached_property
    def escaped(self) -> bool:
        """Whether the names are paths with escapes: ids of pictures, which seeds hang on."""
        source = self.there.plan.config["source"]
        return (self.names, source["name"], source.get("id_column")) == ("id", "images", "path")

    @cached_property
    def text(self) -> StoredText | None:
        """What the first row has of encodings of its prompt; None if the dataset has none. Raises RunError if it can't be read."""
        names = [name for name in self.columns if name.startswith(PROMPT_PREFIX)]
        files = (self.there.shard(shard) for shard in range(self.there.plan.shards)) if names else ()
        for file in files:
            for table in file.read(["row_id", *names], range(min(1, file.about()[2]))):
                if isinstance(table, RowError):
                    raise RunError(f"{self.there.store.url}/{file.name}: {table}")
                held = {name.removeprefix(PROMPT_PREFIX): tensors.shared(table, name)[0] for name in names}
                shapes = {name: tuple(values.shape[1:]) for name, values in held.items()}
                return stored_text(shapes, self.there.plan.config)
        return None

    def rows(self, shard: int, wanted: Sequence[str] = ()) -> Iterator[ExportRow]:
        """The rows of a shard that are ok, in order, with these tensors. Raises RunError if one is damaged."""
        for table in self._read(shard, [name for name in self.columns if _is_plain(name) or name in wanted]):
            yield from self._rows(table)

    def column(self, shard: int, name: str) -> Iterator[Any]:
        """The values of a plain column of a shard, in the order of its rows. Raises RunError if one is damaged."""
        for table in self._read(shard, [name]):
            yield from table.column(name).to_pylist()

    def _read(self, shard: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        file, name = self.there.shard(shard), data_name(shard, self.there.sink)
        for piece in file.read(columns, range(file.about()[2])):
            if isinstance(piece, RowError):
                raise RunError(f"{self.there.store.url}/{name}: {piece}; latentmill verify says what is wrong with it")
            yield piece

    def _rows(self, table: pa.Table) -> Iterator[ExportRow]:
        held = {f.name: tensors.shared(table, f.name) for f in table.schema if tensors.is_tensor(f)}
        for at, columns in enumerate(plain_rows(table.drop_columns([*held]))):
            row_id = columns["row_id"]
            source_row, _, sample = row_id.partition("-")
            number = int(source_row) * self.there.plan.samples_per_row + int(sample)
            picture = columns[self.names] if self.names is not None else row_id
            picture = unescaped(picture) if self.escaped else picture
            of_row = {name: values[index[at]] for name, (values, index) in held.items()}
            text = self.text.family if not held.keys().isdisjoint(TEXTS) and self.text else None
            name, resolution = self._name(picture, row_id), self.resolutions[int(sample) % len(self.resolutions)]
            yield ExportRow(
                number, row_id, name, str(picture), columns, of_row, self.family, resolution, text, self.of_size
            )

    def _name(self, picture: Any, row_id: str) -> str:
        said = "" if picture is None else str(picture)
        if name := picture_name(said):
            return name
        raise ExportError(
            f"row {row_id}: its {self.names} is {escaped(said)!r:.100}, which is no path below a folder; "
            "--names row_id takes the row's own name"
        )


def picture_name(picture: str) -> str:
    """A picture's path without suffix; "" of what is no path that a file can be made at."""
    path = PurePosixPath(picture)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in picture:
        return ""
    stem, suffix = os.path.splitext(path.as_posix())
    return stem if suffix.lower() in SUFFIXES else path.as_posix()


def require_short(path: str, row: str) -> None:
    """Raise ExportError if a part of a file's path has more bytes than a disk takes."""
    for name in path.split("/"):
        if len(name) > LONGEST_NAME // 4 and (size := len(name.encode("utf-8", "surrogateescape"))) > LONGEST_NAME:
            raise ExportError(
                f"{row}: the name of its file, {escaped(name)[:40]}..., would have {size} bytes, and a name has {LONGEST_NAME} at "
                "most: --names row_id, or another column, gives it a shorter one"
            )


def resolutions_of(config: Mapping[str, Any]) -> list[int]:
    """The sides of the squares of a picture's samples, where a job makes several of each; else 0."""
    areas = (config.get("size") or {}).get("area")
    return [math.isqrt(area) for area in areas] if isinstance(areas, list) and areas[1:] else [0]


def of_size(plan: Plan) -> frozenset[str]:
    """The columns that say what a ``size`` did: the job's, or that of the job whose latents it kept them with."""
    kept = plan.columns.kept
    if plan.config.get("size") is not None:
        return frozenset({of.name for of in SIZE_COLUMNS} - {*kept.names})
    return frozenset(of.name for of in SIZE_COLUMNS if of in kept and plan.config["source"]["name"] == "latents")


def named_by(names: str | None, columns: Sequence[str], where: str) -> str | None:
    """The column that says what the pictures are called: ``names``, or else the first of NAMED_BY that is there. Raises ExportError."""
    plain = [name for name in columns if _is_plain(name)]
    if names is None:
        return next((name for name in NAMED_BY if name in plain), None)
    if names not in plain:
        raise ExportError(f"--names {names}: {where} has no such column; it has: {', '.join(plain)}")
    return names


def _is_plain(name: str) -> bool:
    return name not in NOT_READ and not name.startswith(CONDITIONING)

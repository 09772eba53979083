"""Latents that an earlier job of ours stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from latentmill import storage, tensors
from latentmill.batch import SPEC_KEY, spec_from_json
from latentmill.dataset import Dataset, data_name, load
from latentmill.fields import BATCH_SCHEMA, HALFWAY, MAX_SIDE, OURS
from latentmill.plugin import Fragment, LatentSpec, RowError, Source
from latentmill.sources import ParquetRows, as_id, changed, find, fingerprint, is_small, locate, root
from latentmill.text import first_line

SAMPLING = tuple(field.name for field in OURS if field.sampling)


class Latents(Source):
    """The rows of a job's output folder that holds latents, each shard a fragment; or of Parquet files of its ``data``.

    A row keeps its prompts and seed; its size is the latent's. It keeps its steps, guidance, strength and scheduler only
    if it names a scheduler: one that names none was never denoised, and the job's values are used. With ``keep_sampling:
    false`` the job's are used for all. Half-way latents bring their time, and what the scheduler remembers. ``id_column``
    may be ``id``, if the job that made them declared one, or ``row_id``.
    """

    def __init__(self, path: str, keep_sampling: bool = True, id_column: str | None = None) -> None:
        self.path, self.keep_sampling, self.id_column = path, keep_sampling, id_column
        self._files: dict[str, ParquetRows] = {}

    def latent_spec(self) -> LatentSpec:
        """The space of the latents. Raises ValueError if there are no latents."""
        return self._spec(self._names()[0])

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if there are no latents, or latents of different spaces."""
        names = self._names()
        spec = self.latent_spec()
        contents = is_small(self._root, names)
        self.fingerprinted = ("path",) if contents else ()
        found = []
        for name in names:
            if self._spec(name) != spec:
                raise ValueError(f"{self.path}: {names[0]} and {name} hold latents of different spaces")
            self._file(name).require_ids(self.id_column)
            found.append(Fragment(name, self._file(name).rows, fingerprint(self._root, [name], contents)))
        if not any(fragment.rows for fragment in found):
            raise ValueError(f"{self.path} has no rows")
        return found

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """``latents`` is an array, or a tensor where the space's dtype is bfloat16, which numpy lacks."""
        file = self._file(fragment)
        names = [*BATCH_SCHEMA.names, *HALFWAY.names, "state"]
        kept = [name for name in names if name in file.schema.names and name not in DROPPED]
        dtype = (file.schema.field("latents").metadata or {}).get(tensors.DTYPE_KEY)
        if self.id_column is not None and self.id_column not in kept:
            kept.append(self.id_column)
        for piece in file.read(start, stop, [*kept, "latents", "shape"]):
            yield from piece if isinstance(piece, list) else self._rows(piece, dtype)

    def _rows(self, table: pa.Table, dtype: bytes | None) -> Iterator[Mapping[str, Any] | RowError]:
        column = table.column("latents").combine_chunks()
        for i, row in enumerate(table.drop_columns(["latents"]).to_pylist()):
            shape = row.pop("shape")
            if self.id_column is not None:
                try:
                    row["id"] = as_id(row[self.id_column])
                except RowError as error:
                    yield error
                    continue
            if column[i].values is None or shape is None:
                yield RowError("latents are null")
                continue
            values = column[i].values.to_numpy(zero_copy_only=False)
            if any(not side or side < 0 for side in shape) or values.size != math.prod(shape):
                yield RowError(f"{values.size} latent values can't be of shape {shape}")
                continue
            if not (self.keep_sampling and row.get("scheduler")):
                row = {name: value for name, value in row.items() if name not in SAMPLING}
            if "state" in row:
                try:
                    row["state"] = {s["name"]: _tensor(s["values"], s["dtype"], s["shape"]) for s in row["state"] or ()}
                except (TypeError, KeyError, AttributeError, RuntimeError) as error:
                    yield RowError(f"the state can't be read: {first_line(error)}")
                    continue
            latents = values.reshape(shape)
            row["latents"] = torch.tensor(latents).bfloat16() if dtype == b"bfloat16" else latents
            yield row

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        file = self._file(fragment.name)
        kept = [name for name in ("prompt", "negative_prompt") if name in file.schema.names]
        for piece in file.read(0, file.rows, kept):
            for row in [{}] * len(piece) if isinstance(piece, list) else piece.to_pylist():
                yield row.get("prompt"), row.get("negative_prompt")

    def changed(self, fragment: Fragment) -> bool:
        return changed(self._root, [fragment.name], fragment.fingerprint)

    def ids(self, fragment: Fragment) -> Iterator[str | None]:
        assert self.id_column is not None
        return self._file(fragment.name).ids(self.id_column)

    def notices(self) -> list[str]:
        if self._dataset is None:
            return []
        done, shards = len(self._dataset.done()), self._dataset.plan.shards
        lines = [f"{self.path} is not finished: {done} of its {shards} shards are there"] if done < shards else []
        foreign = self._dataset.foreign()
        return lines + [f"{self.path}/data/{name} is no shard of it, and is passed over" for name in foreign]

    def _names(self) -> list[str]:
        names = find(self._data, [".parquet"])
        if self._dataset is None:
            return names
        ours = {data_name(shard, self._dataset.sink) for shard in self._dataset.done()}
        kept = [name for name in names if f"data/{name}" in ours]
        if not kept:
            raise ValueError(f"{self.path}: none of its shards is there yet")
        return kept

    @cached_property
    def _dataset(self) -> Dataset | None:
        """The dataset, where ``path`` is the folder of one, with its plan."""
        folder = locate(self.path)
        return load(storage.at(str(folder))) if (folder / "plan.json").is_file() else None

    @cached_property
    def _data(self) -> str:
        inside = locate(self.path) / "data"
        return str(inside) if inside.is_dir() else self.path

    @cached_property
    def _root(self) -> Path:
        return root(self._data)

    def _file(self, name: str) -> ParquetRows:
        if name not in self._files:
            self._files.clear()  # one file's footer and row group are enough to keep
            self._files[name] = ParquetRows(self._root / name)
        return self._files[name]

    def _spec(self, name: str) -> LatentSpec:
        schema = self._file(name).schema
        text = (schema.metadata or {}).get(SPEC_KEY)
        if text is None or not {"latents", "shape"} <= {*schema.names}:
            raise ValueError(f"{self.path}: {name} holds no latents of ours")
        for column, fits in (("latents", pa.types.is_floating), ("shape", pa.types.is_integer)):
            type = schema.field(column).type
            lists = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
            if not lists or not fits(type.value_type):
                raise ValueError(f"{self.path}: {name}: column {column} is {type}, which it can't be")
        try:
            spec = spec_from_json(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: {name} says of its latents what can't be read: {error}") from error
        if (
            not isinstance(spec.channels, int)
            or not (isinstance(spec.downscale, int) and 1 <= spec.downscale <= MAX_SIDE)
            or not (isinstance(spec.time_downscale, int) and spec.time_downscale >= 0)
            or spec.dtype not in ("float32", "float16", "bfloat16")
        ):
            raise ValueError(f"{self.path}: {name} says of its latents what can't be: {spec}")
        return spec


def _tensor(values: list[float], dtype: str, shape: list[int]) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{dtype} is no dtype")
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(kind)


DROPPED = ("row", "row_id", "width", "height")

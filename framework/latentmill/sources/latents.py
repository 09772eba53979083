"""Latents and conditioning that an earlier job of ours stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from latentmill import registry
from latentmill.batch import CONDITIONING, ENCODER_KEY, SPEC_KEY, STATE_PREFIX, spec_from_json
from latentmill.columns import reserved, unified
from latentmill.dataset import Dataset, load
from latentmill.errors import PluginError
from latentmill.fields import BATCH_SCHEMA, HALFWAY, MAX_SIDE, OWN_FIELDS
from latentmill.plugin import Fragment, LatentSpec, RowError, Source, tensors
from latentmill.shards import FOLDER, ShardFile, data_name, side_files
from latentmill.sources import as_id, files, is_text, plain, suffix
from latentmill.sources.files import Files
from latentmill.sources.kept import rows_kept
from latentmill.text import first_line

SAMPLING = tuple(field.name for field in OWN_FIELDS if field.sampling)


class Latents(Source):
    """The rows of a job's output folder that holds latents, or conditioning, each shard a fragment; or of Parquet files of its ``data``.

    A row keeps its prompts and seed; its size is the latent's. It keeps its steps, guidance, strength and scheduler only
    if it names a scheduler: one that names none was never denoised, and the job's values are used. With ``keep_sampling:
    false`` the job's are used for all. Conditioning is read where no stage of the job encodes text. Half-way latents bring their time, and what the scheduler remembers. ``id_column``
    may be ``id``, if the job that made them declared one, or ``row_id``.
    """

    contract = 2

    def __init__(self, path: str, keep_sampling: bool = True, id_column: str | None = None) -> None:
        self.path, self.keep_sampling, self.id_column = path, keep_sampling, id_column
        self._about: dict[str, tuple[list[str], pa.Schema, int]] = {}
        """Of each file the names of its side files, its columns, and how many rows it has."""
        self._schema: pa.Schema | None = None
        self._reader: _Reader | None = None

    def latent_spec(self) -> LatentSpec | None:
        """The space of the latents; None if there is only conditioning. Raises ValueError if there is neither."""
        return self._spec(self._with_rows(self._names()))

    def conditioning(self) -> dict[str, str]:
        _, schema, _ = self._of(self._with_rows(self._names()))
        stored = [field for field in schema if field.name.startswith(CONDITIONING)]
        return {field.name: (field.metadata or {}).get(ENCODER_KEY, b"").decode() for field in stored}

    def columns(self) -> list[str]:
        """Those that our own job would not make again: kept ones, and what its plugins added."""
        found = dict.fromkeys(name for file in self._names_read() for name in self._of(file)[1].names)
        used = {self.id_column, *(field.name for field in self.job_fields)}
        return [name for name in found if name not in used and not reserved(name)]

    def column_types(self, names: Sequence[str]) -> pa.Schema:
        schemas = ((file, self._of(file)[1]) for file in self._names_read())
        return unified(
            (file, name, schema.field(name).type) for file, schema in schemas for name in names if name in schema.names
        )

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if there are neither latents nor conditioning, or those of different spaces and text encoders."""
        names = self._names_read()
        first = self._with_rows(names)
        spec = self._spec(first)
        contents = self._data.known_by_contents([file for name in names for file in self._files(name)])
        self.fingerprinted = ("path",) if contents else ()
        found = []
        for name in names:
            _, schema, count = self._of(name)
            if count and self._spec(name) != spec:
                raise ValueError(f"{self.path}: {first} and {name} hold latents of different spaces")
            self._require_conditioning(name, first, count)
            self._require_own_sampling(name)
            self._require_ids(name, schema)
            found.append(Fragment(name, count, self._data.fingerprint(self._files(name), contents)))
        if not any(fragment.rows for fragment in found):
            raise ValueError(f"{self.path} has no rows")
        return found

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """``latents`` is an array, or a tensor where the space's dtype is bfloat16, which numpy lacks."""
        reader, self._reader = self._reader, None  # what fails on the way is begun anew
        _, schema, count = self._of(fragment)
        halfway = STATE_PREFIX in schema.names
        if reader is None or (reader.fragment, reader.at) != (fragment, start):
            known = [*BATCH_SCHEMA.names, *HALFWAY.names, STATE_PREFIX, *(field.name for field in self.job_fields)]
            dropped = DROPPED if "latents" in schema.names else DROPPED[:2]
            kept = [name for name in known if name in schema.names and name not in dropped]
            if self.wants_conditioning:
                kept += [name for name in schema.names if name.startswith(CONDITIONING)]
            if self.id_column is not None and self.id_column not in kept:
                kept.append(self.id_column)
            wanted = dict.fromkeys([*kept, "latents", *self._beside(schema)])
            pieces = self._file(fragment).read([*wanted], range(start, count))
            reader = _Reader(fragment, start, pieces)
        for piece in reader.take(stop - start):
            if isinstance(piece, RowError):
                yield piece
                continue
            for row, more in zip(self._rows(piece, halfway), rows_kept(piece, self._beside(schema))):
                yield row if isinstance(row, RowError) or not self.kept.names else {**row, "kept": more}
        self._reader = reader

    def _rows(self, table: pa.Table, halfway: bool) -> Iterator[Mapping[str, Any] | RowError]:
        stored = [f.name for f in table.schema if tensors.is_tensor(f) and f.name.startswith(CONDITIONING)]
        conditioning = {name: tensors.by_row(table, name, torch.device("cpu")) for name in stored}
        found = {
            f.name: tensors.from_arrow(table, f.name)
            for f in table.schema
            if tensors.is_tensor(f) and f.name not in stored
        }
        latents: Any = found.pop("latents", None)
        if latents is not None and latents.dtype != torch.bfloat16:
            latents = latents.numpy()
        dropped = [*(["latents"] if latents is not None else []), *found, *stored]
        beside = [name for name in self._beside(table.schema) if name != self.id_column]
        for i, row in enumerate(table.drop_columns([*dropped, *beside]).to_pylist()):
            if self.id_column is not None:
                try:
                    row["id"] = as_id(row[self.id_column])
                except RowError as error:
                    yield error
                    continue
            denoised = bool(row.get("scheduler"))
            if not (self.keep_sampling and denoised):
                row = {name: value for name, value in row.items() if name.rpartition(".")[2] not in SAMPLING}
            if latents is None and not self.keep_sampling:  # nothing was made with it
                row.pop("seed", None)
            if halfway:
                row["state"] = {name.removeprefix(STATE_PREFIX): tensor[i] for name, tensor in found.items()}
            if latents is not None:
                row |= {"latents": latents[i], "denoised": denoised}
            elif not row.get("width"):  # 0 where only prompts were encoded
                row = {name: value for name, value in row.items() if name not in DROPPED}
            if stored:
                row["conditioning"] = {name: each[i] for name, each in conditioning.items()}
            yield row

    def _beside(self, schema: pa.Schema) -> list[str]:
        return [name for name in self.kept.names if name in schema.names]

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        for piece in self._file(fragment.name).read(["prompt", "negative_prompt"], range(fragment.rows)):
            for row in [{}] if isinstance(piece, RowError) else piece.to_pylist():
                yield row.get("prompt"), row.get("negative_prompt")

    def expect(self, fragment: Fragment) -> None:
        self._there.expect(fragment.fingerprint)

    def changed(self, fragment: Fragment) -> bool:
        return self._data.changed(self._files(fragment.name), fragment.fingerprint)

    def stamp(self, fragment: Fragment) -> str:
        return self._data.stamp(self._files(fragment.name))

    def still(self, fragment: Fragment, runs: Sequence[tuple[str, int, int]]) -> bool | None:
        whole = [*runs] == [(fragment.name, 0, fragment.rows)]
        if whole and self._data.still(self._files(fragment.name), fragment.fingerprint):
            return True
        return None if self.id_column is not None else False

    def ids(self, fragment: Fragment) -> Iterator[str | None]:
        assert self.id_column is not None
        for piece in self._file(fragment.name).read([self.id_column], range(fragment.rows)):
            if isinstance(piece, RowError):
                yield None
                continue
            for value in plain(piece.column(self.id_column)).to_pylist():
                try:
                    yield as_id(value.decode() if isinstance(value, bytes) else value)
                except (RowError, UnicodeDecodeError):
                    yield None

    def notices(self) -> list[str]:
        left = [name for name in self.columns() if name not in self.kept.names]
        unkept = [f"{self.path}: columns not kept: {', '.join(left)} (source.keep=all keeps them)"] if left else []
        if self._dataset is None:
            return unkept
        done, shards = len(self._dataset.done()), self._dataset.plan.shards
        lines = [f"{self.path} is not finished: {done} of its {shards} shards are there"] if done < shards else []
        foreign = self._dataset.foreign()
        return unkept + lines + [f"{self.path}/data/{name} is no shard of it, and is passed over" for name in foreign]

    def _require_own_sampling(self, name: str) -> None:
        """Raise ValueError if rows are half-way in a stage with sampling of its own, and this job has no stage that takes that."""
        schema = self._of(name)[1]
        if STATE_PREFIX not in schema.names:
            return
        stages = self._dataset.plan.stages if self._dataset is not None else ()
        halfway = next((stage.name for stage in stages if HALFWAY.names[0] in stage.added()), None)
        taken = {field.name for field in self.job_fields}
        for column in schema.names:
            stage, _, field = column.rpartition(".")
            if stage and field in SAMPLING and halfway in (None, stage) and column not in taken:
                raise ValueError(
                    f"{self.path}: its rows are half-way through stage {stage}, with {field} of its own ({column}): go on with a stage of "
                    f"that name with sampling of its own, as stages.{stage}.sampling={{{field}: ...}}"
                )

    def _names(self) -> list[str]:
        if self._dataset is None:
            found = self._data.find([*self._sinks])
        else:
            sink = self._dataset.sink
            found = [data_name(shard, sink).removeprefix("data/") for shard in sorted(self._dataset.done())]
            if not found:
                raise ValueError(f"{self.path}: none of its shards is there yet")
        return found

    def _with_rows(self, names: Sequence[str]) -> str:
        """The first file that has rows: one in which all failed may not say what others hold."""
        return next((name for name in names if self._of(name)[2]), names[0])

    def _names_read(self) -> list[str]:
        """The same. What they say of themselves is known then, read of many at a time."""
        names = self._names()
        unread = [name for name in names if name not in self._about]
        for name, about in zip(unread, self._data.storage().each(self._read_about, unread)):
            self._keep(name, *about)
        return names

    @cached_property
    def _dataset(self) -> Dataset | None:
        """The dataset, where ``path`` is the folder of one, with its plan."""
        if not self._there.is_folder():
            return None
        store = self._there.storage()
        return load(store) if store.exists("plan.json") else None

    @cached_property
    def _there(self) -> Files:
        return files.at(self.path)

    @cached_property
    def _data(self) -> Files:
        """The files of rows: those in ``data/``, where there is such a folder."""
        return self._there.child("data") or self._there

    @cached_property
    def _sinks(self) -> dict[str, str]:
        """The installed sinks, by the suffix of the files that they read."""
        found: dict[str, str] = {}
        for entry in registry.entries("sink"):
            with suppress(PluginError):
                found.setdefault(getattr(registry.load("sink", entry.name), "suffix", ""), entry.name)
        return found

    def _file(self, name: str) -> ShardFile:
        if self._dataset is not None:
            return ShardFile(self._dataset.store, self._dataset.sink, f"data/{name}")
        return ShardFile(self._data.storage(), registry.build("sink", {"name": self._sinks[suffix(name)]}), name)

    def _files(self, name: str) -> list[str]:
        """A shard's file, and those beside it, relative to ``data/``."""
        return [name, *(f"../{FOLDER}/{stored_as}" for stored_as in self._of(name)[0])]

    def _of(self, name: str) -> tuple[list[str], pa.Schema, int]:
        """What a file says of itself. Raises ValueError if that can't be read."""
        if name not in self._about:
            self._keep(name, *self._read_about(name))
        return self._about[name]

    def _keep(self, name: str, metadata: Mapping[str, str], schema: pa.Schema, count: int) -> None:
        if self._schema is None or not schema.equals(self._schema, check_metadata=True):
            self._schema = schema  # of a hundred thousand files one, as a rule
        self._about[name] = [side.stored_as for side in side_files(metadata)], self._schema, count

    def _read_about(self, name: str) -> tuple[dict[str, str], pa.Schema, int]:
        try:
            return self._file(name).about()
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {first_line(error)}") from error
        except OSError as error:  # Arrow's, of what is no file of its kind
            if error.errno is not None:
                raise
            raise ValueError(f"{self.path}: {name}: {first_line(error)}") from error

    def _require_ids(self, name: str, schema: pa.Schema) -> None:
        if self.id_column is None:
            return
        if self.id_column not in schema.names:
            there = ", ".join(schema.names)[:200]
            raise ValueError(f"{self._data.file(name)} has no column {self.id_column} (id_column), only {there}")
        type = schema.field(self.id_column).type
        if not is_text(type) and not pa.types.is_integer(type):
            raise ValueError(
                f"{self._data.file(name)}: column {self.id_column} is {type}, and ids are text or whole numbers"
            )

    def _require_conditioning(self, name: str, first: str, count: int) -> None:
        """Raise ValueError unless a file has the conditioning of the first, if it has rows: a shard in which all failed has none."""
        told = [
            {f.name: f.metadata or {} for f in self._of(file)[1] if f.name.startswith(CONDITIONING)}
            for file in (first, name)
        ]
        if not count or not self.wants_conditioning:
            return
        if told[0].keys() != told[1].keys():
            raise ValueError(
                f"{self.path}: {first} and {name} have not the same conditioning: {[*told[0]]}, {[*told[1]]}"
            )
        for column, about in told[0].items():
            if about.get(ENCODER_KEY) != told[1][column].get(ENCODER_KEY):
                raise ValueError(f"{self.path}: {first} and {name} hold conditioning of different text encoders")

    def _spec(self, name: str) -> LatentSpec | None:
        _, schema, _ = self._of(name)
        if "latents" not in schema.names and any(each.startswith(CONDITIONING) for each in schema.names):
            return None
        about = (schema.field("latents").metadata or {}) if "latents" in schema.names else {}
        if SPEC_KEY not in about:
            raise ValueError(f"{self.path}: {name} holds no latents of ours")
        try:
            spec = spec_from_json(about[SPEC_KEY])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: {name} says of its latents what can't be read: {error}") from error
        if (
            not isinstance(spec.channels, int)
            or not (isinstance(spec.downscale, int) and 1 <= spec.downscale <= MAX_SIDE)
            or not (isinstance(spec.time_downscale, int) and spec.time_downscale >= 0)
            or spec.dtype not in ("float32", "float16", "bfloat16")
            or not isinstance(spec.statistics, str)
        ):
            raise ValueError(f"{self.path}: {name} says of its latents what can't be: {spec}")
        return spec


class _Reader:
    """Rows of a fragment from some row on, so that asking for the next ones reads nothing twice."""

    def __init__(self, fragment: str, at: int, pieces: Iterator[pa.Table | RowError]) -> None:
        self.fragment, self.at, self.pieces = fragment, at, pieces
        self.rest: pa.Table | None = None
        """Of a piece that was read and not taken."""

    def take(self, count: int) -> Iterator[pa.Table | RowError]:
        """The next ``count`` rows."""
        while count:
            piece = self.rest if self.rest is not None else next(self.pieces, None)
            self.rest = None
            if piece is None:
                return
            if isinstance(piece, RowError):
                taken = 1
            else:
                taken = min(count, len(piece))
                self.rest = piece.slice(taken) if taken < len(piece) else None
                piece = piece.slice(0, taken)
            count -= taken
            self.at += taken
            yield piece


DROPPED = ("row", "row_id", "width", "height")

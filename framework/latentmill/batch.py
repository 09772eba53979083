"""What travels between the stages: a batch is a ``pa.Table`` of rows of one tensor shape.

Its columns are the row's fields (``latentmill.fields``), the source's columns that the job keeps, and those in
``latentmill.plugin.stage.BATCH_COLUMNS``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from latentmill.fields import BATCH_SCHEMA, HALFWAY, ID, defaults
from latentmill.plugin import Declaration, FixedShape, LatentSpec, tensors
from latentmill.plugin.stage import named

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_PREFIX, NEGATIVE_PREFIX, STATE_PREFIX = "prompt:", "negative:", "state:"
"""Prefixes of columns of conditioning, and of what a scheduler remembers of half-way latents."""
CARRIED = "half_done:"
"""Prefix of the columns of rows that were handed over in the middle of a stage, which it alone reads."""
CONDITIONING = (PROMPT_PREFIX, NEGATIVE_PREFIX)

ENCODER_KEY = b"latentmill.text_encoder"
"""Metadata key, on the fields of conditioning that is stored, of the fingerprint of the text encoder that made it."""

PSNR = pa.field("psnr", pa.float64())
"""Of a picture that was encoded and decoded again, in dB."""

ATTEMPT = pa.field("attempt", pa.int32())
"""Of a job with ``accept``: which of a row's samples it is, from 0."""

SCHEDULER_KEY = b"latentmill.scheduler"
"""Metadata key of a batch whose rows have all one scheduler: what can be moved together travels together."""

SPEC_KEY = b"latentmill.latents"
"""Metadata key of the latent space, on the field of a ``latents`` column."""

SPACED = "latents", "latents_flipped"
"""Columns of latents, whose fields say the space."""
LATENTS = (*SPACED, "latents_std", "latents_std_flipped")
"""Columns of one tensor shape: latents, and of what spread they are."""


def from_dicts(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A batch of our fields of ``rows``, with a field's default where a row doesn't say it."""
    return pa.Table.from_pylist(defaults(rows), schema=BATCH_SCHEMA)


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Its rows as Python values. Dates and times that Python doesn't have are text."""
    try:
        found: list[dict[str, Any]] = table.to_pylist()
    except (ValueError, OverflowError):
        columns = [[_plain(value) for value in column] for column in table.columns]
        found = [dict(zip(table.column_names, row)) for row in zip(*columns)]
    return found


def _plain(value: Any) -> Any:
    """An Arrow scalar as a Python value."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        if isinstance(value, pa.MapScalar):
            return [(_plain(pair[0]), _plain(pair[1])) for pair in value.values]
        if isinstance(value, pa.StructScalar):
            return {field.name: _plain(value[at]) for at, field in enumerate(value.type)}
        if hasattr(value, "values"):  # a list of any kind
            return [_plain(inside) for inside in value.values]
        text: str = value.cast(pa.string()).as_py()
        return str(value.value) if text.startswith("<") else text  # Arrow has no words for years of six digits


def shape_key(batch: pa.Table) -> str:
    """Names what must agree for two batches to be stacked: the schema. Rows of one key can share a batch."""
    text = "|".join(f"{f.name}:{f.type}:{sorted((f.metadata or {}).items())}" for f in batch.schema)
    text += str((batch.schema.metadata or {}).get(SCHEDULER_KEY))
    shaped = (f for f in batch.schema if f.name in ("latents", "image", "video") and tensors.is_tensor(f))
    shape = next(map(tensors.shape_of, shaped), ())
    return "x".join(map(str, shape)) + "#" + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def concat(batches: Sequence[pa.Table]) -> pa.Table:
    """One batch out of several of one key, each column one chunk, in the order of their row numbers."""
    batch = batches[0] if len(batches) == 1 else tensors.concat(batches)
    numbers = batch.column("row").to_pylist()
    if any(a > b for a, b in zip(numbers, numbers[1:])):
        batch = batch.take(sorted(range(len(numbers)), key=numbers.__getitem__))
    return batch


def with_latents(batch: pa.Table, latents: Any, spec: LatentSpec, name: str = "latents") -> pa.Table:
    """The batch with its ``latents`` column and, in the field's metadata, the space that they are of."""
    batch = tensors.with_tensor(batch, name, latents)
    at = batch.schema.get_field_index(name)
    field = batch.schema.field(at)
    return batch.set_column(
        at, field.with_metadata({**field.metadata, SPEC_KEY: spec_to_json(spec).encode()}), batch.column(at)
    )


def with_warnings(batch: pa.Table, warnings: Sequence[Sequence[str]]) -> pa.Table:
    """The batch with more of what people should know of each row, which is used all the same: each text once, after "; "."""
    column = [
        "; ".join(dict.fromkeys([*filter(None, there.split("; ")), *(text.replace("; ", ", ") for text in more)]))
        for there, more in zip(batch.column("warning").to_pylist(), warnings, strict=True)
    ]
    at = batch.schema.get_field_index("warning")
    return batch.set_column(at, batch.schema.field(at), pa.array(column, pa.string()))


def count_warnings(batch: pa.Table) -> dict[str, int]:
    """How many rows have which warning."""
    found = Counter(text for value in batch.column("warning").to_pylist() for text in filter(None, value.split("; ")))
    return dict(sorted(found.items()))


def spec_to_json(spec: LatentSpec) -> str:
    """The latent space as JSON, for metadata."""
    return json.dumps(spec.about(), sort_keys=True)


def spec_from_json(text: str | bytes) -> LatentSpec:
    """The latent space out of metadata."""
    return LatentSpec(**json.loads(text))


def frames_of(batch: pa.Table, spec: LatentSpec) -> int | None:
    """How many frames the batch's clips have, stored as ``video`` or as latents of ``spec``; None if it has none."""
    if "video" in batch.column_names:
        return tensors.shape_of(batch.schema.field("video"))[0]
    if spec.time_downscale and "latents" in batch.column_names:
        return spec.pixels(tensors.shape_of(batch.schema.field("latents")))[0]
    return None


def require_spec(batch: pa.Table, spec: LatentSpec) -> None:
    """Raise ValueError if the batch's latents are of another space than ``spec``."""
    metadata = batch.schema.field("latents").metadata or {}
    found = spec_from_json(metadata[SPEC_KEY]) if SPEC_KEY in metadata else None
    if found != spec:
        raise ValueError(f"these latents are of the space {found}, and this VAE decodes {spec}")


def empty(
    stages: Sequence[Declaration], spec: LatentSpec | None, sampling: Mapping[str, Any], beside: Sequence[pa.Field] = ()
) -> pa.Table:
    """No rows, with the columns that rows have behind these stages: a shard of which none is stored must fit beside the others.

    ``beside``: plugins' fields and the source's own columns, which the first stage adds.
    Columns whose shapes only a stage's plugins know are left out: conditioning, masks, and what a scheduler remembers.
    """
    import torch

    batch = BATCH_SCHEMA.empty_table()
    for stage in stages:
        dropped = [name for name in batch.column_names if any(named(name, each) for each in stage.drops)]
        batch = batch.drop_columns(dropped)
        own = [column for column in stage.adds if column == ID.name]
        for column in [*own, *(beside if stage.position == "first" else ()), *(c for c in stage.adds if c not in own)]:
            if isinstance(column, pa.Field):
                at, values = batch.schema.get_field_index(column.name), pa.array([], column.type)
                # It is there, where a stage makes it anew: it may stand twice in the flow.
                batch = batch.append_column(column, values) if at < 0 else batch.set_column(at, column, values)
            elif column in (plain := {field.name: field for field in (ID, PSNR, *HALFWAY)}):
                batch = batch.append_column(plain[column], pa.array([], plain[column].type))
            elif column in ("image", "video", "source_image"):
                shown = spec.decoded if spec is not None and column == "source_image" else column
                sides = (1, 1, 1, 3) if shown == "video" else (1, 1, 3)
                batch = tensors.with_tensor(batch, column, torch.zeros(0, *sides, dtype=torch.uint8))
            elif column in LATENTS and spec is not None:
                height, width = (sampling[side] or spec.downscale for side in ("height", "width"))
                shape = spec.shape(height, width, 1 if spec.time_downscale else None)
                dtype = torch.float32 if "time" in stage.adds else getattr(torch, spec.dtype)
                zeros = torch.zeros(0, *shape, dtype=dtype)
                batch = (
                    with_latents(batch, zeros, spec, column)
                    if column in SPACED
                    else tensors.with_tensor(batch, column, zeros)
                )
    return batch


def fixed_slots(batch: pa.Table, fixed: FixedShape | None) -> tuple[Tensor, int]:
    """Where each row stands in the computed batch, ``[B]``, and that batch's size."""
    import torch

    if fixed is None:
        return torch.arange(len(batch)), len(batch)
    numbers = batch.column("row").to_pylist()
    places = torch.tensor([number % fixed.rows_per_shard % fixed.batch_size for number in numbers])
    return places, fixed.batch_size

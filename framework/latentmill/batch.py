"""What travels between the stages: a batch is a ``pa.Table`` of rows of one tensor shape.

Its columns are the row's fields (``latentmill.fields``, from read to write), the source's columns that the job keeps, and

=======================  ====================================  ==================================================
column                   type                                  from, to
=======================  ====================================  ==================================================
image                    tensor uint8 [H, W, 3], RGB           read to encode; decode to write
mask                     tensor uint8 [H, W], [1, h, w]        read to encode, encode to denoise: 1 where to paint
masked                   tensor as latents                     encode to denoise: of the picture, gray under the mask
latents                  tensor [C, h, w], scaled              encode to denoise to decode or write
latents_std              tensor as latents                     encode to write, where the job asks for it
time, trajectory         float64, string                       beside half-way latents only
state:NAME               tensor                                with them: what the scheduler remembers
source_image             tensor uint8 [H, W, 3]                encode to decode, where a job has no denoise
psnr                     float64, dB                           decode to the dataset, where there is a source_image
prompt:NAME              tensor, a conditioning                encode to denoise
negative:NAME            tensor, the same of the negative      encode to denoise
=======================  ====================================  ==================================================
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import tensors
from latentmill.fields import BATCH_SCHEMA, defaults
from latentmill.plugin import LatentSpec

PROMPT_PREFIX, NEGATIVE_PREFIX, STATE_PREFIX = "prompt:", "negative:", "state:"
"""Prefixes of columns of conditioning, and of what a scheduler remembers of half-way latents."""

SCHEDULER_KEY = b"latentmill.scheduler"
"""Metadata key of a batch whose rows have all one scheduler: what can be moved together travels together."""

SPEC_KEY = b"latentmill.latents"
"""Metadata key of the latent space, on the field of a ``latents`` column."""


def from_dicts(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A batch of our fields of ``rows``, with a field's default where a row doesn't say it."""
    return pa.Table.from_pylist(defaults(rows), schema=BATCH_SCHEMA)


def shape_key(batch: pa.Table) -> str:
    """Names what must agree for two batches to be stacked: the schema. Rows of one key can share a batch."""
    text = "|".join(f"{f.name}:{f.type}:{sorted((f.metadata or {}).items())}" for f in batch.schema)
    text += str((batch.schema.metadata or {}).get(SCHEDULER_KEY))
    shape = next(
        (f.type.shape for f in batch.schema if f.name in ("latents", "image", "video") and tensors.is_tensor(f)), ()
    )
    return "x".join(map(str, shape)) + "#" + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def concat(batches: Sequence[pa.Table]) -> pa.Table:
    """One batch out of several of one key, each column one chunk, in the order of their row numbers."""
    batch = batches[0] if len(batches) == 1 else pa.concat_tables(batches).combine_chunks()
    numbers = batch.column("row").to_pylist()
    if any(a > b for a, b in zip(numbers, numbers[1:])):
        batch = batch.take(sorted(range(len(numbers)), key=numbers.__getitem__))
    return batch


def with_latents(batch: pa.Table, latents: Any, spec: LatentSpec) -> pa.Table:
    """The batch with its ``latents`` column and, in the field's metadata, the space that they are of."""
    batch = tensors.with_tensor(batch, "latents", latents)
    at = batch.schema.get_field_index("latents")
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
        return int(batch.schema.field("video").type.shape[0])
    if spec.time_downscale and "latents" in batch.column_names:
        return spec.pixels(batch.schema.field("latents").type.shape)[0]
    return None


def require_spec(batch: pa.Table, spec: LatentSpec) -> None:
    """Raise ValueError if the batch's latents are of another space than ``spec``."""
    metadata = batch.schema.field("latents").metadata or {}
    found = spec_from_json(metadata[SPEC_KEY]) if SPEC_KEY in metadata else None
    if found != spec:
        raise ValueError(f"these latents are of the space {found}, and this VAE decodes {spec}")


@dataclass(frozen=True)
class FixedShape:
    """How a deterministic job computes: every batch has ``batch_size`` slots, and a row's slot follows from its number.

    What a matrix product gives for a row may depend on the batch's size and on the row's place in it, never on what
    stands in the other places. So with both fixed a row's bits are the same alone, in company, and after a resume.
    """

    batch_size: int
    rows_per_shard: int


def fixed_slots(batch: pa.Table, fixed: FixedShape | None) -> tuple[Tensor, int]:
    """Where each row stands in the computed batch, ``[B]``, and that batch's size."""
    if fixed is None:
        return torch.arange(len(batch)), len(batch)
    numbers = batch.column("row").to_pylist()
    places = torch.tensor([number % fixed.rows_per_shard % fixed.batch_size for number in numbers])
    return places, fixed.batch_size

"""What travels between the stages: a batch is a ``pa.Table`` of rows of one tensor shape.

=======================  ====================================  ==================================================
column                   type                                  from, to
=======================  ====================================  ==================================================
row                      int64                                 its number in the plan; read to write
row_id                   string                                its name for ever; read to the dataset
id                       string                                its name in the source, where that declares one
prompt                   string                                read to the dataset
negative_prompt          string, null for none                 read to the dataset
seed                     uint64                                read to the dataset: all noise of the row hangs on it
steps                    int32                                 read to the dataset
guidance_scale, strength float64                               read to the dataset
guidance_rescale         float64, from 0 to 1                  read to the dataset
guidance_from, _until    float64, times                        read to the dataset: guided where until < t <= from
scheduler                string                                read to the dataset
width, height            int32, pixels                         read to the dataset
warning                  string, "" for none                   read, encode to the dataset: see ``warned``
image                    tensor uint8 [H, W, 3], RGB           read to encode; decode to write
mask                     tensor uint8 [H, W], [1, h, w]        read to encode, encode to denoise: 1 where to paint
masked                   tensor as latents                     encode to denoise: of the picture, gray under the mask
latents                  tensor [C, h, w], scaled              encode to denoise to decode or write
latents_std              tensor as latents                     encode to write, where the job asks for it
time, trajectory         float64, string                       beside half-way latents only: see HALFWAY
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
from latentmill.plugin import LatentSpec

SCALARS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string()),  # null: none was given, which is not an empty one
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("steps", pa.int32(), nullable=False),
        pa.field("guidance_scale", pa.float64(), nullable=False),
        pa.field("guidance_rescale", pa.float64(), nullable=False),
        pa.field("guidance_from", pa.float64(), nullable=False),
        pa.field("guidance_until", pa.float64(), nullable=False),
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("scheduler", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("warning", pa.string(), nullable=False),
    ]
)
"""The columns that every batch has, from read to write."""

PLAIN_GUIDANCE = {"guidance_rescale": 0.0, "guidance_from": 1.0, "guidance_until": 0.0}

PROMPT, NEGATIVE, STATE = "prompt:", "negative:", "state:"
"""Prefixes of columns of conditioning, and of what a scheduler remembers of half-way latents."""

HALFWAY = pa.schema(
    [pa.field("time", pa.float64(), nullable=False), pa.field("trajectory", pa.string(), nullable=False)]
)
"""Beside half-way latents: the time that they are at, and what their state can be continued with (see ``denoise``)."""

ID = pa.field("id", pa.string(), nullable=False)
"""The row's own id, where the source has an ``id_column``; read to the dataset."""

SCHEDULER_KEY = b"latentmill.scheduler"
"""Metadata key of a batch whose rows have all one scheduler: what can be moved together travels together."""

SPEC_KEY = b"latentmill.latents"
"""Metadata key of the latent space, on the field of a ``latents`` column."""


LIMITS = {"steps": 100_000, "width": 1 << 16, "height": 1 << 16}
"""The most that a row or a job may ask for: beyond, it is a slip. Width times height is bounded by ``sampling.max_pixels``."""


def from_dicts(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A batch of the scalar columns of ``rows``; guidance is plain, and at all times, where a row doesn't say otherwise.

    Without ``warning`` a row has none.
    """
    complete = ({**PLAIN_GUIDANCE, "warning": "", **row} for row in rows)
    return pa.Table.from_pylist([{name: row[name] for name in SCALARS.names} for row in complete], schema=SCALARS)


def shape_key(batch: pa.Table) -> str:
    """Names what must agree for two batches to be stacked: the schema. Rows of one key can share a batch."""
    text = "|".join(f"{f.name}:{f.type}:{sorted((f.metadata or {}).items())}" for f in batch.schema)
    text += str((batch.schema.metadata or {}).get(SCHEDULER_KEY))
    shape = next((f.type.shape for f in batch.schema if f.name in ("latents", "image") and tensors.is_tensor(f)), ())
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


def warned(batch: pa.Table, warnings: Sequence[Sequence[str]]) -> pa.Table:
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
    return json.dumps(vars(spec), sort_keys=True)


def spec_from_json(text: str | bytes) -> LatentSpec:
    """The latent space out of metadata."""
    return LatentSpec(**json.loads(text))


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


def slots(batch: pa.Table, fixed: FixedShape | None) -> tuple[Tensor, int]:
    """Where each row stands in the computed batch, ``[B]``, and that batch's size."""
    if fixed is None:
        return torch.arange(len(batch)), len(batch)
    numbers = batch.column("row").to_pylist()
    places = torch.tensor([number % fixed.rows_per_shard % fixed.batch_size for number in numbers])
    return places, fixed.batch_size

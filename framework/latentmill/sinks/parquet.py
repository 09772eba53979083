"""Shards as Parquet that Hugging Face ``datasets`` opens as they are: pictures as pictures, latents as lists."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from latentmill import failpoints, tensors
from latentmill.batch import SPEC_KEY, STATE_PREFIX
from latentmill.fields import HALFWAY
from latentmill.plugin import Sink

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"info": {"features": {"image": {"_type": "Image"}}}}
"""Without it ``datasets`` gives a dict of bytes and path. Columns that it doesn't name keep their Arrow types."""
STATE = pa.list_(
    pa.struct(
        [
            ("name", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float64())),
        ]
    )
)
"""What a scheduler remembers of a row. One type whatever the scheduler is, so that all shards have one schema; float64 holds
float32 and less to the bit."""
ROW_GROUP = 16 << 20
"""Bytes of a row group, about: what reading one row at random costs."""


class Parquet(Sink):
    """A Parquet file a shard.

    ``image`` becomes a struct of file ``bytes`` and ``path``; ``latents`` a list of numbers, with its ``shape`` beside.
    ``latents_std`` are stored likewise. Latents are float16 or float32; bfloat16 is stored as float32, and the field's metadata remembers. The list is never of
    fixed size, since another shard's latents may be of another, and ``datasets`` wants one type. The space of the latents stands in the file's metadata.
    What a scheduler remembers of half-way latents becomes the column ``state``. Other tensors are left out, all other columns kept. The same rows give the same bytes.
    """

    suffix = ".parquet"

    def __init__(self, image_format: str = "png", quality: int = 90) -> None:
        """``quality``, 1 to 100, is that of webp and jpeg; png is without loss."""
        if image_format not in EXTENSIONS:
            raise ValueError(f"image_format must be one of {', '.join(EXTENSIONS)}, not {image_format!r}")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, not {quality!r}")
        self.image_format, self.quality = image_format, quality

    def pack(self, batch: pa.Table) -> pa.Table:
        fields: list[pa.Field] = []
        columns: list[Any] = []
        metadata: dict[bytes, bytes] = {}
        for field, column in zip(batch.schema, batch.columns):
            if not tensors.is_tensor(field):
                fields.append(field)
                columns.append(column)
            elif field.name == "image":
                fields.append(pa.field("image", PICTURE))
                columns.append(self._pictures(batch.column("row_id").to_pylist(), tensors.from_arrow(batch, "image")))
                metadata[b"huggingface"] = json.dumps(FEATURES).encode()
            elif field.name == "video":
                clips = tensors.from_arrow(batch, "video")
                frames = self._pictures(
                    [f"{i}-{k}" for i in batch.column("row_id").to_pylist() for k in range(clips.shape[1])],
                    clips.flatten(0, 1),
                )
                ends = pa.array(range(0, len(frames) + 1, clips.shape[1]), pa.int32())
                fields.append(pa.field("video", pa.list_(PICTURE)))
                columns.append(pa.ListArray.from_arrays(ends, frames))
            elif field.name == "latents":
                latents, about = tensors.from_arrow(batch, "latents"), field.metadata or {}
                lists, dtype = _lists(latents), {tensors.DTYPE_KEY: about[tensors.DTYPE_KEY]}
                fields += [pa.field("latents", lists.type, metadata=dtype), pa.field("shape", pa.list_(pa.int32()))]
                columns += [lists, pa.array([list(latents.shape[1:])] * len(latents), pa.list_(pa.int32()))]
                if SPEC_KEY in about:
                    metadata[SPEC_KEY] = about[SPEC_KEY]
            elif field.name == "latents_std":
                columns.append(_lists(tensors.from_arrow(batch, "latents_std")))
                fields.append(pa.field("latents_std", columns[-1].type))
        if HALFWAY.names[0] in batch.column_names:
            fields.append(pa.field("state", STATE))
            columns.append(_states(batch))
        return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))

    def _pictures(self, row_ids: list[str], images: Tensor) -> pa.StructArray:
        files = []
        for pixels in images.numpy():
            file = io.BytesIO()
            # Pillow has no quality of PNG; it ignores it.
            Image.fromarray(pixels).save(file, self.image_format.upper(), quality=self.quality)
            files.append(file.getvalue())
        paths = [row_id + EXTENSIONS[self.image_format] for row_id in row_ids]
        return pa.StructArray.from_arrays(
            [pa.array(files, pa.binary()), pa.array(paths, pa.string())], fields=list(PICTURE)
        )

    def write(self, path: str, shard: pa.Table, metadata: Mapping[str, str]) -> None:
        schema = shard.schema.with_metadata({**(shard.schema.metadata or {}), **metadata})
        scalars = [f.name for f in schema if f.name not in ("image", "latents") and not pa.types.is_nested(f.type)]
        size = max(1, len(shard) * ROW_GROUP // max(1, _bytes(shard)))
        with pq.ParquetWriter(
            path,
            schema,
            # Pictures are compressed already, and latents are noise to a compressor.
            compression={name: "zstd" for name in scalars},
            use_dictionary=scalars,
            write_statistics=scalars,
            write_page_checksum=True,
        ) as writer:
            for start in range(0, len(shard), size):
                # One chunk, whatever batches the rows came in: the writer cuts its pages at chunks.
                group = shard.slice(start, size).combine_chunks()
                writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=size)
                failpoints.reach("writing")

    def row_ids(self, file: BinaryIO) -> list[str]:
        ids: list[str] = []
        stored = opened(file)
        for group in range(stored.num_row_groups):
            ids += stored.read_row_group(group, use_threads=False).column("row_id").to_pylist()
        return ids

    def metadata(self, file: BinaryIO) -> dict[str, str]:
        found = opened(file).schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in found.items()}


def opened(file: BinaryIO) -> pq.ParquetFile:
    """A Parquet file to read in this thread alone: give ``use_threads=False`` to what reads from it, too.

    A thread of Arrow's pool that lets go of a Python file while the interpreter ends takes the process with it
    ("terminate called without an active exception"), and a command that had done its work exits with 134.
    """
    return pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)


def _lists(latents: Tensor) -> pa.LargeListArray:
    """Each of ``latents[B, ...]`` as a list of numbers, bfloat16 as float32."""
    if latents.dtype == torch.bfloat16:
        latents = latents.float()
    ends = torch.arange(len(latents) + 1) * latents.shape[1:].numel()
    return pa.LargeListArray.from_arrays(pa.array(ends.numpy()), pa.array(latents.flatten().numpy()))


def _states(batch: pa.Table) -> pa.Array:
    named = [(n, tensors.from_arrow(batch, n)) for n in batch.column_names if n.startswith(STATE_PREFIX)]
    dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in named]
    about = [
        {"name": name.removeprefix(STATE_PREFIX), "dtype": dtype, "shape": list(tensor.shape[1:])}
        for (name, tensor), dtype in zip(named, dtypes)
    ]
    values = [
        tensor.double().flatten(1).numpy() if tensor.ndim > 1 else tensor.double()[:, None].numpy()
        for _, tensor in named
    ]
    return pa.array([[{**a, "values": v[i]} for a, v in zip(about, values)] for i in range(len(batch))], STATE)


def _bytes(shard: pa.Table) -> int:
    """What pictures and latents weigh. Not ``nbytes``, which depends on how the rows are chunked."""
    total = 0
    if "image" in shard.column_names:
        total += pc.sum(pc.binary_length(pc.struct_field(shard.column("image"), "bytes"))).as_py() or 0
    for name in ("latents", "latents_std"):
        if name not in shard.column_names:
            continue
        column = shard.column(name)
        total += (pc.sum(pc.list_value_length(column)).as_py() or 0) * column.type.value_type.bit_width // 8
    return total

"""Shards as Parquet that Hugging Face ``datasets`` opens as they are: pictures as pictures, latents as lists."""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill import failpoints
from latentmill.batch import CONDITIONING, LATENTS, SPACED, SPEC_KEY, STATE_PREFIX
from latentmill.fields import HALFWAY
from latentmill.plugin import OpenSideFile, RowError, Sink, TensorSpec, tensors
from latentmill.sinks import conditioning
from latentmill.sinks.picture_files import PictureFiles, decode
from latentmill.sinks.rebuild import MOST, batches
from latentmill.text import first_line

if TYPE_CHECKING:  # who reads no tensors takes no torch
    import numpy as np
    from torch import Tensor


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
END = 8
"""Bytes at the end of a Parquet file: the length of the footer, which is before them, and ``PAR1``."""
DIGEST = 16
"""Bytes before the footer, where no reader of Parquet looks: the digest of all other bytes. Pages have checksums; the footer, and
the headers of pages, have none."""
_PIECE = 1 << 20


class Parquet(Sink):
    """A Parquet file a shard.

    ``image`` becomes a struct of file ``bytes`` and ``path``, ``video`` a list of such, a frame each; ``latents`` a list of numbers, with its ``shape`` beside.
    ``latents_std`` and flipped ones are stored likewise. Latents are float16 or float32; bfloat16 is stored as float32, and the field's metadata remembers. The list is never of
    fixed size, since another shard's latents may be of another, and ``datasets`` wants one type. The space of the latents stands in the file's metadata.
    Conditioning that is stored, ``prompt:NAME`` and ``negative:NAME``, is the bytes of the tensor, once for all rows of a prompt in a row group;
    the field's metadata has dtype and shape, and zeros at the end are left out. What a scheduler remembers of half-way latents becomes the column ``state``. Other tensors are left out, all other columns kept. The same rows give the same bytes.
    The 16 bytes before the footer are the BLAKE2b of all others.
    """

    contract = 2

    suffix = ".parquet"

    def __init__(
        self, image_format: str = "png", quality: int = 90, picture_text: Mapping[str, Any] | None = None
    ) -> None:
        """``quality``, 1 to 100, is that of webp and jpeg; png is without loss, and can carry ``picture_text``: see ``PictureFiles``."""
        self.pictures = PictureFiles(image_format, quality, picture_text)

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
                columns.append(
                    self._pictures(batch.column("row_id").to_pylist(), tensors.pictures_of(batch, "image"), batch)
                )
                metadata[b"huggingface"] = json.dumps(FEATURES).encode()
            elif field.name == "video":
                clips = tensors.pictures_of(batch, "video")
                frames = self._pictures(
                    [f"{i}-{k}" for i in batch.column("row_id").to_pylist() for k in range(clips.shape[1])],
                    clips.reshape(-1, *clips.shape[2:]),
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
            elif field.name in LATENTS:
                columns.append(_lists(tensors.from_arrow(batch, field.name)))
                kept = {tensors.DTYPE_KEY: (field.metadata or {})[tensors.DTYPE_KEY]} if field.name in SPACED else None
                fields.append(pa.field(field.name, columns[-1].type, metadata=kept))
            elif field.name.startswith(CONDITIONING):
                stored, contents = conditioning.packed(batch, field.name)
                fields.append(stored)
                columns.append(contents)
        if HALFWAY.names[0] in batch.column_names:
            fields.append(pa.field("state", STATE))
            columns.append(_states(batch))
        return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))

    def _pictures(
        self, row_ids: list[str], images: np.ndarray[Any, Any], batch: pa.Table | None = None
    ) -> pa.StructArray:
        files = list(self.pictures.encode(images, batch))
        paths = [row_id + self.pictures.extension for row_id in row_ids]
        return pa.StructArray.from_arrays(
            [pa.array(files, pa.binary()), pa.array(paths, pa.string())], fields=list(PICTURE)
        )

    def write(self, path: str, shard: pa.Table, metadata: Mapping[str, str]) -> None:
        schema = shard.schema.with_metadata({**(shard.schema.metadata or {}), **metadata})
        scalars = [f.name for f in schema if f.name not in ("image", "latents") and not pa.types.is_nested(f.type)]
        texts = [name for name in schema.names if name.startswith(CONDITIONING)]
        size = max(1, len(shard) * ROW_GROUP // max(1, _bytes(shard)))
        with pq.ParquetWriter(
            path,
            schema,
            # Pictures are compressed already, and latents are noise to a compressor.
            compression={name: "zstd" for name in scalars},
            use_dictionary=[*scalars, *texts],
            dictionary_pagesize_limit=max(1 << 20, *(_distinct(shard, name) + (1 << 20) for name in texts))
            if texts
            else None,
            write_statistics=scalars,
            write_page_checksum=True,
        ) as writer:
            for start in range(0, len(shard), size):
                # One chunk, whatever batches the rows came in: the writer cuts its pages at chunks.
                group = shard.slice(start, size)
                for name in texts:
                    at = group.schema.get_field_index(name)
                    group = group.set_column(at, group.schema.field(at), conditioning.compact(group.column(name)))
                group = group.combine_chunks()
                writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=size)
                failpoints.reach("writing")
        with open(path, "r+b") as file:
            start = _footer(file)
            digest = _digest(file, start, start)
            file.seek(start)
            footer = file.read()
            file.seek(start)
            file.write(digest + footer)

    def row_ids(self, file: BinaryIO) -> list[str]:
        start = _footer(file)
        file.seek(max(0, start - DIGEST))
        if start < DIGEST or file.read(DIGEST) != _digest(file, start - DIGEST, start):
            raise ValueError("it is not as it was written")
        stored = opened(file)
        ids: list[str] = []
        for group in range(stored.num_row_groups):
            ids += stored.read_row_group(group, columns=["row_id"], use_threads=False).column("row_id").to_pylist()
        return ids

    def metadata(self, file: BinaryIO) -> dict[str, str]:
        found = opened(file).schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in found.items()}

    def count(self, file: BinaryIO) -> int:
        return int(opened(file).metadata.num_rows)

    def schema(self, file: BinaryIO) -> pa.Schema:
        stored = opened(file).schema_arrow
        spec = (stored.metadata or {}).get(SPEC_KEY)
        fields = []
        for field in stored:
            if field.name == "image" and pa.types.is_struct(field.type):
                field = pa.field("image", pa.list_(pa.uint8()), nullable=False)
            elif field.name == "video" and pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
                field = pa.field("video", pa.list_(pa.uint8()), nullable=False)
            elif field.name in LATENTS:
                if "shape" not in stored.names:
                    continue
                _require_lists(field, pa.types.is_floating)
                _require_lists(stored.field("shape"), pa.types.is_integer)
                about = {
                    **(field.metadata or {}),
                    **({SPEC_KEY: spec} if spec and field.name in SPACED else {}),
                }
                field = pa.field(field.name, pa.list_(field.type.value_type), metadata=about)
            elif field.name.startswith(CONDITIONING):
                field = conditioning.as_lists(field)
            elif field.name == "shape" and "latents" in stored.names:
                continue
            elif field.name == "state":
                field = pa.field(STATE_PREFIX, pa.list_(pa.float64()))
            fields.append(field)
        return pa.schema(fields)

    def layout(self, schema: pa.Schema) -> dict[str, str]:
        names = [name.removesuffix(":") for name in schema.names]
        if "latents" in names:
            names.insert(names.index("latents") + 1, "shape")
        return dict.fromkeys(names, "")

    def stored_bytes(self, tensor: TensorSpec, rows: int, distinct: int) -> int:
        return distinct * tensor.bytes

    def read(
        self, file: BinaryIO, columns: Sequence[str] | None, rows: Sequence[int], side_file: OpenSideFile
    ) -> Iterator[pa.Table | RowError]:
        stored = opened(file)
        names, metadata = stored.schema_arrow.names, stored.schema_arrow.metadata or {}
        wanted = names if columns is None else [n.removesuffix(":") for n in columns if n.removesuffix(":") in names]
        if {*LATENTS} & {*wanted} and "shape" not in wanted:
            wanted = [*wanted, "shape"]
        start = 0
        for group in range(stored.num_row_groups):
            stop = start + stored.metadata.row_group(group).num_rows
            here = [at - start for at in rows[bisect_left(rows, start) : bisect_left(rows, stop)]]
            start = stop
            if not here:
                continue
            try:
                table = stored.read_row_group(group, columns=wanted, use_threads=False)
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the storage's, and may be gone soon
                    raise
                yield from [RowError(f"row group {group} is damaged: {first_line(error, 200)}")] * len(here)
                continue
            whole = here[-1] - here[0] == len(here) - 1
            table = table.slice(here[0], len(here)) if whole else table.take(here)
            yield from batches(_scalars(table), _tensors(table), metadata.get(SPEC_KEY))


def opened(file: BinaryIO) -> pq.ParquetFile:
    """A Parquet file to read in this thread alone: give ``use_threads=False`` to what reads from it, too.

    A thread of Arrow's pool that lets go of a Python file while the interpreter ends takes the process with it
    ("terminate called without an active exception"), and a command that had done its work exits with 134.
    """
    return pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)


def _footer(file: BinaryIO) -> int:
    """Where the footer of a Parquet file begins; of what is none, anywhere."""
    end = max(0, file.seek(0, os.SEEK_END) - END)
    file.seek(end)
    return end - int.from_bytes(file.read(4), "little")


def _digest(file: BinaryIO, stop: int, start: int) -> bytes:
    """Of what is before ``stop`` and from ``start`` on."""
    digest, left = hashlib.blake2b(digest_size=DIGEST), stop
    file.seek(0)
    while left > 0 and (piece := file.read(min(left, _PIECE))):
        digest.update(piece)
        left -= len(piece)
    file.seek(start)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.digest()


def _lists(latents: Tensor) -> pa.LargeListArray:
    """Each of ``latents[B, ...]`` as a list of numbers, bfloat16 as float32."""
    import torch

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
    import pyarrow.compute as pc  # takes a while, and who reads no rows needs none of it

    total = 0
    if "image" in shard.column_names:
        total += pc.sum(pc.binary_length(pc.struct_field(shard.column("image"), "bytes"))).as_py() or 0
    for name in LATENTS:
        if name not in shard.column_names:
            continue
        column = shard.column(name)
        total += (pc.sum(pc.list_value_length(column)).as_py() or 0) * column.type.value_type.bit_width // 8
    return total + sum(_distinct(shard, name) for name in shard.column_names if name.startswith(CONDITIONING))


def _distinct(shard: pa.Table, name: str) -> int:
    """What the distinct values of a column of conditioning weigh."""
    import pyarrow.compute as pc

    return pc.sum(pc.binary_length(conditioning.compact(shard.column(name)).dictionary)).as_py() or 0


def _require_lists(field: pa.Field, fits: Callable[[pa.DataType], bool]) -> None:
    type = field.type
    lists = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    if not lists or not fits(type.value_type):
        raise ValueError(f"column {field.name} is {type}, which it can't be")


def _scalars(table: pa.Table) -> pa.Table:
    """The columns that were no tensors when they travelled."""
    stored = {
        "image",
        "video",
        *LATENTS,
        "state",
        *(name for name in table.column_names if name.startswith(CONDITIONING)),
        *(["shape"] if "shape" in table.column_names else []),
    }
    return table.drop_columns([name for name in table.column_names if name in stored]).replace_schema_metadata()


def _tensors(table: pa.Table) -> Iterator[dict[str, Tensor] | RowError]:
    """Each row's tensors, by the names that they travelled under."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    dtypes = {name: (table.schema.field(name).metadata or {}).get(tensors.DTYPE_KEY) for name in columns}
    texts = {
        name: conditioning.unpacked(column, table.schema.field(name), MOST)
        for name, column in columns.items()
        if name.startswith(CONDITIONING)
    }
    for at in range(len(table)):
        told = {name: next(each) for name, each in texts.items()}
        try:
            found = {}
            if "image" in columns:
                found["image"] = decode(columns["image"][at].as_py()["bytes"])
            if "video" in columns:
                found["video"] = _clip(columns["video"][at].as_py())
            for name in LATENTS:
                if name in columns:
                    found[name] = _latents(columns[name][at].values, columns["shape"][at].as_py(), dtypes[name])
            for name, value in told.items():
                if isinstance(value, RowError):
                    raise value
                found[name] = value
            for state in (columns["state"][at].as_py() or ()) if "state" in columns else ():
                found[STATE_PREFIX + state["name"]] = _state(state["values"], state["dtype"], state["shape"])
            yield found
        except RowError as error:
            yield error
        except (TypeError, KeyError, AttributeError, RuntimeError) as error:
            yield RowError(f"the state can't be read: {first_line(error)}")


def _clip(frames: list[dict[str, Any] | None] | None) -> Tensor:
    import torch

    if not frames:
        raise RowError("the clip has no frames")
    found = []
    for k, frame in enumerate(frames):
        if frame is None or frame["bytes"] is None:
            raise RowError(f"frame {k} of the clip is null")
        found.append(decode(frame["bytes"]))
    if len({frame.shape for frame in found}) > 1:
        raise RowError("the clip has frames of several sizes")
    return torch.stack(found)


def _latents(values: pa.Array | None, shape: list[int] | None, dtype: bytes | None) -> Tensor:
    import torch

    if values is None or shape is None:
        raise RowError("latents are null")
    found = values.to_numpy(zero_copy_only=False)
    if any(not side or side < 0 for side in shape) or found.size != math.prod(shape):
        raise RowError(f"{found.size} latent values can't be of shape {shape}")
    latents = torch.tensor(found.reshape(shape))
    return latents.bfloat16() if dtype == b"bfloat16" else latents


def _state(values: list[float], dtype: str, shape: list[int]) -> Tensor:
    import torch

    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{dtype} is no dtype")
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(kind)

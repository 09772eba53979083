"""A sink: an Arrow stream a shard, which ``pyarrow.ipc.open_stream`` reads, and behind its end a checksum."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentmill.batch import SPEC_KEY
from latentmill.plugin import OpenSideFile, RowError, Sink, tensors
from latentmill.sinks.rebuild import batches

TENSOR = b"example.tensor"
"""Metadata key of a column that holds tensors, each as a .npy file."""


class ArrowStream(Sink):
    """All columns as they travel; tensors as .npy files, so that rows of several shapes fit into one column."""

    contract = 2
    suffix = ".arrow"

    def pack(self, batch: pa.Table) -> pa.Table:
        for at, field in enumerate(batch.schema):
            if tensors.is_tensor(field):
                files = [_to_npy(tensor) for tensor in tensors.from_arrow(batch, field.name)]
                packed = pa.field(field.name, pa.large_binary(), metadata={**(field.metadata or {}), TENSOR: b""})
                batch = batch.set_column(at, packed, pa.array(files, pa.large_binary()))
        return batch

    def write(self, path: str, shard: pa.Table, metadata: Mapping[str, str]) -> None:
        stream = io.BytesIO()
        schema = shard.schema.with_metadata({**(shard.schema.metadata or {}), **metadata})
        with pa.ipc.new_stream(stream, schema) as writer:
            writer.write_table(pa.Table.from_arrays(shard.combine_chunks().columns, schema=schema))
        content = stream.getvalue()
        with open(path, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())

    def row_ids(self, file: BinaryIO) -> Sequence[str]:
        content, checksum = (whole := file.read())[:-32], whole[-32:]
        if hashlib.sha256(content).digest() != checksum:
            raise ValueError("the file is not as it was written")
        return list(pa.ipc.open_stream(content).read_all().column("row_id").to_pylist())

    def metadata(self, file: BinaryIO) -> Mapping[str, str]:
        found = pa.ipc.open_stream(file).schema.metadata or {}
        return {name.decode(): value.decode() for name, value in found.items()}

    def count(self, file: BinaryIO) -> int:
        return sum(len(batch) for batch in pa.ipc.open_stream(file))

    def schema(self, file: BinaryIO) -> pa.Schema:
        stored = pa.ipc.open_stream(file).schema
        return pa.schema([_travelling(field) for field in stored])

    def read(
        self, file: BinaryIO, columns: Sequence[str] | None, rows: Sequence[int], side_file: OpenSideFile
    ) -> Iterator[pa.Table | RowError]:
        table = pa.ipc.open_stream(file).read_all().replace_schema_metadata()
        table = table.select([name for name in table.column_names if columns is None or name in columns]).take(
            list(rows)
        )
        packed = {field.name: field.metadata for field in table.schema if TENSOR in (field.metadata or {})}
        files = [
            {name: _from_npy(file, packed[name]) for name, file in row.items()}
            for row in table.select([*packed]).to_pylist()
        ]
        yield from batches(table.drop_columns([*packed]), files, packed.get("latents", {}).get(SPEC_KEY))


def _to_npy(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())  # numpy has no bfloat16
    return file.getvalue()


def _from_npy(file: bytes, about: Mapping[bytes, bytes]) -> Tensor:
    dtype: torch.dtype = getattr(torch, about[tensors.DTYPE_KEY].decode())
    return torch.from_numpy(np.load(io.BytesIO(file))).to(dtype)


def _travelling(field: pa.Field) -> pa.Field:
    if TENSOR not in (field.metadata or {}):
        return field
    about = {name: value for name, value in field.metadata.items() if name != TENSOR}
    floats = about[tensors.DTYPE_KEY] in (b"float32", b"float16", b"bfloat16")
    return pa.field(field.name, pa.list_(pa.float32() if floats else pa.uint8()), metadata=about)

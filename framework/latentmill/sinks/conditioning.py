"""Conditioning as a Parquet column: the bytes of each distinct tensor once, without zeros at its end, and which of them a row has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import pyarrow as pa

from latentmill.plugin import RowError, tensors

if TYPE_CHECKING:  # who reads no tensors takes no torch
    from torch import Tensor

STORED = pa.dictionary(pa.int32(), pa.large_binary())


def packed(batch: pa.Table, name: str) -> tuple[pa.Field, pa.DictionaryArray]:
    """A column of conditioning of a batch, as it is stored. The field says dtype and shape; of what is cut off nothing is lost."""
    values, index = tensors.shared(batch, name)
    about = batch.schema.field(name).metadata or {}
    shape = json.dumps(list(values.shape[1:])).encode()
    field = pa.field(name, STORED, metadata={**about, tensors.SHAPE_KEY: shape})
    contents = pa.array([_content(value) for value in values], pa.large_binary())
    return field, pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), contents)


def unpacked(array: pa.Array, field: pa.Field, at_once: int) -> Iterator[Tensor | RowError]:
    """Each row's tensor, as it is asked for: rows of one prompt have one, among the last ``at_once`` prompts."""
    array = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    tensor = lru_cache(at_once)(lambda k: _tensor(array.dictionary[k].as_py(), field))
    for k in array.indices:
        yield RowError(f"{field.name} is null") if k.as_py() is None else tensor(k.as_py())


def compact(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """One array, with those values alone that are used, each once, in the order in which rows have them."""
    import pyarrow.compute as pc  # takes a while, and who reads no rows needs none of it

    none = pa.array(
        [], STORED
    )  # beside it equal values become one even where there is one chunk, whatever rows came together
    whole = pa.chunked_array([*column.cast(STORED).chunks, none]).unify_dictionaries().combine_chunks()
    used = pc.unique(whole.indices.drop_null())
    return pa.DictionaryArray.from_arrays(pc.index_in(whole.indices, used), whole.dictionary.take(used))


def as_lists(field: pa.Field) -> pa.Field:
    """The field of a column as ``Sink.schema`` tells of it. Raises ValueError if it is none of ours."""
    about = field.metadata or {}
    type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not {tensors.DTYPE_KEY, tensors.SHAPE_KEY} <= about.keys() or not (
        pa.types.is_binary(type) or pa.types.is_large_binary(type)
    ):
        raise ValueError(f"column {field.name} is {field.type}, which it can't be")
    dtype = about[tensors.DTYPE_KEY].decode()
    number = {"bfloat16": pa.float32(), "bool": pa.uint8()}.get(dtype) or pa.type_for_alias(dtype)
    kept = {key: value for key, value in about.items() if key != tensors.SHAPE_KEY}
    return pa.field(field.name, pa.list_(number), nullable=False, metadata=kept)


def _content(value: Tensor) -> bytes:
    """Its bytes, less those of places along the first axis at the end that are zero to the bit: of padding, most often."""
    import torch

    value = value.contiguous()
    if value.ndim > 1 and value.numel():
        used = value.flatten(1).view(torch.uint8).any(1).nonzero()
        value = value[: int(used[-1]) + 1 if len(used) else 0]
    return value.flatten().view(torch.uint8).numpy().tobytes()


def _tensor(content: bytes | None, field: pa.Field) -> Tensor | RowError:
    import torch

    if content is None:
        return RowError(f"{field.name} is null")
    try:
        dtype, shape = (
            getattr(torch, field.metadata[tensors.DTYPE_KEY].decode()),
            json.loads(field.metadata[tensors.SHAPE_KEY]),
        )
        size = math.prod(shape) * dtype.itemsize
        if len(content) > size or (len(content) < size and len(shape) < 2) or len(content) % dtype.itemsize:
            return RowError(f"{field.name} has {len(content)} bytes, which can't be of shape {shape}")
        return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=dtype).reshape(shape)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return RowError(f"{field.name} can't be read: {error}")

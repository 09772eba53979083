"""Tensors as Arrow columns: ``arrow.fixed_shape_tensor``, without a copy on the way in and on the way out.

Arrow has no bfloat16: it rides as uint16 and the field's metadata keeps the logical dtype.

Rows may share a tensor, as rows of one prompt do its conditioning: the column is then a dictionary, values and an index a row. A
stage sees such a column only if it says ``shares_tensors``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:  # who reads only what is stored takes no torch
    import numpy as np
    import torch
    from torch import Tensor

DTYPE_KEY = b"latentmill.dtype"
PLAIN_KEY = b"latentmill.plain"
"""Of a tensor of one axis: a number a row, which Arrow keeps as a tensor of shape ``[1]``."""
SHAPE_KEY = b"latentmill.shape"
"""Of tensors that rows share: the shape of one, as JSON. Arrow's own tensors in a dictionary can't be written to a stream."""


def to_arrow(tensor: Tensor) -> pa.FixedShapeTensorArray:
    """``tensor[B, ...]`` as an Arrow array of B tensors; shares memory with a contiguous CPU tensor.

    bool becomes uint8, bfloat16 its bits as uint16. A tensor of one axis becomes B tensors of shape ``[1]``.
    """
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    if len(tensor) == 0:
        value = pa.from_numpy_dtype(tensor.numpy().dtype)
        return pa.array([], type=pa.fixed_shape_tensor(value, tuple(tensor.shape[1:])))
    return pa.FixedShapeTensorArray.from_numpy_ndarray(tensor.numpy())


def field_of(name: str, tensor: Tensor) -> pa.Field:
    """The schema field of ``to_arrow(tensor)``, with the logical dtype and no ``dim_names``, so that types compare equal."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    metadata = {DTYPE_KEY: dtype.encode(), **({PLAIN_KEY: b""} if tensor.ndim == 1 else {})}
    return pa.field(name, to_arrow(tensor[:0]).type, nullable=False, metadata=metadata)


def with_tensor(table: pa.Table, name: str, tensor: Tensor) -> pa.Table:
    """The table with the column ``name`` added, or replaced where there is one."""
    field, column = field_of(name, tensor), to_arrow(tensor)
    column = pa.ExtensionArray.from_storage(field.type, column.storage)
    at = table.schema.get_field_index(name)
    return table.append_column(field, column) if at < 0 else table.set_column(at, field, column)


def with_shared(table: pa.Table, name: str, values: Tensor, index: Sequence[int]) -> pa.Table:
    """The table with a column ``name``, new or replaced, of which row ``i`` is ``values[index[i]]``: each value is kept once."""
    about = field_of(name, values)
    column = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), to_arrow(values).storage)
    metadata = {**about.metadata, SHAPE_KEY: json.dumps(list(about.type.shape)).encode()}
    field = pa.field(name, column.type, nullable=False, metadata=metadata)
    at = table.schema.get_field_index(name)
    return table.append_column(field, column) if at < 0 else table.set_column(at, field, column)


def with_each(table: pa.Table, name: str, each: Sequence[Tensor]) -> pa.Table:
    """The table with a column ``name``, new or replaced, of which row ``i`` is ``each[i]``: rows that were given one tensor share it."""
    import torch

    distinct = {id(value): value for value in each}
    place = {key: k for k, key in enumerate(distinct)}
    return with_shared(table, name, torch.stack([*distinct.values()]), [place[id(value)] for value in each])


def from_arrow(table: pa.Table, name: str) -> Tensor:
    """Column ``name`` as a tensor ``[B, ...]``: read-only memory shared with the table if it is one chunk; clone to write."""
    if is_shared(table.schema.field(name)):
        values, index = shared(table, name)
        return values[index]
    return _tensor(_whole(table, name), table.schema.field(name))


def pictures_of(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """Column ``name``, of pictures or clips in bytes, as an array ``[B, ...]``, for those who take no torch; memory as ``from_arrow``."""
    shares = is_shared(table.schema.field(name))
    found: np.ndarray[Any, Any] = from_arrow(table, name).numpy() if shares else _whole(table, name).to_numpy_ndarray()
    return found


def _whole(table: pa.Table, name: str) -> Any:
    """A column as one array."""
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def shared(table: pa.Table, name: str) -> tuple[Tensor, list[int]]:
    """The values ``[U, ...]`` of a column, and which of them each row has: its own, where rows don't share."""
    field = table.schema.field(name)
    if not is_shared(field):
        return from_arrow(table, name), list(range(len(table)))
    array = _joined(table.column(name).chunks, field.type)
    kind = pa.fixed_shape_tensor(array.type.value_type.value_type, json.loads(field.metadata[SHAPE_KEY]))
    return _tensor(pa.ExtensionArray.from_storage(kind, array.dictionary), field), array.indices.to_pylist()


def by_row(table: pa.Table, name: str, device: torch.device) -> Sequence[Tensor]:
    """Column ``name`` as a tensor for each row, on ``device``: rows that share one there share one here."""
    values, index = shared(table, name)
    each = send(values, device).unbind()
    return [each[k] for k in index]


def _tensor(array: Any, field: pa.Field) -> Tensor:
    import torch

    logical = (field.metadata or {}).get(DTYPE_KEY)
    tensor = torch.utils.dlpack.from_dlpack(array)
    if logical == b"bfloat16":
        tensor = tensor.view(torch.bfloat16)
    elif logical == b"bool":
        tensor = tensor.to(torch.bool)
    return tensor[:, 0] if PLAIN_KEY in (field.metadata or {}) else tensor


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures as uint8: of floats, 0 for black and 1 for white, what is beyond is cut, and the rest rounded."""
    import torch

    if not pictures.is_floating_point():
        return pictures
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def as_floats(pictures: Tensor) -> Tensor:
    """Pictures as float32, 0 for black and 1 for white."""
    import torch

    return pictures if pictures.is_floating_point() else pictures.to(torch.float32) / 255


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, itself if it is there. Nothing waits for what a device has yet to do, as ``to`` alone would."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    # A copy out of plain memory, if it is large, waits all the same.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=device.type != "mps")


def is_tensor(field: pa.Field) -> bool:
    """Whether the column holds tensors."""
    return isinstance(field.type, pa.FixedShapeTensorType) or is_shared(field)


def shape_of(field: pa.Field) -> tuple[int, ...]:
    """The shape of one row's tensor, of a column in which rows share them, too."""
    return tuple(json.loads(field.metadata[SHAPE_KEY]) if is_shared(field) else field.type.shape)


def is_shared(field: pa.Field) -> bool:
    """Whether the column holds tensors that rows share."""
    return pa.types.is_dictionary(field.type) and SHAPE_KEY in (field.metadata or {})


def expanded(table: pa.Table) -> pa.Table:
    """The table with a tensor of its own for each row."""
    for at, field in enumerate(table.schema):
        if is_shared(field):
            table = with_tensor(table, field.name, from_arrow(table, field.name))
            about = {key: value for key, value in field.metadata.items() if key != SHAPE_KEY}
            table = table.set_column(at, table.schema.field(at).with_metadata(about), table.column(at))
    return table


def compact(table: pa.Table) -> pa.Table:
    """The table without shared values that no row of it has: a part of another table has them all."""
    for at, field in enumerate(table.schema):
        if is_shared(field):
            table = table.set_column(at, field, _joined(table.column(at).chunks, field.type))
    return table


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of several of one schema, each column one chunk. Arrow can't put dictionaries of tensors together."""
    schema = tables[0].schema
    names = [field.name for field in schema if is_shared(field)]
    plain = pa.concat_tables([table.drop_columns(names) for table in tables]).combine_chunks()
    columns = [
        _joined([chunk for table in tables for chunk in table.column(name).chunks], schema.field(name).type)
        if name in names
        else plain.column(name)
        for name in schema.names
    ]
    return pa.table(columns, schema=schema)


def _joined(chunks: Sequence[pa.DictionaryArray], kind: pa.DictionaryType) -> pa.DictionaryArray:
    """One array of several, with those values alone that are used; itself, if it is so."""
    dictionaries: dict[tuple[int, ...], pa.Array] = {}
    """By where they lie: parts of one table have one."""
    rows: list[tuple[tuple[int, ...], int]] = []
    for chunk in chunks:
        dictionary = chunk.dictionary
        where = dictionary.buffers()[-1].address, dictionary.offset, len(dictionary)
        dictionaries[where] = dictionary
        rows += [(where, k) for k in chunk.indices.to_pylist()]
    used = {*rows}
    if len(chunks) == 1 and len(used) == len(chunks[0].dictionary):
        return chunks[0]
    places, values = dict[tuple[tuple[int, ...], int], int](), [pa.array([], kind.value_type)]
    for lies, dictionary in dictionaries.items():
        those = sorted(k for at, k in used if at == lies)
        places |= {(lies, k): len(places) + n for n, k in enumerate(those)}
        values.append(dictionary if len(those) == len(dictionary) else dictionary.take(pa.array(those, pa.int32())))
    index = pa.array([places[row] for row in rows], pa.int32())
    return pa.DictionaryArray.from_arrays(index, pa.concat_arrays(values) if len(values) != 2 else values[1])


def spread(tensor: Tensor, slots: Tensor, size: int) -> Tensor:
    """``tensor[B, ...]`` laid out at ``slots[B]`` of a zero tensor ``[size, ...]``; itself if it already lies so."""
    if len(tensor) == size:
        return tensor
    import torch

    out = torch.zeros(size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    out[slots.to(tensor.device)] = tensor
    return out

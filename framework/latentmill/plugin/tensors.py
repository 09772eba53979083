"""Tensors as Arrow columns: ``arrow.fixed_shape_tensor``, without a copy on the way in and on the way out.

Arrow has no bfloat16: it rides as uint16 and the field's metadata keeps the logical dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:  # who reads only what is stored takes no torch
    from torch import Tensor

DTYPE_KEY = b"latentmill.dtype"
PLAIN_KEY = b"latentmill.plain"
"""Of a tensor of one axis: a number a row, which Arrow keeps as a tensor of shape ``[1]``."""


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


def from_arrow(table: pa.Table, name: str) -> Tensor:
    """Column ``name`` as a tensor ``[B, ...]``: read-only memory shared with the table if it is one chunk; clone to write."""
    import torch

    field = table.schema.field(name)
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    logical = (field.metadata or {}).get(DTYPE_KEY)
    tensor = torch.utils.dlpack.from_dlpack(array)
    if logical == b"bfloat16":
        tensor = tensor.view(torch.bfloat16)
    elif logical == b"bool":
        tensor = tensor.to(torch.bool)
    return tensor[:, 0] if PLAIN_KEY in (field.metadata or {}) else tensor


def is_tensor(field: pa.Field) -> bool:
    """Whether the column holds tensors."""
    return isinstance(field.type, pa.FixedShapeTensorType)


def spread(tensor: Tensor, slots: Tensor, size: int) -> Tensor:
    """``tensor[B, ...]`` laid out at ``slots[B]`` of a zero tensor ``[size, ...]``; itself if it already lies so."""
    if len(tensor) == size:
        return tensor
    import torch

    out = torch.zeros(size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    out[slots.to(tensor.device)] = tensor
    return out

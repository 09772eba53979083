"""Tensors in Arrow columns: the same bits, and no copy."""

import pyarrow as pa
import pytest
import torch

from latentmill.plugin import tensors

ROWS = pa.table({"row": [3, 1, 2]})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.float64]
)
def test_the_same_bits_come_back(dtype):
    x = (torch.rand(3, 4, 5) * 3).to(dtype)
    back = tensors.from_arrow(tensors.with_tensor(ROWS, "x", x), "x")
    assert back.dtype == dtype and torch.equal(back, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_no_copy_either_way(dtype):
    x = torch.ones(3, 4, 5).to(dtype)
    assert tensors.from_arrow(tensors.with_tensor(ROWS, "x", x), "x").data_ptr() == x.data_ptr()


def test_a_slice_and_several_chunks_read_right():
    x = torch.arange(12.0).reshape(3, 2, 2)
    table = tensors.with_tensor(ROWS, "x", x)
    assert torch.equal(tensors.from_arrow(table.slice(1, 2), "x"), x[1:])
    assert torch.equal(tensors.from_arrow(pa.concat_tables([table.slice(2), table.slice(0, 1)]), "x"), x[[2, 0]])


def test_a_column_is_replaced_in_its_place():
    table = tensors.with_tensor(tensors.with_tensor(ROWS, "x", torch.zeros(3, 2)), "y", torch.zeros(3, 2))
    again = tensors.with_tensor(table, "x", torch.ones(3, 4))
    assert again.column_names == ["row", "x", "y"] and tensors.from_arrow(again, "x").shape == (3, 4)


def test_no_rows_keep_their_type():
    empty = tensors.with_tensor(ROWS, "x", torch.zeros(3, 2, 5)).slice(0, 0)
    assert empty.schema.field("x").type == tensors.field_of("x", torch.zeros(0, 2, 5)).type


def test_spread_lays_rows_at_their_slots():
    x = torch.tensor([[1.0], [2.0]])
    assert tensors.spread(x, torch.tensor([3, 1]), 4).tolist() == [[0.0], [2.0], [0.0], [1.0]]

"""Tensors in Arrow columns: the same bits, and no copy."""

import pickle

import pyarrow as pa
import pytest
import torch

from latentmill.batch import concat, frames_of, shape_key
from latentmill.plugin import LatentSpec, tensors

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


VALUES = [
    torch.rand(3, 4, 5), torch.rand(3, 4, 5).bfloat16(), torch.tensor([7, 8, 9]), torch.rand(3, 1), torch.eye(3).bool(),
]  # fmt: skip


def column(values, index, first=0):
    return tensors.with_shared(pa.table({"row": range(first, first + len(index))}), "x", values, index)


@pytest.mark.parametrize("values", VALUES, ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_rows_share_tensors_and_each_has_its_own_through_all_that_becomes_of_a_batch(values):
    index = [2, 0, 0, 2, 1]
    table, wanted = pickle.loads(pickle.dumps(column(values, index))), values[index]
    other = column(values.flip(0).contiguous(), [1, 1], 5)
    parts = {
        "whole": (table, wanted),
        "slice": (table.slice(3, 1), wanted[3:4]),
        "taken": (table.take([4, 1]), wanted[[4, 1]]),
        "filtered": (table.filter(pa.array([False, True, False, False, True])), wanted[[1, 4]]),
        "joined": (
            concat([table.slice(3, 2), other, table.slice(0, 1)]),
            torch.cat([wanted[[0, 3, 4]], values[[1, 1]]]),
        ),
        "chunks": (pa.concat_tables([table, other]), torch.cat([wanted, values[[1, 1]]])),
        "none": (table.slice(0, 0), wanted[:0]),
    }
    for part, each in parts.values():
        assert tensors.is_tensor(part.schema.field("x"))
        for form in (part, tensors.compact(part), tensors.expanded(part)):
            found = tensors.from_arrow(form, "x")
            assert found.dtype == values.dtype and torch.equal(found, each)
        rows = tensors.by_row(part, "x", torch.device("cpu"))
        assert len(rows) == len(each) and all(torch.equal(a, b) for a, b in zip(rows, each))
        dense = tensors.with_tensor(pa.table({"row": range(len(each))}), "x", each)
        assert tensors.expanded(part).schema.field("x").equals(dense.schema.field("x"), check_metadata=True)


def test_shared_values_are_kept_once_and_unused_ones_dropped():
    table = column(torch.rand(3, 4), [2, 0, 0, 2])
    assert tensors.shared(table.slice(1, 2), "x")[0].shape == (1, 4)
    joined = concat([table.slice(2, 2), table.slice(0, 2)])
    assert tensors.shared(joined, "x")[0].shape == (2, 4), "of one table's parts"
    one, two, *_ = tensors.by_row(joined, "x", torch.device("cpu"))
    assert one.data_ptr() != two.data_ptr() and tensors.compact(table).column("x").chunk(0).dictionary.nbytes == 32
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, joined.schema) as writer:
        writer.write_table(joined)
    assert pa.ipc.open_stream(stream.getvalue()).read_all().equals(joined)


@pytest.mark.parametrize("name", ["latents", "image", "video"])
def test_a_shape_is_found_of_tensors_that_rows_share_too(name):
    values, spec = torch.zeros(2, 3, 5, 4, 4), LatentSpec(3, 1, 1.0, 0.0, "float32", "clips", time_downscale=1)
    each = tensors.with_tensor(ROWS, name, values[[0, 1, 1]])
    both = tensors.with_shared(ROWS, name, values, [0, 1, 1])
    for table in (each, both):
        assert tensors.shape_of(table.schema.field(name)) == (3, 5, 4, 4)
        assert shape_key(table).startswith("3x5x4x4#")
        assert frames_of(table, spec) == {"latents": 5, "image": None, "video": 3}[name]

"""Batches: which rows can be stacked, in which order, and where they stand when batches are fixed."""

import pyarrow as pa
import pytest
import torch

from latentmill.batch import FixedShape, concat, empty, fixed_slots, require_spec, shape_key, with_latents
from latentmill.plugin import Declaration, LatentSpec, tensors

SPEC = LatentSpec(channels=4, downscale=4, scale=1.0, shift=0.0, dtype="float32", fingerprint="a")


def batch(numbers, shape=(4, 2, 2), spec=SPEC):
    latents = torch.tensor(numbers).float().reshape(-1, 1, 1, 1).expand(-1, *shape)
    return with_latents(pa.table({"row": numbers}), latents, spec)


def test_rows_of_one_shape_and_space_can_be_stacked_and_others_not():
    key = shape_key(batch([1, 2]))
    assert key.startswith("4x2x2#")
    assert shape_key(batch([7])) == key
    assert shape_key(batch([7], shape=(4, 2, 3))) != key
    other = LatentSpec(channels=4, downscale=4, scale=2.0, shift=0.0, dtype="float32", fingerprint="a")
    assert shape_key(batch([7], spec=other)) != key


def test_concat_brings_rows_into_the_plan_s_order_with_their_tensors():
    table = concat([batch([5, 9]), batch([2]), batch([7])])
    assert table.column("row").to_pylist() == [2, 5, 7, 9]
    assert tensors.from_arrow(table, "latents")[:, 0, 0, 0].tolist() == [2, 5, 7, 9]


def test_latents_of_another_space_are_refused():
    require_spec(batch([1]), SPEC)
    with pytest.raises(ValueError, match="fingerprint='b'"):
        require_spec(batch([1]), LatentSpec(**{**vars(SPEC), "fingerprint": "b"}))


def test_a_row_s_slot_follows_from_its_number():
    fixed = FixedShape(batch_size=8, rows_per_shard=20)
    places, size = fixed_slots(batch([0, 7, 8, 19, 20, 43]), fixed)
    assert size == 8 and places.tolist() == [0, 7, 0, 3, 0, 3]
    assert fixed_slots(batch([4, 6]), None)[0].tolist() == [0, 1]


def test_without_rows_a_column_that_a_stage_makes_anew_stays_in_its_place_unless_the_stage_drops_it():
    score, other = pa.field("score", pa.float64()), pa.field("other", pa.int64())
    made = [Declaration("a", adds=(score,)), Declaration("b", adds=(other,))]
    again = pa.field("score", pa.float32())
    there = empty([*made, Declaration("c", adds=(again,))], None, {}).schema
    assert there.names[-2:] == ["score", "other"] and there.field("score").type == pa.float32()
    assert empty([*made, Declaration("c", adds=(again,), drops=("score",))], None, {}).schema.names[-2:] == [
        "other",
        "score",
    ]

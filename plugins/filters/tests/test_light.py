"""What is scored without a network: blank pictures, sizes, and hashes."""

import itertools
import tracemalloc

import imagehash
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from latentmill.plugin import Filtered, tensors
from latentmill.testing import StageSuite
from latentmill.testing.batches import rows, with_clips, with_pictures
from latentmill_filters.broken import Broken
from latentmill_filters.near_duplicates import NearDuplicates
from latentmill_filters.phash import as_numbers, firsts, phash
from latentmill_filters.size import SizeBounds


class TestBroken(StageSuite):
    stage = Broken
    name = "broken"


class TestSize(StageSuite):
    stage = SizeBounds
    name = "size"


class TestNearDuplicates(StageSuite):
    stage = NearDuplicates
    name = "near_duplicates"


def done(stage, batch):
    """What a stage makes of a batch: its rows, and what it rejects."""
    told = {}
    return stage(batch, told.__setitem__).to_pylist(), told


def batch(*pictures):
    """Rows of pictures of one size."""
    stacked = torch.from_numpy(np.stack([np.asarray(each) for each in pictures]))
    return tensors.with_tensor(rows(len(pictures), *stacked.shape[1:3]), "image", stacked)


# ------------------------------------------------------------------------------------------------------------- broken

RED = np.full((6, 4, 3), (255, 0, 0), np.uint8)
HALVES = np.zeros((6, 4, 3), np.uint8)
HALVES[:3] = 255
NEARLY = np.full((10, 10, 3), 100, np.uint8)
NEARLY[0, 0, 1] = 110
"""One value of 300 is another: in its channel the deviation is 10 * sqrt(0.01 * 0.99)."""


def test_brightness_and_contrast_are_as_worked_out_by_hand():
    found, _ = done(Broken(min_contrast=None), batch(RED, HALVES, HALVES[::-1] // 5))
    assert [row["brightness"] for row in found] == pytest.approx([1 / 3, 0.5, 0.1])
    assert [row["contrast"] for row in found] == pytest.approx([0, 0.5, 0.1])
    [nearly], _ = done(Broken(min_contrast=None), batch(NEARLY))
    assert nearly["brightness"] == pytest.approx((299 * 100 + 110) / 300 / 255)
    assert nearly["contrast"] == pytest.approx(10 * (0.01 * 0.99) ** 0.5 / 255)


def test_what_is_black_of_one_colour_or_nearly_so_is_filtered():
    black = np.zeros_like(RED)
    found, told = done(Broken(), batch(black, RED, HALVES))
    assert [row["row"] for row in found] == [12]
    assert told == {
        0: Filtered("a black picture", {"brightness": 0.0, "contrast": 0.0}),
        1: Filtered("a picture of one colour", {"brightness": pytest.approx(1 / 3), "contrast": 0.0}),
    }
    _, told = done(Broken(), batch(NEARLY))
    assert told[0].reason == "contrast 0.0039 is below 0.01"


def test_a_score_that_would_read_as_its_bound_is_told_in_full():
    [why] = done(SizeBounds(max_aspect=1.33), with_pictures(1, height=300, width=400))[1].values()
    assert why.reason == f"aspect {4 / 3!r} is above 1.33"


def test_not_a_number_is_a_picture_of_one_colour_once_it_is_bytes():
    """As other programs store it; our own decode refuses the row before."""
    with np.errstate(invalid="ignore"):
        pixels = (np.full((6, 4, 3), np.nan, np.float32) * 255).astype(np.uint8)
    assert done(Broken(), batch(pixels))[1][0].scores["contrast"] == 0


def test_brightness_has_bounds_of_its_own():
    _, told = done(Broken(None, min_brightness=0.2, max_brightness=0.4), batch(RED, HALVES, HALVES // 5))
    assert {i: why.reason for i, why in told.items()} == {
        1: "brightness 0.5000 is above 0.4",
        2: "brightness 0.1000 is below 0.2",
    }


@pytest.mark.parametrize("stage", [Broken(), NearDuplicates()])
def test_a_row_without_a_picture_and_a_clip_are_errors_and_are_not_filtered(stage):
    assert {*done(stage, rows(2))[1].values()} == {
        "there is no picture here: put the stage behind decode or, where the source has pictures, before encode"
    }
    found, told = done(stage, with_clips(2))
    assert not found and {*told.values()} == {"it is a clip, and only pictures are scored here"}


# --------------------------------------------------------------------------------------------------------------- size


def test_sides_are_of_the_picture_as_it_was_opened_where_that_is_known():
    given = with_pictures(2, height=6, width=9)
    assert [(row["short_side"], row["aspect"]) for row in done(SizeBounds(), given)[0]] == [(6, 1.5)] * 2
    opened = given.append_column("original_size", pa.array([[400, 100], [99, 120]], pa.list_(pa.int32())))
    found, told = done(SizeBounds(min_side=100, max_aspect=3.5), opened)
    assert not found
    assert told == {
        0: Filtered("aspect 4.00 is above 3.5", {"short_side": 100.0, "aspect": 4.0}),
        1: Filtered("the shorter side, 99 pixels, is below 100", {"short_side": 99.0, "aspect": 120 / 99}),
    }
    assert len(done(SizeBounds(min_side=99, max_aspect=4), opened)[0]) == 2


# ------------------------------------------------------------------------------------------------------------- hashes


def test_a_hash_is_that_of_imagehash(drawn):
    sizes = [(48, 40), (8, 8), (33, 200), (640, 360)]
    for seed, (width, height) in itertools.product(range(10), sizes):
        picture = drawn(seed, width, height)
        assert phash(np.asarray(picture)) == str(imagehash.phash(picture))
    flat = np.full((20, 20, 3), 7, np.uint8)
    assert phash(flat) == str(imagehash.phash(Image.fromarray(flat)))


def test_the_hash_is_a_column(drawn):
    pictures = [drawn(seed) for seed in range(3)]
    found, _ = done(NearDuplicates(), batch(*pictures))
    assert [row["phash"] for row in found] == [str(imagehash.phash(each)) for each in pictures]


def grouped(hashes, distance):
    """For each of some hashes the first of its group, by comparing all with all."""
    of = list(range(len(hashes)))
    for i, j in itertools.combinations(range(len(hashes)), 2):
        if (hashes[i] ^ hashes[j]).bit_count() <= distance and of[i] != of[j]:
            low, high = sorted((of[i], of[j]))
            of = [low if each == high else each for each in of]
    return of


@pytest.mark.parametrize("distance", range(9))
def test_groups_are_those_that_comparing_all_with_all_finds(distance):
    random = np.random.default_rng(distance)
    hashes = []
    for _ in range(25):  # chains in which each is a few bits from the one before, and some are there again
        value = int(random.integers(0, 2**64, dtype=np.uint64))
        for _ in range(8):
            for bit in random.choice(64, int(random.integers(0, 2 * distance + 2)), replace=False):
                value ^= 1 << int(bit)
            hashes.append(value)
    random.shuffle(hashes)
    found = firsts(np.array(hashes, np.uint64), distance).tolist()
    assert found == grouped(hashes, distance)
    assert 1 < len({*found}) < len(hashes) or distance == 0


def test_memory_is_of_the_order_of_the_hashes_however_near_they_are():
    """Ten pictures of which there are a thousand copies each, of as many hashes: all pairs in one group are 500 000."""
    random = np.random.default_rng(0)
    bits = np.zeros((10, 1000), np.uint64)
    for _ in range(3):  # from the first of each, so that the farthest differ in six bits
        bits ^= np.uint64(1) << random.integers(0, 64, bits.shape, np.uint64)
    bits[:, 0] = 0
    hashes = (random.integers(0, 2**64, (10, 1), np.uint64) ^ bits).ravel()
    tracemalloc.start()
    found = firsts(hashes, 4)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 300 * len(hashes)
    assert found.tolist() == np.repeat(np.arange(0, 10_000, 1000), 1000).tolist()


def test_a_hash_of_hex_digits_is_a_number():
    assert as_numbers(["00000000000000ff", "8000000000000000"]).tolist() == [255, 2**63]
    assert firsts(as_numbers([]), 3).tolist() == []


@pytest.mark.parametrize("distance", [-1, 9])
def test_distances_of_which_groups_say_nothing_are_refused(distance):
    with pytest.raises(ValueError, match=f"^distance must be 0 to 8 bits, not {distance}$"):
        NearDuplicates(distance=distance)

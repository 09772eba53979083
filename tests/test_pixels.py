"""Pixels brought to a bucket: the mean of an area against OpenCV's and against figures worked out by hand, and what is cut."""

import cv2
import numpy as np
import pytest
from PIL import Image

from latentmill.buckets import Fit, Size
from latentmill.pixels import area, fitted


def noise(height, width, channels=3):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)


def gray(*lines):
    return np.array(lines, np.uint8)[:, :, None].repeat(3, 2)


def shown(picture):
    return picture[:, :, 0].tolist()


def test_a_mean_of_areas_by_hand():
    # Three pixels to two: each takes one and a half. (10 + 20 / 2) / 1.5 = 13.33, (20 / 2 + 40) / 1.5 = 33.33.
    assert shown(area(gray([10, 20, 40]), 2, 1)) == [[13, 33]]
    # 2 x 2 to one: a half is rounded up; of other whole factors to even, so 1.5 to 2, 2.5 to 2.
    assert shown(area(gray([1, 1], [2, 2]), 1, 1)) == [[2]] and shown(area(gray([2, 2], [3, 3]), 1, 1)) == [[3]]
    assert shown(area(gray([1, 2, 2, 3]), 2, 1)) == [[2, 2]]
    assert shown(area(gray([0, 3, 6], [30, 33, 36], [60, 63, 66]), 1, 1)) == [[33]]
    # One side alone: lines stay what they are.
    assert shown(area(gray([0, 30, 60], [90, 90, 90]), 1, 2)) == [[30], [90]]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_mean_of_areas_is_opencv_s_to_the_bit(channels):
    random = np.random.default_rng(11)
    sizes = [(7 * k, 5 * m, 5, 7) for k in (1, 2, 3, 4, 8, 49) for m in (1, 2, 3, 103) if (k, m) != (1, 1)]
    for _ in range(60):
        width, height = random.integers(1, 400, 2)
        sizes.append((height, width, int(random.integers(1, width + 1)), int(random.integers(1, height + 1))))
    sizes += [(700, 1000, 992, 694), (1333, 1999, 1024, 683), (513, 300, 299, 512)]
    for height, width, *want in sizes:
        picture = noise(height, width, channels)
        if (width, height) != (*want,):
            expected = cv2.resize(picture, want, interpolation=cv2.INTER_AREA)
            assert np.array_equal(area(picture, *want), expected), (width, height, want)


def test_the_trainers_scale_down_by_area_and_up_by_lanczos_then_cut():
    small, fit = noise(40, 30), Fit((64, 64), (64, 85))
    for way in ("kohya", "musubi"):
        found, ltrb = fitted(small, fit, None, way)
        expected = np.asarray(Image.fromarray(small).resize((64, 85), Image.LANCZOS))[10:74]
        assert np.array_equal(found, expected) and found.flags["C_CONTIGUOUS"]
        # kohya: 64 * 0.75 = 48 wide inside the bucket, 8 free at each side; musubi: what was cut.
        assert ltrb == ((8.0, 0.0, 56.0, 64.0) if way == "kohya" else (0.0, 10.0, 64.0, 74.0))
    large, fit = noise(300, 200), Fit((64, 64), (64, 96))
    found, ltrb = fitted(large, fit, (0, 2**32 - 1), "musubi")
    assert np.array_equal(found, area(large, 64, 96)[32:]) and ltrb == (0.0, 32.0, 64.0, 96.0)


def test_musubi_enlarges_alpha_with_its_colours_and_drops_it_behind():
    picture = noise(20, 20, 4)
    found, _ = fitted(picture, Fit((32, 32), (32, 32)), None, "musubi")
    assert np.array_equal(found, np.asarray(Image.fromarray(picture, "RGBA").resize((32, 32), Image.LANCZOS))[:, :, :3])
    without, _ = fitted(np.ascontiguousarray(picture[:, :, :3]), Fit((32, 32), (32, 32)), None, "musubi")
    assert not np.array_equal(found, without)


def test_ours_never_makes_the_whole_scaled_picture():
    fit = Size.of({"buckets": "sdxl"}).fit(1, 20000)  # scaled by 512 it would be 10 million lines high
    found, ltrb = fitted(np.full((20000, 1, 3), 7, np.uint8), fit, None, "ours")
    assert found.shape == (2048, 512, 3) and (found == 7).all()
    assert ltrb == (0.0, 5118976.0, 512.0, 5121024.0)


def test_a_picture_that_only_is_cut_is_not_touched():
    picture, fit = noise(10, 20), Fit((16, 8), (20, 10), as_is=True)
    for way in ("ours", "kohya", "musubi"):
        found, _ = fitted(picture, fit, None, way)
        assert np.array_equal(found, picture[1:9, 2:18])
    found, ltrb = fitted(picture, fit, (2**31, 0), "ours")
    assert np.array_equal(found, picture[:8, 2:18]) and ltrb == (2.0, 0.0, 18.0, 8.0)

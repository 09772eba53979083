"""Tables of buckets and what is chosen of them, with figures worked out by hand from the trainers' rules."""

import pytest

from latentmill.buckets import Fit, Size, kohya_crop
from latentmill.plugin import RowError

KOHYA_512 = [
    *((256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512)),
    *((576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)),
]
MUSUBI_256 = [
    *((128, 512), (144, 448), (160, 400), (176, 368), (192, 336), (208, 304), (224, 288), (240, 272), (256, 256)),
    *((272, 240), (288, 224), (304, 208), (336, 192), (368, 176), (400, 160), (448, 144), (512, 128)),
]
AUTOMODEL_256 = [(192, 320), (192, 256), (256, 256), (256, 192), (320, 192)]


def table(**given):
    [found] = Size.of(given).tables
    return found


def test_the_tables_are_those_of_the_trainers():
    assert table(buckets="kohya", area=512 * 512) == KOHYA_512
    assert table(buckets="musubi", area=256 * 256) == MUSUBI_256
    assert table(buckets="automodel", area=256 * 256) == AUTOMODEL_256


def test_kohya_s_sides_are_bounded_and_rounded_to_its_steps():
    # 1024 x 1024 within 256..1024: a side is cut at 1024, so that 832 x 1216 is none of them.
    wide = table(buckets="kohya")
    assert (832, 1024) in wide and (832, 1216) not in wide and max(max(sides) for sides in wide) == 1024
    assert (832, 1216) in table(buckets="kohya", max_side=2048)
    # 300 becomes 256, 700 becomes 704: 262144 / 256 = 1024, which 704 cuts; / 704 = 372, so 320.
    assert table(buckets="kohya", area=512 * 512, min_side=300, max_side=700)[0] == (256, 704)
    assert table(buckets="kohya", area=512 * 512, min_side=300, max_side=700)[-1] == (704, 320)


def test_sdxl_has_forty_sizes_and_a_list_is_its_own_table():
    sdxl = table(buckets="sdxl")
    assert len(sdxl) == 40 and all(width % 64 == height % 64 == 0 for width, height in sdxl)
    assert (704, 1344) in sdxl and (1344, 704) not in sdxl and (1024, 1024) in sdxl  # as the paper has them
    assert table(buckets=[[64, 32], [32, 32], [64, 32]]) == [(32, 32), (64, 32)]


@pytest.mark.parametrize(
    ("given", "picture", "bucket", "scaled"),
    [
        # The nearest aspect ratio: 1.5, of 448/576 = 0.78, 512/512, 576/448 = 1.29, 640/384 = 1.67. Scaled by 384 / 400 it is 576 wide: too narrow;
        # by 640 / 600 it is 426.67 high.
        (("kohya", 512 * 512), (600, 400), (640, 384), (640, 427)),
        # 1.2 is nearer to 1.29 (0.0857) than to 1 (0.2): 576 x 448, by 448 / 1000.
        (("kohya", 512 * 512), (1200, 1000), (576, 448), (576, 480)),
        # 704 x 320 is a bucket itself, and so is 768 x 320: the picture's own wins, whatever is near.
        (("kohya", 512 * 512), (704, 320), (704, 320), (704, 320)),
        # 3.0 lies between 832/256 = 3.25 and 768/320 = 2.4.
        (("kohya", 512 * 512), (300, 100), (832, 256), (832, 277)),
        # musubi: 1.5 lies between 304/208 = 1.46 and 336/192 = 1.75.
        (("musubi", 256 * 256), (600, 400), (304, 208), (312, 208)),
        # AutoModel: 0.5 is nearest to 192/320 = 0.6.
        (("automodel", 256 * 256), (100, 200), (192, 320), (192, 384)),
    ],
)
def test_a_picture_gets_the_bucket_of_the_nearest_aspect_ratio(given, picture, bucket, scaled):
    assert Size.of(dict(zip(("buckets", "area"), given))).fit(*picture) == Fit(bucket, scaled)


def test_of_two_that_are_equally_near_the_first_of_the_table_wins():
    # 1.5 between 1 and 2.
    assert Size.of({"buckets": [[64, 32], [32, 32]]}).fit(96, 64).bucket == (32, 32)
    # Of one aspect ratio the first, unless the picture's own size is there.
    squares = Size.of({"buckets": [[96, 96], [64, 64], [32, 32]]})
    assert [squares.fit(side, side).bucket[0] for side in (31, 32, 64, 65, 96)] == [32, 32, 64, 32, 96]


@pytest.mark.parametrize(
    ("picture", "bucket", "scaled", "as_is"),
    [
        # As many pixels as it may have, or fewer: cut to steps, not scaled.
        ((500, 300), (448, 256), (500, 300), True),
        # 1000 x 600 of 262144 pixels: 661 x 397. By width 640 x 384, by height 640 x 384: 1.667 both, so by height: 640 x 384.
        ((1000, 600), (640, 384), (640, 384), False),
        # 1600 x 900: 683 x 384. By width 640, 360 -> 320: 2.0; by height 384, 683 -> 640: 1.667, nearer to 1.778.
        ((1600, 900), (640, 384), (683, 384), False),
    ],
)
def test_kohya_without_upscale_scales_down_alone(picture, bucket, scaled, as_is):
    size = Size.of({"buckets": "kohya", "area": 512 * 512, "upscale": False})
    assert size.fit(*picture) == Fit(bucket, scaled, as_is)


def test_musubi_without_upscale_takes_a_small_picture_s_own_size_and_a_large_one_s_bucket():
    size = Size.of({"buckets": "musubi", "area": 256 * 256, "upscale": False})
    # 250 x 200 becomes 240 x 192: by 0.96 both ways.
    assert size.fit(250, 200) == Fit((240, 192), (240, 192))
    # 100 x 90: 96 x 80; by 0.96 it is 86.4 high.
    assert size.fit(100, 90) == Fit((96, 80), (96, 86))
    assert size.fit(600, 400) == Fit((304, 208), (312, 208))


@pytest.mark.parametrize("buckets", ["kohya", "musubi"])
def test_a_picture_that_is_smaller_than_a_step_is_an_error(buckets):
    size = Size.of({"buckets": buckets, "area": 512 * 512, "step": 64, "upscale": False})
    with pytest.raises(RowError, match=r"a picture of 63x400 pixels becomes 63x400, less than size.step=64"):
        size.fit(63, 400)
    assert size.fit(64, 64).bucket == (64, 64)
    if buckets == "kohya":
        with pytest.raises(
            RowError, match=r"a picture of 1x300000 pixels is narrower than size.step=64 in 262144 pixels"
        ):
            size.fit(1, 300000)


def test_each_sample_has_its_area():
    size = Size.of({"buckets": "kohya", "area": [512 * 512, 1024 * 1024]})
    assert [size.fit(900, 900, sample).bucket for sample in range(4)] == [(512, 512), (1024, 1024)] * 2


def test_kohya_s_crop_says_where_the_whole_picture_would_lie_in_the_bucket():
    # 600 x 400 into 640 x 384: 1.667 > 1.5, so 384 high and 576 wide; (640 - 576) // 2 = 32.
    assert kohya_crop((640, 384), (600, 400)) == (32.0, 0.0, 608.0, 384.0)
    # 1200 x 1000 into 576 x 448: 448 * 1.2 = 537.6; 38.4 // 2 = 19.
    assert kohya_crop((576, 448), (1200, 1000)) == (19.0, 0.0, pytest.approx(556.6), 448.0)
    # 300 x 100 into 768 x 320: 768 / 3 = 256; (320 - 256) // 2 = 32.
    assert kohya_crop((768, 320), (300, 100)) == (0.0, 32.0, 768.0, 288.0)


def test_what_is_cut_is_half_or_as_the_seed_says():
    fit = Fit((64, 64), (100, 71))
    assert fit.cut(None) == (18, 3)
    assert fit.cut((0, 0)) == (0, 0) and fit.cut((2**32 - 1, 2**32 - 1)) == (36, 7)
    assert fit.cut((2**31, 2**30)) == (18, 2)  # 37 places and 8
    center, random = Size.of({"buckets": "sdxl"}), Size.of({"buckets": "sdxl", "crop": "random"})
    assert center.draw(1) is None and random.draw(1) == random.draw(1)
    draws = [random.draw(seed) for seed in range(200)]
    assert len({*draws}) == 200 and all(0 <= number < 2**32 for draw in draws for number in draw)
    lefts = [Fit((1, 1), (4, 1)).cut(draw)[0] for draw in draws]
    assert {*lefts} == {0, 1, 2, 3} and all(30 < lefts.count(k) < 70 for k in range(4))


def test_a_plan_has_what_means_something():
    assert Size.of({"buckets": "sdxl", "flip": True}).about() == {
        "buckets": "sdxl", "crop": "center", "flip": True, "pixels": "ours",
    }  # fmt: skip
    assert Size.of({"buckets": "kohya", "area": 512 * 512, "max_side": 1000}).about() == {
        "buckets": "kohya", "area": [262144], "step": 64, "upscale": True, "min_side": 256, "max_side": 1024,
        "crop": "center", "flip": False, "pixels": "ours",
    }  # fmt: skip
    about = Size.of({"buckets": [[64, 32], [32, 32]], "pixels": "musubi", "crop": "random"}).about()
    assert about == {"buckets": [[32, 32], [64, 32]], "crop": "random", "flip": False, "pixels": "musubi"}
    for given in ({"buckets": "kohya"}, {"buckets": "musubi", "upscale": False}, {"buckets": [[8, 8]]}):
        assert Size.of(Size.of(given).about()) == Size.of(given)

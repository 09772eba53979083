"""``latentmill export --to pixart`` as PixArt-Sigma's loader and its sampler of batches take it."""

import json

import numpy as np
import pytest
from PIL import Image

from latentmill.buckets import Size

THREE = (".png", ".jpg", ".webp")
SIX = (*THREE, ".jpeg", ".JPEG", ".JPG")
"""What its loader makes .npy of, at 1ce521a; at older commits the first three."""
RATIOS = [
    0.25,
    0.26,
    0.27,
    0.28,
    0.32,
    0.33,
    0.35,
    0.4,
    0.42,
    0.48,
    0.5,
    0.52,
    0.57,
    0.6,
    0.68,
    0.72,
    0.78,
    0.82,
    0.88,
    0.94,
]
RATIOS += [
    1.0,
    1.07,
    1.13,
    1.21,
    1.29,
    1.38,
    1.46,
    1.67,
    1.75,
    2.0,
    2.09,
    2.4,
    2.5,
    2.89,
    3.0,
    3.11,
    3.62,
    3.75,
    3.88,
    4.0,
]
"""Height to width of its groups, of all four resolutions."""
SETTINGS = ("latents_std=true", "rows_per_shard=2")
SIZED = ("sampling.width=null", "sampling.height=null")


def group(height, width):
    return min(RATIOS, key=lambda ratio: abs(ratio - height / width))


def pixart(folder, resolution, listed="data_info.json", suffixes=SIX):
    """Each item of a list with its mean and its group."""
    found = []
    for item in json.loads((folder / listed).read_text(encoding="utf-8")):
        name = "_".join(item["path"].rsplit("/", 1))
        for suffix in suffixes:
            name = name.replace(suffix, ".npy")
        moments = np.load(folder / f"img_sdxl_vae_features_{resolution}resolution_ms_new" / name)
        assert item["ratio"] == item["height"] / item["width"] <= 4.5
        found.append((item, np.split(moments, 2)[0], group(item["height"], item["width"])))
    return found


@pytest.mark.parametrize("suffixes", [THREE, SIX])
def test_each_picture_s_file_is_found_whatever_its_suffix(trainers, suffixes):
    names = ["Low.WEBP", "a.jpeg", "b.JPG", "c.bmp", "d.v2.jpg", "sub/e.PNG", "sub/f.webp"]
    for at, name in enumerate(names):
        path = trainers.pictures / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (255 * (at % 2), 0, 0)).save(path, quality=100)
    output = trainers.own("sdxl", *SETTINGS)
    found = pixart(trainers.export(output, "pixart"), 256, suffixes=suffixes)
    reds = {item["path"].rpartition(".")[0]: mean[0, 0, 0] / 2 for item, mean, _ in found}
    assert len(reds) == len(found) == 3 + len(names)
    for at, name in enumerate(names):
        assert reds[name.rpartition(".")[0]] == pytest.approx(2 * (at % 2) - 1, abs=0.1), name
    kept = {item["path"] for item, *_ in found}
    assert {"d.v2.jpg", "sub/f.webp", "a b.png"} < kept

    folder = trainers.export(output, "pixart", "--names", "row_id", folder="numbered")
    assert [item["path"] for item, *_ in pixart(folder, 256, suffixes=suffixes)] == [
        f"{number:09d}-000.png" for number in range(10)
    ]


def test_a_suffix_within_a_name_is_taken_as_the_loader_takes_it(trainers):
    Image.new("RGB", (8, 8)).save(trainers.pictures / "shot.png.old.png")
    found = pixart(trainers.export(trainers.own("sdxl", *SETTINGS), "pixart"), 256)
    assert [item["path"] for item, *_ in found][-1] == "shot.png.old.png"


def test_a_batch_s_latents_have_one_shape_and_it_is_the_list_s(trainers):
    """The tall picture and the two others' buckets are not of the pictures' own ratios."""
    output = trainers.encode("sdxl", *SETTINGS, *SIZED, "size.buckets=[[16, 32], [32, 32]]")
    groups = {}
    for item, mean, ratio in pixart(trainers.export(output, "pixart"), 256):
        assert mean.shape == (4, item["height"] // 8, item["width"] // 8)
        groups.setdefault(ratio, []).append(mean.shape)
    assert groups == {1.0: [(4, 4, 4), (4, 4, 4)], 2.0: [(4, 4, 2)]}


def test_each_resolution_has_a_list_of_its_own(trainers, latentmill):
    areas = ("size.buckets=automodel", "size.area=[65536, 262144]", "samples_per_row=2")
    output = trainers.encode("sdxl", *SETTINGS, *SIZED, *areas)
    folder = trainers.export(output, "pixart")
    assert sorted(path.name for path in folder.glob("*.json")) == ["data_info_256.json", "data_info_512.json"]
    for side in (256, 512):
        found = pixart(folder, side, f"data_info_{side}.json")
        assert [item["path"] for item, *_ in found] == ["a b.png", "cats/dog.v2.png", "cats/tom.png"]
        assert all(mean.shape == (4, item["height"] // 8, item["width"] // 8) for item, mean, _ in found)
    trainers.export(output, "pixart")
    assert latentmill.out == "pixart: 0 files written, 8 were there\n"


@pytest.mark.parametrize("side", [256, 512, 1024, 2048])
def test_the_buckets_that_the_page_names_have_a_group_each(side):
    buckets = {*Size.of({"buckets": "automodel", "area": side**2}).sides()}
    assert len({group(height, width) for width, height in buckets}) == len(buckets) > 4

"""The read stage of a job with ``size``: what comes along with a picture is cut as the picture is."""

import numpy as np
import pyarrow as pa
from tests.test_read import Given, Plan, Sampling

from latentmill.plugin import Declaration, LatentSpec, StageContext, tensors
from latentmill.stages.read import Read


def read(*given, size, samples=1):
    """Each row's tensors and columns by its number, and the reasons of those that were rejected."""
    stage, plan, rejected, found = Read(), Plan(samples), {}, {}
    plan.spec = LatentSpec(4, 1, 1.0, 0.0, "float32", "")
    stage.prepare(
        StageContext.of(
            {"source": Given(*given)},
            plan=plan,
            sampling=Sampling(width=None, height=None),
            choices={"scheduler": {"name": "euler"}},
            after=[Declaration("denoise", needs=("denoiser",))],
            size=size,
        )
    )
    numbers = pa.table({"row": pa.array(range(len(given) * samples), pa.int64())})
    for table in stage(numbers, lambda i, reason: rejected.setdefault(i, reason)):
        names = [field.name for field in table.schema if tensors.is_tensor(field)]
        held = {name: tensors.from_arrow(table, name).numpy() for name in names}
        for at, row in enumerate(table.drop_columns(names).to_pylist()):
            found[row["row"]] = {**row, **{name: values[at] for name, values in held.items()}}
    return found, rejected


def striped(width, height=4):
    """Light in odd columns, and the number of each column beside it."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, 1::2, 0], picture[..., 2] = 255, np.arange(width)
    return picture


def test_a_mask_is_cut_where_its_picture_is():
    picture = striped(40)
    mask = picture[..., :1].repeat(3, 2)
    row = {"image": picture, "mask": mask}
    size = {"buckets": [[8, 4]], "crop": "random", "pixels": "musubi"}
    found, rejected = read(row, row, {**row, "mask": mask[:, 1:]}, size=size, samples=2)
    assert rejected == dict.fromkeys((4, 5), "the mask is of another size than the picture")
    for row in found.values():
        left = int(row["crop_ltrb"][0])
        assert np.array_equal(row["image"], picture[:, left : left + 8])
        assert np.array_equal(row["mask"], row["image"][..., 0] // 255)
    assert len({row["crop_ltrb"][0] for row in found.values()}) > 2


def test_the_frames_of_a_clip_are_cut_at_one_place():
    clip = np.stack([striped(40), striped(40)[:, ::-1], striped(40) // 2])
    found, _ = read(
        {"video": clip},
        {"video": clip},
        {"video": clip},
        size={"buckets": [[8, 4]], "crop": "random", "pixels": "kohya"},
    )
    places = []
    for row in found.values():
        places += [left for left in range(33) if np.array_equal(row["video"], clip[:, :, left : left + 8])]
        assert row["original_size"] == [40, 4] and row["bucket"] == [row["width"], row["height"]] == [8, 4]
    assert len(places) == 3 and len({*places}) > 1


def test_a_picture_that_would_be_huge_before_it_is_cut_is_an_error():
    thin = np.zeros((20000, 1, 3), np.uint8)
    reason = "512x10240000 are 5242880000 pixels, more than sampling.max_pixels=16777216 allows"
    for pixels in ("kohya", "musubi"):
        assert read(*[{"image": thin}] * 3, size={"buckets": "sdxl", "pixels": pixels}) == (
            {},
            dict.fromkeys(range(3), reason),
        )


def test_alpha_is_for_musubi_alone():
    row = {"image": np.full((4, 8, 4), 9, np.uint8)}
    for pixels in ("ours", "kohya"):
        _, rejected = read(row, row, row, size={"buckets": [[8, 4]], "pixels": pixels})
        assert rejected == dict.fromkeys(range(3), "a picture must be a uint8 array [H, W, 3]")
    found, _ = read(row, row, row, size={"buckets": [[8, 4]], "pixels": "musubi"})
    assert found[0]["image"].shape == (4, 8, 3)

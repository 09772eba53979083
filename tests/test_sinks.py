"""Shards as Parquet: what Hugging Face datasets makes of them, and that damage is seen."""

import hashlib
import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill.batch import SPEC_KEY, from_dicts, spec_from_json, with_latents
from latentmill.fields import BATCH_SCHEMA
from latentmill.plugin import LatentSpec, tensors
from latentmill.sinks.parquet import Parquet

SPEC = LatentSpec(channels=4, downscale=4, scale=0.5, shift=0.25, dtype="float16", fingerprint="abc")


def scalars(numbers):
    return from_dicts(
        [
            {
                "row": n,
                "row_id": f"{n:09d}-000",
                "prompt": f"prompt {n} \u2728",
                "negative_prompt": "",
                "seed": 2**64 - 1 - n,
                "steps": 20,
                "guidance_scale": 4.0,
                "strength": 1.0,
                "scheduler": "euler",
                "width": 8,
                "height": 4,
            }
            for n in numbers
        ]
    )


def pictures(numbers, height=4, width=8):
    """Row n's pixels: red n, green the line, blue the column."""
    image = torch.zeros(len(numbers), height, width, 3, dtype=torch.uint8)
    image[..., 0] = torch.tensor(numbers)[:, None, None]
    image[..., 1] = torch.arange(height)[:, None]
    image[..., 2] = torch.arange(width)
    return image


def latents(numbers, shape=(4, 2, 3), dtype=torch.float16):
    count = int(np.prod(shape))
    return torch.stack([(torch.arange(count) / 8 + n).reshape(shape) for n in numbers]).to(dtype)


def stored(path, sink, batches, **metadata):
    table = pa.concat_tables([sink.pack(batch) for batch in batches])
    sink.write(str(path), table.drop_columns(["row"]), metadata)
    return path


def load(path, **options):
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=path.parent / "cache", **options
    )


def test_datasets_opens_pictures_as_pictures(tmp_path):
    batch = tensors.with_tensor(scalars([0, 1]), "image", pictures([0, 1]))
    batch = batch.append_column("psnr", pa.array([30.5, 31.5]))
    batch = tensors.with_tensor(batch, "masked", torch.zeros(2, 5))
    data = load(stored(tmp_path / "00000.parquet", Parquet(), [batch]))
    assert data.column_names == [*BATCH_SCHEMA.names[1:], "image", "psnr"]
    for n, row in enumerate(data):
        assert isinstance(row["image"], Image.Image) and row["image"].size == (8, 4)
        assert np.array_equal(np.asarray(row["image"]), pictures([n])[0].numpy())
        assert row["prompt"] == f"prompt {n} \u2728"
        assert row["seed"] == 2**64 - 1 - n
        assert row["psnr"] == 30.5 + n
    files = pq.read_table(tmp_path / "00000.parquet").column("image").to_pylist()
    assert [file["path"] for file in files] == ["000000000-000.png", "000000001-000.png"]


@pytest.mark.parametrize(("image_format", "extension", "found"), [("webp", ".webp", "WEBP"), ("jpeg", ".jpg", "JPEG")])
def test_lossy_formats_are_close_and_get_better_with_quality(tmp_path, image_format, extension, found):
    image = pictures([7], 64, 64)
    batch = tensors.with_tensor(scalars([7]), "image", image)
    sizes = []
    for quality in (30, 95):
        path = stored(tmp_path / f"{quality}.parquet", Parquet(image_format, quality), [batch])
        [file] = pq.read_table(path).column("image").to_pylist()
        assert file["path"] == "000000007-000" + extension
        with Image.open(io.BytesIO(file["bytes"])) as picture:
            assert picture.format == found
            assert np.abs(np.asarray(picture).astype(int) - image[0].numpy()).mean() < 8
        sizes.append(len(file["bytes"]))
    assert sizes[0] < sizes[1]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="image_format must be one of png, webp, jpeg, not 'bmp'"):
        Parquet("bmp")
    with pytest.raises(ValueError, match="quality must be from 1 to 100, not 0"):
        Parquet(quality=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_datasets_opens_latents_as_lists_with_their_shape(tmp_path, dtype):
    batch = with_latents(scalars([3, 4]), latents([3, 4], dtype=dtype), SPEC)
    path = stored(tmp_path / "00000.parquet", Parquet(), [batch])
    wide = "float16" if dtype == torch.float16 else "float32"
    data = load(path)
    assert data.features["latents"] == datasets.LargeList(datasets.Value(wide))
    for n, row in zip([3, 4], data.with_format("numpy")):
        assert np.array_equal(row["latents"].reshape(row["shape"]), latents([n], dtype=dtype)[0].float().numpy())
    schema = pq.read_schema(path)
    assert spec_from_json(schema.metadata[SPEC_KEY]) == SPEC
    assert schema.field("latents").metadata[tensors.DTYPE_KEY].decode() == str(dtype).removeprefix("torch.")


def test_the_posterior_s_standard_deviation_is_stored_as_its_mean_is(tmp_path):
    batch = with_latents(scalars([0, 1]), latents([0, 1]), SPEC)
    batch = tensors.with_tensor(batch, "latents_std", 1 + latents([0, 1]))
    path = stored(tmp_path / "x.parquet", Parquet(), [batch])
    opened = datasets.load_dataset("parquet", data_files=str(path), split="train")
    for n in (0, 1):
        mean, std = (np.reshape(opened[n][name], opened[n]["shape"]) for name in ("latents", "latents_std"))
        np.testing.assert_array_equal(std, 1 + mean)


def test_latents_of_two_sizes_share_a_shard(tmp_path):
    sink = Parquet()
    small = with_latents(scalars([0]), latents([0]), SPEC)
    large = with_latents(scalars([1]), latents([1], (4, 5, 2)), SPEC)
    stored(tmp_path / "00001.parquet", sink, [small])
    stored(tmp_path / "00002.parquet", sink, [large])
    assert len(load(tmp_path / "0000[12].parquet")) == 2, "shards of one size each are of one type"
    data = load(stored(tmp_path / "00000.parquet", sink, [small, large])).with_format("numpy")
    assert [row["latents"].reshape(row["shape"]).shape for row in data] == [(4, 2, 3), (4, 5, 2)]
    assert data[1]["latents"][39] == 39 / 8 + 1


def test_a_shard_without_rows_loads_beside_others(tmp_path):
    sink = Parquet()
    image = tensors.with_tensor(scalars([0]), "image", pictures([0]))
    latent = with_latents(scalars([0]), latents([0]), SPEC)
    nothing = BATCH_SCHEMA.empty_table()
    no_image = tensors.with_tensor(nothing, "image", pictures([0])[:0])
    no_latent = with_latents(nothing, latents([0])[:0], SPEC)
    for name, full, empty in (("image", image, no_image), ("latents", latent, no_latent)):
        folder = tmp_path / name
        folder.mkdir()
        a, b = (stored(folder / f"{i}.parquet", sink, [batch]) for i, batch in enumerate((full, empty)))
        assert pq.read_schema(a).equals(pq.read_schema(b), check_metadata=True)
        assert sink.row_ids(b.open("rb")) == []
        assert len(load(folder / "*.parquet")) == 1


def test_the_same_rows_give_the_same_bytes_however_they_were_batched(tmp_path):
    def write(name, *cuts):
        numbers = list(range(50))
        parts = [numbers[a:b] for a, b in zip((0, *cuts), (*cuts, 50))]
        batches = [tensors.with_tensor(scalars(part), "image", pictures(part, 64, 64)) for part in parts]
        path = stored(tmp_path / name, Parquet(), batches, plan="x")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert len({write("a"), write("b", 1, 2, 30), write("c", 49)}) == 1


def test_a_row_group_is_small_enough_to_read_at_random(tmp_path):
    big = latents(range(10), (4, 512, 512))  # 2 MB a row
    path = stored(tmp_path / "a.parquet", Parquet(), [with_latents(scalars(range(10)), big, SPEC)])
    assert [pq.read_metadata(path).row_group(g).num_rows for g in range(2)] == [8, 2]


def test_metadata_comes_back(tmp_path):
    batch = tensors.with_tensor(scalars([0]), "image", pictures([0]))
    path = stored(tmp_path / "a.parquet", Parquet(), [batch], plan="x", errors="[\u2728]")
    found = Parquet().metadata(path.open("rb"))
    assert (found["plan"], found["errors"]) == ("x", "[\u2728]")
    assert json.loads(found["huggingface"])["info"]["features"] == {"image": {"_type": "Image"}}


def test_one_damaged_byte_anywhere_is_seen(tmp_path):
    """In pages, their headers, the footer, and what says how long that is; nor may one be missing, or one too many be there."""
    sink, ids = Parquet(), ["000000000-000", "000000001-000"]
    path = stored(tmp_path / "a.parquet", sink, [tensors.with_tensor(scalars([0, 1]), "image", pictures([0, 1]))])
    whole = path.read_bytes()
    assert sink.row_ids(io.BytesIO(whole)) == ids and pq.read_table(path).column("row_id").to_pylist() == ids
    changed = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for wrong in (*changed, *(whole[:at] for at in range(0, len(whole), 50)), whole[:-1], whole + b"1", whole[1:]):
        with pytest.raises(ValueError, match="it is not as it was written"):
            sink.row_ids(io.BytesIO(wrong))

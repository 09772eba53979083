"""``latentmill export`` to caches that trainers look up by a picture's name: each read as its trainer's loader reads it."""

import glob
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from tests.outside.trainer_parts import FAMILIES, PICTURES, files

TOM = "cats/tom.png"
"""8 x 24 pixels, red but for the last third: of channel 3, raw, 5, 5 and 1."""

# ------------------------------------------------------------------------------------------------------- sd-scripts


def kohya(folder, picture, model, size, plain):
    """What the trainer loads for a picture of this size (width, height): latents, original size, crop, flipped."""
    path = os.path.splitext(folder / picture)[0] + f"_{size[0]:04d}x{size[1]:04d}_{model}.npz"
    found, key = np.load(path), "" if plain else f"_{size[1] // 8}x{size[0] // 8}"
    flipped = found.get("latents_flipped" + key)
    return found["latents" + key], *(found[name + key].tolist() for name in ("original_size", "crop_ltrb")), flipped


@pytest.mark.parametrize(
    ("family", "model", "values"),
    [
        ("sd", "sd", [5, 5, 1]),
        ("sdxl", "sdxl", [5, 5, 1]),
        ("sd3", "sd3", [5, 5, 1]),
        ("flux", "flux", [1.76364851, 1.76364851, 0.31924851]),  # (5 - 0.1159) * 0.3611
        ("flux", "lumina", [1.76364851, 1.76364851, 0.31924851]),
    ],
)
def test_sd_scripts_loads_each_picture_s_latents(trainers, family, model, values):
    folder = trainers.export(trainers.encode(family), f"kohya-{model}")
    assert [*files(folder)] == [f"a b_0016x0008_{model}.npz", f"cats/dog.v2_0024x0016_{model}.npz", f"cats/tom_0008x0024_{model}.npz"]  # fmt: skip
    for plain in [False, True][: 1 + (model in ("sd", "sdxl"))]:
        latents, original, crop, flipped = kohya(folder, TOM, model, (8, 24), plain)
        assert latents.dtype == np.float32 and latents.shape == (FAMILIES[family]["channels"], 3, 1)
        assert latents[3].flatten().tolist() == pytest.approx(values, abs=1e-5)
        assert (original, crop, flipped) == ([8, 24], [0, 0, 8, 24], None)
    plain = "latents" in np.load(folder / "cats" / f"tom_0008x0024_{model}.npz")
    assert plain == (model in ("sd", "sdxl"))


BUCKETS = "size.buckets=[[16, 32], [32, 16]]"


def test_sd_scripts_loads_what_a_bucket_cut_and_the_mirrored_picture(trainers):
    exact = trainers.encode("sd", "size.buckets=[[16, 8], [8, 24], [24, 16]]", "size.flip=true")
    folder = trainers.export(exact, "kohya", folder="to-exact")
    for plain in (False, True):
        latents, _, crop, flipped = kohya(folder, "a b.png", "sd", (16, 8), plain)
        assert latents[3].tolist() == [pytest.approx([5, 1], abs=1e-5)] and crop == [0, 0, 16, 8]
        assert flipped[3].tolist() == [pytest.approx([1, 5], abs=1e-5)] and flipped.dtype == np.float32
    found = np.load(trainers.export(trainers.encode("flux", BUCKETS), "kohya-flux") / "cats" / "tom_0008x0024_flux.npz")
    assert found["latents_4x2"].shape == (16, 4, 2) and found["original_size_4x2"].tolist() == [8, 24]
    # 8 x 24 pixels, in 16 x 32, would be 10.67 x 32, from (16 - 10.67) // 2 on: that is how the trainer counts.
    assert found["crop_ltrb_4x2"].tolist() == pytest.approx([2, 0, 2 + 32 / 3, 32])


def test_a_trainer_s_name_stands_for_its_one_format_of_a_family(trainers):
    sd, flux, wan = (trainers.encode(family) for family in ("sd", "flux", "wan"))
    assert len(files(trainers.export(sd, "kohya"))) == 3
    assert trainers.refused(flux, "kohya") == "kohya is kohya-flux or kohya-lumina: write which"
    assert trainers.refused(sd, "musubi").endswith(
        f"and those of {sd} are sd (Stable Diffusion 1 and 2, PixArt-alpha, DiT)"
    )
    assert trainers.refused(wan, "musubi") == ("musubi is musubi-qwen-image or musubi-krea2 or musubi-wan: write which")
    assert "kohya-sdxl takes latents of sdxl, and those of " in trainers.refused(sd, "kohya-sdxl")


def test_a_dataset_that_does_not_say_how_large_pictures_are_is_exported_with_a_word(trainers, latentmill):
    trainers.export(trainers.encode("sd"), "kohya,comfyui", folder="unsized")
    [line] = latentmill.err.splitlines()
    assert "doesn't say how large the pictures themselves are, so files of kohya-sd are named" in line
    trainers.export(trainers.encode("sd", BUCKETS), "kohya", folder="to-sized")
    assert latentmill.err == ""


def test_sd_scripts_files_can_lie_beside_the_pictures(trainers):
    """Where the trainer looks for them; what we remember of it lies beside, too, and no trainer takes it for a picture."""
    output = trainers.encode("sd")
    assert trainers.latentmill("export", output, trainers.pictures, "--to", "kohya") == 0, trainers.latentmill.said
    for name in PICTURES:
        assert glob.glob(glob.escape(os.path.splitext(trainers.pictures / name)[0]) + "_*_sd.npz")


# ----------------------------------------------------------------------------------------------------- musubi-tuner


def musubi(folder, short):
    """Each item of the cache as the trainer has it, from names and keys: (item, width, height) -> content, metadata."""
    found = {}
    for path in glob.glob(os.path.join(folder, f"*_{short}.safetensors")):
        tokens = os.path.basename(path).split("_")
        width, height = map(int, tokens[-2].split("x"))
        with safetensors.safe_open(path, framework="pt") as file:
            [key] = file.keys()
            content, about = file.get_tensor(key), file.metadata()
        name, size, dtype = key.split("_", 2)
        assert name == "latents" and str(content.dtype) == f"torch.{dtype}"
        assert size == "x".join(map(str, (1, *content.shape[-2:])))
        found["_".join(tokens[:-2]), width, height] = content, about
    return found


@pytest.mark.parametrize(
    ("family", "model", "short", "architecture", "shape", "values"),
    [
        ("wan", "qwen-image", "qi", "qwen_image", (16, 1, 3, 1), [5, 5, 1]),
        ("wan", "krea2", "kr2", "krea2", (16, 1, 3, 1), [5, 5, 1]),
        ("wan", "wan", "wan", "wan", (16, 1, 3, 1), [5, 5, 1]),
        ("flux", "z-image", "zi", "z_image", (16, 3, 1), [5, 5, 1]),  # raw: without scale and shift again
    ],
)
def test_musubi_finds_its_items(trainers, family, model, short, architecture, shape, values):
    folder = trainers.export(trainers.encode(family), f"musubi-{model}")
    found = musubi(folder, short)
    assert {*found} == {("a b", 16, 8), ("dog.v2", 24, 16), ("tom", 8, 24)} and len(files(folder)) == 3
    latents, about = found["tom", 8, 24]
    assert about == {"architecture": architecture, "width": "8", "height": "24", "format_version": "1.0.1"}
    assert latents.shape == shape and latents.dtype == torch.float32
    assert latents[3].flatten().tolist() == pytest.approx(values, abs=1e-5)


def test_musubi_s_normalised_latents_keep_their_dtype(trainers):
    folder = trainers.export(trainers.encode("wan", "vae.dtype=bfloat16"), "musubi-wan")
    assert musubi(folder, "wan")["a b", 16, 8][0].dtype == torch.bfloat16


def test_musubi_has_one_folder_for_all_so_names_in_two_folders_are_refused(trainers):
    (trainers.pictures / "dogs").mkdir()
    (trainers.pictures / TOM).rename(trainers.pictures / "dogs" / "a b.png")
    output = trainers.own("wan", "sampling.width=16", "sampling.height=8")
    assert "would both be a b_0016x0008_wan.safetensors" in trainers.refused(output, "musubi-wan")


def test_several_resolutions_of_a_picture_have_a_folder_each(trainers):
    """As musubi-tuner wants it: a cache directory for each of its datasets."""
    areas = ["size.buckets=musubi", "size.area=[1024, 4096]", "samples_per_row=2"]
    output = trainers.encode("wan", *areas)
    folder = trainers.export(output, "musubi-wan")
    found = {side: musubi(folder / str(side), "wan") for side in (32, 64)}
    assert [*map(len, found.values())] == [3, 3] and len(files(folder)) == 6
    small, large = (found[side]["tom", 8, 24][0] for side in (32, 64))
    assert (small.shape, large.shape) == ((16, 1, 8, 2), (16, 1, 16, 4))  # of buckets of 16 x 64, and of 32 x 128


# ------------------------------------------------------------------------------------------ SimpleTuner, AutoModel


@pytest.mark.parametrize(("family", "first"), [("sd", 0.91075), ("sd3", 7.559293), ("flux", 1.76364851)])
def test_simpletuner_loads_scaled_tensors_by_the_hash_of_the_name(trainers, family, first):
    """5 * 0.18215, (5 - 0.0609) * 1.5305, (5 - 0.1159) * 0.3611."""
    folder = trainers.export(trainers.encode(family), "simpletuner")
    assert len(files(folder)) == 3
    latents = torch.load(folder / "cats" / f"{hashlib.sha256(b'tom').hexdigest()}.pt", weights_only=True)
    assert latents.shape[1:] == (3, 1) and latents[3, 0, 0].item() == pytest.approx(first, abs=1e-5)
    dog = torch.load(folder / "cats" / f"{hashlib.sha256(b'dog.v2').hexdigest()}.pt", weights_only=True)
    assert (dog[0] > 0).tolist() == [[False, True, True], [True, False, False]]


def test_a_tensor_s_file_holds_it_alone(trainers):
    """And not the rows of its shape that were read with it: of 64 x 64 pixels a kilobyte for each."""
    folder = trainers.export(trainers.encode("sd", "sampling.width=64", "sampling.height=64"), "simpletuner")
    small = len(torch_saved(torch.zeros(4, 8, 8)))
    assert {len(content) for content in files(folder).values()} == {small}


def torch_saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def automodel(folder):
    """The trainer's items, with what it loads for each."""
    about = json.loads((folder / "metadata.json").read_text())
    items = [item for name in about["shards"] for item in json.loads((folder / name).read_text(encoding="utf-8"))]
    assert len(items) == about["total_items"] and len(about["shards"]) == about["num_shards"]
    for item in items:
        assert Path(item["cache_file"]).resolve().relative_to(folder.resolve())
        yield item, torch.load(item["cache_file"], map_location="cpu", weights_only=True)


def test_automodel_loads_its_items(trainers, monkeypatch, tmp_path):
    output = trainers.encode("flux")
    monkeypatch.chdir(tmp_path)  # the list has absolute paths wherever the command is started
    assert trainers.latentmill("export", output, "export", "--to", "automodel") == 0, trainers.latentmill.said
    items = {item["image_path"]: (item, data) for item, data in automodel(tmp_path / "export")}
    assert {*items} == {*PICTURES}
    item, data = items[TOM]
    assert item["bucket_resolution"] == item["original_resolution"] == [8, 24] and item["aspect_ratio"] == 8 / 24
    assert item["prompt"] == data["prompt"] == PICTURES[TOM][1]
    assert torch.tensor(data["crop_offset"]).tolist() == [0, 0]
    assert data["latent"].dtype == torch.float16 and data["latent"].shape == (16, 3, 1)
    assert data["latent"][3].flatten().tolist() == pytest.approx([1.76364851, 1.76364851, 0.31924851], rel=1e-3)


def test_automodel_knows_where_a_bucket_was_cut_out(trainers):
    folder = trainers.export(trainers.encode("flux", BUCKETS), "automodel")
    found = {item["image_path"]: (item, data) for item, data in automodel(folder)}
    item, data = found[TOM]
    assert item["bucket_resolution"] == [16, 32] and item["original_resolution"] == [8, 24]
    assert data["crop_offset"] == [0, 8]  # scaled to 16 x 48, of which the middle is taken
    as_kohya = trainers.export(trainers.encode("flux", BUCKETS, "size.pixels=kohya"), "automodel", folder="to-kohya")
    assert {item["image_path"]: data["crop_offset"] for item, data in automodel(as_kohya)}[TOM] == [0, 8]
    assert found["cats/dog.v2.png"][1]["crop_offset"] == [0, 2]  # 24 x 16 to 32 x 21, and (21 - 16) // 2
    assert (folder / "16x32" / "000000002-000.pt").is_file()


def test_automodel_s_files_hold_their_own_latents_alone(trainers):
    """Half precision needs no conversion: a view of all rows that were read together would be stored with each."""
    folder = trainers.export(
        trainers.encode("flux", "vae.dtype=float16", "sampling.width=64", "sampling.height=64"), "automodel"
    )
    for _, data in automodel(folder):
        assert data["latent"].untyped_storage().nbytes() == data["latent"].numel() * 2


def test_automodel_knows_where_a_random_crop_was(trainers):
    """Of 30 samples: left and right are not whole numbers, so their difference is the bucket's width to rounding."""
    settings = ("size.buckets=[[16, 24]]", "size.crop=random", "samples_per_row=30", "rows_per_shard=100")
    output = trainers.encode("flux", *settings)
    folder = trainers.export(output, "automodel", "--names", "row_id")
    found = {Path(item["cache_file"]).stem: data["crop_offset"] for item, data in automodel(folder)}
    rows = pq.read_table(output / "data").to_pylist()
    assert len({tuple(row["crop_ltrb"]) for row in rows}) > 30
    assert found == {row["row_id"]: [int(side) for side in row["crop_ltrb"][:2]] for row in rows}


# ------------------------------------------------------------------------------------------------------ all together


def test_one_pass_writes_all_formats_of_a_family_and_again_the_same_bytes(trainers, latentmill):
    output = trainers.encode("flux")
    formats = "kohya-flux,kohya-lumina,musubi-z-image,simpletuner,comfyui"
    folder = trainers.export(output, formats)
    assert latentmill.out.splitlines() == [f"{name}: 3 files written" for name in formats.split(",")]
    before = files(folder)
    for mark in (folder / ".latentmill").glob("*/*.json"):
        mark.unlink()  # as a killed export, that had written all and said nothing
    trainers.export(output, formats)
    assert latentmill.out.splitlines() == [f"{name}: 0 files written, 3 were there" for name in formats.split(",")]
    assert files(folder) == before

"""``latentmill export``: what research trainers, ComfyUI and ``datasets`` make of it, and that it is made once."""

import csv
import io
import json
import os
import re
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from tests.outside.trainer_parts import PICTURES, files

STD = "latents_std=true"
ONE_SIZE = (STD, "size.buckets=[[16,8]]")


def edm2(folder):
    """Each file with its label, as EDM2's reader finds them: all .npy and pictures of the folder, and a label for each."""
    names = sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, there in os.walk(folder)
        for name in there
        if os.path.splitext(name)[1].lower() in Image.registered_extensions().keys() | {".npy"}
    )
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    labels = None if labels is None else dict(labels)
    return {name: (np.load(folder / name), labels and labels[name]) for name in names}


def test_edm2_reads_the_posterior_as_the_vae_gave_it(trainers):
    found = edm2(trainers.export(trainers.encode("sd", *ONE_SIZE), "edm2"))
    assert [*found] == [f"00000/img-mean-std-0000000{n}.npy" for n in range(3)]
    two, label = found["00000/img-mean-std-00000000.npy"]
    assert two.dtype == np.float32 and two.shape == (8, 1, 2) and label is None
    np.testing.assert_allclose(two[:4, 0], [[2, -2], [3, -1], [4, 0], [5, 1]], atol=1e-6)
    np.testing.assert_allclose(two[4:, 0], [[0.5, 0.5], [1.5, 1.5], [2.5, 2.5], [3.5, 3.5]], atol=1e-6)
    cat, _ = found["00000/img-mean-std-00000002.npy"]
    np.testing.assert_allclose(cat[1], [[3, 3]], atol=0.05)  # sorted by name, the dog is before the cat


def test_a_trainer_of_one_size_is_given_no_other(trainers, latentmill):
    output = trainers.encode("sd", STD)
    for _ in range(2):  # the second finds the first shards there
        assert latentmill("export", output, trainers.root / "export", "--to", "edm2") == 2
        assert latentmill.err.startswith(
            "latentmill: edm2 takes pictures of one size, and row 000000000-000 is of 16x8 and row 00000000"
        )
        assert latentmill.err.endswith(" pixels: encode them with one bucket, as size.buckets=[[256,256]]\n")


def test_repa_reads_labels_that_a_source_s_column_has(trainers, tmp_path):
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], ["pictures/a b.png", 7], ["pictures/cats/tom.png", 207]])
    table = ["source=prompts", f"source.path={tmp_path / 'list.csv'}"]
    unlabelled = trainers.own("sd", *ONE_SIZE, *table, "source.keep=[]", output="unlabelled")
    assert trainers.refused(unlabelled, "repa").startswith("repa needs label, and ")
    output = trainers.own("sd", *ONE_SIZE, *table, "source.keep=[label]")
    folder = trainers.export(output, "repa,edm2")
    for format in (folder / "repa" / "vae-sd", folder / "edm2"):
        found = edm2(format)
        assert [label for _, label in found.values()] == [7, 207]
        assert found["00000/img-mean-std-00000000.npy"][0][0].tolist() == pytest.approx(np.array([[2, -2]]))


@pytest.mark.parametrize(
    ("labels", "edm2_says", "repa_says"),
    [
        (["cat", "dog"], "row 000000000-000: label must be a whole number, not 'cat'", None),
        ([7, 7.5], "row 000000001-000: label must be a whole number, not 7.5", None),
        ([7, ""], "the label of 00000/img-mean-std-00000000.npy is a number, and of 00000/img-mean-std-00000001.npy none", "row 000000001-000 has no label"),
    ],
)  # fmt: skip
def test_labels_that_the_trainer_can_t_make_an_array_of_are_refused(trainers, tmp_path, labels, edm2_says, repa_says):
    with (tmp_path / "list.csv").open("w", newline="") as file:
        names = "pictures/a b.png", "pictures/cats/tom.png"
        csv.writer(file).writerows([["image", "label"], *zip(names, labels)])
    output = trainers.own(
        "sd", *ONE_SIZE, "source=prompts", f"source.path={tmp_path / 'list.csv'}", "source.keep=[label]"
    )
    for name, said in (("edm2", edm2_says), ("repa", repa_says or edm2_says)):
        assert trainers.latentmill("export", output, tmp_path / name, "--to", name) == 2
        assert trainers.latentmill.err.splitlines()[-1].startswith(f"latentmill: {said}")


def test_pixart_finds_each_picture_s_file_by_the_path_in_its_list(trainers):
    folder = trainers.export(trainers.encode("sdxl", STD), "pixart")
    listed = json.loads((folder / "data_info.json").read_text(encoding="utf-8"))
    assert [item["path"] for item in listed] == ["a b.png", "cats/dog.v2.png", "cats/tom.png"]
    assert listed[2] == {
        "path": "cats/tom.png",
        "ratio": 3.0,
        "height": 24,
        "width": 8,
        "prompt": PICTURES["cats/tom.png"][1],
    }
    for item, red in zip(listed, ([[1, -1]], [[-1, 1, 1], [1, -1, -1]], [[1], [1], [-1]])):
        name = "_".join(item["path"].rsplit("/", 1)).removesuffix(".png") + ".npy"
        moments = np.load(folder / "img_sdxl_vae_features_256resolution_ms_new" / name)
        mean, std = np.split(moments, 2)
        np.testing.assert_allclose(mean[3], 2 * np.array(red) + 3, atol=1e-5)
        np.testing.assert_allclose(std[3], np.full(np.shape(red), 3.5), atol=1e-5)
    assert len(files(folder)) == 4


def load_latent(path):
    """As ComfyUI's node does."""
    found = safetensors.torch.load_file(path)
    return found["latent_tensor"].float() * (1.0 if "latent_format_version_0" in found else 1 / 0.18215)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_comfyui_loads_latents_of_every_family_raw(trainers, family):
    folder = trainers.export(trainers.encode(family), "comfyui")
    assert [*files(folder)] == ["a b.latent", "cats/dog.v2.latent", "cats/tom.latent"]
    latents = load_latent(folder / "cats" / "tom.latent")
    assert latents.shape[0] == 1 and latents.shape[2:] == (3, 1)
    assert latents[0, 3].flatten().tolist() == pytest.approx([5, 5, 1], abs=1e-5)


def test_comfyui_loads_wan_s_with_an_axis_of_frames_and_the_statistics_of_each_channel_undone(trainers):
    latents = load_latent(trainers.export(trainers.encode("wan"), "comfyui") / "a b.latent")
    assert latents.shape == (1, 16, 1, 1, 2)
    # Stored are 2 and -2 for channel 0, 5 and 1 for channel 3: times the spread of Wan's channel, and its mean added.
    assert latents[0, 0].flatten().tolist() == pytest.approx([2 * 2.8184 - 0.7571, -2 * 2.8184 - 0.7571])
    assert latents[0, 3].flatten().tolist() == pytest.approx([5 * 2.6558 + 0.1075, 2.6558 + 0.1075])


def test_half_precision_goes_out_as_float32(trainers):
    folder = trainers.export(trainers.encode("sd", "vae.dtype=bfloat16"), "comfyui")
    latents = load_latent(folder / "a b.latent")
    # 5 * 0.18215 = 0.91075 is 0.91015625 in bfloat16, of 8 bits
    assert (
        latents[0, 3, 0, 0].item() == pytest.approx(0.91015625 / 0.18215, rel=1e-6) and latents.dtype == torch.float32
    )


def test_datasets_reads_the_folder_of_pictures(trainers, tmp_path):
    settings = ["vae.name=known", "cluster=inline", "source.keep=[file]", f"source.path={trainers.pictures}"]
    output = tmp_path / "pictured"
    assert trainers.latentmill("run", "reconstruct", *settings, f"output={output}") == 0, trainers.latentmill.said
    folder = trainers.export(output, "folder")
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    found = {row["file"]: row for row in loaded}
    assert {name: row["text"] for name, row in found.items()} == {
        n: prompt or "" for n, (_, prompt) in PICTURES.items()
    }
    assert np.asarray(found["cats/tom.png"]["image"])[:, 0, 0].tolist() == [255] * 16 + [0] * 8
    assert (folder / "cats" / "tom.txt").read_text(encoding="utf-8") == PICTURES["cats/tom.png"][1]
    assert not (folder / "cats" / "dog.v2.txt").exists()  # trainers stop at an empty one
    with Image.open(io.BytesIO(files(folder)["a b.png"])) as picture:
        assert picture.format == "PNG" and picture.size == (16, 8)


def test_columns_of_a_source_that_are_called_as_ours_are_kept_apart(trainers):
    """A source's own ``bucket`` and ``original_size`` are no sizes, and its ``text`` is not the caption."""
    table, names = trainers.root / "list.jsonl", ("a b.png", "cats/dog.v2.png")
    own = {"prompt": "of a dog", "bucket": [3, 7], "original_size": [1.5, 2], "text": "said", "source_text": "seen"}
    rows = [json.dumps({"image": f"{trainers.pictures.name}/{name}", "file": name, **own}) for name in names]
    table.write_text("\n".join(rows))
    job = ("source=prompts", f"source.path={table}", "source.keep=[file, bucket, original_size, text, source_text]")
    folder = trainers.root / "pictured"
    arguments = ["run", "reconstruct", "cluster=inline", "vae.name=known", *job, f"output={folder}"]
    assert trainers.latentmill(*arguments) == 0, trainers.latentmill.said
    notes = files(trainers.export(folder, "folder", folder="as-pictures"))["metadata.jsonl"].decode().splitlines()
    said = {"text": "of a dog", "source_source_text": "said", "source_text": "seen", "bucket": [3, 7]}
    assert [{name: json.loads(note)[name] for name in said} for note in notes] == [said] * 2
    latents = trainers.own("sd", "flow=[read, encode, write]", *job)
    found = files(trainers.export(latents, "mds,kohya-sd", folder="as-latents"))
    assert json.loads(found["mds/index.json"])["shards"][0]["samples"] == 2
    assert {"kohya-sd/a b_0016x0008_sd.npz", "kohya-sd/cats/dog.v2_0024x0016_sd.npz"} < {*found}


def test_sizes_are_those_that_were_encoded_and_travel_with_latents(trainers):
    """After an upscale a bucket is not what was encoded, and the place of a crop is larger, too."""
    size = ("size.buckets=[[8,8]]", "size.crop=random")
    larger = "flow=[read, {name: image_upscale, method: bicubic, scale: 2}, encode, write]"
    plain, twice = trainers.encode("flux", *size), trainers.encode("flux", *size, larger)
    found = [trainers.export(each, "automodel", folder=each.name) for each in (plain, twice)]
    [was, now] = [[torch.load(path) for path in sorted(folder.rglob("*.pt"))] for folder in found]
    assert [each["bucket_resolution"] for each in now] == [[16, 16]] * 3
    assert any(sum(each["crop_offset"]) for each in was)
    for one, two in zip(was, now):
        assert all(b - 2 * a in (0, 1) for a, b in zip(one["crop_offset"], two["crop_offset"]))
    kept = ("source=latents", "source.keep=[file, original_size, crop_ltrb, bucket]", "flow=[read, write]")
    travelled = trainers.own("flux", *kept, f"source.path={plain}")
    of = [files(trainers.export(each, "kohya-flux", folder=f"kohya-{each.name}")) for each in (plain, travelled)]
    assert of[0] == of[1] and "a b_0016x0008_flux.npz" in of[0]


# ------------------------------------------------------------------------------------------------------- refused


def test_what_a_dataset_is_not_for_is_said_before_anything_is_written(trainers):
    plain, sdxl = trainers.encode("sd"), trainers.encode("sdxl", STD, "source.keep=null")
    assert trainers.refused(plain, "comfyui,edm2") == (
        f"edm2 needs latents_std, and {plain} has none: run the job again with latents_std=true, into another output"
    )
    assert trainers.refused(sdxl, "edm2") == (
        f"edm2 takes latents of sd, and those of {sdxl} are sdxl (Stable Diffusion XL, PixArt-Sigma)"
    )
    assert trainers.refused(plain, "folder").startswith(f"folder needs image, and {plain} has none: ")
    assert "(it has no column file or id): make it with source.keep=[file]" in trainers.refused(sdxl, "pixart")
    random = trainers.encode("flux", "size.buckets=[[8,8]]", "size.pixels=kohya", "size.crop=random")
    assert trainers.refused(random, "automodel").startswith("automodel is told where each picture was cut, and with ")
    assert trainers.refused(plain, "pixarts").startswith("there is no format 'pixarts' (did you mean 'pixart'?); ")
    assert "--names colour: " in trainers.refused(plain, "comfyui", "--names", "colour")


def test_a_vae_of_no_known_family_is_told_by_its_numbers(trainers):
    output = trainers.encode("sd", "vae.scale=0.5")
    assert trainers.refused(output, "comfyui").endswith(
        "are of no VAE that is known here (4 channels, 1/8 of the sides, scale 0.5, shift 0)"
    )


def test_rows_that_would_be_one_file_are_refused_and_told_apart_by_their_row_ids(trainers):
    Image.new("RGB", (8, 8)).save(trainers.pictures / "a b.webp", lossless=True)
    output = trainers.own("sd")
    assert trainers.refused(output, "comfyui").startswith(
        "rows 000000000-000 and 000000001-000 would both be a b.latent: "
    )
    found = files(trainers.export(output, "comfyui", "--names", "row_id"))
    assert [*found] == [f"00000000{n}-000.latent" for n in range(4)]


def test_a_picture_is_called_what_it_is_called(trainers):
    """With the narrow blank of a screenshot's name, a line break, and bytes that are no UTF-8."""
    for name in ("shot 1.00\u202fAM.png", "two\nlines.png", os.fsdecode(b"caf\xe9.png")):
        os.link(trainers.pictures / "a b.png", trainers.pictures / name)
    found = files(trainers.export(trainers.own("sd"), "comfyui"))
    assert {"shot 1.00\u202fAM.latent", "two\nlines.latent", "caf\\udce9.latent"} < {*found}


def test_an_id_with_escapes_is_the_path_that_it_was_made_of(trainers):
    """The narrow blank of a screenshot's name; but a backslash that a name has is no escape."""
    for name in ("shot 1.00\u202fAM\xa0.png", "cats\\tom.png"):
        os.link(trainers.pictures / "a b.png", trainers.pictures / name)
    found = files(trainers.export(trainers.own("sd", "source.id_column=path", "source.keep=[]"), "comfyui"))
    assert {"shot 1.00\u202fAM\xa0.latent", "cats\\tom.latent", "cats/tom.latent"} < {*found}


def test_dates_that_python_does_not_have_go_out_as_text(trainers):
    far, day = pa.array([2**30, 1], pa.date32()), pa.date32()
    columns = {
        "at": far,
        "ns": pa.array([1, None], pa.timestamp("ns")),
        "utc": pa.array([1 << 60, None], pa.timestamp("us", "UTC")),
        "inside": pa.array([[{"x": [("k", 2**30)]}], None], pa.list_(pa.struct({"x": pa.map_(pa.string(), day)}))),
    }
    names = ["a b.png", "cats/tom.png"]
    table = {"image": [f"{trainers.pictures.name}/{name}" for name in names], "file": names, **columns}
    pq.write_table(pa.table(table), trainers.root / "list.parquet")
    job = ("source=prompts", f"source.path={trainers.root / 'list.parquet'}", f"source.keep=[file,{','.join(columns)}]")
    said = [
        {"at": "1073741824", "ns": "1970-01-01 00:00:00.000000001", "utc": "-27032-08-17 21:30:06.846976Z", "inside": [{"x": [["k", "1073741824"]]}]},
        {"at": "1970-01-02", "ns": None, "utc": None, "inside": None},
    ]  # fmt: skip
    output = trainers.own("sd", *job)
    for tar in (
        trainers.export(output, "energon,comfyui") / "energon/shard_000000.tar",
        trainers.own("sd", *job, "sink=webdataset", output="tars") / "data/00000.tar",
    ):
        with tarfile.open(tar) as file:
            texts = [json.load(file.extractfile(f"00000000{n}-000.json")) for n in range(2)]
        assert [{name: text[name] for name in columns} for text in texts] == said


def test_a_latent_that_half_precision_does_not_hold_is_named(trainers):
    output = trainers.encode("sd", "vae.scale=20000")
    assert trainers.latentmill("export", output, trainers.root / "export", "--to", "mds") == 2
    [line] = trainers.latentmill.err.splitlines()
    said = "a latent of 100000 is more than float16 holds, as which the format stores them"
    assert re.fullmatch(rf"latentmill: row 00000000[0-2]-000: {said}", line)  # shards are written side by side


def test_a_name_may_be_as_long_as_a_disk_takes_it(trainers):
    long, longer = ("x" * length for length in (237, 238))
    os.link(trainers.pictures / "a b.png", trainers.pictures / f"{long}.png")
    found = files(trainers.export(trainers.own("sd"), "kohya-sd"))
    assert f"{long}_0016x0008_sd.npz" in found and len(f"{long}_0016x0008_sd.npz") == 254
    os.rename(trainers.pictures / f"{long}.png", trainers.pictures / f"{longer}x.png")
    said = trainers.refused(trainers.own("sd", output="longer"), "kohya-sd")
    assert said.startswith("row 000000003-000: the name of its file, xxx") and " would have 256 bytes, and " in said


@pytest.mark.parametrize("name", ["../tom", "/tom", "cats/../../tom", "", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_or_is_none_is_refused(trainers, tmp_path, name):
    pictures = [str(trainers.pictures.relative_to(tmp_path) / each) for each in ("a b.png", "cats/tom.png")]
    pq.write_table(pa.table({"image": pictures, "name": [name, "tom"]}), tmp_path / "list.parquet")
    output = trainers.own("sd", "source=prompts", f"source.path={tmp_path / 'list.parquet'}", "source.keep=[name]")
    said = trainers.refused(output, "comfyui", "--names", "name")
    assert said.startswith("row 000000000-000: its name is ") and not list(tmp_path.glob("tom*"))


def test_a_dataset_that_is_not_finished_or_is_the_place_is_refused(trainers):
    output = trainers.own("sd")
    assert "lies in the dataset" in trainers.refused(output, "comfyui", folder="encoded/export")
    (output / "data" / "00001.parquet").rename(trainers.root / "away")
    assert trainers.refused(output, "comfyui") == f"{output} is not finished: 1 of its 2 shards are missing"


def test_latents_that_are_half_way_are_refused(latentmill, trainers, tmp_path):
    job = ["run", "denoise", "cluster=inline", "sampling.until=0.5", "sampling.steps=2", "samples_per_row=1"]
    assert latentmill(*job, "source=images", f"source.path={trainers.pictures}", "sampling.width=32",
                      "sampling.height=32", f"output={tmp_path / 'half'}") == 0, latentmill.said  # fmt: skip
    assert "half-way" in trainers.refused(tmp_path / "half", "comfyui")


# ---------------------------------------------------------------------------------------------------------- once


def test_the_same_command_writes_nothing_again_and_makes_what_is_lost_or_cut_short(trainers, latentmill):
    output = trainers.encode("sd", *ONE_SIZE)
    folder = trainers.export(output, "edm2,comfyui")
    assert latentmill.out.splitlines() == ["edm2: 4 files written", "comfyui: 3 files written"]
    before = files(folder)
    stamps = {path: path.stat().st_ino for path in folder.rglob("*.npy")}
    trainers.export(output, "edm2,comfyui")
    assert latentmill.out.splitlines() == [
        "edm2: 0 files written, 4 were there",
        "comfyui: 0 files written, 3 were there",
    ]
    assert {path: path.stat().st_ino for path in folder.rglob("*.npy")} == stamps
    (folder / "edm2" / "00000" / "img-mean-std-00000001.npy").unlink()
    cut = folder / "comfyui" / "a b.latent"
    cut.write_bytes(cut.read_bytes()[:-1])
    trainers.export(output, "edm2,comfyui")
    assert latentmill.out.splitlines() == [
        "edm2: 1 file written, 3 were there",
        "comfyui: 1 file written, 2 were there",
    ]
    assert files(folder) == before


def test_what_is_there_is_known_without_reading_the_dataset_again_and_a_damaged_shard_is_named(trainers, latentmill):
    output = trainers.own("sd", *ONE_SIZE)
    folder = trainers.export(output, "edm2")
    shard = output / "data" / "00000.parquet"
    content = bytearray(shard.read_bytes())
    at = content.index(b"a b.png")  # the first page of rows
    content[at : at + 7] = b"A B.PNG"
    shard.write_bytes(content)
    trainers.export(output, "edm2")
    assert latentmill.out == "edm2: 0 files written, 4 were there\n"
    (folder / "00000" / "img-mean-std-00000001.npy").unlink()
    assert latentmill("export", output, folder, "--to", "edm2") == 1
    [line] = latentmill.err.splitlines()
    assert "00000.parquet: " in line and "latentmill verify says" in line


def test_a_folder_that_a_variable_was_to_name_is_not_the_one_where_one_is(trainers, latentmill, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert latentmill("export", trainers.encode("sd"), "", "--to", "comfyui") == 2
    assert latentmill.err == "latentmill: the folder of the export is empty: name one\n" and not [
        *tmp_path.glob("*.latent")
    ]


def test_a_file_of_somebody_else_stays(trainers, latentmill):
    output = trainers.encode("sd")
    stranger = trainers.root / "export" / "cats" / "tom.latent"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"mine")
    assert latentmill("export", output, trainers.root / "export", "--to", "comfyui") == 3
    assert latentmill.err.endswith(
        "cats/tom.latent is there, and is not what comfyui would write: move it away, or choose another folder\n"
    )
    assert stranger.read_bytes() == b"mine"
    stranger.unlink()
    assert len(files(trainers.export(output, "comfyui"))) == 3


def test_another_dataset_s_export_is_not_mixed_with_this_one(trainers, latentmill):
    trainers.export(trainers.encode("sd"), "comfyui")
    other = trainers.encode("sdxl")
    assert latentmill("export", other, trainers.root / "export", "--to", "comfyui") == 2
    assert "is of another export to comfyui" in latentmill.err


def test_a_spread_that_is_not_finite_is_its_row_s_error(trainers, monkeypatch, failed):
    monkeypatch.setenv("ACME_BROKEN", "std")
    [row] = failed(trainers.own("sd", STD, "max_error_rate=1"))
    assert row["row_id"] == "000000001-000" and row["reason"] == "the VAE's latents of this picture are not finite"


def test_a_shard_that_was_made_again_with_more_rows_is_exported_again(trainers, monkeypatch):
    monkeypatch.setenv("ACME_BROKEN", "1")
    output = trainers.own("sd", STD)
    assert [*files(trainers.export(output, "comfyui"))] == ["a b.latent", "cats/tom.latent"]
    monkeypatch.delenv("ACME_BROKEN")
    trainers.own("sd", STD, "--retry-failed")
    assert len(files(trainers.export(output, "comfyui"))) == 3


def test_an_export_of_tars_is_that_of_parquet(trainers):
    of = [trainers.export(trainers.encode("sd", *ONE_SIZE, f"sink={sink}"), "edm2,comfyui", folder=f"to-{sink}")
          for sink in ("parquet", "webdataset")]  # fmt: skip
    assert files(of[0]) == files(of[1]) and len(files(of[0])) == 7


def test_an_export_into_a_bucket_is_that_into_a_folder(trainers, bucket, latentmill):
    output = trainers.encode("sd", *ONE_SIZE)
    local = files(trainers.export(output, "edm2"))
    for _ in range(2):
        assert latentmill("export", output, f"{bucket}/export", "--to", "edm2") == 0, latentmill.said
    assert latentmill.out == "edm2: 0 files written, 4 were there\n"
    from latentmill import storage

    store = storage.at(f"{bucket}/export")
    assert {name: store.read(name) for name in local} == local


def test_tars_whose_first_shard_has_no_rows_are_exported(trainers):
    """It knows of no latents."""
    for k in range(2):
        (trainers.pictures / f"!{k}.png").write_bytes(b"no picture")
    output = trainers.own("sd", "sink=webdataset", "max_error_rate=1")
    assert len(files(trainers.export(output, "comfyui"))) == 3


def test_a_folder_of_one_format_is_not_begun_again_for_several(trainers, latentmill):
    """Its files would stay there, of which nobody knows any more."""
    output = trainers.encode("sd")
    folder = trainers.export(output, "comfyui")
    assert latentmill("export", output, folder, "--to", "comfyui, energon") == 2
    assert "another export to comfyui (another dataset, other --names, or beside other formats)" in latentmill.err

"""``latentmill export`` to files that hold many rows: one for each shard of the dataset, read as their readers do."""

import io
import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from tests.outside.trainer_parts import PICTURES, files

READ = ["a b.png", "cats/dog.v2.png", "cats/tom.png"]
"""Pictures in the order of rows, two in a shard; of the last, raw, channel 3 is 5, 5 and 1."""


def mds(folder):
    """The samples of an MDS folder, by its index, as Streaming's MDSReader finds and decodes them."""
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2
    for shard in index["shards"]:
        assert (shard["format"], shard["version"], shard["compression"], shard["zip_data"]) == ("mds", 2, None, None)
        content = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"]
        assert struct.unpack_from("<I", content) == (shard["samples"],)
        for at in range(shard["samples"]):
            begin, end = struct.unpack_from("<2I", content, 4 * (1 + at))
            data, sizes, sample = content[begin:end], [], {}
            for size in shard["column_sizes"]:
                if not size:
                    (size,), data = struct.unpack_from("<I", data), data[4:]
                sizes.append(size)
            for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes):
                value, data = data[:size], data[size:]
                decode = {"str": bytes.decode, "bytes": bytes, "json": json.loads}.get(encoding)
                sample[name] = decode(value) if decode else struct.unpack("<q", value)[0]
            assert not data
            yield sample


def test_streaming_reads_scaled_latents(trainers):
    folder = trainers.export(trainers.encode("sd"), "mds")
    assert [*files(folder)] == ["index.json", "shard.00000.mds", "shard.00001.mds"]
    samples = [*mds(folder)]
    assert [sample["caption"] for sample in samples] == [PICTURES[name][1] or "" for name in READ]
    assert [sample["id"] for sample in samples] == [f"00000000{n}-000" for n in range(3)]
    tom = samples[2]
    assert (tom["width"], tom["height"], tom["latents_shape"]) == (8, 24, [4, 3, 1])
    latents = np.frombuffer(tom["latents"], np.float16).reshape(tom["latents_shape"])
    assert latents[3].flatten().tolist() == pytest.approx([0.91075, 0.91075, 0.18215], rel=1e-3)


def test_a_shard_whose_rows_all_failed_is_no_file_of_streaming(trainers):
    (trainers.pictures / "cats" / "tom.png").write_bytes(b"no picture")
    folder = trainers.export(trainers.own("sd"), "mds")
    assert [*files(folder)] == ["index.json", "shard.00000.mds"] and len([*mds(folder)]) == 2


def test_webdataset_reads_energon_s_tars(trainers):
    folder = trainers.export(trainers.encode("flux", "vae.dtype=bfloat16"), "energon")
    assert [*files(folder)] == ["shard_000000.tar", "shard_000001.tar"]
    found = [*webdataset.WebDataset([str(folder / name) for name in files(folder)], shardshuffle=False)]
    assert [sample["__key__"] for sample in found] == [f"00000000{n}-000" for n in range(3)]
    latents = torch.load(io.BytesIO(found[2]["pth"]), weights_only=True)
    assert latents.shape == (16, 3, 1) and latents.dtype == torch.bfloat16
    assert latents[3].flatten().tolist() == pytest.approx([1.76364851, 1.76364851, 0.31924851], rel=1e-2)
    about = json.loads(found[2]["json"])
    assert (about["prompt"], about["file"], about["width"], about["height"]) == (PICTURES[READ[2]][1], READ[2], 8, 24)


def test_fastvideo_reads_raw_latents_of_one_frame_and_no_text(trainers):
    folder = trainers.export(trainers.encode("wan"), "fastvideo")
    assert [*files(folder)] == [f"combined_parquet_dataset/0000{n}.parquet" for n in range(2)]
    rows = [row for name in files(folder) for row in pq.read_table(folder / name).to_pylist()]
    assert [row["file_name"] for row in rows] == READ and rows[0]["caption"] == "two blocks"
    tom = rows[2]
    latents = np.frombuffer(tom["vae_latent_bytes"], np.float32).reshape(tom["vae_latent_shape"])
    assert latents.shape == (16, 1, 3, 1)
    high, low = 5 * 2.6558 + 0.1075, 1 * 2.6558 + 0.1075  # Wan's spread and mean of channel 3
    assert latents[3].flatten().tolist() == pytest.approx([high, high, low])
    assert (tom["width"], tom["height"], tom["num_frames"], tom["media_type"]) == (8, 24, 1, "image")
    assert tom["text_embedding_bytes"] == b"" and tom["text_embedding_shape"] == []


def test_shards_are_written_once_and_anew_the_same(trainers, latentmill):
    output = trainers.encode("wan")
    folder = trainers.export(output, "mds,energon,fastvideo,comfyui")
    before = files(folder)
    for mark in (folder / ".latentmill").glob("*/*.json"):
        mark.unlink()
    (folder / "mds" / "shard.00001.mds").unlink()
    trainers.export(output, "mds,energon,fastvideo,comfyui")
    assert latentmill.out.splitlines() == [
        "mds: 1 file written, 2 were there",
        "energon: 0 files written, 2 were there",
        "fastvideo: 0 files written, 2 were there",
        "comfyui: 0 files written, 3 were there",
    ]
    assert files(folder) == before
    torn = folder / "energon" / "shard_000000.tar"
    content = torn.read_bytes()
    torn.write_bytes(content[:2000] + b"X" + content[2001:])  # of the same size, so that only a comparison finds it
    (folder / ".latentmill" / "energon" / "00000.json").unlink()
    assert latentmill("export", output, folder, "--to", "mds,energon,fastvideo,comfyui") == 3
    assert "energon/shard_000000.tar is there, and is not what energon would write" in latentmill.err

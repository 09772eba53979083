"""What a row may ask for: beyond its bound it is an error row that names the key, before anything is made of it."""

import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.outside.picture_files import chunk, gif, tiff


def told(failed, output):
    """The reasons of a dataset's error rows, by row number."""
    return {row["row"]: row["reason"] for row in failed(output)}


def test_a_row_of_more_pixels_than_the_job_s_bound_is_an_error_row(latentmill, rows, failed, tmp_path, patches):
    asked = ["65536,65536", "4097,4096", "16,16", "65537,1", "1,65536"]
    (tmp_path / "p.csv").write_text("prompt,width,height\n" + "".join(f"a,{size}\n" for size in asked))
    output = tmp_path / "out"
    settings = ["source=prompts", f"source.path={tmp_path / 'p.csv'}", *patches]
    assert latentmill("run", "encode", *settings, f"output={output}", "max_error_rate=1") == 0
    assert told(failed, output) == {
        0: "65536x65536 are 4294967296 pixels, more than sampling.max_pixels=16777216 allows",
        1: "4097x4096 are 16781312 pixels, more than sampling.max_pixels=16777216 allows",
        3: "width must be from 1 to 65536, not 65537",
    }
    assert [row["shape"] for row in rows(output)] == [[3, 16, 16], [3, 65536, 1]]


def test_pictures_of_their_own_size_are_bounded_and_those_of_a_given_size_by_it(
    latentmill, rows, failed, tmp_path, patches
):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, size in enumerate([(16, 16), (17, 16), (1, 257), (1, 60_000)]):
        Image.new("RGB", size, (200, 0, 0)).save(folder / f"{number}.png")
    job = ["run", "encode", f"source.path={folder}", *patches, "sampling.max_pixels=256", "max_error_rate=1"]
    assert latentmill(*job, f"output={tmp_path / 'own'}") == 0
    assert told(failed, tmp_path / "own") == {
        1: "17x16 are 272 pixels, more than sampling.max_pixels=256 allows",
        2: "1x257 are 257 pixels, more than sampling.max_pixels=256 allows",
        3: "1x60000 are 60000 pixels, more than sampling.max_pixels=256 allows",
    }
    assert latentmill(*job, "sampling.width=16", "sampling.height=16", f"output={tmp_path / 'given'}") == 0
    assert [(row["width"], row["height"]) for row in rows(tmp_path / "given")] == [(16, 16)] * 4


def test_stored_latents_are_bounded_by_the_picture_that_they_are_of(latentmill, rows, failed, pictures, tmp_path):
    Image.new("RGB", (2, 4)).save(pictures / "small.png")
    coarse = ["cluster=inline", "vae.name=patches", "vae.side=2"]
    made = ["run", "encode", f"source.path={pictures}", *coarse]
    assert latentmill(*made, f"output={tmp_path / 'latents'}") == 0
    again = ["run", "decode", f"source.path={tmp_path / 'latents'}"]
    again += [*coarse, "max_error_rate=1"]
    assert latentmill(*again, "sampling.max_pixels=16", f"output={tmp_path / 'all'}") == 0
    assert len(rows(tmp_path / "all")) == 5
    assert latentmill(*again, "sampling.max_pixels=15", f"output={tmp_path / 'small'}") == 0
    assert [row["width"] for row in rows(tmp_path / "small")] == [2]
    assert {*told(failed, tmp_path / "small").values()} == {
        "4x4 are 16 pixels, more than sampling.max_pixels=15 allows"
    }


@pytest.mark.parametrize("downscale", [0, 10**9, "8"])
def test_latents_whose_downscale_can_t_be_are_refused_before_the_start(
    latentmill, pictures, tmp_path, patches, downscale
):
    output = tmp_path / "latents"
    job = ["run", "encode", *patches]
    assert latentmill(*job, f"source.path={pictures}", f"output={output}") == 0
    [shard] = output.glob("data/*.parquet")
    table = pq.read_table(shard)
    key = next(key for key, value in table.schema.metadata.items() if b'"downscale": 1' in value)
    text = (
        table.schema.metadata[key].decode().replace('"downscale": 1', f'"downscale": {downscale!r}'.replace("'", '"'))
    )
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key: text.encode()}), tmp_path / "l.parquet")
    again = ["run", "decode", f"source.path={tmp_path / 'l.parquet'}", "flow=[read,write]"]
    assert latentmill(*again, "cluster=inline", f"output={tmp_path / 'out'}") == 2
    assert len(latentmill.err.splitlines()) == 1 and "downscale" in latentmill.err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sampling.width=65536", "sampling.height=65536"], "more than sampling.max_pixels=16777216 allows"),
        (["sampling.width=65537", "sampling.height=1"], "sampling.width must be from 1 to 65536, not 65537"),
        (["sampling.steps=100001"], "sampling.steps must be from 1 to 100000, not 100001"),
        (["sampling.max_pixels=0"], "sampling.max_pixels must be 1 or more, not 0"),
    ],
)
def test_a_job_that_asks_for_too_much_is_refused_before_the_start(latentmill, tmp_path, settings, said):
    (tmp_path / "p.txt").write_text("a\n")
    job = ["run", "txt2img", f"source.path={tmp_path / 'p.txt'}", *settings, f"output={tmp_path / 'out'}"]
    assert latentmill(*job) == 2
    assert said in latentmill.err and len(latentmill.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_files_that_unpack_to_more_than_they_may_are_error_rows(latentmill, failed, tmp_path, patches):
    folder = tmp_path / "in"
    folder.mkdir()
    small = np.zeros((4, 4), int)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    webp = b"WEBPVP8X" + struct.pack("<II", 10, 2) + b"\xff\xff\0" * 2 + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    bombs = {
        "lines.png": b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**7))) + chunk(b"IEND", b""),
        "screen.gif": gif(small, np.zeros((2, 3), int), screen=(60_000, 60_000)),
        "frame.gif": gif(small, np.zeros((2, 3), int), at=(60_000, 60_000)),
        "tile.tif": tiff(small[:, :, None], 8, 1, tile=16, tags={322: [65_520], 323: [65_520]}),
        "canvas.webp": b"RIFF" + struct.pack("<I", len(webp)) + webp,
    }
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (4, 4)).save(folder / "none.png")
    job = ["run", "encode", f"source.path={folder}", "source.id_column=path", *patches, "max_error_rate=1"]
    assert latentmill(*job, f"output={tmp_path / 'out'}") == 0
    reasons = [row["reason"] for row in failed(tmp_path / "out")]
    assert [reason.partition(": ")[0] for reason in reasons] == sorted(bombs)
    assert all("more than 89478485 pixels (max_pixels)" in reason for reason in reasons)

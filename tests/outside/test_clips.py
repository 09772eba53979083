"""Latents with a time axis from end to end, and pictures that condition a denoiser: both through the contract alone."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

CODE = '''
import numpy as np
import torch
from torch.nn.functional import avg_pool2d, pixel_shuffle, pixel_unshuffle
from latentmill.plugin import tensors
from latentmill.plugin import VAE, Denoiser, Fragment, LatentSpec, Source, Stage, TextEncoder
from latentmill.schedulers.noise_schedules import RectifiedFlow


def clip(row):
    return np.random.default_rng(row).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)


class Clips(Source):
    contract = 2

    def __init__(self, path: str = "", frames: int = 5):
        self.frames = frames

    def fragments(self):
        return [Fragment("all", 3)]

    def read(self, fragment, start, stop):
        for row in range(start, stop):
            yield {"prompt": f"clip {row}", "video": clip(row)[: self.frames if row == 1 else 5]}


class Film(VAE):
    """Two frames and 2 x 2 pixels a latent pixel, behind a first frame that stands alone; nothing is lost."""

    contract, spec = 2, LatentSpec(24, 2, 1.0, 0.0, "float32", "film", time_downscale=2)

    def encode(self, images):
        assert images.shape[1:] == (3, 5, 4, 6) and images.dtype == torch.float32
        pairs = torch.cat([images[:, :, :1], images], 2)  # the first frame twice
        pairs = torch.stack([pairs[:, :, ::2], pairs[:, :, 1::2]], 2).flatten(1, 2)  # [B, 6, t, H, W]
        return pixel_unshuffle(pairs.movedim(2, 1).flatten(0, 1), 2).unflatten(0, (len(images), -1)).movedim(1, 2)

    def decode(self, latents):
        count = latents.shape[2]
        pairs = pixel_shuffle(latents.movedim(1, 2).flatten(0, 1), 2).unflatten(0, (-1, count)).movedim(1, 2)
        pairs = pairs.unflatten(1, (3, 2)).movedim(2, 3).flatten(2, 3)
        return pairs[:, :, 1:]


class Words(TextEncoder):
    contract = 2

    def encode(self, prompts):
        return {"embeds": torch.zeros(len(prompts), 1)}


class Still(Denoiser):
    """Says that every frame is as its prompt's first latent frame: 1/4."""

    contract, prediction, noise_schedule = 2, "sample", RectifiedFlow()

    def check(self, spec):
        if spec.time_downscale != 2: raise ValueError("trained on clips of two frames a latent frame")

    def predict(self, x, t, conditioning):
        assert x.shape[1:] == (24, 3, 2, 3)
        return torch.full_like(x, 0.25)


class Control(Stage):
    """Tells the denoiser how bright the row's picture is, pixel by pixel of the latents; it begins from noise."""

    contract = 2

    def __call__(self, batch, reject):
        pictures = tensors.from_arrow(batch, "image").permute(0, 3, 1, 2).float() / 127.5 - 1
        batch = tensors.with_tensor(batch, "prompt:control", pictures.mean(1, keepdim=True))
        batch = tensors.with_tensor(batch, "negative:control", torch.zeros(len(batch), 1, *pictures.shape[2:]))
        return batch.drop_columns(["image"])


class Controlled(Denoiser):
    """Its picture is the control picture, in the first channel."""

    contract, prediction, noise_schedule = 2, "sample", RectifiedFlow()

    def predict(self, x, t, conditioning):
        return conditioning["control"].expand_as(x)
'''
POINTS = """
[latentmill.sources]
clips = acme_film:Clips
[latentmill.vaes]
film = acme_film:Film
[latentmill.text_encoders]
words = acme_film:Words
[latentmill.denoisers]
still = acme_film:Still
controlled = acme_film:Controlled
[latentmill.stages]
control = acme_film:Control
"""


@pytest.fixture
def acme(install):
    install("acme", POINTS, acme_film=CODE)


PARTS = (
    "cluster=inline",
    "samples_per_row=1",
    "text_encoder.name=words",
    "scheduler.name=euler",
    "sampling.steps=4",
    "sampling.width=null",
    "sampling.height=null",
)
FILM = (*PARTS, "source=clips", "vae.name=film", "denoiser.name=still")


def frames(row):
    """A stored clip as an array ``[T, H, W, 3]``."""
    return np.stack([np.array(Image.open(io.BytesIO(frame["bytes"]))) for frame in row["video"]])


def clip(row):
    return np.random.default_rng(row).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)


def test_clips_go_through_encode_denoise_and_decode_and_come_back(latentmill, rows, acme, tmp_path):
    """With strength 0 they are the same clips, to the bit; with all steps what the network says."""
    flow = "flow=[read,encode,denoise,decode,write]"
    for strength, wanted in ((0.0, clip), (1.0, lambda row: np.full((5, 4, 6, 3), 159))):
        out = tmp_path / f"out{strength}"
        job = ("img2img", *FILM, flow, f"sampling.strength={strength}", f"output={out}")
        assert latentmill("run", *job) == 0, latentmill.said
        found = {row["prompt"]: row for row in rows(out)}
        assert sorted(found) == ["clip 0", "clip 1", "clip 2"]
        for number in range(3):
            row = found[f"clip {number}"]
            np.testing.assert_array_equal(frames(row), wanted(number))
            assert (row["width"], row["height"]) == (6, 4)


def test_a_shard_of_error_rows_has_the_columns_of_clips(latentmill, failed, acme, tmp_path):
    """Beside the others it must fit: `datasets` wants one schema."""
    flow = ("flow=[read,encode,denoise,decode,write]", "rows_per_shard=1", "max_error_rate=1")
    for more in ((), ("source.frames=4",)):
        out = tmp_path / f"out{len(more)}"
        latentmill("run", "img2img", *FILM, *flow, *more, f"output={out}")
    assert [row["row"] for row in failed(out)] == [1], latentmill.said
    schemas = [pq.read_schema(path) for path in sorted(out.glob("data/*.parquet"))]
    assert len(schemas) == 3 and "video" in schemas[0].names and "image" not in schemas[0].names
    assert schemas[1].equals(schemas[0]) and schemas[2].equals(schemas[0])


def test_a_tar_holds_clips_as_arrays(latentmill, acme, tmp_path):
    out = tmp_path / "out"
    flow = ("flow=[read,encode,denoise,decode,write]", "sampling.strength=0.0", "sink=webdataset")
    assert latentmill("run", "img2img", *FILM, *flow, f"output={out}") == 0, latentmill.said
    with tarfile.open(out / "data" / "00000.tar") as tar:
        members = [name for name in tar.getnames() if name.endswith(".video.npy")]
        clips = [np.load(io.BytesIO(tar.extractfile(name).read())) for name in members]
    assert len(clips) == 3 and all(found.dtype == np.uint8 for found in clips)
    for number, found in enumerate(clips):
        np.testing.assert_array_equal(found, clip(number))
    assert latentmill("verify", str(out)) == 0, latentmill.said


def test_latents_of_clips_are_stored_and_read_again(latentmill, rows, acme, tmp_path):
    half, out = tmp_path / "half", tmp_path / "out"
    job = ("img2img", *FILM, "flow=[read,encode,denoise,write]", "sampling.strength=0", f"output={half}")
    assert latentmill("run", *job) == 0, latentmill.said
    assert {tuple(row["shape"]) for row in rows(half)} == {(24, 3, 2, 3)}
    [about] = {pq.read_schema(path).metadata[b"latentmill.latents"] for path in half.glob("data/*.parquet")}
    assert json.loads(about)["time_downscale"] == 2
    job = ("decode", "cluster=inline", "vae.name=film", f"source.path={half}", f"output={out}")
    assert latentmill("run", *job) == 0, latentmill.said
    for row in rows(out):
        np.testing.assert_array_equal(frames(row), clip(int(row["prompt"][-1])))
    assert latentmill("verify", out) == 0, latentmill.said


def test_what_does_not_fit_a_space_of_clips_is_an_error_row(latentmill, failed, acme, pictures, tmp_path):
    flow = "flow=[read,encode,denoise,decode,write]"
    for more, said in (
        (["source.frames=4"], "4 frames are not one more than a multiple of 2, as the VAE needs"),
        (["source.frames=0"], "the clip has no pixels"),
    ):
        out = tmp_path / said[:3]
        latentmill("run", "img2img", *FILM, flow, *more, f"output={out}")
        assert [row["reason"] for row in failed(out)] == [said]
    out = tmp_path / "of_pictures"
    given = (*PARTS, "source=images", f"source.path={pictures}", *FILM[len(PARTS) + 1 :])
    latentmill("run", "img2img", *given, flow, f"output={out}")
    assert {row["reason"] for row in failed(out)} == {"no clip and no latents, and the VAE is one of clips"}


def test_pictures_latents_say_nothing_of_time(latentmill, acme, pictures, tmp_path):
    out = tmp_path / "latents"
    job = ("encode", "cluster=inline", "vae.name=patches", "vae.side=1", f"source.path={pictures}", f"output={out}")
    assert latentmill("run", *job) == 0, latentmill.said
    [about] = {pq.read_schema(path).metadata[b"latentmill.latents"] for path in out.glob("data/*.parquet")}
    assert sorted(json.loads(about)) == ["channels", "downscale", "dtype", "fingerprint", "scale", "shift"]
    assert "time_downscale" not in (out / "plan.json").read_text()


def test_a_stage_s_picture_conditions_the_denoiser_row_by_row(latentmill, rows, acme, pictures, tmp_path):
    """With guidance 2 the control picture counts twice, against a negative one of zeros."""
    out = tmp_path / "out"
    given = ("source=images", f"source.path={pictures}", "vae.name=patches", "vae.side=1", "denoiser.name=controlled")
    flow = ("flow=[read,control,encode,denoise,write]", "sampling.guidance_scale=2")
    assert latentmill("run", "img2img", *PARTS, *given, *flow, f"output={out}") == 0, latentmill.said
    found = rows(out)
    assert len(found) == 4
    values = sorted(row["latents"][0] for row in found)
    wanted = sorted(2 * ((60 * k + 30 + 200 - 50 * k) / 3 / 127.5 - 1) for k in range(4))
    assert values == pytest.approx(wanted, abs=1e-5)
    assert all(len(set(np.round(row["latents"], 5))) == 1 for row in found), "nothing is left of noise or picture"

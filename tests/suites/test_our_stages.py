"""Our own stages that work on a batch, by the suite that plugins inherit."""

from functools import partial

import torch
from tests.suites import wrong_clips, wrong_denoisers, wrong_text_encoders, wrong_vaes

from latentmill.batch import from_dicts, with_latents
from latentmill.plugin import Declaration, StageContext, tensors
from latentmill.schedulers.euler import Euler
from latentmill.stages.decode import Decode
from latentmill.stages.denoise import Denoise
from latentmill.stages.encode import Encode, EncodeImages, EncodeText
from latentmill.stages.upscale import ImageUpscale, LatentUpscale
from latentmill.testing import StageSuite
from latentmill.testing.batches import with_clips, with_pictures, with_stored_latents

DENOISES = (Declaration("denoise", needs=("denoiser",), takes=("latents", "prompt:"), adds=("latents",)),)
DECODES = (Declaration("decode", needs=("vae",), takes=("latents",), drops=("latents", "source_image")),)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text_to_encode():
    return StageContext.of({"text_encoder": wrong_text_encoders.Right()}, after=DENOISES)


def pictures_to_paint_over():
    return StageContext.of({"vae": wrong_vaes.Right(), "text_encoder": wrong_text_encoders.Right()}, after=DENOISES)


def pictures_to_reconstruct():
    return StageContext.of({"vae": wrong_vaes.Right()}, after=DECODES, latents_std=True)


def clips_to_encode():
    return StageContext.of({"vae": wrong_clips.Right()})


def reconstructions():
    encodes = Declaration("encode", needs=("vae",), adds=("latents", "source_image"))
    return StageContext.of({"vae": wrong_vaes.Right()}, before=[encodes])


def latents_to_denoise():
    return StageContext.of(
        {"denoiser": wrong_denoisers.Right(), "scheduler": None},
        batch_size=4,
        sampling={"until": 0.0, "first_noise": "latentmill"},
        choices={"scheduler": {"name": "euler", "grid": "trailing"}},
        scheduler_of={"euler": Euler()}.__getitem__,
    )


def nothing_else():
    return StageContext.of({})


class TestImageUpscale(StageSuite):
    stage = partial(ImageUpscale, method="lanczos", scale=1.6)
    name = "image_upscale"
    context = nothing_else


class TestLatentUpscale(StageSuite):
    stage = partial(LatentUpscale, method="bislerp", scale=1.6)
    name = "latent_upscale"
    context = nothing_else

    def batch(self):
        return with_stored_latents()


class TestEncodeText(StageSuite):
    stage = EncodeText
    name = "encode_text"
    context = text_to_encode


class TestEncode(StageSuite):
    """Pictures under masks, one of them of a prompt that can't be encoded."""

    stage = Encode
    name = "encode"
    context = pictures_to_paint_over

    def batch(self):
        batch = with_pictures(5, 6, 4)
        prompts = [*batch.column("prompt").to_pylist()[:4], "x" * 300]
        at = batch.schema.get_field_index("prompt")
        batch = batch.set_column(at, batch.schema.field(at), [prompts])
        return tensors.with_tensor(batch, "mask", (random(5, 6, 4) > 0).to(torch.uint8))


class TestEncodeImages(StageSuite):
    stage = EncodeImages
    name = "encode_images"
    context = pictures_to_reconstruct

    def batch(self):
        return with_pictures(5, 6, 4)


class TestEncodeClips(StageSuite):
    stage = EncodeImages
    context = clips_to_encode

    def batch(self):
        return with_clips(5, 3, 6, 4)


class TestDecode(StageSuite):
    """One row's latents are not finite."""

    stage = Decode
    name = "decode"
    context = reconstructions

    def batch(self):
        batch = with_pictures(5, 6, 4)
        batch = tensors.with_tensor(batch, "source_image", tensors.from_arrow(batch, "image")).drop_columns(["image"])
        latents = random(5, 12, 3, 2)
        latents[1] = torch.nan
        return with_latents(batch, latents, wrong_vaes.Right().spec)


class TestDecodeClips(StageSuite):
    stage = Decode
    context = clips_to_encode

    def batch(self):
        spec = wrong_clips.Right().spec
        return with_latents(with_clips(5, 3, 6, 4).drop_columns(["video"]), random(5, *spec.shape(6, 4, 3)), spec)


class TestDenoise(StageSuite):
    """Rows of unlike steps, strength and guidance, of which a call takes some."""

    stage = Denoise
    name = "denoise"
    context = latents_to_denoise

    def batch(self):
        rows = [
            {"row": n, "row_id": f"{n:03d}", "prompt": "", "negative_prompt": "", "seed": 50 + n, "steps": 1 + n,
             "guidance_scale": 1.0 + n % 2, "strength": 1 - n / 5, "width": 16, "height": 24, "scheduler": "euler"}
            for n in range(5)
        ]  # fmt: skip
        batch = with_latents(from_dicts(rows), random(5, 4, 3, 2), wrong_denoisers.SPEC)
        batch = tensors.with_tensor(batch, "prompt:embeds", torch.arange(5.0))
        return tensors.with_tensor(batch, "negative:embeds", -torch.arange(5.0))

"""Masks of ComfyUI's workflows: what a workflow's job says of them, and where a source finds them."""

import random
from functools import partial

import numpy as np
import pytest
from PIL import ExifTags, Image
from tests.outside.comfy_parts import TEXT_TO_IMAGE, job_of, node, with_changes

from latentmill.sources.as_comfyui import changed, masks_of

MASKED = with_changes(
    TEXT_TO_IMAGE,
    _4=node("LoadImage", image="cat.png"),
    _11=node("VAEEncode", pixels=["4", 0], vae=["1", 2]),
    _12=node("SetLatentNoiseMask", samples=["11", 0], mask=["4", 1]),
    _5={"latent_image": ["12", 0]},
)
CHANNEL = with_changes(
    MASKED, _13=node("LoadImageMask", image="paint.png [input]", channel="red"), _12={"mask": ["13", 0]}
)
INPAINT = with_changes(
    MASKED, _12=node("VAEEncodeForInpaint", pixels=["4", 0], vae=["1", 2], mask=["4", 1], grow_mask_by=6)
)


@pytest.fixture
def job(latentmill, tmp_path):
    return partial(job_of, latentmill, tmp_path)


def test_a_mask_is_the_picture_s_transparent_part_or_a_channel_of_another(job):
    config = job(MASKED)
    common = {"name": "rows", "path": "/comfy/input", "opened": "comfy"}
    assert config["source"] == {**common, "masks": "image", "rows": [{"image": "cat.png", "seed": 7}]}
    assert config["flow"] == ["read", "encode", "denoise", "decode", "write"]
    assert not config["stages"]["encode"]["settings"]
    config = job(CHANNEL)
    rows = [{"image": "cat.png", "mask": "paint.png", "seed": 7}]
    assert config["source"] == {**common, "masks": "red", "rows": rows}
    config = job(INPAINT)
    assert config["source"]["masks"] == "image" and config["stages"]["encode"]["settings"] == {"grow_mask_by": 6}


def test_what_is_done_to_a_mask_is_said_to_the_source_and_a_scaled_picture_keeps_its_mask(job):
    config = job(
        with_changes(
            MASKED,
            _13=node("GrowMask", mask=["4", 1], expand=-3, tapered_corners=False),
            _14=node("InvertMask", mask=["13", 0]),
            _15=node("ImageScaleBy", image=["4", 0], upscale_method="area", scale_by=2),
            _11={"pixels": ["15", 0]},
            _12={"mask": ["14", 0]},
        )
    )
    assert config["source"]["masks"] == ["image", {"grow": -3, "tapered": False}, "invert"]
    assert config["flow"] == ["read", "image_upscale", "encode", "denoise", "decode", "write"]
    assert config["stages"]["image_upscale"]["settings"] == {"method": "area", "scale": 2.0, "keep_mask": True}


def test_masks_of_a_table(job):
    source = job(CHANNEL, "source.path=a.csv", "map.4.image=photo")["source"]
    common = {"name": "prompts", "path": "a.csv", "opened": "comfy", "masks": "red"}
    defaults = {"mask": "/comfy/input/paint.png", "prompt": "a lighthouse"}
    assert source == {**common, "columns": {"image": "photo"}, "defaults": defaults}
    source = job(CHANNEL, "source.path=a.csv", "map.4.image=photo", "map.13.image=painted")["source"]
    assert source["columns"] == {"image": "photo", "mask": "painted"}
    assert "a mask is known beside a picture of source prompts alone" in job(MASKED, "source=images", "source.path=a")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"_12": {"mask": ["14", 1]}, "_14": node("LoadImage", image="other.png")}, "the same LoadImage's picture"),
        (
            {
                "_13": node("UpscaleModelLoader", model_name="2x.pth"),
                "_14": node("ImageUpscaleWithModel", image=["4", 0], upscale_model=["13", 0]),
                "_11": {"pixels": ["14", 0]},
            },
            "beside a picture as LoadImage gives it, or scaled without a model",
        ),
        (
            {"_14": node("GrowMask", mask=["4", 1], expand=20000, tapered_corners=True), "_12": {"mask": ["14", 0]}},
            "node 14 GrowMask: expand must be from -16384 to 16384, not 20000",
        ),
        (
            {
                "_14": node("SetLatentNoiseMask", samples=["12", 0], mask=["4", 1]),
                "_5": {"latent_image": ["14", 0]},
            },
            "node 14 SetLatentNoiseMask: its latents have a mask already",
        ),
        ({"_5": {"sampler_name": "ddim"}}, "node 5 KSampler: ddim with a mask is not supported"),
    ],
)
def test_other_masks_are_refused(job, changes, line):
    assert line in job(with_changes(MASKED, **changes))


def test_masks_are_what_comfyui_s_loaders_give(latentmill, rows, tmp_path):
    """Beside the same picture with the mask in a file of its own: the same latents."""
    draw = random.Random(0)
    pixels = [tuple(draw.randrange(256) for _ in range(4)) for _ in range(32 * 32)]
    whole = Image.new("RGBA", (32, 32))
    whole.putdata(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    whole.save(tmp_path / "a.png", exif=exif)
    upright = whole.rotate(180)
    upright.convert("RGB").save(tmp_path / "plain.png")
    upright.getchannel("G").save(tmp_path / "green.png")
    Image.eval(upright.getchannel("A"), lambda alpha: 255 - alpha).save(tmp_path / "alpha.png")
    Image.new("L", (32, 32)).save(tmp_path / "nothing.png")

    def made(masks, *pairs):
        named = ", ".join(f"{{image: {image}, mask: {mask}, prompt: a red ring, seed: 7}}" for image, mask in pairs)
        code = latentmill(
            "run", "img2img", "cluster=inline", "flow=[read,encode,denoise,write]", "source=rows", f"source.rows=[{named}]",
            "source.opened=comfy", f"source.masks={masks}", f"source.path={tmp_path}", f"output={tmp_path / masks}",
            "sampling={steps: 2, strength: 0.7, width: 32, height: 32, first_noise: comfy}", "samples_per_row=1",
        )  # fmt: skip
        assert code == 0, latentmill.said
        return [row["latents"] for row in rows(tmp_path / masks)]

    alpha, green, nothing = made(
        "light", ("plain.png", "alpha.png"), ("plain.png", "green.png"), ("plain.png", "nothing.png")
    )
    assert made("image", ("a.png", "null"), ("plain.png", "null")) == [alpha, nothing]
    close = partial(pytest.approx, abs=1e-4)  # in a batch of other rows
    assert made("alpha", ("plain.png", "a.png")) == [close(alpha)]
    assert made("green", ("a.png", "a.png")) == [close(green)]
    assert alpha != close(green) and green != close(nothing) and nothing != close(alpha)
    assert latentmill("plan", "img2img", "source=rows", "source.rows=[{image: a.png}]", "source.masks=image") == 2
    assert "masks must be light, without changes, unless opened is comfy, not 'image'" in latentmill.err


def test_a_mask_of_another_size_is_stretched_where_it_is_used(latentmill, rows, tmp_path):
    """Of one colour a picture is the same however it is scaled; latents are a fourth of its sides."""
    Image.new("RGB", (16, 16), (200, 60, 30)).save(tmp_path / "square.png")
    Image.new("RGB", (32, 16), (200, 60, 30)).save(tmp_path / "wide.png")
    picture(16, 16, 1).save(tmp_path / "mask.png")
    small = picture(8, 4, 2)
    small.save(tmp_path / "small.png")
    small.resize((32, 16), Image.Resampling.NEAREST).save(tmp_path / "blocks.png")

    def made(name, between, *pairs):
        named = ", ".join(f"{{image: {image}, mask: {mask}, prompt: a red ring, seed: 7}}" for image, mask in pairs)
        code = latentmill(
            "run", "img2img", "cluster=inline", f"flow=[read,{between}encode,denoise,write]", "source=rows", f"source.rows=[{named}]",
            "source.opened=comfy", f"source.path={tmp_path}", f"output={tmp_path / name}", "samples_per_row=1",
            "sampling={steps: 2, strength: 0.7, width: null, height: null, first_noise: comfy}",
        )  # fmt: skip
        assert code == 0, latentmill.said
        return [row["latents"] for row in rows(tmp_path / name)]

    upscale = "{name: image_upscale, method: area, width: 32, height: 16, crop: center, keep_mask: true},"
    [scaled] = made("scaled", upscale, ("square.png", "mask.png"))
    other, stretched, blocks = made("other", "", *(("wide.png", f"{mask}.png") for mask in ("mask", "small", "blocks")))
    close = partial(pytest.approx, abs=1e-4)
    assert scaled == close(other) and stretched == close(blocks) and other != close(blocks)


def picture(width, height, seed):
    draw = random.Random(seed)
    values = [draw.choice((0, 0, 0, 90, 255)) for _ in range(width * height)]
    mask = Image.new("L", (width, height))
    mask.putdata(values)
    return mask


@pytest.mark.parametrize("tapered", [True, False])
def test_a_mask_grows_and_shrinks_by_its_neighbours(tapered):
    mask = np.array(picture(11, 9, 1))
    for by in (2, -1):
        expected = mask
        for _ in range(abs(by)):
            before, expected = expected, expected.copy()
            for y, x in np.ndindex(before.shape):
                beside = [
                    before[v, u]
                    for v in range(max(0, y - 1), min(9, y + 2))
                    for u in range(max(0, x - 1), min(11, x + 2))
                    if not tapered or v == y or u == x
                ]
                expected[y, x] = max(beside) if by > 0 else min(beside)
        assert np.array_equal(changed(mask, [{"grow": by, "tapered": tapered}]), expected)
    assert np.array_equal(changed(mask, ["invert", {"grow": 50}]), np.full_like(mask, 255))


@pytest.mark.parametrize(
    "wrong", ["invert", ["light", "blur"], ["light", {"grow": 1.5}], ["light", {"grow": 1, "by": 2}]]
)
def test_other_changes_of_masks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"masks must be light|a change of masks must be invert or \{grow"):
        masks_of(wrong)

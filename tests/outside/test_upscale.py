"""Latents and pictures brought to another size between two stages, as ComfyUI does it."""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentmill.batch import with_latents
from latentmill.plugin import Declaration, LatentSpec, StageContext, tensors
from latentmill.testing import batches

VALUES = json.loads((Path(__file__).parent / "comfyui_values" / "upscale.json").read_text())
"""From a run of ComfyUI; what and when is said in the file."""


def pattern(*shape):
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(i * i * 0.37 + i * 0.11).reshape(shape).float()


def stage(name, batch, reject=pytest.fail, sampling=(), floats=False, **settings):
    [found] = entry_points(group="latentmill.stages", name=name)
    made = found.load()(**settings)
    after = [Declaration("next", drops=("image",), takes_floats=floats)]
    made.prepare(StageContext(Declaration(name), after=after, sampling=dict(sampling), float_pictures=floats))
    return made(batch, reject)


@pytest.mark.parametrize("case", VALUES["latents"], ids=lambda case: "-".join(map(str, list(case.values())[:4])))
def test_latents_are_comfyui_s(case):
    spec, x = LatentSpec(4, 8, 1.0, 0.0, "float32", "f"), pattern(1, 4, 8, 12)
    settings = {key: case[key] for key in ("method", "scale", "width", "height", "crop") if case.get(key) is not None}
    batch = with_latents(batches.rows(3, 64, 96), torch.cat([torch.randn_like(x), x, x * 2]), spec)
    found = stage("latent_upscale", batch, **settings)
    latents = tensors.from_arrow(found, "latents")
    assert list(latents.shape[1:]) == case["shape"]
    assert torch.allclose(latents[1].flatten()[::67].double(), torch.tensor(case["values"]).double(), rtol=0, atol=1e-6)
    assert abs(latents[1].double().sum().item() - case["sum"]) < 1e-4
    sides = {(row["height"], row["width"]) for row in found.select(["height", "width"]).to_pylist()}
    assert sides == {(8 * case["shape"][1], 8 * case["shape"][2])}


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        ({"height": 64}, (8, 8)),
        ({"width": 400}, (8, 50)),
        ({"width": 1600}, (16, 200)),
        ({"height": 32, "width": 32}, (4, 4)),
    ],
)
def test_a_side_of_latents_that_follows_from_the_other_is_64_pixels_or_more(given, sides):
    """As ComfyUI's LatentUpscale has it, whose node gives 0 for that side: 64 / 12 and 400 / 12 are less."""
    spec = LatentSpec(4, 8, 1.0, 0.0, "float32", "f")
    tall = torch.zeros(1, 4, 24, 2) if "height" in given else torch.zeros(1, 4, 2, 24)
    batch = with_latents(batches.rows(1, 16, 192), tall, spec)
    latents = tensors.from_arrow(stage("latent_upscale", batch, method="area", **given), "latents")
    assert tuple(latents.shape[-2:]) == sides


def test_latents_of_a_space_with_a_shift_turn_where_comfyui_s_do():
    """Its latents are not scaled, and an arc between two of them hangs on where nothing is."""
    raw, scaled = (LatentSpec(4, 8, scale, shift, "float32", "f") for scale, shift in ((1.0, 0.0), (0.5, 0.1)))
    x = pattern(1, 4, 8, 12)
    found = [
        tensors.from_arrow(
            stage("latent_upscale", with_latents(batches.rows(1, 64, 96), z, spec), method="bislerp", scale=1.5),
            "latents",
        )
        for z, spec in ((x, raw), ((x - 0.1) * 0.5, scaled))
    ]
    assert torch.allclose((found[0] - 0.1) * 0.5, found[1], atol=1e-6)


@pytest.mark.parametrize("case", VALUES["pictures"], ids=lambda case: "-".join(map(str, list(case.values())[:4])))
def test_pictures_are_comfyui_s_within_a_level(case):
    u = ((pattern(1, 3, 20, 14) * 0.5 + 0.5) * 255).floor().to(torch.uint8).movedim(1, -1)
    settings = {key: case[key] for key in ("method", "scale", "width", "height", "crop") if case.get(key) is not None}
    found = stage("image_upscale", tensors.with_tensor(batches.rows(1, 20, 14), "image", u), **settings)
    image = tensors.from_arrow(found, "image")[0]
    assert list(image.shape) == case["shape"] and image.shape[:2] == (
        found["height"][0].as_py(),
        found["width"][0].as_py(),
    )
    assert (image.flatten()[::37].int() - torch.tensor(case["values"]).int()).abs().max() <= 1


@pytest.mark.parametrize("case", VALUES["floats"], ids=lambda case: "-".join(map(str, list(case.values())[:3])))
def test_pictures_of_floats_are_comfyui_s_and_are_rounded_for_who_takes_bytes(case):
    """Bicubic goes beyond black and white, and is not cut as long as the picture is one of floats."""
    given = tensors.with_tensor(batches.rows(1, 20, 14), "image", (pattern(1, 3, 20, 14) * 0.5 + 0.5).movedim(1, -1))
    settings = {key: case[key] for key in ("method", "scale", "width", "height", "crop") if case.get(key) is not None}
    [image] = tensors.from_arrow(stage("image_upscale", given, floats=True, **settings), "image")
    [shown] = tensors.from_arrow(stage("image_upscale", given, **settings), "image")
    assert image.dtype == torch.float32 and list(image.shape) == case["shape"]
    assert torch.allclose(image.flatten()[::97], torch.tensor(case["values"]), rtol=0, atol=1e-6)
    ends = torch.tensor([case["least"], case["most"]])
    assert torch.allclose(torch.stack([image.min(), image.max()]), ends, rtol=0, atol=1e-6)
    assert shown.dtype == torch.uint8 and torch.equal(shown, (image.clamp(0, 1) * 255).round().to(torch.uint8))


def test_a_clip_s_frames_are_each_resized():
    clips = batches.with_clips(2, 3, 8, 6)
    found = tensors.from_arrow(stage("image_upscale", clips, method="bilinear", scale=2), "video")
    one = tensors.with_tensor(batches.rows(2, 8, 6), "image", tensors.from_arrow(clips, "video")[:, 1])
    assert found.shape == (2, 3, 16, 12, 3)
    assert torch.equal(
        found[:, 1], tensors.from_arrow(stage("image_upscale", one, method="bilinear", scale=2), "image")
    )


@pytest.mark.parametrize(("megapixels", "sides"), [(0.01, (125, 84)), (0.0005, (28, 19))])
def test_megapixels_are_comfyui_s(megapixels, sides):
    """ImageScaleToTotalPixels: whole pixels of 1024 x 1024, in the picture's aspect; ComfyUI 0.3.64 (a125cd8), 2026-11-26."""
    found = stage("image_upscale", batches.with_pictures(1, 64, 96), method="area", megapixels=megapixels)
    assert (found["width"][0].as_py(), found["height"][0].as_py()) == sides


def test_a_row_of_too_many_pixels_is_an_error_row():
    wrong = []
    found = stage(
        "image_upscale",
        batches.with_pictures(2, 8, 8),
        lambda *why: wrong.append(why),
        {"max_pixels": 100},
        method="area",
        scale=2,
    )
    assert len(found) == 0 and wrong == [
        (i, "16x16 are 256 pixels, more than sampling.max_pixels=100 allows") for i in range(2)
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "bicubc", "scale": 2}, "method must be nearest-exact, bilinear, area, bicubic or bislerp, not 'bicubc' .*did you mean 'bicubic'"),
        ({"method": "area"}, "either scale, megapixels or width and height must be given"),
        ({"method": "area", "scale": 2, "width": 8}, "either scale, megapixels or width and height must be given"),
        ({"method": "area", "scale": 0.0}, "scale must be more than 0, not 0.0"),
        ({"method": "area", "scale": 2.0, "crop": "center"}, "crop is for width and height"),
        ({"method": "area", "width": 8, "height": 8, "crop": "middle"}, "crop must be disabled or center"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValueError, match=said):
        stage("latent_upscale", batches.with_stored_latents(), **settings)


def test_a_job_with_each_of_them_between_two_passes(latentmill, rows, tmp_path):
    """Latents, or the decoded pictures, of twice the size; the prompts go on to the second pass."""
    (tmp_path / "prompts.csv").write_text("prompt\na red ring on a blue background\na blue star on a red background\n")
    flows = {
        "latents": "flow=[read,encode,denoise,{name: latent_upscale, method: bislerp, scale: 1.5},{name: denoise, as: refine},decode,write]",
        "pictures": "flow=[read,encode,denoise,decode,{name: image_upscale, method: lanczos, width: 50, height: 50},"
        "{name: encode_images, as: encode_again},{name: denoise, as: refine},{name: decode, as: decode_again},write]",
    }
    for name, flow in flows.items():
        code = latentmill(
            "run", "txt2img", "cluster=inline", flow, f"source.path={tmp_path}/prompts.csv", "samples_per_row=1",
            "sampling={steps: 2, width: 32, height: 32}", "stages.refine.sampling={strength: 0.5}", f"output={tmp_path / name}",
        )  # fmt: skip
        assert code == 0, latentmill.said
        assert {(row["width"], row["height"], row["warning"]) for row in rows(tmp_path / name)} == {(48, 48, "")}
        [plan] = [json.loads((tmp_path / name / "plan.json").read_text())]
        [first] = [stage for stage in plan["stages"] if stage["name"] == "denoise"]
        assert "prompt:" not in first["drops"]


PLAIN = """
from latentmill.plugin import Stage


class Plain(Stage):
    contract = 2
    adds = drops = ("image",)

    def __call__(self, batch, reject):
        return batch
"""


@pytest.mark.parametrize(
    ("stage", "sides"), [("{name: image_upscale, method: area, scale: 2}", (132, 140)), ("plain", (64, 68))]
)
def test_a_picture_is_whole_before_a_stage_that_cuts_it_for_the_vae_and_no_other(
    stage, sides, install, latentmill, rows, tmp_path
):
    install("acme", "[latentmill.stages]\nplain = acme_plain:Plain\n", acme_plain=PLAIN)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (67, 70), (9, 99, 199)).save(tmp_path / "pictures" / "a.png")
    flow = f"flow=[read,{stage},encode,decode,write]"
    code = latentmill(
        "run",
        "reconstruct",
        "cluster=inline",
        flow,
        f"source.path={tmp_path / 'pictures'}",
        f"output={tmp_path / 'out'}",
    )
    assert code == 0, latentmill.said
    [row] = rows(tmp_path / "out")
    assert (row["width"], row["height"]) == sides

"""Inpainting as ComfyUI has it: a soft mask, around each answer of the network, and a picture that is grey under it."""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentmill.batch import with_latents
from latentmill.plugin import VAE, Declaration, Denoiser, LatentSpec, StageContext, tensors
from latentmill.schedulers.noise_schedules import RectifiedFlow
from latentmill.testing import batches

VALUES = json.loads((Path(__file__).parent / "comfyui_values" / "masks.json").read_text())
"""From a run of ComfyUI; what and when is said in the file."""
SPEC = LatentSpec(4, 8, 1.0, 0.0, "float32", "f")


def pattern(*shape):
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(i * i * 0.37 + i * 0.11).reshape(shape).float()


MASK = ((pattern(1, 48, 40) * 0.5 + 0.5) * 255).floor() / 255


def plugin(kind, name):
    [found] = entry_points(group=f"latentmill.{kind}s", name=name)
    return found.load()


class Tanh(Denoiser):
    contract, prediction, noise_schedule = 2, "sample", RectifiedFlow()

    def predict(self, x, t, conditioning):
        return torch.tanh(x * 0.8)


class Same(VAE):
    contract, spec = 2, SPEC

    def encode(self, pictures):
        self.given = pictures
        return torch.zeros(len(pictures), 4, 6, 5)

    def decode(self, latents):
        raise NotImplementedError


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_rows_are_comfyui_s(name):
    solver = plugin("scheduler", "comfy")(sampler=name)
    context = StageContext.of(
        {"denoiser": Tanh(), "scheduler": solver},
        sampling={"until": 0.0, "first_noise": "comfy"},
        choices={"scheduler": {"name": name, "grid": {"name": "times", "times": VALUES["sigmas"][:-1]}}},
        scheduler_of={name: solver}.__getitem__,
    )
    denoise = plugin("stage", "denoise")()
    denoise.prepare(context)
    rows = batches.rows(2, 48, 40)
    for column, value in (("seed", 5), ("scheduler", name), ("guidance_scale", 1.0)):
        at = rows.schema.get_field_index(column)
        rows = rows.set_column(at, rows.schema.field(at), pa.array([value] * 2, rows.schema.field(at).type))
    batch = with_latents(rows, pattern(1, 4, 6, 5).repeat(2, 1, 1, 1), SPEC)
    batch = tensors.with_tensor(batch, "mask", torch.stack([MASK, torch.zeros_like(MASK)]))
    [found] = denoise(batch, pytest.fail)
    painted, kept = tensors.from_arrow(found, "latents")
    assert torch.allclose(painted.flatten().double(), torch.tensor(VALUES[name]).double(), rtol=0, atol=1e-6)
    assert torch.allclose(kept, pattern(4, 6, 5), atol=1e-6), "where there is nothing to paint the picture stays"


@pytest.mark.parametrize("grow", [0, 1, 6, 7])
def test_a_mask_grows_as_comfyui_s_and_the_picture_is_grey_under_it(grow):
    vae, encode = Same(), plugin("stage", "encode_images")(grow_mask_by=grow)
    denoises = Declaration("denoise", needs=("denoiser",), takes=("latents", "prompt:"))
    encode.prepare(StageContext.of({"vae": vae}, adds=("latents", "mask", "from_noise"), after=[denoises]))
    picture = ((pattern(1, 3, 48, 40) * 0.5 + 0.5) * 255).floor().to(torch.uint8).movedim(1, -1)
    batch = tensors.with_tensor(batches.rows(1, 48, 40), "image", picture)
    batch = tensors.with_tensor(batch, "mask", (MASK > 0.985).float())
    [found] = encode(batch, pytest.fail)
    mask, (count, places) = tensors.from_arrow(found, "mask"), VALUES[f"grown by {grow}"]
    assert mask.shape == (1, 1, 48, 40) and int(mask.sum()) == count
    assert mask.flatten().nonzero().flatten()[::40].tolist() == places
    grey, (count, places) = (vae.given == 0).all(1).flatten(), VALUES["grey"]
    assert int(grey.sum()) == count and grey.nonzero().flatten()[::10].tolist() == places


def test_a_job_reads_soft_masks_where_its_first_noise_is_comfyui_s(latentmill, rows, tmp_path):
    """And both passes of it hold to them: a picture without anything to paint comes back as the VAE has it."""
    from PIL import Image

    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "a.png")
    for name, light in (("black", 0), ("grey", 60)):
        Image.new("L", (16, 16), light).save(tmp_path / f"{name}.png")
    (tmp_path / "rows.csv").write_text(
        "prompt,image,mask\n"
        + "".join(f"a red ring on a blue background,a.png,{mask}.png\n" for mask in ("black", "grey"))
    )
    pictures = {}
    for first in ("comfy", "latentmill"):
        flow = "flow=[read,encode,denoise,{name: denoise, as: refine},decode,write]"
        code = latentmill(
            "run", "img2img", "cluster=inline", flow, f"source.path={tmp_path / 'rows.csv'}", "samples_per_row=1",
            f"sampling={{steps: 2, strength: 0.7, width: 16, height: 16, first_noise: {first}}}", f"output={tmp_path / first}",
        )  # fmt: skip
        assert code == 0, latentmill.said
        pictures[first] = [row["image"]["bytes"] for row in rows(tmp_path / first)]
    assert pictures["comfy"][0] != pictures["comfy"][1], "what is a little light is painted a little"
    assert pictures["latentmill"][0] == pictures["latentmill"][1], "ours are of two levels"

"""Pictures redone, refined and painted anew by our jobs, against the diffusers pipelines called directly, with the same seeds."""

import json
import shutil

import diffusers
import pytest
import torch
from beside import GUIDANCE, PROMPTS, SIZE, STEPS, denoised, difference, rows_of
from PIL import Image

pytestmark = pytest.mark.usefixtures("plain_convolutions")
INPAINTING = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
PLAIN = {"clip_sample": False, "set_alpha_to_one": False}

PICTURES = torch.randint(0, 256, (3, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_pictures_redone_after_a_prompt(name, strength, model, tmp_path):
    """The pipeline is given the mean of the VAE's posterior, which is where we begin; itself it would draw from it."""
    rows = []
    for i, ((prompt, negative), pixels) in enumerate(zip(PROMPTS, PICTURES)):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        rows.append({"prompt": prompt, "negative_prompt": negative, "seed": i, "image": f"{i}.png"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = rows_of(
        "sd15_img2img",
        tmp_path / "out",
        "stages=cpu",
        "flow=[read,encode,denoise,write]",
        f"model.path={model(name)}",
        "model.dtype=float32",
        f"source.path={tmp_path / 'edits.jsonl'}",
        "sampling.first_noise=diffusers",
        f"sampling.steps={STEPS}",
        f"sampling.guidance_scale={GUIDANCE}",
        f"sampling.strength={strength}",
        f"sampling.height={SIZE[0]}",
        f"sampling.width={SIZE[1]}",
    )
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(model(name))
    with torch.inference_mode():
        encoded = pipeline.vae.encode(PICTURES.permute(0, 3, 1, 2) / 127.5 - 1.0)
        latents = encoded.latent_dist.mean * pipeline.vae.config.scaling_factor
    for i, (row, (prompt, negative)) in enumerate(zip(found, PROMPTS, strict=True)):
        wanted = pipeline(
            prompt,
            image=latents[i : i + 1],
            negative_prompt=negative,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
        ).images[0]
        assert difference(row, wanted) <= 1e-5


def test_the_refiner_goes_on_where_the_base_model_stopped(model, tmp_path):
    base = model("StableDiffusionXLPipeline")
    refiner = shutil.copytree(model("StableDiffusionXLImg2ImgPipeline"), tmp_path / "refiner")
    shutil.rmtree(refiner / "vae")
    shutil.copytree(base / "vae", refiner / "vae")
    denoised(tmp_path, base, PROMPTS, "sampling.until=0.2")
    told = [f"sampling.steps={STEPS}", f"sampling.guidance_scale={GUIDANCE}", f"source.path={tmp_path / 'latents'}"]
    job = ["model=diffusers", "scheduler=model", "source=latents", f"model.path={refiner}", *told]
    found = rows_of("denoise", tmp_path / "refined", *job)
    first = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
    told = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    for i, (row, (prompt, negative)) in enumerate(zip(found, PROMPTS, strict=True)):
        given = {**told, "negative_prompt": negative, "generator": torch.Generator().manual_seed(i)}
        half = first(prompt, height=SIZE[0], width=SIZE[1], denoising_end=0.8, **given).images
        wanted = second(prompt, image=half, denoising_start=0.8, **given).images[0]
        assert difference(row, wanted) <= 1e-5


MASK = torch.zeros(*SIZE)
MASK[4:, 10:25] = 1


def painted(tmp_path, folder, strength):
    """The rows of a job that paints PICTURES anew under MASK."""
    Image.fromarray((MASK * 255).to(torch.uint8).numpy()).save(tmp_path / "mask.png")
    rows = []
    for i, ((prompt, negative), pixels) in enumerate(zip(PROMPTS, PICTURES)):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        rows.append({"prompt": prompt, "negative_prompt": negative, "seed": i, "image": f"{i}.png", "mask": "mask.png"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = ["sampling.first_noise=diffusers", f"sampling.steps={STEPS}", f"sampling.guidance_scale={GUIDANCE}"]
    told += [f"sampling.strength={strength}", f"sampling.height={SIZE[0]}", f"sampling.width={SIZE[1]}"]
    told += ["stages=cpu", "model.dtype=float32", f"model.path={folder}", f"source.path={tmp_path / 'edits.jsonl'}"]
    return rows_of("sd15_img2img", tmp_path / "out", "flow=[read,encode,denoise,write]", *told)


def painted_by(pipeline, strength):
    """The same by a pipeline. It is given the means of the VAE's posterior, which is where we begin; itself it would draw."""
    images = PICTURES.permute(0, 3, 1, 2) / 127.5 - 1.0
    with torch.inference_mode():
        latents, masked = (
            pipeline.vae.encode(pictures).latent_dist.mean * pipeline.vae.config.scaling_factor
            for pictures in (images, images * (1 - MASK))
        )
    for i, (prompt, negative) in enumerate(PROMPTS):
        yield pipeline(
            prompt,
            image=latents[i : i + 1],
            mask_image=MASK[None, None],
            masked_image_latents=masked[i : i + 1],
            negative_prompt=negative,
            strength=strength,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
        ).images[0]


@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_a_picture_painted_anew_where_its_mask_is_light(strength, model, tmp_path):
    """Stable Diffusion's pipeline for inpainting, with a network that was not trained for it."""
    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        model("StableDiffusionPipeline"), safety_checker=None
    )
    pipeline.scheduler = diffusers.DDIMScheduler(**LEADING, **PLAIN)
    pipeline.save_pretrained(tmp_path / "model")
    found = painted(tmp_path, tmp_path / "model", strength)
    for row, wanted in zip(found, painted_by(pipeline, strength), strict=True):
        assert difference(row, wanted) <= 1e-5


@pytest.mark.parametrize("strength", [0.75, 1.0])
@pytest.mark.parametrize("name", INPAINTING)
def test_networks_that_were_trained_for_inpainting(name, strength, model, tmp_path):
    pipeline = getattr(diffusers, name).from_pretrained(model(name))
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**LEADING)  # PNDM begins otherwise
    pipeline.save_pretrained(tmp_path / "model")
    found = painted(tmp_path, tmp_path / "model", strength)
    for row, wanted in zip(found, painted_by(pipeline, strength), strict=True):
        assert difference(row, wanted) <= 1e-5

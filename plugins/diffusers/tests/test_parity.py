"""Family by family: our job against the diffusers pipeline called directly, with the same seeds."""

import inspect
import io
import json
import shutil

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from layouts import ordered
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import latentmill

PROMPTS = [
    ("a red fox", None),
    (
        "two houses by the sea, at night, and a boat that is longer than both of them, but not as long as this sentence",
        "blurry",
    ),
    ("x", "y"),
]
SIZE = (32, 64)
STEPS, GUIDANCE = 8, 4.0
INPAINTING = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
ELSEWHERE = ("StableDiffusionXLImg2ImgPipeline", "LatentConsistencyModelPipeline", *INPAINTING)
"""Families with tests of their own: they have no text-to-image, or draw noise at every step, which is ours."""


def rows_of(job, output, *overrides):
    """The rows that a job makes of PROMPTS, or of whatever it reads."""
    result = latentmill.run(job, [f"output={output}", "cluster=inline", *overrides])
    assert (result.ok, result.failed) == (len(PROMPTS), 0), (output / "errors/00000.jsonl").read_text()
    return [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def denoised(tmp_path, folder, prompts=PROMPTS, *overrides):
    rows = [{"prompt": p, "negative_prompt": n, "seed": i} for i, (p, n) in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows_of(
        "denoise",
        tmp_path / "latents",
        "model=diffusers",
        "scheduler=model",
        f"model.path={folder}",
        f"source.path={tmp_path / 'prompts.jsonl'}",
        "sampling.first_noise=diffusers",
        f"sampling.steps={STEPS}",
        f"sampling.guidance_scale={GUIDANCE}",
        f"sampling.height={SIZE[0]}",
        f"sampling.width={SIZE[1]}",
        *overrides,
    )


def theirs(folder, name, prompts, prepare=lambda pipeline: None):
    """What the pipeline makes of prompts, one after another: its last latents, as it has them, and pictures."""
    pipeline = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    known = inspect.signature(pipeline.__call__).parameters
    last = {}
    told = {
        "num_inference_steps": STEPS,
        "true_cfg_scale" if name == "QwenImagePipeline" else "guidance_scale": GUIDANCE,
        "height": SIZE[0],
        "width": SIZE[1],
        "use_resolution_binning": False,
        "callback_on_step_end": lambda pipeline, i, t, found: last.update(found) or {},
        "callback": lambda i, t, latents: last.update(latents=latents),
    }
    if "callback_on_step_end" in known:
        del told["callback"]
    made = []
    for i, (prompt, negative) in enumerate(prompts):
        given = {key: value for key, value in told.items() if key in known}
        if negative is not None:
            given["negative_prompt"] = negative
        picture = pipeline(prompt=prompt, generator=torch.Generator().manual_seed(i), **given).images[0]
        made.append((last["latents"][0].clone(), np.asarray(picture).astype(int)))
    return made


def difference(row, latents, name=""):
    """Of a row's latents from those of the pipeline of that name, relative to their length."""
    latents = ordered(name, latents[None], *row["shape"])
    return float((torch.tensor(np.reshape(row["latents"], row["shape"])) - latents).norm() / latents.norm())


@pytest.mark.parametrize("name", [name for name in tiny.BUILDERS if name not in ELSEWHERE])
def test_the_same_latents_and_pictures_as_the_pipeline(name, model, tmp_path):
    negative = "negative_prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
    prompts = [(p, n if negative else None) for p, n in PROMPTS]
    wanted = theirs(model(name), name, prompts)
    rows = denoised(tmp_path, model(name), prompts)
    for row, (latents, _) in zip(rows, wanted, strict=True):
        assert difference(row, latents, name) <= 1e-5
    rows = rows_of(
        "decode",
        tmp_path / "pictures",
        "vae=diffusers",
        f"vae.path={model(name)}",
        f"source.path={tmp_path / 'latents'}",
    )
    for row, (_, picture) in zip(rows, wanted, strict=True):
        found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)
        assert (np.abs(found - picture) <= 1).mean() >= 0.999


def lora_files(folder, name, path, seed):
    """Random LoRA weights for network and first text encoder, as diffusers saves them; and those of the network alone.

    The latter is what the pipeline can load itself: transformers refuses this peft for text encoders. What the former adds
    to the text encoder's weights is returned, too.
    """
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    network, generator = getattr(pipeline, part), torch.Generator().manual_seed(seed)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(network)
    layers = {key: torch.randn(value.shape, generator=generator) / 4 for key, value in state.items()}
    told, added = {}, {}
    for key, module in pipeline.text_encoder.named_modules():
        if key.endswith("q_proj"):
            down, up = (
                torch.randn(s, generator=generator) for s in ((2, module.in_features), (module.out_features, 2))
            )
            told |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            added[key] = up @ down
    for file, more in ((path, {"text_encoder_lora_layers": told}), (path.with_suffix(".network.safetensors"), {})):
        pipeline.save_lora_weights(file.parent, weight_name=file.name, **{f"{part}_lora_layers": layers}, **more)
    return path, path.with_suffix(".network.safetensors"), added


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"])
def test_two_loras_with_weights_of_their_own(name, model, tmp_path):
    weights = [0.8, -0.5]
    files = [lora_files(model(name), name, tmp_path / f"{i}.safetensors", i) for i in (1, 2)]

    def prepare(pipeline):
        for (_, network, added), weight, adapter in zip(files, weights, ("first", "second")):
            pipeline.load_lora_weights(str(network), adapter_name=adapter)
            for key, change in added.items():
                pipeline.text_encoder.get_submodule(key).weight.data += weight * change
        pipeline.set_adapters(["first", "second"], weights)

    prompts = [(p, n if name != "FluxPipeline" else None) for p, n in PROMPTS]
    plain, wanted = theirs(model(name), name, prompts), theirs(model(name), name, prompts, prepare)
    loras = ",".join(f"{{path: {file}, weight: {weight}}}" for (file, _, _), weight in zip(files, weights))
    rows = denoised(tmp_path, model(name), prompts, f"model.loras=[{loras}]")
    for row, (latents, _), (without, _) in zip(rows, wanted, plain, strict=True):
        assert difference(row, latents, name) <= 1e-5 < 1e-3 < difference(row, without, name)


def test_the_alpha_of_a_lora_may_stand_in_the_file_s_metadata(model, tmp_path):
    """As diffusers' scripts for training write it: in peft's config of the adapter, and in no tensor."""
    name = "StableDiffusionPipeline"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model(name))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.unet)
    text = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 32)}
    text["text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.randn(32, 2)
    module = {key.removeprefix("text_model."): value for key, value in text.items()}
    about = {"unet_lora_adapter_metadata": config.to_dict(), "text_encoder_lora_adapter_metadata": config.to_dict()}
    told = {"unet_lora_layers": layers, "text_encoder_lora_layers": module}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, weight_name="both.safetensors", **told, **about)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, layers, weight_name="unet.safetensors", unet_lora_adapter_metadata=config.to_dict())  # fmt: skip

    def prepare(pipeline):
        pipeline.load_lora_weights(str(tmp_path / "unet.safetensors"))
        down, up = text.values()
        pipeline.text_encoder.get_submodule("encoder.layers.0.self_attn.q_proj").weight.data += 8 / 2 * up @ down

    wanted = theirs(model(name), name, PROMPTS, prepare)
    rows = denoised(tmp_path, model(name), PROMPTS, f"model.loras=[{{path: {tmp_path / 'both.safetensors'}}}]")
    for row, (latents, _) in zip(rows, wanted, strict=True):
        assert difference(row, latents, name) <= 1e-5


def test_stable_diffusion_3_without_its_t5(model, tmp_path):
    name = "StableDiffusion3Pipeline"
    folder = shutil.copytree(model(name), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(model(name), text_encoder_3=None, tokenizer_3=None)
    rows = denoised(tmp_path, folder, PROMPTS)
    for i, (row, (prompt, negative)) in enumerate(zip(rows, PROMPTS, strict=True)):
        told = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIZE[0], "width": SIZE[1]}
        generator = torch.Generator().manual_seed(i)
        wanted = pipeline(prompt, negative_prompt=negative, generator=generator, output_type="latent", **told).images[0]
        assert difference(row, wanted) <= 1e-5


def test_a_config_without_a_key_has_the_class_s_default(model, tmp_path):
    """FLUX.2 is told the guidance scale unless its config says that it isn't."""
    name = "Flux2Pipeline"
    folder = shutil.copytree(model(name), tmp_path / "model")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config.pop("guidance_embeds") is True
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    for row, (latents, _) in zip(denoised(tmp_path, folder, [(p, None) for p, _ in PROMPTS]), theirs(model(name), name, [(p, None) for p, _ in PROMPTS]), strict=True):  # fmt: skip
        assert difference(row, latents, name) <= 1e-5


def test_a_latent_consistency_model_is_told_the_guidance_scale(model, tmp_path):
    """One step: what follows is noise of the row's own."""
    name = "LatentConsistencyModelPipeline"
    pipeline = getattr(diffusers, name).from_pretrained(model(name))
    told = {"num_inference_steps": 1, "guidance_scale": GUIDANCE, "height": SIZE[0], "width": SIZE[1]}
    rows = denoised(tmp_path, model(name), [(p, None) for p, _ in PROMPTS], "sampling.steps=1")
    for i, (row, (prompt, _)) in enumerate(zip(rows, PROMPTS, strict=True)):
        generator = torch.Generator().manual_seed(i)
        wanted = pipeline(prompt, generator=generator, output_type="latent", **told).images[0]
        assert difference(row, wanted) <= 1e-5


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


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
PLAIN = {"clip_sample": False, "set_alpha_to_one": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "ddim, sd 1": ("DDIMScheduler", {**LEADING, **PLAIN}),
    "ddim, v, zero snr, trailing": (
        "DDIMScheduler",
        {
            **SD,
            **PLAIN,
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
    ),
    "ddim, sample": ("DDIMScheduler", {**LEADING, **PLAIN, "prediction_type": "sample"}),
    "pndm": ("PNDMScheduler", {**LEADING, "skip_prk_steps": True}),
    "euler, leading": ("EulerDiscreteScheduler", LEADING),
    "euler, linspace": ("EulerDiscreteScheduler", SD),
    "euler, trailing, v": (
        "EulerDiscreteScheduler",
        {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "heun": ("HeunDiscreteScheduler", LEADING),
    "lms": ("LMSDiscreteScheduler", LEADING),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**LEADING, "final_sigmas_type": "zero"}),
    "dpmpp_2m, karras": ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}),
    "dpmpp_2m, flow": ("DPMSolverMultistepScheduler", FLOW),
    "unipc": ("UniPCMultistepScheduler", {**SD, "final_sigmas_type": "zero"}),
    "euler, karras": ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    "euler, beta": ("EulerDiscreteScheduler", {**SD, "use_beta_sigmas": True}),
    "unipc, sigma_min": (
        "UniPCMultistepScheduler",
        {**SD, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "deis": ("DEISMultistepScheduler", {**SD, "solver_order": 2, "lower_order_final": False}),
    "kdpm2": ("KDPM2DiscreteScheduler", LEADING),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_path_prediction_grid_and_solver_are_what_the_scheduler_config_says(case, model, tmp_path):
    """The same network under each: what it was trained for is nothing that random weights would mind."""
    name, settings = SCHEDULERS[case]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model("StableDiffusionPipeline"))
    pipeline.scheduler = getattr(diffusers, name)(**settings)
    pipeline.save_pretrained(tmp_path / "model")
    rows = denoised(tmp_path, tmp_path / "model", PROMPTS)
    wanted = theirs(tmp_path / "model", "StableDiffusionPipeline", PROMPTS)
    for row, (latents, _) in zip(rows, wanted, strict=True):
        assert difference(row, latents, name) <= 1e-5


MASK = torch.zeros(*SIZE)
MASK[8:, 20:50] = 1


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

"""Family by family: our job against the diffusers pipeline called directly, with the same seeds."""

import inspect
import io
import json

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import latentmill
from latentmill_diffusers import tiny
from latentmill_diffusers.families import unpatched

PROMPTS = [
    ("a red fox", ""),
    (
        "two houses by the sea, at night, and a boat that is longer than both of them, but not as long as this sentence",
        "blurry",
    ),
    ("x", "y"),
]
SIZE = (32, 64)
STEPS, GUIDANCE = 8, 4.0


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
        "guidance_scale": GUIDANCE,
        "true_cfg_scale": GUIDANCE,
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
        if name != "FluxPipeline":  # without one it has the guidance that the network was told
            told["negative_prompt"] = None if name == "StableDiffusionXLPipeline" and not negative else negative
        given = {key: value for key, value in told.items() if key in known}
        picture = pipeline(prompt=prompt, generator=torch.Generator().manual_seed(i), **given).images[0]
        made.append((last["latents"][0].clone(), np.asarray(picture).astype(int)))
    return made


def unpacked(latents, shape):
    """A pipeline's latents ``[C, h, w]``: some are tokens, of one place or of 2x2."""
    if latents.ndim == 3:
        return latents
    if latents.shape[-1] == shape[0]:
        return latents.T.unflatten(1, shape[1:])
    return unpatched(latents[None], shape[1] // 2, shape[2] // 2)[0]


def difference(row, latents):
    """Of a row's latents from a pipeline's, relative to their length."""
    latents = unpacked(latents, row["shape"])
    return float((torch.tensor(np.reshape(row["latents"], row["shape"])) - latents).norm() / latents.norm())


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_the_same_latents_and_pictures_as_the_pipeline(name, model, tmp_path):
    negative = "negative_prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
    prompts = [(p, n if negative else "") for p, n in PROMPTS]
    wanted = theirs(model(name), name, prompts)
    rows = denoised(tmp_path, model(name), prompts)
    for row, (latents, _) in zip(rows, wanted, strict=True):
        assert difference(row, latents) <= 1e-5
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

    prompts = [(p, n if name != "FluxPipeline" else "") for p, n in PROMPTS]
    plain, wanted = theirs(model(name), name, prompts), theirs(model(name), name, prompts, prepare)
    loras = ",".join(f"{{path: {file}, weight: {weight}}}" for (file, _, _), weight in zip(files, weights))
    rows = denoised(tmp_path, model(name), prompts, f"model.loras=[{loras}]")
    for row, (latents, _), (without, _) in zip(rows, wanted, plain, strict=True):
        assert difference(row, latents) <= 1e-5 < 1e-3 < difference(row, without)

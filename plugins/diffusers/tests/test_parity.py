"""Family by family: our job against the diffusers pipeline called directly, with the same seeds."""

import inspect
import io
import json
import shutil

import diffusers
import numpy as np
import pytest
import tiny
import torch
from beside import GUIDANCE, PROMPTS, SIZE, STEPS, denoised, difference, rows_of, theirs
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

pytestmark = pytest.mark.usefixtures("plain_convolutions")
ELSEWHERE = (
    "StableDiffusionXLImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
)
"""Families with tests of their own: they have no text-to-image, or draw noise at every step, which is ours."""
LARGER = ("HunyuanDiTPipeline", "Lumina2Pipeline", "SanaPipeline")
"""Families whose pictures are of more pixels for one of their latents', or multiples of 32."""


@pytest.mark.parametrize("name", [name for name in tiny.BUILDERS if name not in ELSEWHERE])
def test_the_same_latents_and_pictures_as_the_pipeline(name, model, tmp_path):
    negative = "negative_prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
    prompts = [(p, n if negative else None) for p, n in PROMPTS]
    size = (32, 64) if name in LARGER else SIZE
    wanted = theirs(model(name), name, prompts, size=size)
    rows = denoised(tmp_path, model(name), prompts, size=size)
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
    plain = theirs(model(name), name, prompts, decode=False)
    wanted = theirs(model(name), name, prompts, prepare, decode=False)
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

    wanted = theirs(model(name), name, PROMPTS, prepare, decode=False)
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
    for row, (latents, _) in zip(denoised(tmp_path, folder, [(p, None) for p, _ in PROMPTS]), theirs(model(name), name, [(p, None) for p, _ in PROMPTS], decode=False), strict=True):  # fmt: skip
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

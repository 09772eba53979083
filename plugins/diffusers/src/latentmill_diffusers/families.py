"""What the families of models differ in: one row of a table each, under the name of the pipeline's class in ``model_index.json``.

A row says what ``encode_prompt`` of the pipeline returns, how the network is called, and what the pipeline tells its
scheduler. All else (path, prediction, grid, solver, sizes) is in the model's own configs, or the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from latentmill_diffusers.networks import (
    NetworkCall,
    aura_flow,
    cogview_4,
    flux,
    flux_2,
    hunyuan_dit,
    lumina_2,
    patches,
    pixart,
    qwen_image,
    sana,
    stable_diffusion_3,
    unet,
    unpatched,
    z_image,
)


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    name: str
    call: NetworkCall
    network: str = "transformer"
    """The part that is the network."""
    encoded: tuple[str, ...] = ("embeds -embeds",)
    """What each call of ``encode_prompt`` returns: names of conditioning, those of the negative prompt with a minus, and _ for
    what is not needed. Without a minus, negative prompts are encoded as all others."""
    with_each: tuple[Mapping[str, Any], ...] = ({},)
    """Arguments of each of those calls."""
    packed: int = 1
    """Latent pixels, on each side, that the network takes as one, with a channel for every value."""
    pad: int = 0
    """Above 0: prompts come out of different lengths, which the network sees. They travel padded to so many tokens, with
    ``length`` beside, and each row is encoded alone, so that it hangs on no other. Those of one length share a call of the
    network, but on the CPU."""
    pad_to: int = 1
    """The pipeline fills prompts up to a multiple of so many tokens."""
    schedule: Callable[[Any, int, Sequence[int]], dict[str, Any]] = field(default=lambda scheduler, steps, shape: {})
    """``schedule(config, steps, shape)``: what the pipeline hands to ``set_timesteps`` of a scheduler of this config."""
    told: Callable[[Any, Tensor, Sequence[int]], Tensor] | None = None
    """``told(config, timestep, shape)``: the timestep that the network is told, where that is another than the scheduler's."""
    parted_by: tuple[str, ...] = ()
    """Conditioning by which the network itself pads its rows, to the longest of them: how long that is shows in their last bits."""
    note: str = ""
    """What a user should know; it stands in the README's table."""
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """``guide(prompt, negative, scale)``, where it is another formula than everyone's."""
    guides_above: float = 1.0
    """The guidance scale above which the pipeline guides."""
    guides_without: bool = True
    """Whether the pipeline guides a row that gives no negative prompt, as by an empty one."""


def sd3_schedule(config: Any, steps: int, shape: Sequence[int]) -> dict[str, Any]:
    """A shift that grows with the number of tokens, for the models that want one."""
    return (
        {"mu": shift(config, (shape[-2] // 2) * (shape[-1] // 2), most=1.16)}
        if config.get("use_dynamic_shifting")
        else {}
    )


def flux_schedule(config: Any, steps: int, shape: Sequence[int]) -> dict[str, Any]:
    """Equal steps, and a shift that grows with the number of tokens."""
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift(config, tokens)}


def lumina_2_schedule(config: Any, steps: int, shape: Sequence[int]) -> dict[str, Any]:
    """As Flux's, but the pipeline takes the number of channels for that of the tokens."""
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift(config, shape[-3])}


def cogview_4_schedule(config: Any, steps: int, shape: Sequence[int]) -> dict[str, Any]:
    """Whole timesteps, equally spaced with both ends, and a shift that grows with the root of the number of tokens."""
    whole = np.linspace(config.num_train_timesteps, 1.0, steps).astype(np.int64).astype(np.float32)
    return {"sigmas": whole / config.num_train_timesteps, "mu": cogview_4_shift(config, shape)}


def cogview_4_shift(config: Any, shape: Sequence[int]) -> float:
    """``mu``, for patches of 2x2 latent pixels."""
    tokens = shape[-2] * shape[-1] // 4
    root = math.sqrt(tokens / config.get("base_image_seq_len", 256))
    return float(root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25))


def cogview_4_told(config: Any, timestep: Tensor, shape: Sequence[int]) -> Tensor:
    """The timestep before the shift: the sigmas are shifted, and the network is not told."""
    mu, sigma = cogview_4_shift(config, shape), timestep.double() / 1000
    return 1000 * sigma / (mu * (1 - sigma) + sigma)


def flux_2_schedule(config: Any, steps: int, shape: Sequence[int]) -> dict[str, Any]:
    """Equal steps, and a shift that follows tokens and steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": compute_empirical_mu(shape[-2] * shape[-1], steps)}


def lumina_2_guide(prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Everyone's formula, each line of pixels brought back to the length of the prompt's."""
    guided = negative + scale * (prompt - negative)
    scaled: Tensor = guided * (prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return scaled


def qwen_image_guide(prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Everyone's formula, each token brought back to the length of the prompt's."""
    height, width = prompt.shape[-2] // 2, prompt.shape[-1] // 2
    prompt, negative, scale = patches(prompt), patches(negative), scale.flatten(1)[:, :, None]
    guided = negative + scale * (prompt - negative)
    return unpatched(guided * (prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), height, width)


def z_image_guide(prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """As much again: by everyone's formula the scale would be one more."""
    return prompt + scale * (prompt - negative)


def shift(config: Any, tokens: float, most: float = 1.15) -> float:
    """``mu``: linear in the number of tokens, through two points of the config (``calculate_shift`` of diffusers)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", most)
    slope = (most - least) / (high - low)
    return float(tokens * slope + least - slope * low)


NO_NEGATIVE = "{} guides only rows that give a negative prompt; an empty one will do"
MASKS = "each row has image and mask"
BINS = "sizes are taken as they are (use_resolution_binning: false)"
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("Stable Diffusion 1 and 2", unet, network="unet"),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL",
        unet,
        network="unet",
        encoded=("embeds -embeds pooled -pooled",),
        note="turbo: guidance_scale 1",
    ),
    "StableDiffusionXLImg2ImgPipeline": Family(
        "Stable Diffusion XL refiner",
        unet,
        network="unet",
        encoded=("embeds -embeds pooled -pooled",),
        note="from pictures, or from a base model's half-way latents",
    ),
    "StableDiffusionInpaintPipeline": Family("Stable Diffusion 1 and 2, inpainting", unet, network="unet", note=MASKS),
    "StableDiffusionXLInpaintPipeline": Family(
        "Stable Diffusion XL, inpainting",
        unet,
        network="unet",
        encoded=("embeds -embeds pooled -pooled",),
        note=MASKS,
    ),
    "LatentConsistencyModelPipeline": Family(
        "Latent consistency models", unet, network="unet", note="the network is told the guidance_scale"
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3 and 3.5",
        stable_diffusion_3,
        encoded=("embeds -embeds pooled -pooled",),
        schedule=sd3_schedule,
    ),
    "FluxPipeline": Family(
        "FLUX.1",
        flux,
        encoded=("embeds pooled _",),
        packed=2,
        schedule=flux_schedule,
        guides_without=False,
        note="dev is told the guidance_scale; schnell: guidance_scale 1, or more and a negative prompt (true_cfg_scale)",
    ),
    "PixArtAlphaPipeline": Family("PixArt-alpha", pixart, encoded=("embeds mask -embeds -mask",), note=BINS),
    "PixArtSigmaPipeline": Family("PixArt-sigma", pixart, encoded=("embeds mask -embeds -mask",), note=BINS),
    "SanaPipeline": Family("Sana", sana, encoded=("embeds mask -embeds -mask",), note=BINS),
    "Lumina2Pipeline": Family(
        "Lumina 2",
        lumina_2,
        encoded=("embeds mask -embeds -mask",),
        parted_by=("mask",),
        schedule=lumina_2_schedule,
        guide=lumina_2_guide,
    ),
    "AuraFlowPipeline": Family("AuraFlow", aura_flow, encoded=("embeds _ -embeds _",)),
    "HunyuanDiTPipeline": Family(
        "HunyuanDiT",
        hunyuan_dit,
        encoded=("embeds -embeds mask -mask", "embeds_2 -embeds_2 mask_2 -mask_2"),
        with_each=(
            {"max_sequence_length": 77, "text_encoder_index": 0},
            {"max_sequence_length": 256, "text_encoder_index": 1},
        ),
        note=f"{BINS}; its own scheduler draws noise, which is ours",
    ),
    "CogView4Pipeline": Family(
        "CogView 4",
        cogview_4,
        encoded=("embeds -embeds",),
        pad=1024,
        pad_to=16,
        schedule=cogview_4_schedule,
        told=cogview_4_told,
        note="rows whose prompts have one length share a call",
    ),
    "KolorsPipeline": Family("Kolors", unet, network="unet", encoded=("embeds -embeds pooled -pooled",)),
    "QwenImagePipeline": Family(
        "Qwen-Image",
        qwen_image,
        encoded=("embeds _",),
        packed=2,
        pad=512,
        schedule=flux_schedule,
        guide=qwen_image_guide,
        guides_without=False,
        note="guidance_scale is the pipeline's true_cfg_scale, and guides rows that give a negative prompt; rows whose prompts have one length share a call",
    ),
    "ZImagePipeline": Family(
        "Z-Image",
        z_image,
        encoded=("embeds -embeds",),
        pad=512,
        schedule=flux_schedule,
        guide=z_image_guide,
        guides_above=0.0,
        note="guidance_scale is the pipeline's, one less than everyone's; turbo: 0; rows whose prompts have one length share a call",
    ),
    "Flux2Pipeline": Family(
        "FLUX.2", flux_2, encoded=("embeds _",), schedule=flux_2_schedule, note="dev is told the guidance_scale"
    ),
    "Flux2KleinPipeline": Family(
        "FLUX.2 klein",
        flux_2,
        encoded=("embeds _",),
        schedule=flux_2_schedule,
        note="negative prompts count, which its pipeline has none of",
    ),
}


def family_of(pipeline: str) -> Family:
    """The row of a pipeline's class. Raises ValueError if there is none."""
    if pipeline not in FAMILIES:
        raise ValueError(
            f"{pipeline} is none of the families that run on our schedulers ({', '.join(FAMILIES)}); model=pipeline runs others"
        )
    return FAMILIES[pipeline]

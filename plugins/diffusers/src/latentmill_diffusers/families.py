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
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


@dataclass(frozen=True)
class Network:
    """What a call is told besides its inputs."""

    model: Any
    downscale: int
    """Pixels of the picture per latent pixel, on each side."""

    @property
    def config(self) -> Any:
        return self.model.config


Call = Callable[[Network, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""``call(network, x, timestep, conditioning)``: the prediction for latents ``x[B, C, h, w]``, all of the network's dtype but the
timesteps ``[B]``, float32, which are what the noise schedule says (1000 t on a flow path)."""


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    name: str
    call: Call
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
    ``length`` beside, and each row is encoded and called for alone, so that it hangs on no other."""
    schedule: Callable[[Any, int, Sequence[int]], dict[str, Any]] = field(default=lambda scheduler, steps, shape: {})
    """``schedule(config, steps, shape)``: what the pipeline hands to ``set_timesteps`` of a scheduler of this config."""
    told: Callable[[Any, Tensor, Sequence[int]], Tensor] | None = None
    """``told(config, timestep, shape)``: the timestep that the network is told, where that is another than the scheduler's."""
    note: str = ""
    """What a user should know; it stands in the README's table."""
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """``guide(prompt, negative, scale)``, where it is another formula than everyone's."""
    guides_above: float = 1.0
    """The guidance scale above which the pipeline guides."""
    guides_without: bool = True
    """Whether the pipeline guides a row that gives no negative prompt, as by an empty one."""


# ------------------------------------------------------------------------------------------------------- networks


def unet(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Stable Diffusion 1 and 2, and SDXL's relatives where there is a pooled embedding; the refiner has a score besides.

    Networks that were trained for inpainting take the mask and what it leaves of the picture as more channels.
    """
    more: dict[str, Any] = {}
    if "masked" in c:
        x = torch.cat([x, c["mask"], c["masked"]], 1)
    if "pooled" in c:
        size = [x.shape[-2] * network.downscale, x.shape[-1] * network.downscale]
        last = c["score"][:, None] if "score" in c else x.new_tensor([size]).expand(len(x), 2)
        ids = torch.cat([x.new_tensor([[*size, 0, 0]]).expand(len(x), 4), last.to(x)], 1)  # size, crop, size or score
        more["added_cond_kwargs"] = {"text_embeds": c["pooled"], "time_ids": ids}
    if width := network.config.time_cond_proj_dim:  # LCM: the network is told the guidance scale
        from diffusers import StableDiffusionPipeline

        embedded = StableDiffusionPipeline.get_guidance_scale_embedding(
            None, c["guidance_scale"].cpu().float() - 1, width
        )
        more["timestep_cond"] = embedded.to(x)
    return first(network.model(x, timestep, encoder_hidden_states=c["embeds"], **more, return_dict=False))


def stable_diffusion_3(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Stable Diffusion 3 and 3.5."""
    told = {"encoder_hidden_states": c["embeds"], "pooled_projections": c["pooled"]}
    return first(network.model(hidden_states=x, timestep=timestep, **told, return_dict=False))


def flux(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """FLUX.1: patches of 2x2 latent pixels as tokens, at places of their own; dev is told the guidance scale."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x)
    predicted = first(
        network.model(
            hidden_states=patches(x),
            timestep=timestep / 1000,
            guidance=c.get("guidance_scale"),
            pooled_projections=c["pooled"],
            encoder_hidden_states=c["embeds"],
            txt_ids=places.new_zeros(c["embeds"].shape[1], 3),
            img_ids=places,
            return_dict=False,
        )
    )
    return unpatched(predicted, height, width)


def pixart(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """PixArt-alpha and -sigma; the large ones of alpha are told size and aspect ratio."""
    height, width = x.shape[-2] * network.downscale, x.shape[-1] * network.downscale
    size = {"resolution": None, "aspect_ratio": None}
    if network.config.sample_size == 128:
        size["resolution"] = x.new_tensor([height, width]).repeat(len(x), 1)
        size["aspect_ratio"] = x.new_tensor([height / width]).repeat(len(x), 1)
    told = {"encoder_hidden_states": c["embeds"], "encoder_attention_mask": c["mask"], "added_cond_kwargs": size}
    return first(network.model(x, timestep=timestep, **told, return_dict=False))


def sana(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Sana 1.0 and 1.5."""
    told = {"encoder_hidden_states": c["embeds"], "encoder_attention_mask": c["mask"]}
    return first(network.model(x, timestep=timestep * network.config.timestep_scale, **told, return_dict=False))


def lumina_2(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Lumina 2: its time runs from noise to picture, and so does what it predicts."""
    told = {"encoder_hidden_states": c["embeds"], "encoder_attention_mask": c["mask"]}
    return -first(network.model(hidden_states=x, timestep=1 - timestep / 1000, **told, return_dict=False))


def aura_flow(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """AuraFlow."""
    told = {"encoder_hidden_states": c["embeds"], "timestep": timestep / 1000}
    return first(network.model(x, **told, return_dict=False))


def hunyuan_dit(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """HunyuanDiT: two text encoders side by side, the size of the picture, and places in a square of 512 pixels."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch = network.config.patch_size
    grid = x.shape[-2] // patch, x.shape[-1] // patch
    crops = get_resize_crop_region_for_grid(grid, 64 // patch)
    width = network.model.inner_dim // network.model.num_heads
    places = get_2d_rotary_pos_embed(width, crops, grid, device=x.device, output_type="pt")
    size = [1024, 1024, x.shape[-2] * network.downscale, x.shape[-1] * network.downscale, 0, 0]
    return first(
        network.model(
            x,
            timestep.to(x.dtype),
            encoder_hidden_states=c["embeds"],
            text_embedding_mask=c["mask"],
            encoder_hidden_states_t5=c["embeds_2"],
            text_embedding_mask_t5=c["mask_2"],
            image_meta_size=x.new_tensor(size).repeat(len(x), 1),
            style=torch.zeros(len(x), dtype=torch.long, device=x.device),
            image_rotary_emb=places,
            return_dict=False,
        )
    )


def cogview_4(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """CogView 4."""
    size = x.new_tensor([[x.shape[-2] * network.downscale, x.shape[-1] * network.downscale]])
    told = {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}
    embeds = c["embeds"]
    return first(
        network.model(hidden_states=x, encoder_hidden_states=embeds, timestep=timestep, **told, return_dict=False)
    )


def qwen_image(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Qwen-Image: patches of 2x2 latent pixels as tokens of a single frame."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    predicted = first(
        network.model(
            hidden_states=patches(x),
            timestep=timestep / 1000,
            guidance=c.get("guidance_scale"),
            encoder_hidden_states_mask=None,
            encoder_hidden_states=c["embeds"],
            img_shapes=[[(1, height, width)]] * len(x),
            return_dict=False,
        )
    )
    return unpatched(predicted, height, width)


def z_image(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Z-Image: lists of pictures of one frame; its time and prediction run from noise to picture."""
    return -torch.stack(
        first(network.model(list(x[:, :, None]), (1000 - timestep) / 1000, list(c["embeds"]), return_dict=False))
    )[:, :, 0]


def flux_2(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """FLUX.2: latents are patches already; dev is told the guidance scale."""
    height, width = x.shape[-2:]
    one = torch.arange(1)
    places = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
    predicted = first(
        network.model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=c["guidance_scale"] if network.config.guidance_embeds else None,
            encoder_hidden_states=c["embeds"],
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(c["embeds"].shape[1])).to(x.device),
            img_ids=places.to(x.device),
            return_dict=False,
        )
    )
    return predicted.transpose(1, 2).unflatten(2, (height, width))


def first(result: tuple[Any, ...]) -> Any:
    """What a network returns with ``return_dict=False``."""
    return result[0]


def patches(x: Tensor) -> Tensor:
    """``x[B, C, h, w]`` as 2x2 patches ``[B, h/2 * w/2, 4 C]``, row by row."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, height: int, width: int) -> Tensor:
    """``patches``, undone: ``height`` and ``width`` are in patches."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


# ----------------------------------------------------------------------------------------------------------- grids


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


# -------------------------------------------------------------------------------------------------------- guidance


def lumina_2_guide(prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Everyone's formula, each line of pixels brought back to the length of the prompt's."""
    guided = negative + scale * (prompt - negative)
    return guided * (prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def qwen_image_guide(prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Everyone's formula, each token brought back to the length of the prompt's."""
    height, width = prompt.shape[-2] // 2, prompt.shape[-1] // 2
    prompt, negative, scale = patches(prompt), patches(negative), scale.flatten(1)[:, :, None]
    guided = negative + scale * (prompt - negative)
    return unpatched(guided * (prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), height, width)


def z_image_guide(prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """As much again: by everyone's formula the scale would be one more."""
    return prompt + scale * (prompt - negative)


def shift(config: Any, tokens: int, most: float = 1.15) -> float:
    """``mu``: linear in the number of tokens, through two points of the config (``calculate_shift`` of diffusers)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", most)
    slope = (most - least) / (high - low)
    return float(tokens * slope + least - slope * low)


# ------------------------------------------------------------------------------------------------------- the table

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
        schedule=cogview_4_schedule,
        told=cogview_4_told,
        note="a row at a time",
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
        note="guidance_scale is the pipeline's true_cfg_scale, and guides rows that give a negative prompt; a row at a time",
    ),
    "ZImagePipeline": Family(
        "Z-Image",
        z_image,
        encoded=("embeds -embeds",),
        pad=512,
        schedule=flux_schedule,
        guide=z_image_guide,
        guides_above=0.0,
        note="guidance_scale is the pipeline's, one less than everyone's; turbo: 0; a row at a time",
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

"""What the families of models differ in: one row of a table each, under the name of the pipeline's class in ``model_index.json``.

A row says what ``encode_prompt`` of the pipeline returns, how the network is called, and what the pipeline tells its
scheduler. All else (path, prediction, grid, solver, sizes) is in the model's own configs, or the same for all.
"""

from __future__ import annotations

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
timesteps ``[B]``, float32, which are what the noise path says (1000 t on a flow path)."""


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
    """Prompts that come out of different lengths are padded to so many tokens, and ``length`` says how many there are."""
    schedule: Callable[[Any, int, Sequence[int]], dict[str, Any]] = field(default=lambda scheduler, steps, shape: {})
    """``schedule(config, steps, shape)``: what the pipeline hands to ``set_timesteps`` of a scheduler of this config."""
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """``guide(prompt, negative, scale)``, where it is another formula than everyone's."""


# ------------------------------------------------------------------------------------------------------- networks


def unet(network: Network, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Stable Diffusion 1 and 2, and SDXL's relatives where there is a pooled embedding."""
    more: dict[str, Any] = {}
    if "pooled" in c:
        size = [x.shape[-2] * network.downscale, x.shape[-1] * network.downscale]
        ids = [*size, 0, 0, *size]  # original size, crop, target size
        ids_of_rows = torch.tensor(ids, dtype=x.dtype, device=x.device).repeat(len(x), 1)
        more["added_cond_kwargs"] = {"text_embeds": c["pooled"], "time_ids": ids_of_rows}
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


def first(result: tuple[Tensor, ...]) -> Tensor:
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
    return {"mu": shift(config, (shape[-2] // 2) * (shape[-1] // 2), most=1.16)} if config.use_dynamic_shifting else {}


def flux_schedule(config: Any, steps: int, shape: Sequence[int]) -> dict[str, Any]:
    """Equal steps, and a shift that grows with the number of tokens."""
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift(config, tokens)}


def shift(config: Any, tokens: int, most: float = 1.15) -> float:
    """``mu``: linear in the number of tokens, through two points of the config (``calculate_shift`` of diffusers)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", most)
    slope = (most - least) / (high - low)
    return float(tokens * slope + least - slope * low)


# ------------------------------------------------------------------------------------------------------- the table

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("Stable Diffusion 1 and 2", unet, network="unet"),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL", unet, network="unet", encoded=("embeds -embeds pooled -pooled",)
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3 and 3.5",
        stable_diffusion_3,
        encoded=("embeds -embeds pooled -pooled",),
        schedule=sd3_schedule,
    ),
    "FluxPipeline": Family("FLUX.1", flux, encoded=("embeds pooled _",), packed=2, schedule=flux_schedule),
    "PixArtAlphaPipeline": Family("PixArt-alpha", pixart, encoded=("embeds mask -embeds -mask",)),
    "PixArtSigmaPipeline": Family("PixArt-sigma", pixart, encoded=("embeds mask -embeds -mask",)),
    "SanaPipeline": Family("Sana", sana, encoded=("embeds mask -embeds -mask",)),
}


def family_of(pipeline: str) -> Family:
    """The row of a pipeline's class. Raises ValueError if there is none."""
    if pipeline not in FAMILIES:
        raise ValueError(f"{pipeline} is none of the families that run on our schedulers: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]

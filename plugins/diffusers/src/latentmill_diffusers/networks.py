"""How the network of each family is called: latents, timesteps and conditioning in, a prediction out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from latentmill.plugin import tensors


@dataclass(frozen=True)
class LoadedNetwork:
    """What a call is told besides its inputs."""

    model: Any
    downscale: int
    """Pixels of the picture per latent pixel, on each side."""

    @property
    def config(self) -> Any:
        return self.model.config


NetworkCall = Callable[[LoadedNetwork, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""``call(network, x, timestep, conditioning)``: the prediction for latents ``x[B, C, h, w]``, all of the network's dtype but the
timesteps ``[B]``, float32, which are what the noise schedule says (1000 t on a flow path)."""


def unet(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Stable Diffusion 1 and 2, and SDXL's relatives where there is a pooled embedding; the refiner has a score besides.

    Networks that were trained for inpainting take the mask and what it leaves of the picture as more channels.
    """
    more: dict[str, Any] = {}
    if "masked" in c:
        x = torch.cat([x, c["mask"], c["masked"]], 1)
    if "pooled" in c:
        size = x.shape[-2] * network.downscale, x.shape[-1] * network.downscale
        last = c["score"][:, None] if "score" in c else numbers(x, *size).expand(len(x), 2)
        ids = torch.cat([numbers(x, *size, 0, 0).expand(len(x), 4), last.to(x)], 1)  # size, crop, size or score
        more["added_cond_kwargs"] = {"text_embeds": c["pooled"], "time_ids": ids}
    if width := network.config.time_cond_proj_dim:  # LCM: the network is told the guidance scale
        # As get_guidance_scale_embedding of the pipelines, which makes it on the CPU.
        angles = (1000.0 * (c["guidance_scale"].float() - 1))[:, None] * _kept(_frequencies, x.device, width // 2)
        embedded = pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
        more["timestep_cond"] = embedded.to(x)
    return first(network.model(x, timestep, encoder_hidden_states=c["embeds"], **more, return_dict=False))


def stable_diffusion_3(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Stable Diffusion 3 and 3.5."""
    told = {"encoder_hidden_states": c["embeds"], "pooled_projections": c["pooled"]}
    return first(network.model(hidden_states=x, timestep=timestep, **told, return_dict=False))


def flux(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """FLUX.1: patches of 2x2 latent pixels as tokens, at places of their own; dev is told the guidance scale."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    places = _kept(_places, x.device, height, width, 1, x.dtype)[:, :3]
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


def pixart(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """PixArt-alpha and -sigma; the large ones of alpha are told size and aspect ratio."""
    height, width = x.shape[-2] * network.downscale, x.shape[-1] * network.downscale
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.config.sample_size == 128:
        size["resolution"] = numbers(x, height, width).repeat(len(x), 1)
        size["aspect_ratio"] = numbers(x, height / width).repeat(len(x), 1)
    told = {"encoder_hidden_states": c["embeds"], "encoder_attention_mask": c["mask"], "added_cond_kwargs": size}
    return first(network.model(x, timestep=timestep, **told, return_dict=False))


def sana(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Sana 1.0 and 1.5."""
    told = {"encoder_hidden_states": c["embeds"], "encoder_attention_mask": c["mask"]}
    return first(network.model(x, timestep=timestep * network.config.timestep_scale, **told, return_dict=False))


def lumina_2(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Lumina 2: its time runs from noise to picture, and so does what it predicts."""
    told = {"encoder_hidden_states": c["embeds"], "encoder_attention_mask": c["mask"]}
    return -first(network.model(hidden_states=x, timestep=1 - timestep / 1000, **told, return_dict=False))


def aura_flow(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """AuraFlow."""
    told = {"encoder_hidden_states": c["embeds"], "timestep": timestep / 1000}
    return first(network.model(x, **told, return_dict=False))


def hunyuan_dit(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """HunyuanDiT: two text encoders side by side, the size of the picture, and places in a square of 512 pixels."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch = network.config.patch_size
    grid = x.shape[-2] // patch, x.shape[-1] // patch
    crops = get_resize_crop_region_for_grid(grid, 64 // patch)
    width = network.model.inner_dim // network.model.num_heads
    places = get_2d_rotary_pos_embed(width, crops, grid, device=x.device, output_type="pt")
    size = 1024, 1024, x.shape[-2] * network.downscale, x.shape[-1] * network.downscale, 0, 0
    return first(
        network.model(
            x,
            timestep.to(x.dtype),
            encoder_hidden_states=c["embeds"],
            text_embedding_mask=c["mask"],
            encoder_hidden_states_t5=c["embeds_2"],
            text_embedding_mask_t5=c["mask_2"],
            image_meta_size=numbers(x, *size).repeat(len(x), 1),
            style=torch.zeros(len(x), dtype=torch.long, device=x.device),
            image_rotary_emb=places,
            return_dict=False,
        )
    )


def cogview_4(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """CogView 4."""
    size = numbers(x, x.shape[-2] * network.downscale, x.shape[-1] * network.downscale).repeat(len(x), 1)
    told = {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}
    embeds = c["embeds"]
    return first(
        network.model(hidden_states=x, encoder_hidden_states=embeds, timestep=timestep, **told, return_dict=False)
    )


def qwen_image(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
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


def z_image(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """Z-Image: lists of pictures of one frame; its time and prediction run from noise to picture."""
    predicted: list[Tensor] = network.model(
        list(x[:, :, None]), (1000 - timestep) / 1000, list(c["embeds"]), return_dict=False
    )[0]
    return -torch.stack(predicted)[:, :, 0]


def flux_2(network: LoadedNetwork, x: Tensor, timestep: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    """FLUX.2: latents are patches already; dev is told the guidance scale."""
    height, width = x.shape[-2:]
    predicted = first(
        network.model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=c["guidance_scale"] if network.config.guidance_embeds else None,
            encoder_hidden_states=c["embeds"],
            txt_ids=_kept(_places, x.device, 1, 1, c["embeds"].shape[1], torch.int64),
            img_ids=_kept(_places, x.device, height, width, 1, torch.int64),
            return_dict=False,
        )
    )
    latents: Tensor = predicted.transpose(1, 2).unflatten(2, (height, width))
    return latents


def numbers(x: Tensor, *values: float) -> Tensor:
    """``[1, n]`` of the latents' dtype, where they are. Read only."""
    return _kept(_numbers, x.device, values, x.dtype)


def _numbers(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor([values], dtype=dtype)


def _places(height: int, width: int, length: int, dtype: torch.dtype) -> Tensor:
    """Where tokens are, ``[height * width * length, 4]``: 0, line, column, number."""
    each = (torch.arange(count) for count in (1, height, width, length))
    return torch.cartesian_prod(*each).to(dtype)


def _frequencies(count: int) -> Tensor:
    slope = torch.log(torch.tensor(10000.0)) / (count - 1)
    return torch.exp(torch.arange(count, dtype=torch.float32) * -slope)[None]


def _kept(make: Callable[..., Tensor], device: torch.device, *told: Any) -> Tensor:
    """``make(*told)`` on the device, made and sent once, not at each call of a network."""
    return _sent(torch.is_inference_mode_enabled(), make, device, *told)


@lru_cache(maxsize=1024)
def _sent(inference: bool, make: Callable[..., Tensor], device: torch.device, *told: Any) -> Tensor:
    # Those of inference mode are of no use outside of it.
    return tensors.send(make(*told), device)


def first(result: tuple[Any, ...]) -> Tensor:
    """What a network returns with ``return_dict=False``."""
    predicted: Tensor = result[0]
    return predicted


def patches(x: Tensor) -> Tensor:
    """``x[B, C, h, w]`` as 2x2 patches ``[B, h/2 * w/2, 4 C]``, row by row."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, height: int, width: int) -> Tensor:
    """``patches``, undone: ``height`` and ``width`` are in patches."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)

"""The autoencoders of ComfyUI's files: pictures to scaled latents and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentmill_comfy.folders import find
from latentmill_comfy.headers import Header, in_dtype
from latentmill_comfy.recognition import Shapes, recognised
from latentmill_comfy.single import Part
from latentmill_comfy.tiles import decoded_in_tiles
from latentmill_diffusers.vae import DiffusersVAE

PREFIXES = ("first_stage_model.", "vae.")
"""How checkpoints begin the names of the VAE's tensors."""
VAE_TENSORS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""How the names of tensors begin that a VAE is made of; files of training have others beside them."""
SCALES = {
    "StableDiffusionPipeline": (4, 0.18215, 0.0),
    "StableDiffusionXLPipeline": (4, 0.13025, 0.0),
    "StableDiffusionXLImg2ImgPipeline": (4, 0.13025, 0.0),
    "StableDiffusion3Pipeline": (16, 1.5305, 0.0609),
    "FluxPipeline": (16, 0.3611, 0.1159),
}
"""Channels, scale and shift of what a network is told: they are the network's, and no file of a VAE says them."""


class ComfyVAE(DiffusersVAE):
    """The VAE in a ``checkpoint`` of ComfyUI's models folder, or that of a file ``vae`` of its own for the network in ``checkpoint`` or ``unet``.

    Its own file doesn't say how latents are scaled; the network's does. ``tiling`` is ``{tile_size: 512, overlap: 64}``, in pixels, for decoding
    in tiles as ComfyUI does it: three times, in tiles of three shapes, and their mean. With ``dtype`` float16 it stays in float32, as there.
    """

    contract = 2
    fingerprinted: Sequence[str] = ("models", "checkpoint", "unet", "vae")

    def __init__(
        self,
        models: str = "",
        checkpoint: str | None = None,
        unet: str | None = None,
        vae: str | None = None,
        dtype: str = "float32",
        tiling: Mapping[str, int] | None = None,
        slicing: bool = False,
        compile: bool = False,
    ) -> None:
        if (checkpoint is None) == (unet is None):
            raise ValueError("vae comfy: give checkpoint, or unet and vae: the files of the network and of its VAE")
        if unet is not None and vae is None:
            raise ValueError("vae comfy: unet is a network alone: give vae, the file of its VAE, too")
        if unknown := (tiling or {}).keys() - {"tile_size", "overlap"}:
            raise ValueError(f"vae.tiling has no {sorted(unknown)[0]}: tile_size and overlap, in pixels, are expected")
        sides = {"tile_size": 512, "overlap": 64, **(tiling or {})}
        if any(type(side) is not int for side in sides.values()) or sides["tile_size"] < 64 or sides["overlap"] < 0:
            raise ValueError(
                f"vae.tiling: tile_size must be 64 or more, and overlap 0 or more, not {dict(tiling or {})}"
            )
        network = Header(find(models, "checkpoints" if unet is None else "unet", str(checkpoint or unet)))
        header = network if vae is None else Header(find(models, "vae", vae))
        self.prefix = next((each for each in PREFIXES if header.under(each)), "")
        config = _config(header, header.under(self.prefix))
        channels, scale, shift = SCALES[recognised(network).pipeline]
        if config["latent_channels"] != channels:
            raise ValueError(
                f"{header.path} holds a VAE of {config['latent_channels']} channels, and {network.path} wants {channels}"
            )
        configs = {"vae/config.json": {**config, "scaling_factor": scale, "shift_factor": shift}}
        self.header, self.tiles = header, sides if tiling is not None else None
        part = Part(header, configs)
        self._made_of(part, dtype, slicing, False, compile)
        part.tensors(self._state)

    def decode(self, latents: Tensor) -> Tensor:
        if self.tiles is None:
            return super().decode(latents)
        size, overlap, pixels = self.tiles["tile_size"], self.tiles["overlap"], self.spec.downscale
        return decoded_in_tiles(super().decode, latents, size // pixels, min(overlap, size // 4) // pixels, pixels)

    def _state(self) -> dict[str, Tensor]:
        state = in_dtype(self.header.read(self.prefix, VAE_TENSORS), torch.float32, None)
        return {f"first_stage_model.{name}": tensor for name, tensor in state.items()}


def _config(header: Header, shapes: Shapes) -> dict[str, Any]:
    """The VAE's config, by diffusers' names. Raises ValueError for one of another kind."""
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in shapes:
        raise ValueError(f"{header.path} holds a VAE under diffusers' names: the VAE diffusers reads it")
    if "decoder.conv_in.weight" not in shapes or "encoder.down.0.block.0.conv1.weight" not in shapes:
        raise ValueError(
            f"{header.path} holds no VAE that is known here: those of Stable Diffusion 1, 2, XL, 3 and FLUX.1 are"
        )
    levels = [shape[0] for n in range(9) if (shape := shapes.get(f"encoder.down.{n}.block.0.conv1.weight"))]
    blocks = [n for n in range(9) if f"encoder.down.0.block.{n}.conv1.weight" in shapes]
    quant = "quant_conv.weight" in shapes
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": levels,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": len(blocks),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "use_quant_conv": quant,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "sample_size": 512,
        "force_upcast": True,
    }

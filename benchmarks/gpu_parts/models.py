"""Models with random weights in diffusers' own classes: at their real sizes, or small, with heads as wide as the real ones'."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "plugins/diffusers/tests"))  # whose tiny models have a tokenizer

CONVOLUTIONS = (("DownEncoderBlock2D",), ("UpDecoderBlock2D",))


@dataclass(frozen=True)
class Model:
    """A model to measure."""

    name: str
    pipeline: str
    build: Callable[[bool], dict[str, Any]]
    """Its parts; of the real size if it is told True."""
    guidance: float
    evaluations: int
    """Of a picture in a step."""
    note: str = ""


def on_host(cls: Any, **settings: Any) -> Any:
    """A scheduler, wherever weights are drawn: some make arrays of their tensors."""
    with torch.device("cpu"):
        return cls(**settings)


def vae(real: bool, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512) if real else (16, 32, 32, 32)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=CONVOLUTIONS[0] * 4,
        up_block_types=CONVOLUTIONS[1] * 4,
        layers_per_block=2 if real else 1,
        norm_num_groups=32 if real else 8,
        **settings,
    )


def clip(real: bool, width: int = 768, layers: int = 12, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width, layers = (width, layers) if real else (width // 12, 2)
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return cls(
        CLIPTextConfig(
            vocab_size=49408 if real else 200,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64 or 1,
            num_hidden_layers=layers,
            projection_dim=(projection or width) if real else width,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=1,
        )
    )


def stable_diffusion(real: bool) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from tiny.text import tokenizer
    from tiny.unets import SD_BETAS

    small = {
        "block_out_channels": (80, 160),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,  # the number of heads: 40 wide, as the real ones
        "norm_num_groups": 8,
    }
    return {
        "unet": UNet2DConditionModel(
            cross_attention_dim=768 if real else 64, sample_size=64, **({} if real else small)
        ),
        "scheduler": on_host(EulerDiscreteScheduler, **SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        "vae": vae(real, force_upcast=False),
        "text_encoder": clip(real),
        "tokenizer": tokenizer(77, pad="</s>"),
        "safety_checker": None,
        "feature_extractor": None,
    }


def stable_diffusion_xl(real: bool) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel
    from tiny.text import tokenizer

    wide = 1280 if real else 1280 // 12
    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),  # the number of heads, 64 wide
        "addition_time_embed_dim": 256,
    }
    small: dict[str, Any] = {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "addition_time_embed_dim": 8,
        "layers_per_block": 1,
    }
    given = sizes if real else small
    unet = UNet2DConditionModel(
        sample_size=128,
        cross_attention_dim=(768 if real else 64) + wide,
        use_linear_projection=True,
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=6 * given["addition_time_embed_dim"] + wide,
        **given,
    )
    encoder = clip(real, width=1280, layers=32, projection=1280)
    return {
        **{name: part for name, part in stable_diffusion(real).items() if part is not None and name != "unet"},
        "unet": unet,
        "vae": vae(real, scaling_factor=0.13025, force_upcast=True),
        "text_encoder_2": encoder,
        "tokenizer_2": tokenizer(77),
    }


def flux(real: bool) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from tiny.text import tokenizer
    from transformers import T5Config, T5EncoderModel

    heads, wide = (24, 4096) if real else (2, 64)
    t5 = {"d_model": wide, "d_ff": 10240, "d_kv": 64, "num_heads": 64} if real else {"d_model": wide, "num_heads": 1}
    return {
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=3 if real else 1,
            num_single_layers=6 if real else 1,
            attention_head_dim=128,
            num_attention_heads=heads,
            joint_attention_dim=wide,
            pooled_projection_dim=768 if real else 64,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        "scheduler": on_host(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        "vae": vae(
            real,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": clip(real),
        "tokenizer": tokenizer(77, pad="</s>"),
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=32128 if real else 200, num_layers=2, pad_token_id=1, eos_token_id=3, **t5)
        ),
        "tokenizer_2": tokenizer(512, begin=None),
    }


MODELS = {
    model.name: model
    for model in (
        Model("SD 1.5", "StableDiffusionPipeline", stable_diffusion, 7.5, 2),
        Model("SDXL", "StableDiffusionXLPipeline", stable_diffusion_xl, 5.0, 2),
        Model("FLUX.1-dev, cut", "FluxPipeline", flux, 3.5, 1, "3 of 19 and 6 of 38 blocks, 2 of T5's 24"),
    )
}


def build(model: Model, folder: Path, real: bool, dtype: torch.dtype, device: torch.device) -> Path:
    """Write a model, as ``save_pretrained`` does. Weights are drawn where it is quick, and are of ``dtype``."""
    import diffusers

    with _drawn(dtype, device):
        parts = model.build(real)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.parameters():  # gates of transformer blocks begin at 0
                    if not bool(parameter.any()):
                        torch.nn.init.normal_(parameter, std=0.02)
    getattr(diffusers, model.pipeline)(**parts).save_pretrained(folder)
    return folder


@contextmanager
def _drawn(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def megabytes(folder: Path) -> Mapping[str, float]:
    """MiB of weights, by the stage that has them."""
    parts = {"encode": "text_encoder*", "denoise": "*", "decode": "vae"}
    sizes = {stage: 0.0 for stage in parts}
    for name in json.loads((folder / "model_index.json").read_text()):
        stage = "encode" if name.startswith("text_encoder") else {"vae": "decode"}.get(name, "denoise")
        sizes[stage] += sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) / 2**20
    return sizes

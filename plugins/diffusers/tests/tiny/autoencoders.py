"""Tiny VAEs, and those that are tested alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def autoencoder(channels: int = 4, blocks: int = 2, **settings: Any) -> Any:
    """An AutoencoderKL that halves the sides between two blocks."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16, 16, 16)[:blocks],
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "latent_channels": channels,
            "norm_num_groups": 4,
            "sample_size": 32,
            **settings,
        }
    )


def packed_vae(channels: int = 4) -> Any:
    """FLUX's kind of autoencoder: its latents are packed into 2x2 patches."""
    return autoencoder(
        channels, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )


def deep_compression(channels: int = 4) -> Any:
    """An AutoencoderDC that halves the sides."""
    from diffusers import AutoencoderDC

    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (max(8, channels),) * 2,
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=2,
        **halves,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def asymmetric_autoencoder() -> Any:
    from diffusers import AsymmetricAutoencoderKL

    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 24),
        layers_per_up_block=1,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )


def tiny_autoencoder() -> Any:
    from diffusers import AutoencoderTiny

    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def hunyuan_autoencoder() -> Any:
    """HunyuanImage's autoencoder, that halves the sides."""
    from diffusers import AutoencoderKLHunyuanImage

    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.75,
    )


def quantized_autoencoder() -> Any:
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
    )


def flux_2_autoencoder() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def video_autoencoder(name: str) -> Any:
    """An autoencoder of video, Qwen-Image's or Wan's, that makes a quarter of the sides."""
    import diffusers

    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    return getattr(diffusers, name)(**sizes, temperal_downsample=[False, True], **statistics)


def transparent_autoencoder() -> Any:
    from diffusers import AutoencoderKLQwenImage21

    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLQwenImage21(**sizes, **statistics)


def consistency_decoder() -> Any:
    from diffusers import ConsistencyDecoderVAE

    return ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    )


VAES: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": autoencoder,
    "AutoencoderKL with a shift": lambda: autoencoder(
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    ),
    "AutoencoderKL with statistics": lambda: autoencoder(
        latents_mean=[0.5, -1.0, 0.2, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5], scaling_factor=0.5
    ),
    "AsymmetricAutoencoderKL": asymmetric_autoencoder,
    "AutoencoderTiny": tiny_autoencoder,
    "AutoencoderDC": deep_compression,
    "VQModel": quantized_autoencoder,
    "AutoencoderKLFlux2": flux_2_autoencoder,
    "AutoencoderKLHunyuanImage": hunyuan_autoencoder,
    "AutoencoderKLQwenImage": lambda: video_autoencoder("AutoencoderKLQwenImage"),
    "AutoencoderKLQwenImage21": transparent_autoencoder,
    "AutoencoderKLWan": lambda: video_autoencoder("AutoencoderKLWan"),
    "ConsistencyDecoderVAE": consistency_decoder,
}

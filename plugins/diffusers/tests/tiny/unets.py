"""The parts of tiny models whose network is a UNet."""

from __future__ import annotations

from typing import Any

from torch import nn

from tiny.autoencoders import autoencoder
from tiny.text import VOCABULARY, clip, sentencepiece, tokenizer

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion() -> dict[str, Any]:
    from diffusers import PNDMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return {
        "unet": unet,
        "scheduler": PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        "vae": autoencoder(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(77, pad="</s>"),
        "safety_checker": None,
        "feature_extractor": None,
    }


def latent_consistency() -> dict[str, Any]:
    from diffusers import LCMScheduler, UNet2DConditionModel

    parts = stable_diffusion()
    network = UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=16)
    return {**parts, "unet": network, "scheduler": LCMScheduler(**SD_BETAS, clip_sample=False)}


def inpainting(parts: dict[str, Any]) -> dict[str, Any]:
    """The same model with a network that is told the mask, and the picture without what is under it."""
    from diffusers import UNet2DConditionModel

    return {**parts, "unet": UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)}


def refiner() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    parts = stable_diffusion_xl()
    sizes = {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 8 + 32}
    sizes["transformer_layers_per_block"] = (1, 2)  # as both have them, and here alone: it is what they cost
    network = UNet2DConditionModel.from_config(parts["unet"].config, **sizes)
    first = {"text_encoder": None, "tokenizer": None}
    return {**parts, **first, "unet": network, "requires_aesthetics_score": True}


def stable_diffusion_xl() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 32,
        norm_num_groups=4,
    )
    return {
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": clip(),
        "tokenizer": tokenizer(77, pad="</s>"),
        "text_encoder_2": clip(16, projection=32),
        "tokenizer_2": tokenizer(77),
    }


def kolors() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        norm_num_groups=4,
    )
    text = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=VOCABULARY + 100,
        hidden_size=32,
        ffn_hidden_size=37,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
    )
    text_encoder = ChatGLMModel(text).eval()
    for name, parameter in text_encoder.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:  # it leaves some as the memory was
            nn.init.normal_(parameter, std=0.1)
    betas = {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100}
    return {
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing="leading"),
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": text_encoder,
        "tokenizer": ChatGLMTokenizer(str(sentencepiece())),
    }

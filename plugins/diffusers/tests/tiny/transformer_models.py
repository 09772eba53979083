"""The parts of tiny models whose network is a transformer."""

from __future__ import annotations

from typing import Any

from tiny.autoencoders import autoencoder, deep_compression, flux_2_autoencoder, video_autoencoder
from tiny.text import CHAT, TEXT, VOCABULARY, clip, gemma, t5, tokenizer


def flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def stable_diffusion_3() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": clip(16, projection=16),
        "tokenizer": tokenizer(77, pad="</s>"),
        "text_encoder_2": clip(8, projection=16),
        "tokenizer_2": tokenizer(77),
        "text_encoder_3": t5(),
        "tokenizer_3": tokenizer(256, begin=None),
    }


def flux() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": clip(),
        "tokenizer": tokenizer(77, pad="</s>"),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(512, begin=None),
    }


def pixart(sample_size: int, scaling_factor: float) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=24,
    )
    return {
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        "vae": autoencoder(scaling_factor=scaling_factor),
        "text_encoder": t5(),
        "tokenizer": tokenizer(300, begin=None),
    }


def sana() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(**flow),
        "vae": deep_compression(16),  # sides must be multiples of 32 pixels: at 32 x 32 its latents are a cube
        "text_encoder": gemma(),
        "tokenizer": tokenizer(300, end=None),
    }


def lumina_2() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae": autoencoder(blocks=4, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": gemma(),
        "tokenizer": tokenizer(256, end=None),
    }


def aura_flow() -> dict[str, Any]:
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    for parameter in transformer.parameters():  # else what a prompt says is lost in its padding
        parameter.data *= 1.7
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73),
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": t5(),
        "tokenizer": tokenizer(256, begin=None),
    }


def hunyuan_dit() -> dict[str, Any]:
    from diffusers import DDIMScheduler, HunyuanDiT2DModel
    from transformers import BertConfig, BertModel

    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    bert = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.03, "beta_schedule": "scaled_linear"}
    return {
        "transformer": transformer,
        # Its own is DDPM, whose noise nobody could compare.
        "scheduler": DDIMScheduler(
            **betas, prediction_type="v_prediction", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        ),
        "vae": autoencoder(blocks=4),  # the pipeline takes 8 for the downscale
        "text_encoder": BertModel(bert).eval(),
        "tokenizer": tokenizer(77),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(256, begin=None),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def cogview_4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(64, 64),
    )
    glm = GlmConfig(
        **TEXT,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**dynamic),
        "vae": autoencoder(8),  # sides must be multiples of 16 pixels: at 16 x 16 its latents are a cube
        "text_encoder": GlmModel(glm).eval(),
        "tokenizer": tokenizer(1024, end=None, side="left"),
    }


def qwen_image() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    text = {
        **TEXT,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=VOCABULARY)
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**dynamic, shift_terminal=0.02),
        "vae": video_autoencoder("AutoencoderKLQwenImage"),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
        "tokenizer": tokenizer(1024, begin=None, end=None),
    }


def z_image() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": Qwen3Model(Qwen3Config(**QWEN_3)).eval(),
        "tokenizer": tokenizer(512, begin=None, end=None, template=CHAT),
    }


QWEN_3 = {
    **TEXT,
    "hidden_size": 16,
    "intermediate_size": 16,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _flux_2(**settings: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        **settings,
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": flux_2_autoencoder(),
        "tokenizer": tokenizer(512, begin=None, end=None, template=CHAT),
    }


def flux_2_dev() -> dict[str, Any]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"model_type": "mistral", **QWEN_3, "num_hidden_layers": 31, "num_attention_heads": 1}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16, "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision)
    return {**_flux_2(), "text_encoder": Mistral3ForConditionalGeneration(config).eval()}


def flux_2_klein() -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    text = Qwen3ForCausalLM(Qwen3Config(**{**QWEN_3, "num_hidden_layers": 28, "num_attention_heads": 1})).eval()
    return {**_flux_2(guidance_embeds=False), "text_encoder": text, "is_distilled": False}

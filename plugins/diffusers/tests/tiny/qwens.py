"""The parts of tiny models that only their pipeline runs, and whose prompts a Qwen reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from tiny.autoencoders import VAES, autoencoder, flux_2_autoencoder, hunyuan_autoencoder, packed_vae, video_autoencoder
from tiny.text import CHAT, TEXT, VOCABULARY, clip, t5, tokenizer
from tiny.transformer_models import QWEN_3, flow


def qwen_3(cls: str) -> Any:
    import transformers

    return getattr(transformers, cls)(transformers.Qwen3Config(**QWEN_3)).eval()


def qwen_2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_3_vl(cls: str = "Qwen3VLForConditionalGeneration", layers: int = 2) -> Any:
    import transformers

    text = {**QWEN_3, "num_hidden_layers": layers}
    text["rope_scaling"] = {"mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return getattr(transformers, cls)(config).eval()


def processor(length: int = 1024) -> Any:
    """LLaVA's, which for text does what Qwen3-VL's does, and doesn't ask for torchvision, for videos."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image = "<|image_pad|>"
    tokens = tokenizer(length, begin=None, end=None, template=CHAT, extra={"image_token": image})
    return LlavaProcessor(CLIPImageProcessorPil(), tokens, chat_template=CHAT, image_token=image)


def ovis() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    tokens = tokenizer(512, begin=None, end=None, template=CHAT)
    qwen = {"text_encoder": qwen_3("Qwen3Model"), "tokenizer": tokens}
    return {"transformer": transformer, "vae": packed_vae(), "scheduler": flow(), **qwen}


def longcat() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    qwen = {"text_encoder": qwen_2_5_vl(), "tokenizer": tokenizer(512, begin=None, end=None)}
    return {"transformer": transformer, "vae": packed_vae(16), "scheduler": flow(), **qwen, "text_processor": None}


def krea_2() -> dict[str, Any]:
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {**QWEN_3, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return {
        "transformer": transformer,
        "vae": video_autoencoder("AutoencoderKLQwenImage"),
        "scheduler": flow(use_dynamic_shifting=True),
        "text_encoder": encoder,
        "tokenizer": tokenizer(1024, begin=None, end=None),
        "text_encoder_select_layers": (1, 2),
    }


def kandinsky_5() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        attention_type="regular",
    )
    return {
        "transformer": transformer,
        "vae": autoencoder(blocks=4),
        "scheduler": flow(),
        "text_encoder": qwen_2_5_vl(),
        "tokenizer": tokenizer(1024, begin=None, end=None),
        "text_encoder_2": clip(),
        "tokenizer_2": tokenizer(77, pad="</s>"),
    }


def ernie() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    qwen = {"text_encoder": qwen_3("Qwen3Model"), "tokenizer": tokenizer(512, end=None)}
    parts = {"transformer": transformer, "vae": flux_2_autoencoder(), "scheduler": flow()}
    return {**parts, **qwen, "pe": None, "pe_tokenizer": None}


def hunyuan_image() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    return {
        "transformer": transformer,
        "vae": hunyuan_autoencoder(),
        "scheduler": flow(),
        "text_encoder": qwen_2_5_vl(),
        "tokenizer": tokenizer(1200, begin=None, end=None),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(128, begin=None),
        "guider": diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    }


def qwen_image_21() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    parts = {"transformer": transformer, "vae": VAES["AutoencoderKLQwenImage21"]()}
    parts["scheduler"] = flow(use_dynamic_shifting=True)
    return {**parts, "text_encoder": qwen_3_vl(), "processor": processor()}


def nucleus() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):  # it leaves them as the memory was
            nn.init.normal_(parameter, std=0.1)
    parts = {"transformer": transformer, "vae": video_autoencoder("AutoencoderKLQwenImage")}
    parts["scheduler"] = flow(use_dynamic_shifting=True)
    return {**parts, "text_encoder": qwen_3_vl(layers=8), "processor": processor()}


def ideogram_4() -> dict[str, Any]:
    import diffusers

    def network() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * 16,
            mrope_section=(4, 2, 2),
        )

    networks = {"transformer": network(), "unconditional_transformer": network()}
    parts = {"vae": flux_2_autoencoder(), "scheduler": flow(), "prompt_enhancer_head": None}
    qwen = {"text_encoder": qwen_3_vl("Qwen3VLModel", layers=36)}
    return {
        **networks,
        **parts,
        **qwen,
        "tokenizer": tokenizer(512, begin=None, end=None, template=CHAT),
    }


def bria_fibo_2() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=48,
        injection_layer_ids=(0, 1, 0, 1, 0),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=16,
        gist_max_text_len=64,
        axes_dims=(8, 4, 4),
        axes_lens=(512, 64, 64),
    )
    parts = {"transformer": transformer, "vae": flux_2_autoencoder()}
    parts["scheduler"] = flow(use_dynamic_shifting=True)
    return {**parts, "text_encoder": qwen_3_vl(layers=36), "processor": processor()}


def dream_lite() -> dict[str, Any]:
    import diffusers

    unet = diffusers.DreamLiteUNetModel(
        block_out_channels=(8, 16),
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
    )
    parts = {
        "unet": unet,
        "vae": VAES["AutoencoderTiny"](),
        "scheduler": flow(use_dynamic_shifting=True),
    }
    tokens = tokenizer(1024, begin=None, end=None)
    return {**parts, "text_encoder": qwen_3_vl(), "tokenizer": tokens, "processor": processor()}

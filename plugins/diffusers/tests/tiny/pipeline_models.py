"""The parts of other tiny models that only their pipeline runs."""

from __future__ import annotations

from typing import Any

from tiny.autoencoders import autoencoder, deep_compression, packed_vae
from tiny.text import CHAT, TEXT, VOCABULARY, clip, gemma, t5, tokenizer
from tiny.transformer_models import QWEN_3, flow
from tiny.unets import SD_BETAS


def chroma() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    text = {"text_encoder": t5(), "tokenizer": tokenizer(512, begin=None)}
    return {"transformer": transformer, "vae": packed_vae(), "scheduler": flow(), **text}


def cogview_3_plus() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=16,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    text = {"text_encoder": t5(), "tokenizer": tokenizer(224, begin=None)}
    return {"transformer": transformer, "vae": autoencoder(), "scheduler": scheduler, **text}


def lumina() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    text = {"text_encoder": gemma(), "tokenizer": tokenizer(256, end=None)}
    return {"transformer": transformer, "vae": autoencoder(blocks=4), "scheduler": flow(), **text}


def sana_sprint() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.SanaTransformer2DModel(
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
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    text = {"text_encoder": gemma(), "tokenizer": tokenizer(300, end=None)}
    scheduler = diffusers.SCMScheduler()
    return {"transformer": transformer, "vae": deep_compression(16), "scheduler": scheduler, **text}


def bria() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    text = {"text_encoder": t5(), "tokenizer": tokenizer(128, begin=None)}
    return {"transformer": transformer, "vae": packed_vae(), "scheduler": flow(), **text}


def hidream() -> dict[str, Any]:
    import diffusers
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**TEXT, **sizes)).eval()
    llama.config._attn_implementation = "eager"
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        max_resolution=(32, 32),
        caption_channels=[32, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return {
        "transformer": transformer,
        "vae": packed_vae(),
        "scheduler": flow(),
        "text_encoder": clip(16, projection=16, length=218),
        "tokenizer": tokenizer(218, pad="</s>"),
        "text_encoder_2": clip(16, projection=16, length=218),
        "tokenizer_2": tokenizer(218),
        "text_encoder_3": t5(),
        "tokenizer_3": tokenizer(128, begin=None),
        "text_encoder_4": llama,
        "tokenizer_4": tokenizer(128, end=None),
    }


def bria_fibo() -> dict[str, Any]:
    import diffusers
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(**{**QWEN_3, "vocab_size": 128_001, "num_hidden_layers": 3})
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        text_encoder_dim=16,
        axes_dims_rope=[0, 4, 4],
    )
    sixteenth = {"dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [False] * 4, "scale_factor_spatial": 16}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    return {
        "transformer": transformer,
        "vae": diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **sixteenth, **statistics),
        "scheduler": flow(),
        "text_encoder": SmolLM3ForCausalLM(config).eval(),
        "tokenizer": tokenizer(512, begin=None, end=None),
    }


def kandinsky_3() -> dict[str, Any]:
    import diffusers

    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        encoder_hid_dim=32,
    )
    unet.conv_out.weight.data *= 0.1  # else the rounding of a batch, which guidance by scale + 1 makes larger, shows
    movq = diffusers.VQModel(
        block_out_channels=(32, 32, 32, 32),  # its norm has 32 groups
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    text = {"text_encoder": t5(), "tokenizer": tokenizer(128, begin=None)}
    scheduler = diffusers.DDPMScheduler(**SD_BETAS, clip_sample=False)
    return {"unet": unet, "movq": movq, "scheduler": scheduler, **text}


def prx() -> dict[str, Any]:
    import diffusers
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[8, 8]
    )
    gemma = {"hidden_size": 16, "intermediate_size": 37, "head_dim": 8, "num_attention_heads": 1}
    gemma |= {**TEXT, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = T5GemmaConfig(encoder=gemma, decoder=gemma)
    encoder = T5GemmaEncoder(config.encoder).eval()
    encoder.config = config  # as it is saved: of both halves
    text = {"text_encoder": encoder, "tokenizer": tokenizer(256, end=None)}
    return {
        "transformer": transformer,
        "vae": autoencoder(shift_factor=0.1159),
        "scheduler": flow(),
        **text,
    }


def glm_image() -> dict[str, Any]:
    import diffusers
    import transformers

    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    text = {
        **QWEN_3,
        "num_hidden_layers": 1,
        "vocab_size": VOCABULARY + 3,
        "vision_vocab_size": 16,
    }
    del text["head_dim"], text["bos_token_id"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text["eos_token_id"] = 100  # it writes 0 to 15, and doesn't end before its time
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64}
    codes = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 16}
    config = transformers.GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config=codes,
        image_token_id=VOCABULARY,
        image_start_token_id=2,
        image_end_token_id=3,
    )
    extra = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokens = tokenizer(512, begin=None, end=None, side="left", template=CHAT, extra=extra)
    images = transformers.GlmImageImageProcessorPil()
    statistics = {"latents_mean": [0.5, -1.0, 0.2, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    return {
        "transformer": transformer,
        "vae": autoencoder(blocks=4, **statistics),
        "scheduler": flow(use_dynamic_shifting=True),
        "text_encoder": t5(vocabulary=384),
        "tokenizer": transformers.ByT5Tokenizer(),
        "vision_language_encoder": transformers.GlmImageForConditionalGeneration(config).eval(),
        "processor": transformers.GlmImageProcessor(images, tokens, chat_template=CHAT),
    }


def omnigen() -> dict[str, Any]:
    import diffusers

    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=1,
        in_channels=4,
        time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
        vocab_size=VOCABULARY,
        pad_token_id=1,
    )
    return {
        "transformer": transformer,
        "vae": autoencoder(blocks=4),
        "scheduler": flow(invert_sigmas=True, num_train_timesteps=1),
        "tokenizer": tokenizer(512),
    }

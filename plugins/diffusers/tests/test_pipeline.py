"""Pipelines run by their parts against the pipelines called directly, on tiny models of the real classes.

``python plugins/diffusers/tests/test_pipeline.py`` writes the README's table of pipelines anew.
"""

import inspect
import io
import json
import shutil
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import tiny.autoencoders
import tiny.text
import tiny.transformer_models
import tiny.unets
import torch
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from layouts import ordered
from PIL import Image

import latentmill
from latentmill.batch import PROMPT_PREFIX, from_dicts
from latentmill.config import load_job
from latentmill.errors import PluginError
from latentmill.plugin import tensors
from latentmill_diffusers.pipeline import PipelineDenoise, PipelineEncode, known, noted
from latentmill_diffusers.pipeline.absent import Absent
from latentmill_diffusers.vae import DiffusersVAE

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- pipelines, by tests/test_pipeline.py -->\n", "<!-- end of pipelines -->\n"
PROMPTS = [("a red fox", None), ("two houses by the 'sea'", "blurry"), ("a red fox", "bad")]
SIZES = {
    "BriaFiboPipeline": (64, 128),
    "GlmImagePipeline": (64, 128),
    "Kandinsky3Pipeline": (64, 128),
    "HiDreamImagePipeline": (256, 256),
    "Kandinsky5T2IPipeline": (1024, 1024),
    "LuminaPipeline": (64, 128),
}
"""Height and width, where a pipeline has its own idea of them: an area, a list, a factor of 8 or 16."""
CALLS = {
    "BriaPipeline": {"max_sequence_length": 128},
    "Ideogram4Pipeline": {"max_sequence_length": 64},
    "SanaSprintPipeline": {"complex_human_instruction": None},
}


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def packed_vae(channels=4):
    """FLUX's kind of autoencoder: its latents are packed into 2x2 patches."""
    return tiny.autoencoders.autoencoder(
        channels, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )


def chroma():
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
    t5 = {"text_encoder": tiny.text.t5(), "tokenizer": tiny.text.tokenizer(512, begin=None)}
    return {"transformer": transformer, "vae": packed_vae(), "scheduler": flow(), **t5}


def cogview_3_plus():
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
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
    t5 = {"text_encoder": tiny.text.t5(), "tokenizer": tiny.text.tokenizer(224, begin=None)}
    return {"transformer": transformer, "vae": tiny.autoencoders.autoencoder(), "scheduler": scheduler, **t5}


def lumina():
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    gemma = {"text_encoder": tiny.text.gemma(), "tokenizer": tiny.text.tokenizer(256, end=None)}
    return {"transformer": transformer, "vae": tiny.autoencoders.autoencoder(blocks=4), "scheduler": flow(), **gemma}


def sana_sprint():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
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
    gemma = {"text_encoder": tiny.text.gemma(), "tokenizer": tiny.text.tokenizer(300, end=None)}
    scheduler = diffusers.SCMScheduler()
    return {"transformer": transformer, "vae": tiny.autoencoders.deep_compression(16), "scheduler": scheduler, **gemma}


def bria():
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    t5 = {"text_encoder": tiny.text.t5(), "tokenizer": tiny.text.tokenizer(128, begin=None)}
    return {"transformer": transformer, "vae": packed_vae(), "scheduler": flow(), **t5}


def qwen_3(cls):
    import transformers

    return getattr(transformers, cls)(transformers.Qwen3Config(**tiny.transformer_models.QWEN_3)).eval()


def ovis():
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
    tokenizer = tiny.text.tokenizer(512, begin=None, end=None, template=tiny.text.CHAT)
    qwen = {"text_encoder": qwen_3("Qwen3Model"), "tokenizer": tokenizer}
    return {"transformer": transformer, "vae": packed_vae(), "scheduler": flow(), **qwen}


def hidream():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**tiny.text.TEXT, **sizes)).eval()
    llama.config._attn_implementation = "eager"
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
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
        "text_encoder": tiny.text.clip(16, projection=16, length=218),
        "tokenizer": tiny.text.tokenizer(218, pad="</s>"),
        "text_encoder_2": tiny.text.clip(16, projection=16, length=218),
        "tokenizer_2": tiny.text.tokenizer(218),
        "text_encoder_3": tiny.text.t5(),
        "tokenizer_3": tiny.text.tokenizer(128, begin=None),
        "text_encoder_4": llama,
        "tokenizer_4": tiny.text.tokenizer(128, end=None),
    }


def qwen_2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **tiny.text.TEXT,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=tiny.text.VOCABULARY)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def longcat():
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
    qwen = {"text_encoder": qwen_2_5_vl(), "tokenizer": tiny.text.tokenizer(512, begin=None, end=None)}
    return {"transformer": transformer, "vae": packed_vae(16), "scheduler": flow(), **qwen, "text_processor": None}


def krea_2():
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {**tiny.transformer_models.QWEN_3, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
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
        "vae": tiny.autoencoders.video_autoencoder("AutoencoderKLQwenImage"),
        "scheduler": flow(use_dynamic_shifting=True),
        "text_encoder": encoder,
        "tokenizer": tiny.text.tokenizer(1024, begin=None, end=None),
        "text_encoder_select_layers": (1, 2),
    }


def kandinsky_5():
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
        "vae": tiny.autoencoders.autoencoder(blocks=4),
        "scheduler": flow(),
        "text_encoder": qwen_2_5_vl(),
        "tokenizer": tiny.text.tokenizer(1024, begin=None, end=None),
        "text_encoder_2": tiny.text.clip(),
        "tokenizer_2": tiny.text.tokenizer(77, pad="</s>"),
    }


def ernie():
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    qwen = {"text_encoder": qwen_3("Qwen3Model"), "tokenizer": tiny.text.tokenizer(512, end=None)}
    parts = {"transformer": transformer, "vae": tiny.BUILDERS["Flux2Pipeline"]()["vae"], "scheduler": flow()}
    return {**parts, **qwen, "pe": None, "pe_tokenizer": None}


def hunyuan_image():
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
        "vae": tiny.autoencoders.hunyuan_autoencoder(),
        "scheduler": flow(),
        "text_encoder": qwen_2_5_vl(),
        "tokenizer": tiny.text.tokenizer(1200, begin=None, end=None),
        "text_encoder_2": tiny.text.t5(),
        "tokenizer_2": tiny.text.tokenizer(128, begin=None),
        "guider": diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    }


def bria_fibo():
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(**{**tiny.transformer_models.QWEN_3, "vocab_size": 128_001, "num_hidden_layers": 3})
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
        "tokenizer": tiny.text.tokenizer(512, begin=None, end=None),
    }


def qwen_3_vl(cls="Qwen3VLForConditionalGeneration", layers=2):
    import transformers

    text = {**tiny.transformer_models.QWEN_3, "num_hidden_layers": layers}
    text["rope_scaling"] = {"mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return getattr(transformers, cls)(config).eval()


def processor(length=1024):
    """LLaVA's, which for text does what Qwen3-VL's does, and doesn't ask for torchvision, for videos."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image = "<|image_pad|>"
    tokenizer = tiny.text.tokenizer(length, begin=None, end=None, template=tiny.text.CHAT, extra={"image_token": image})
    return LlavaProcessor(CLIPImageProcessorPil(), tokenizer, chat_template=tiny.text.CHAT, image_token=image)


def kandinsky_3():
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
    t5 = {"text_encoder": tiny.text.t5(), "tokenizer": tiny.text.tokenizer(128, begin=None)}
    scheduler = diffusers.DDPMScheduler(**tiny.unets.SD_BETAS, clip_sample=False)
    return {"unet": unet, "movq": movq, "scheduler": scheduler, **t5}


def qwen_image_21():
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    parts = {"transformer": transformer, "vae": tiny.autoencoders.VAES["AutoencoderKLQwenImage21"]()}
    parts["scheduler"] = flow(use_dynamic_shifting=True)
    return {**parts, "text_encoder": qwen_3_vl(), "processor": processor()}


def nucleus():
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
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {"transformer": transformer, "vae": tiny.autoencoders.video_autoencoder("AutoencoderKLQwenImage")}
    parts["scheduler"] = flow(use_dynamic_shifting=True)
    return {**parts, "text_encoder": qwen_3_vl(layers=8), "processor": processor()}


def ideogram_4():
    def network():
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
    parts = {"vae": tiny.BUILDERS["Flux2Pipeline"]()["vae"], "scheduler": flow(), "prompt_enhancer_head": None}
    qwen = {"text_encoder": qwen_3_vl("Qwen3VLModel", layers=36)}
    return {
        **networks,
        **parts,
        **qwen,
        "tokenizer": tiny.text.tokenizer(512, begin=None, end=None, template=tiny.text.CHAT),
    }


def bria_fibo_2():
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
    parts = {"transformer": transformer, "vae": tiny.BUILDERS["Flux2Pipeline"]()["vae"]}
    parts["scheduler"] = flow(use_dynamic_shifting=True)
    return {**parts, "text_encoder": qwen_3_vl(layers=36), "processor": processor()}


def dream_lite():
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
        "vae": tiny.autoencoders.VAES["AutoencoderTiny"](),
        "scheduler": flow(use_dynamic_shifting=True),
    }
    tokenizer = tiny.text.tokenizer(1024, begin=None, end=None)
    return {**parts, "text_encoder": qwen_3_vl(), "tokenizer": tokenizer, "processor": processor()}


def prx():
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
    )
    gemma = {"hidden_size": 16, "intermediate_size": 37, "head_dim": 8, "num_attention_heads": 2}
    gemma |= {**tiny.text.TEXT, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = T5GemmaConfig(encoder=gemma, decoder=gemma)
    encoder = T5GemmaEncoder(config.encoder).eval()
    encoder.config = config  # as it is saved: of both halves
    t5 = {"text_encoder": encoder, "tokenizer": tiny.text.tokenizer(256, end=None)}
    return {
        "transformer": transformer,
        "vae": tiny.autoencoders.autoencoder(shift_factor=0.1159),
        "scheduler": flow(),
        **t5,
    }


def glm_image():
    import transformers

    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    text = {
        **tiny.transformer_models.QWEN_3,
        "num_hidden_layers": 1,
        "vocab_size": tiny.text.VOCABULARY + 3,
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
        image_token_id=tiny.text.VOCABULARY,
        image_start_token_id=2,
        image_end_token_id=3,
    )
    extra = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokenizer = tiny.text.tokenizer(512, begin=None, end=None, side="left", template=tiny.text.CHAT, extra=extra)
    images = transformers.GlmImageImageProcessorPil()
    statistics = {"latents_mean": [0.5, -1.0, 0.2, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    return {
        "transformer": transformer,
        "vae": tiny.autoencoders.autoencoder(blocks=4, **statistics),
        "scheduler": flow(use_dynamic_shifting=True),
        "text_encoder": tiny.text.t5(vocabulary=384),
        "tokenizer": transformers.ByT5Tokenizer(),
        "vision_language_encoder": transformers.GlmImageForConditionalGeneration(config).eval(),
        "processor": transformers.GlmImageProcessor(images, tokenizer, chat_template=tiny.text.CHAT),
    }


def omnigen():
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=1,
        in_channels=4,
        time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
        vocab_size=tiny.text.VOCABULARY,
        pad_token_id=1,
    )
    return {
        "transformer": transformer,
        "vae": tiny.autoencoders.autoencoder(blocks=4),
        "scheduler": flow(invert_sigmas=True, num_train_timesteps=1),
        "tokenizer": tiny.text.tokenizer(512),
    }


BUILDERS = {
    "GlmImagePipeline": glm_image,
    "BriaFibo2Pipeline": bria_fibo_2,
    "BriaFiboPipeline": bria_fibo,
    "BriaPipeline": bria,
    "ChromaPipeline": chroma,
    "CogView3PlusPipeline": cogview_3_plus,
    "DreamLitePipeline": dream_lite,
    "ErnieImagePipeline": ernie,
    "HiDreamImagePipeline": hidream,
    "HunyuanImagePipeline": hunyuan_image,
    "Ideogram4Pipeline": ideogram_4,
    "Kandinsky3Pipeline": kandinsky_3,
    "Kandinsky5T2IPipeline": kandinsky_5,
    "Krea2Pipeline": krea_2,
    "LongCatImagePipeline": longcat,
    "LuminaPipeline": lumina,
    "NucleusMoEImagePipeline": nucleus,
    "OvisImagePipeline": ovis,
    "PRXPipeline": prx,
    "QwenImage21Pipeline": qwen_image_21,
    "SanaSprintPipeline": sana_sprint,
}


WITH_TORCHVISION = {"OmniGenPipeline": omnigen}
"""Pipelines that ask for it. PyPI's doesn't load beside a torch for the CPU alone; where it does, they are tested."""
if find_spec("torchvision"):
    BUILDERS |= WITH_TORCHVISION

FAMILIES = {name: build for name, build in tiny.BUILDERS.items() if not known.refused(getattr(diffusers, name))}
TESTED = {**FAMILIES, **BUILDERS}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model, by its pipeline's name; built once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name):
        if not (root / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiny, "BUILDERS", TESTED)
                tiny.build(name, root / name)
        return root / name

    return folder


def prompts_of(name):
    """PROMPTS, without the negative ones where the pipeline takes none."""
    takes = "negative_prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
    return [(prompt, negative if takes else None) for prompt, negative in PROMPTS]


def table_of(prompts, steps=2, guidance=4.0, size=(32, 64), **changes):
    return from_dicts(
        {
            "row": i, "row_id": str(i), "prompt": prompt, "negative_prompt": negative, "seed": i, "steps": steps,
            "guidance_scale": guidance, "strength": 1.0, "scheduler": "", "height": size[0], "width": size[1], **changes,
        }
        for i, (prompt, negative) in enumerate(prompts)
    )  # fmt: skip


def stages(folder, name):
    """The two stages, loaded."""
    call, device = CALLS.get(name), torch.device("cpu")
    encode = PipelineEncode(str(folder), call=call)
    denoise = PipelineDenoise(str(folder), call=call, vae={"name": "diffusers", "path": str(folder)})
    encode.load(device)
    denoise.load(device)
    return encode, denoise


def ours(encode, denoise, table):
    """Latents by row number."""
    made = {}
    for part in encode(table, lambda i, reason: pytest.fail(reason)):
        for out in denoise(part, lambda i, reason: pytest.fail(reason)):
            numbers = out.column("row").to_pylist()
            made |= zip(numbers, tensors.from_arrow(out, "latents"), strict=True)
    return [made[number] for number in sorted(made)]


def directly(folder, name):
    """The pipeline itself, whole."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, value in index.items() if value == [None, None]}
    made = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, **absent)
    made.set_progress_bar_config(disable=True)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)  # where gradients may be asked for, convolutions round otherwise
    return made


def guided(whole, name, scale):
    """The argument that guides; or it is the guider that is told."""
    if name == "HunyuanImagePipeline":
        whole.guider.guidance_scale = scale
        return {}
    return {"true_cfg_scale" if name.startswith("QwenImage") else "guidance_scale": scale}


OFF = ("use_resolution_binning", "enable_prompt_rewrite", "use_pe", "prompt_upsampling")
"""What would change the size or the prompt."""


def theirs(whole, name, spec, table, kind="latent"):
    """Latents or pictures of the rows, one after another."""
    known = inspect.signature(whole.__call__).parameters
    made = []
    for row in table.to_pylist():
        told = {key: False for key in OFF if key in known} | CALLS.get(name, {})
        if "guidance_schedule" in known:  # it would stand in for the scale
            told["guidance_schedule"] = None
        if row["negative_prompt"] is not None:
            told["negative_prompt"] = row["negative_prompt"]
        one = whole(
            prompt=row["prompt"],
            num_inference_steps=row["steps"],
            height=row["height"],
            width=row["width"],
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type=kind,
            return_dict=False,
            **guided(whole, name, row["guidance_scale"]),
            **told,
        )[0]
        if kind == "latent":
            made.append(
                ordered(name, one, spec.channels, row["height"] // spec.downscale, row["width"] // spec.downscale)
            )
        else:
            made.append(one[0])
    return made


@pytest.mark.parametrize("name", TESTED)
def test_the_same_latents_as_the_pipeline(name, model):
    encode, denoise = stages(model(name), name)
    whole = directly(model(name), name)
    made = {}
    low = 1.0 if name == "PRXPipeline" else 0.5  # it refuses less
    for guidance in (3.0, low):
        table = table_of(prompts_of(name), guidance=guidance, size=SIZES.get(name, (32, 64)))
        made[guidance] = ours(encode, denoise, table)
        for found, wanted in zip(made[guidance], theirs(whole, name, denoise.spec, table), strict=True):
            assert float((found - wanted).norm() / wanted.norm()) <= 2e-6
    assert not torch.allclose(made[3.0][1], made[low][1], atol=1e-4)


@pytest.mark.parametrize("size", ["oblong", "cube"])
@pytest.mark.parametrize("name", TESTED)
def test_the_same_picture_as_the_pipeline(name, size, model):
    """Latents of the VAE's shape may still be in an order that it doesn't know; where all sides are equal no shape tells."""
    encode, denoise = stages(model(name), name)
    side = denoise.spec.channels * denoise.spec.downscale
    if size == "cube" and SIZES.get(name, (0, 0))[0] > side:
        pytest.skip(f"its sizes are multiples of {SIZES[name][0]}, or those of a list")
    table = table_of(prompts_of(name)[1:2], size=(side, side) if size == "cube" else SIZES.get(name, (32, 64)))
    vae = DiffusersVAE(str(model(name)))
    vae.load(torch.device("cpu"))
    with torch.inference_mode():
        found = vae.decode(torch.stack(ours(encode, denoise, table)))[0].permute(1, 2, 0).clamp(-1, 1)
    [wanted] = theirs(directly(model(name), name), name, denoise.spec, table, "np")
    if wanted.shape[2] == 4:  # transparent, on white
        wanted = 1 + (wanted[..., :3] - 1) * wanted[..., 3:]
    assert np.abs((found.numpy() + 1) / 2 - wanted).max() <= 1e-4


@pytest.mark.parametrize("name", ["Ideogram4Pipeline", "Kandinsky3Pipeline"])
@torch.inference_mode()
def test_pictures_become_the_latents_that_its_pictures_are_made_of(name, model):
    vae = DiffusersVAE(str(model(name)))
    vae.load(torch.device("cpu"))
    pictures = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = vae._model.encode(pictures)
    z = encoded.latents if name == "Kandinsky3Pipeline" else encoded.latent_dist.mode()
    plain = {"force_not_quantize": True} if name == "Kandinsky3Pipeline" else {}
    wanted = vae._model.decode(z, **plain).sample
    torch.testing.assert_close(vae.decode(vae.encode(pictures)), wanted, rtol=1e-5, atol=1e-5)
    assert (vae.spec.scale, vae.spec.shift) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["ChromaPipeline", "LongCatImagePipeline", "ZImagePipeline"])
def test_each_stage_has_only_its_own_parts(name, model):
    encode, denoise = stages(model(name), name)
    assert isinstance(encode.pipeline.transformer, Absent) and isinstance(encode.pipeline.vae, Absent)
    assert isinstance(denoise.pipeline.text_encoder, Absent) and isinstance(denoise.pipeline.vae, Absent)
    assert isinstance(encode.pipeline.text_encoder, torch.nn.Module) and encode.pipeline.tokenizer is not None
    assert isinstance(denoise.pipeline.transformer, torch.nn.Module) and denoise.pipeline.tokenizer is None
    assert encode.fingerprint() != denoise.fingerprint()


def test_a_row_does_not_depend_on_its_company(model):
    """Prompts of one length and of others, with noise drawn on the way: LCM's scheduler does."""
    name = "LatentConsistencyModelPipeline"
    encode, denoise = stages(model(name), name)
    table = table_of([("a", ""), ("b", ""), ("three", ""), ("a", "")], steps=3)
    together = ours(encode, denoise, table)
    for i in range(len(table)):
        [alone] = ours(encode, denoise, table.slice(i, 1))
        assert torch.allclose(alone, together[i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[3], atol=0.1)  # one prompt, two seeds


def test_a_prompt_is_encoded_once_in_a_run_and_rows_share_it(model, monkeypatch):
    name = "StableDiffusionPipeline"
    encode, denoise = stages(model(name), name)
    calls = []
    encode.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = table_of([("a", ""), ("b", ""), ("a", "")])
    [part] = encode(first, lambda i, reason: pytest.fail(reason))
    seen = len(calls)
    assert seen and tensors.shared(part, f"{PROMPT_PREFIX}0")[1] == [0, 1, 0]
    [again] = encode(table_of([("b", ""), ("a", "")]), lambda i, reason: pytest.fail(reason))
    assert len(calls) == seen
    for k, row in ((0, 1), (1, 0)):
        assert torch.equal(
            tensors.from_arrow(again, f"{PROMPT_PREFIX}0")[k], tensors.from_arrow(part, f"{PROMPT_PREFIX}0")[row]
        )
    plain = ours(lambda table, reject: [tensors.expanded(part)], denoise, first)
    assert all(map(torch.equal, plain, ours(encode, denoise, first)))
    assert len(calls) == seen
    monkeypatch.setattr("latentmill_diffusers.pipeline.encode.NOTED_ROOM", 0)
    ours(encode, denoise, first)
    ours(encode, denoise, first)
    assert len(calls) > seen, "the room is bounded"


def test_a_row_alone_has_the_bits_that_it_has_in_company(model):
    """Rows of one size, steps and guidance, which else go together."""
    name = "StableDiffusionPipeline"
    encode, denoise = stages(model(name), name)
    table = table_of(PROMPTS)
    denoise.alone = True
    for i, found in enumerate(ours(encode, denoise, table)):
        assert torch.equal(found, ours(encode, denoise, table.slice(i, 1))[0])


def test_a_deterministic_job_makes_the_same_bytes_in_other_company(model, tmp_path, monkeypatch):
    """A batch that fails once, and then in halves, has no batch of its first size again."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt, _ in PROMPTS))
    told = ["model=pipeline", "cluster=inline", f"model.path={model('StableDiffusionPipeline')}", "samples_per_row=1"]
    told += [f"source.path={tmp_path / 'rows.jsonl'}", "sampling.width=64", "sampling.height=32", "sampling.steps=2"]
    told += ["deterministic=true", "rows_per_shard=3", "stages.denoise.batch_size=3", "stages.denoise.retries=0"]
    told += ["flow=[read,pipeline_encode,pipeline_denoise,write]"]
    assert latentmill.run("txt2img", [*told, f"output={tmp_path / 'whole'}"]).ok == 3
    monkeypatch.setenv("LATENTMILL_FAILPOINT", f"pipeline_denoise:memory:{tmp_path}")
    assert latentmill.run("txt2img", [*told, f"output={tmp_path / 'halves'}"]).ok == 3
    assert (tmp_path / "pipeline_denoise").exists()
    whole, halves = (tmp_path / name / "data" / "00000.parquet" for name in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_of_the_vae_s_dtype(dtype, model):
    name = "StableDiffusionPipeline"
    folder, table = str(model(name)), table_of(PROMPTS)
    encode, denoise = stages(folder, name)
    wanted = torch.stack(ours(encode, denoise, table))
    halves = PipelineDenoise(folder, vae={"name": "diffusers", "path": folder, "dtype": dtype})
    halves.load(torch.device("cpu"))
    found = torch.stack(ours(encode, halves, table))
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, wanted.to(found.dtype))


def test_what_rows_share_is_what_they_agree_in(model):
    """FLUX's places of tokens have no batch axis. Rows that bring other ones go apart, each with its own."""
    name = "FluxPipeline"
    encode, denoise = stages(model(name), name)
    [part] = map(tensors.expanded, encode(table_of(PROMPTS), lambda i, reason: pytest.fail(reason)))
    wanted = ours(lambda table, reject: [table], denoise, part)
    form = json.loads(part.schema.field(f"{PROMPT_PREFIX}0").metadata[noted.NOTED])
    [shared] = noted.shared_leaves(form)
    about = part.schema.field(f"{PROMPT_PREFIX}{shared}").metadata
    places = tensors.from_arrow(part, f"{PROMPT_PREFIX}{shared}").clone()
    places[1] += 1
    moved = tensors.with_tensor(part, f"{PROMPT_PREFIX}{shared}", places)
    assert moved.schema.field(f"{PROMPT_PREFIX}{shared}").metadata == about
    found = ours(lambda table, reject: [table], denoise, moved)
    same = [torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True)]
    assert same == [True, False, True]


def test_what_is_drawn_for_a_prompt_is_of_the_row_s_seed(model):
    """GLM-Image writes a picture's tokens before its network sees anything: one prompt, two seeds, two writings."""
    name = "GlmImagePipeline"
    encode, denoise = stages(model(name), name)
    table = table_of([("a red fox", None)] * 2, guidance=1.0, size=SIZES[name])
    [part] = encode(table, lambda i, reason: pytest.fail(reason))
    first, second = tensors.from_arrow(part, f"{PROMPT_PREFIX}0")
    assert first.shape == (32,) and not torch.equal(first, second)
    wanted = theirs(directly(model(name), name), name, denoise.spec, table)
    for found, one in zip(ours(encode, denoise, table), wanted, strict=True):
        assert float((found - one).norm() / one.norm()) <= 2e-6


def test_what_encode_prompt_returns_comes_back_for_several_rows():
    def returned(count):
        """Of rows 0, 1, ...: along the first axis, along the second, a list a row, ends, a number, none, shared, nested."""
        each = [torch.full((3, 2), float(row)) for row in range(count)]
        ends = torch.tensor([0, *(2 + row for row in range(count))]).cumsum(0)
        layers = [torch.stack(each), torch.stack(each) + 10, torch.stack(each) + 20]
        return torch.stack(each), torch.stack(each, 1), each, ends, 7, None, torch.arange(6), layers

    form = noted.form_of(returned(1), returned(2), count())
    second = [v[1:] if k in (0, 2) else v for k, v in enumerate(returned(2))]
    second[1], second[3], second[7] = second[1][:, 1:], torch.tensor([0, 3]), [v[1:] for v in second[7]]
    both = zip(noted.leaves_of(returned(1), form), noted.leaves_of(second, form), strict=True)
    found = noted.filled(form, [torch.stack(pair) for pair in both])
    wanted = returned(2)
    for k in (0, 1, 3, 6):
        assert torch.equal(found[k], wanted[k]), k
    assert all(torch.equal(a, b) for k in (2, 7) for a, b in zip(found[k], wanted[k], strict=True))
    assert found[4:6] == (7, None)


def test_a_job(model, tmp_path):
    """Pictures, of rows with steps, guidance and sizes of their own; what its own loop can't do ends in the error table."""
    name = "ChromaPipeline"
    lines = [
        {"prompt": "a red fox", "seed": 0, "steps": 2, "guidance_scale": 4.0},
        {"prompt": "two houses", "negative_prompt": "dull", "seed": 1, "steps": 3, "guidance_scale": 4.0},
        {"prompt": "a red fox", "seed": 2, "steps": 2, "guidance_scale": 1.0, "width": 32},
        {"prompt": "a red fox", "seed": 3, "scheduler": "euler"},
        {"prompt": "a red fox", "seed": 4, "guidance_rescale": 0.7},
        {"prompt": "a red fox", "seed": 5, "steps": 2, "guidance_scale": 4.0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = latentmill.run(
        "txt2img",
        [
            "model=pipeline",
            f"model.path={model(name)}",
            "cluster=inline",
            f"source.path={tmp_path / 'rows.jsonl'}",
            "samples_per_row=1",
            "sampling.height=32",
            "sampling.width=64",
            f"output={tmp_path / 'out'}",
        ],
    )
    assert (result.ok, result.failed) == (4, 2)
    said = [json.loads(line)["reason"] for line in (tmp_path / "out/errors/00000.jsonl").read_text().splitlines()]
    assert said == [
        "ChromaPipeline runs its own loop, without scheduler: '' is expected, not 'euler'",
        "ChromaPipeline runs its own loop, without guidance_rescale: 0.0 is expected, not 0.7",
    ]
    made = pq.read_table(tmp_path / "out/data").to_pylist()
    assert [row["seed"] for row in made] == [0, 1, 2, 5]
    _, denoise = stages(model(name), name)
    for row in made:
        single = table_of([(row["prompt"], row["negative_prompt"])]).slice(0, 1).to_pylist()[0]
        single |= {key: row[key] for key in ("seed", "steps", "guidance_scale", "height", "width")}
        [wanted] = theirs(directly(model(name), name), name, denoise.spec, from_dicts([single]), "pil")
        found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)
        assert (np.abs(found - np.asarray(wanted).astype(int)) <= 1).mean() >= 0.999


def test_its_stages_have_the_workers_of_encode_and_denoise():
    job = load_job("txt2img", ["model=pipeline", "model.path=x", "stages=gpu", "stages.denoise.replicas=3"])
    plain = load_job("txt2img", ["stages=gpu", "stages.denoise.replicas=3"])
    assert job.flow == plain.flow
    for stage in ("encode", "denoise"):
        made = vars(job.stages[stage])
        assert made["name"] == f"pipeline_{stage}" and made == vars(job.stages[f"pipeline_{stage}"])
        assert {**made, "name": None, "settings": {}} == vars(plain.stages[stage])
    assert job.stages["denoise"].replicas == 3
    assert job.stages["denoise"].settings["vae"]["path"] == "x"


def test_a_picture_is_not_passed_over(model):
    encode, _ = stages(model("ChromaPipeline"), "ChromaPipeline")
    pictures = tensors.with_tensor(table_of(PROMPTS), "image", torch.zeros(3, 32, 64, 3, dtype=torch.uint8))
    said = {}
    assert not list(encode(pictures, said.__setitem__))
    assert said == dict.fromkeys(range(3), "ChromaPipeline begins from noise, and takes no image")


def test_a_size_that_the_pipeline_does_not_make_is_the_row_s_error(model):
    name = "Kandinsky5T2IPipeline"
    encode, denoise = stages(model(name), name)
    [part] = encode(table_of([("a red fox", "")], size=(64, 64)), lambda i, reason: pytest.fail(reason))
    said = {}
    assert not list(denoise(part, said.__setitem__))
    assert said == {0: "Kandinsky5T2IPipeline makes no latents of this size: (4, 128, 128), not (4, 8, 8)"}


def test_a_negative_prompt_that_the_pipeline_does_not_take_is_the_row_s_error(model):
    encode, _ = stages(model("Flux2Pipeline"), "Flux2Pipeline")
    said = {}
    [part] = encode(table_of([("a red fox", ""), ("a red fox", "blurry"), ("a red fox", None)]), said.__setitem__)
    assert said == {1: "Flux2Pipeline takes no negative prompt, and the row has one"} and len(part) == 2


def test_a_pipeline_that_nobody_compared_has_no_rows_whose_axes_can_not_be_told(model, tmp_path, monkeypatch):
    """Here of latents 4 x 4 x 4; others it makes as the pipeline that it is made of."""
    monkeypatch.setattr(diffusers, "NewPipeline", type("NewPipeline", (diffusers.StableDiffusionPipeline,), {}), False)
    folder = shutil.copytree(model("StableDiffusionPipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NewPipeline"}))
    encode, denoise = stages(folder, "NewPipeline")
    said = {}
    [part] = encode(table_of(PROMPTS[:1], size=(8, 8)), said.__setitem__)
    assert not list(denoise(part, said.__setitem__))
    reason = "NewPipeline is not known here, and latents (4, 4, 4) don't show their axes: take another size"
    assert said == {0: reason}
    table = table_of(PROMPTS[:1])
    [found] = ours(encode, denoise, table)
    [wanted] = theirs(directly(folder, "NewPipeline"), "NewPipeline", denoise.spec, table)
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-6
    assert {*known.COMPARED} == {*TESTED, *WITH_TORCHVISION}


def test_layers_that_the_text_encoder_has_not_are_refused_when_it_is_built(model, tmp_path):
    folder = shutil.copytree(model("Krea2Pipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_select_layers": [1, 3]}))
    with pytest.raises(PluginError, match="text_encoder has 2 layers, and Krea2Pipeline takes layer 3's output"):
        latentmill.registry.build("stage", {"name": "pipeline_encode", "path": str(folder)})


def test_steps_that_the_model_s_own_sigmas_do_not_have_are_the_row_s_error(model, tmp_path):
    """With ``sample_sigmas`` the pipeline makes as many steps as there are, whatever it is told."""
    folder = shutil.copytree(model("QwenImage21Pipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": [1.0, 0.7, 0.3]}))
    encode, denoise = stages(folder, "QwenImage21Pipeline")
    assert len(ours(encode, denoise, table_of(PROMPTS[:1], steps=3))) == 1
    said = {}
    assert not list(encode(table_of(PROMPTS[:1]), said.__setitem__))
    assert said == {0: "QwenImage21Pipeline makes the steps of its model's sample_sigmas: 3 is expected, not 2"}


@pytest.mark.parametrize(
    ("index", "settings", "said"),
    [
        ("IFPipeline", {}, "IFPipeline can't be run by its parts: it makes pixels and no latents"),
        ("NobodysPipeline", {}, "the installed diffusers has no NobodysPipeline"),
        (
            "ChromaPipeline",
            {"call": {"max_sequence_lenght": 3}},
            r"ChromaPipeline takes no 'max_sequence_lenght' \(did",
        ),
        ("ChromaPipeline", {"call": {"guidance_scale": 3}}, "call: guidance_scale is told row by row"),
        ("ChromaPipeline", {"call": {"negative_prompt": "x"}}, "call: negative_prompt is told row by row"),
    ],
)
def test_what_can_not_be_run_is_said_when_it_is_built(index, settings, said, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": index}))
    with pytest.raises(PluginError, match=said):
        latentmill.registry.build("stage", {"name": "pipeline_encode", "path": str(tmp_path), **settings})


# ------------------------------------------------------------------------------------------------------- the list

ALSO = """
    BriaFiboPipeline BriaFibo2Pipeline BriaPipeline Cosmos2TextToImagePipeline DreamLitePipeline ErnieImagePipeline
    HiDreamImagePipeline HunyuanImagePipeline Kandinsky5T2IPipeline LongCatImagePipeline OmniGenPipeline PRXPixelPipeline
    SanaSprintPipeline
""".split()
"""Text-to-image pipelines that diffusers' own list of them leaves out."""
OF_OTHER_INPUTS = ("Control", "PAG", "Kontext", "Inpaint", "Helios", "Omni", "Combined")


def table():
    """The README's table."""
    names = {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    names = {name for name in names if not any(word in name for word in OF_OTHER_INPUTS)} | set(ALSO)
    lines = ["| pipeline of diffusers | |\n", "|---|---|\n"]
    for name in sorted(names | set(TESTED)):
        reason = known.refused(getattr(diffusers, name))
        verdict = "works" if name in TESTED else f"no: {reason}" if reason else "not tried"
        verdict = "works; asks for torchvision" if name in WITH_TORCHVISION else verdict
        lines.append(f"| {name} | {verdict} |\n")
    return "".join(lines)


def test_the_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), f"python {Path(__file__).name} writes it anew"


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")

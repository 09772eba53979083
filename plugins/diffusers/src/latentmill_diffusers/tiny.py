"""Tiny models of every family, random weights in the real classes, to test with: nothing is downloaded.

    latentmill_diffusers.tiny.build("StableDiffusionPipeline", folder)

writes what ``save_pretrained`` writes of a model of that pipeline's class. A second or two and a few megabytes each.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def build(pipeline: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of that pipeline's class into ``folder``, and return it. Raises KeyError for one without a builder."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = BUILDERS[pipeline]()
    for part in parts.values():
        if isinstance(part, nn.Module):
            _nowhere_zero(part, seed)
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder)
    return folder


def _nowhere_zero(model: nn.Module, seed: int) -> None:
    """Fill what starts at 0, as gates of transformer blocks do: a network that ignores its inputs tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)


def tokenizer(
    length: int,
    begin: str | None = "<s>",
    end: str | None = "</s>",
    pad: str = "<pad>",
    side: str = "right",
    template: str | None = None,
    extra: dict[str, str] | None = None,
) -> Any:
    """A token a character, between ``begin`` and ``end``; ``extra`` tokens, by what the tokenizer calls them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    around = " ".join(token for token in (begin, "$A", end) if token)
    used = [(token, vocabulary[token]) for token in (begin, end) if token]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token=begin,
        eos_token="</s>",
        pad_token=pad,
        padding_side=side,
        model_max_length=length,
        chat_template=template,
        extra_special_tokens=extra or {},
    )


VOCABULARY = 4 + len(CHARACTERS)
TEXT = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "vocab_size": VOCABULARY}


def clip(width: int = 32, projection: int | None = None, length: int = 77) -> Any:
    """A CLIP text model, with a projection if its width is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **TEXT,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=length,
        projection_dim=projection or width,
    )
    return CLIPTextModelWithProjection(config).eval() if projection else CLIPTextModel(config).eval()


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


def t5(width: int = 32, vocabulary: int = 0) -> Any:
    """The encoder of a T5."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=vocabulary or VOCABULARY, pad_token_id=1, eos_token_id=3, **sizes)).eval()


def gemma(width: int = 16) -> Any:
    """A Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            **TEXT,
            hidden_size=width,
            intermediate_size=37,
            head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=2,
        )
    ).eval()


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


def _asymmetric() -> Any:
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


def _tiny() -> Any:
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


def _quantized() -> Any:
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
    )


def _flux_2_autoencoder() -> Any:
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


def _transparent() -> Any:
    from diffusers import AutoencoderKLQwenImage21

    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLQwenImage21(**sizes, **statistics)


def _consistency() -> Any:
    from diffusers import ConsistencyDecoderVAE

    return ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8, 8, 8),
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    )


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _stable_diffusion() -> dict[str, Any]:
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


def _latent_consistency() -> dict[str, Any]:
    from diffusers import LCMScheduler, UNet2DConditionModel

    parts = _stable_diffusion()
    network = UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=16)
    return {**parts, "unet": network, "scheduler": LCMScheduler(**SD_BETAS, clip_sample=False)}


def _inpainting(parts: dict[str, Any]) -> dict[str, Any]:
    """The same model with a network that is told the mask, and the picture without what is under it."""
    from diffusers import UNet2DConditionModel

    return {**parts, "unet": UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)}


def _refiner() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    parts = _stable_diffusion_xl()
    sizes = {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 8 + 32}
    network = UNet2DConditionModel.from_config(parts["unet"].config, **sizes)
    first = {"text_encoder": None, "tokenizer": None}
    return {**parts, **first, "unet": network, "requires_aesthetics_score": True}


def _stable_diffusion_xl() -> dict[str, Any]:
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
        transformer_layers_per_block=(1, 2),
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


def _stable_diffusion_3() -> dict[str, Any]:
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


def _flux() -> dict[str, Any]:
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


def _pixart(sample_size: int, scaling_factor: float) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
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


def _sana() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
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
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(**flow),
        "vae": deep_compression(16),  # sides must be multiples of 32 pixels: at 32 x 32 its latents are a cube
        "text_encoder": gemma(),
        "tokenizer": tokenizer(300, end=None),
    }


def _lumina_2() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=24,
        num_layers=2,
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


def _aura_flow() -> dict[str, Any]:
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


def _hunyuan_dit() -> dict[str, Any]:
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


def _cogview_4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
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


def _kolors() -> dict[str, Any]:
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
        "tokenizer": ChatGLMTokenizer(str(_sentencepiece())),
    }


def _sentencepiece() -> Path:
    """The file of a sentencepiece model of single characters."""
    import tempfile

    from sentencepiece import SentencePieceTrainer

    stem = Path(tempfile.mkdtemp()) / "tokenizer"
    SentencePieceTrainer.train(
        sentence_iterator=iter(CHARACTERS.split()),
        model_prefix=str(stem),
        model_type="char",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return stem.with_suffix(".model")


def _qwen_image() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
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


CHAT = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}|{% endfor %}"


def _z_image() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
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
        "vae": _flux_2_autoencoder(),
        "tokenizer": tokenizer(512, begin=None, end=None, template=CHAT),
    }


def _flux_2_dev() -> dict[str, Any]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"model_type": "mistral", **QWEN_3, "num_hidden_layers": 31}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16, "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision)
    return {**_flux_2(), "text_encoder": Mistral3ForConditionalGeneration(config).eval()}


def _flux_2_klein() -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    text = Qwen3ForCausalLM(Qwen3Config(**{**QWEN_3, "num_hidden_layers": 28})).eval()
    return {**_flux_2(guidance_embeds=False), "text_encoder": text, "is_distilled": False}


BUILDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": _refiner,
    "StableDiffusionInpaintPipeline": lambda: _inpainting(_stable_diffusion()),
    "StableDiffusionXLInpaintPipeline": lambda: _inpainting(_stable_diffusion_xl()),
    "LatentConsistencyModelPipeline": _latent_consistency,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "PixArtAlphaPipeline": lambda: _pixart(128, 0.18215),
    "PixArtSigmaPipeline": lambda: _pixart(32, 0.13025),
    "SanaPipeline": _sana,
    "Lumina2Pipeline": _lumina_2,
    "AuraFlowPipeline": _aura_flow,
    "HunyuanDiTPipeline": _hunyuan_dit,
    "CogView4Pipeline": _cogview_4,
    "KolorsPipeline": _kolors,
    "QwenImagePipeline": _qwen_image,
    "ZImagePipeline": _z_image,
    "Flux2Pipeline": _flux_2_dev,
    "Flux2KleinPipeline": _flux_2_klein,
}

VAES: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": autoencoder,
    "AutoencoderKL with a shift": lambda: autoencoder(
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    ),
    "AutoencoderKL with statistics": lambda: autoencoder(
        latents_mean=[0.5, -1.0, 0.2, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5], scaling_factor=0.5
    ),
    "AsymmetricAutoencoderKL": _asymmetric,
    "AutoencoderTiny": _tiny,
    "AutoencoderDC": deep_compression,
    "VQModel": _quantized,
    "AutoencoderKLFlux2": _flux_2_autoencoder,
    "AutoencoderKLHunyuanImage": hunyuan_autoencoder,
    "AutoencoderKLQwenImage": lambda: video_autoencoder("AutoencoderKLQwenImage"),
    "AutoencoderKLQwenImage21": _transparent,
    "AutoencoderKLWan": lambda: video_autoencoder("AutoencoderKLWan"),
    "ConsistencyDecoderVAE": _consistency,
}


def build_vae(name: str, folder: Path, seed: int = 0) -> Path:
    """Write one of VAES into ``folder``, and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        VAES[name]().save_pretrained(folder)
    return folder

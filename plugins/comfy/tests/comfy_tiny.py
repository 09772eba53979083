"""Tiny models in ComfyUI's folders, random weights under the names of those who trained them: nothing is downloaded.

    comfy_tiny.build(folder)

writes ``checkpoints/{sd15,sdxl,sd3}.safetensors``, ``unet/flux.safetensors``, ``vae/{ae,sd15}.safetensors`` and ``clip/{clip_l,clip_g,t5xxl}.safetensors``.
Widths and depths are small; what ComfyUI takes as given is as it expects: normalisation over 32 channels, heads of 64 channels (8 heads in
Stable Diffusion 1; of 32 channels in FLUX.1, a quarter), time ids of 256 each, 16 channels of latents in SD3 and FLUX.1, CLIP's and T5's vocabularies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import original_names
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CLIP_L, CLIP_G, T5 = 64, 128, 256
"""Widths of the text encoders: SDXL is told both of CLIP's side by side, SD3 them padded to T5's."""
VAE_RULES = tuple(
    (pattern, {"up.": lambda m: f"up.{3 - int(m[1])}.block", "ups": lambda m: f"up.{3 - int(m[1])}.upsample"}[kind])
    if (kind := {r"up_blocks\.(\d)\.resnets": "up.", r"up_blocks\.(\d)\.upsamplers\.0": "ups"}.get(pattern))
    else (pattern, there)
    for pattern, there in original_names.VAE
)
"""As in original_names, for four blocks."""


def filled(model: Any, seed: int) -> Any:
    """The model, of random weights that are nowhere 0, whatever it begins with."""
    generator = torch.Generator().manual_seed(seed)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.normal_(
                    std=(1.0 if "embedding" in name or "shared" in name else fan**-0.5), generator=generator
                )
            else:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1, generator=generator)
    return model


def stored(model: nn.Module, part: str, convert: Any, seed: int = 0) -> dict[str, Tensor]:
    """The weights of a part under its authors' names, by what original_names makes of a folder."""
    with TemporaryDirectory() as folder:
        filled(model, seed).save_pretrained(Path(folder) / part)
        return convert(Path(folder))


def vae(channels: int = 4, prefix: str = "", **settings: Any) -> dict[str, Tensor]:
    """An autoencoder that halves the sides three times."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        **settings,
    )
    state = stored(model, "vae", lambda folder: original_names.renamed(folder / "vae", VAE_RULES, prefix), 1)
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in state.items()}


def unet(**settings: Any) -> dict[str, Tensor]:
    """A UNet of two levels, whose second looks at the prompt."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )
    return stored(model, "unet", original_names.unet, 2)


def clip(width: int, layers: int, projection: int | None = None, act: str = "quick_gelu") -> Any:
    """A CLIP text model, with a head for every 64 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=layers,
        hidden_act=act,
        projection_dim=projection or width,
    )
    with torch.device("meta"):  # nothing is drawn twice
        return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def clip_l(prefix: str = "") -> dict[str, Tensor]:
    """As its file in ``clip`` has it, with ``text_model.`` in front."""
    return stored(
        clip(CLIP_L, 3), "te", lambda folder: original_names.renamed(folder / "te", original_names.CLIP, prefix), 3
    )


def clip_g(prefix: str = "", open_clip: bool = False) -> dict[str, Tensor]:
    """As its file in ``clip`` has it, or as OpenCLIP names it in SDXL's checkpoints."""

    def names(folder: Path) -> dict[str, Tensor]:
        if open_clip:
            return original_names.open_clip(folder / "te", prefix)
        return original_names.renamed(folder / "te", original_names.CLIP, prefix)

    return stored(clip(CLIP_G, 32, CLIP_G, "gelu"), "te", names, 4)


def t5(prefix: str = "") -> dict[str, Tensor]:
    """The encoder of a T5 1.1."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": T5, "d_ff": 128, "d_kv": 64, "num_heads": 4, "num_layers": 2}
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
    state = stored(model, "te", lambda folder: original_names.renamed(folder / "te", (), prefix), 5)
    return {name: tensor for name, tensor in state.items() if "embed_tokens" not in name}


def sd15() -> dict[str, Tensor]:
    """Stable Diffusion 1's checkpoint."""
    network = unet(cross_attention_dim=CLIP_L, attention_head_dim=8)
    return {**network, **vae(prefix="first_stage_model."), **clip_l("cond_stage_model.transformer.")}


def sdxl() -> dict[str, Tensor]:
    """Stable Diffusion XL's checkpoint."""
    network = unet(
        cross_attention_dim=CLIP_L + CLIP_G,
        attention_head_dim=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 256 + CLIP_G,
    )
    return {
        **network,
        **vae(prefix="first_stage_model."),
        **clip_l("conditioner.embedders.0.transformer."),
        **clip_g("conditioner.embedders.1.model.", open_clip=True),
    }


def sd3() -> dict[str, Tensor]:
    """Stable Diffusion 3's checkpoint, with its encoders."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=T5,
        caption_projection_dim=128,
        pooled_projection_dim=CLIP_L + CLIP_G,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return {
        **stored(model, "transformer", original_names.sd3, 6),
        **vae(16, "first_stage_model.", use_quant_conv=False, use_post_quant_conv=False),
        **clip_l("text_encoders.clip_l.transformer."),
        **clip_g("text_encoders.clip_g.transformer."),
        **t5("text_encoders.t5xxl.transformer."),
    }


def flux(guidance: bool = True) -> dict[str, Tensor]:
    """FLUX.1's network alone."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5,
        pooled_projection_dim=CLIP_L,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )
    return stored(model, "transformer", original_names.flux, 7)


FILES = {
    "checkpoints/sd15": sd15,
    "checkpoints/sdxl": sdxl,
    "checkpoints/sd3": sd3,
    "unet/flux": flux,
    "vae/ae": lambda: vae(16, use_quant_conv=False, use_post_quant_conv=False),
    "vae/sd15": vae,
    "clip/clip_l": clip_l,
    "clip/clip_g": clip_g,
    "clip/t5xxl": t5,
}


def build(folder: Path, *names: str) -> Path:
    """Write those of FILES, or all, into ``folder``, and return it. About two seconds for all."""
    for name in names or FILES:
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in FILES[name]().items()}, path)
    return folder


Q = "transformer_blocks_0_attn1_to_q"
LORAS = {
    # By what a file calls a layer: the shape of its weight.
    "sd15": {
        f"lora_unet_down_blocks_1_attentions_0_{Q}": (64, 64),
        "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k": (64, 64),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (64, 64),
        "lora_unet_down_blocks_0_resnets_0_conv1": (32, 32, 3, 3),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
    },
    "sdxl": {
        f"lora_unet_input_blocks_3_1_{Q}": (64, 64),
        "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj": (512, 64),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": (128, 64),
        "lora_te2_text_model_encoder_layers_30_mlp_fc1": (256, 128),
    },
    "sd3": {
        "transformer.transformer_blocks.0.attn.to_k": (128, 128),
        "transformer.transformer_blocks.1.attn.add_v_proj": (128, 128),
        "transformer.transformer_blocks.0.ff.net.0.proj": (512, 128),
    },
    "flux": {
        "transformer.transformer_blocks.1.attn.to_v": (64, 64),
        "transformer.single_transformer_blocks.0.attn.to_k": (64, 64),
        "transformer.single_transformer_blocks.1.proj_mlp": (256, 64),
        "transformer.norm_out.linear": (128, 64),
    },
    "flux_kohya": {
        "lora_unet_double_blocks_0_img_attn_qkv": (192, 64),
        "lora_unet_single_blocks_1_linear2": (64, 320),
    },
}


def lora(name: str, kind: str = "lora", rank: int = 4, seed: int = 8) -> dict[str, Tensor]:
    """A file of LORAS, in peft's form where layers have dots, else in kohya's; or as ``loha``, ``lokr``, or ``dora``."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    for layer, (out, *rest) in LORAS[name].items():
        within = torch.Size(rest).numel()
        if kind == "loha":
            sizes = {"a": (out, rank), "b": (rank, within)}
            found |= {f"{layer}.hada_w{n}_{half}": drawn(*size) for n in "12" for half, size in sizes.items()}
        elif kind == "lokr":
            found |= {f"{layer}.lokr_w1": drawn(2, 2), f"{layer}.lokr_w2_a": drawn(out // 2, rank)}
            found |= {f"{layer}.lokr_w2_b": drawn(rank, within // 2)}
        elif "." in layer:
            found |= {f"{layer}.lora_B.weight": drawn(out, rank), f"{layer}.lora_A.weight": drawn(rank, *rest)}
        else:
            found |= {f"{layer}.lora_up.weight": drawn(out, rank, *(1 for _ in rest[1:]))}
            found |= {f"{layer}.lora_down.weight": drawn(rank, *rest)}
        if kind == "dora":
            found[f"{layer}.dora_scale"] = drawn(out, *(1 for _ in rest)).abs() + 1
        if "." not in layer:
            found[f"{layer}.alpha"] = torch.tensor(2.0)
    return found


def build_lora(folder: Path, name: str, kind: str = "lora", seed: int = 8) -> str:
    """Write it into ``folder``'s ``loras``, and return its name there."""
    path = folder / "loras" / f"{name}_{kind}_{seed}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora(name, kind, seed=seed), path)
    return path.name


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])

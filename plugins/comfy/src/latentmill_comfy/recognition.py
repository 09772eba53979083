"""Which model a file holds, from its tensors' names and shapes alone, and the configs that diffusers has for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from latentmill_comfy.headers import NETWORK, Header

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = 64
"""Channels of a head, but in Stable Diffusion 1 and FLUX.1."""
TIME_IDS = 256
"""Values that each number among SDXL's conditions becomes."""
OTHERS = {
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "mlp_t5.0.weight": "HunyuanDiT",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo or HunyuanImage",
    "distilled_guidance_layer.norms.0.scale": "Chroma",
    "distilled_guidance_layer.0.norms.0.scale": "Chroma",
    "t_block.1.weight": "PixArt",
    "cap_embedder.1.weight": "Lumina 2 or Z-Image",
    "head.modulation": "Wan",
    "caption_projection.0.linear.weight": "HiDream",
    "txt_norm.weight": "Qwen-Image",
    "clf.1.weight": "Stable Cascade",
    "transformer_blocks.0.attn.add_q_proj.weight": "a network under diffusers' names",
    "down_blocks.0.resnets.0.conv1.weight": "a network under diffusers' names",
}
"""What ComfyUI runs, and we don't from such a file, by a tensor that it has."""


@dataclass(frozen=True)
class Recognised:
    """A network in a file."""

    family: str
    """What people call it."""
    pipeline: str
    """diffusers' class of pipeline, by which the plugin diffusers knows the family."""
    network: str
    """diffusers' class of network."""
    part: str
    """``unet`` or ``transformer``."""
    prefix: str
    """How its tensors' names begin in the file."""
    config: dict[str, Any] = field(hash=False)
    """Of the network, as diffusers has it."""
    prediction: str = "flow"
    """``eps``, ``v_prediction`` or ``flow``, as ComfyUI names them, but for the last."""
    zsnr: bool = False
    """Whether its betas end in pure noise."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """The small files of a model's folder, by name: what the plugin diffusers wants beside weights."""
        index = {
            "_class_name": self.pipeline,
            self.part: ["diffusers", self.network],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        return {
            "model_index.json": index,
            f"{self.part}/config.json": {"_class_name": self.network, **self.config},
            "vae/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]},
        }


def recognised(header: Header) -> Recognised:
    """The network in a file. Raises ValueError, saying what was found, if it is none that is known here, or lacks what tells its sizes."""
    try:
        return _recognised(header)
    except (KeyError, IndexError, StopIteration, ZeroDivisionError) as error:
        lacks = f"it has no {error.args[0]}" if isinstance(error, KeyError) else "it lacks tensors"
        raise ValueError(f"{header.path} holds no whole network that is known here: {lacks}") from error


def _recognised(header: Header) -> Recognised:
    prefix = NETWORK if any(name.startswith(NETWORK) for name in header.shapes) else ""
    shapes = header.under(prefix)
    if "joint_blocks.0.context_block.attn.qkv.weight" in shapes:
        return _stable_diffusion_3(header, prefix, shapes)
    other = next((found for name, found in OTHERS.items() if name in shapes), None)
    if other is None and "double_blocks.0.img_attn.norm.key_norm.scale" in shapes and "img_in.weight" in shapes:
        return _flux(header, prefix, shapes)
    if other is None and "input_blocks.0.0.weight" in shapes:
        return _stable_diffusion(header, prefix, shapes)
    known = "Stable Diffusion 1, 2, XL, its refiner, 3, and FLUX.1"
    raise ValueError(f"{header.path} holds {other or 'no network that is recognised'}; known here are {known}")


def _count(shapes: Shapes, begin: str) -> int:
    """How many blocks there are of names that begin so, from 0 on."""
    found = {name[len(begin) :].split(".")[0] for name in shapes if name.startswith(begin)}
    return next(n for n in range(len(found) + 1) if str(n) not in found)


def _stable_diffusion(header: Header, prefix: str, shapes: Shapes) -> Recognised:
    config = _unet(header, shapes)
    context, told = config["cross_attention_dim"], shapes.get("label_emb.0.0.weight", (0, 0))[1]
    if not told:
        linear = config["use_linear_projection"]
        family = "Stable Diffusion 2" if linear else "Stable Diffusion 1"
        config["attention_head_dim"] = [max(1, n // HEAD_WIDTH) for n in config["block_out_channels"]] if linear else 8
        v = linear and _predicts_v(header, prefix)
        return Recognised(
            family,
            "StableDiffusionPipeline",
            "UNet2DConditionModel",
            "unet",
            prefix,
            config,
            "v_prediction" if v else "eps",
        )
    config |= {
        "attention_head_dim": [max(1, n // HEAD_WIDTH) for n in config["block_out_channels"]],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_IDS,
        "projection_class_embeddings_input_dim": told,
    }
    if "edm_mean" in header.shapes or "edm_vpred.sigma_max" in header.shapes:
        raise ValueError(
            f"{header.path} holds a network of continuous sigmas (EDM), as Playground 2.5, which isn't known here"
        )
    prediction = "v_prediction" if "v_pred" in header.shapes else "eps"
    zsnr = prediction == "v_prediction" and "ztsnr" in header.shapes
    # The refiner has five numbers and one text encoder, whose pooled vector is as wide as its tokens; SDXL six and two.
    if told == 5 * TIME_IDS + context:
        pipeline = "StableDiffusionXLImg2ImgPipeline"
        return Recognised(
            "the refiner of Stable Diffusion XL", pipeline, "UNet2DConditionModel", "unet", prefix, config, "eps"
        )
    if context <= told - 6 * TIME_IDS or told <= 6 * TIME_IDS:
        raise ValueError(
            f"{header.path} holds a UNet with conditions of {told} values and tokens of {context}, which isn't known here"
        )
    pipeline = "StableDiffusionXLPipeline"
    return Recognised("Stable Diffusion XL", pipeline, "UNet2DConditionModel", "unet", prefix, config, prediction, zsnr)


def _unet(header: Header, shapes: Shapes) -> dict[str, Any]:
    """Levels, widths and depths of a UNet. Raises ValueError for one that diffusers' class can't be."""
    width, channels = shapes["input_blocks.0.0.weight"][:2]
    if channels != 4:
        raise ValueError(
            f"{header.path} holds a UNet of {channels} channels, for inpainting or edits, which isn't known here"
        )
    levels: list[list[tuple[int, int]]] = [[]]
    for i in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            depth = _count(shapes, f"input_blocks.{i}.1.transformer_blocks.")
            levels[-1].append((shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0], depth))
    middle = _count(shapes, "middle_block.1.transformer_blocks.")
    up = [_count(shapes, f"output_blocks.{i}.1.transformer_blocks.") for i in range(_count(shapes, "output_blocks."))]
    expected = [level[0][1] for level in reversed(levels) for _ in range(len(level) + 1)]
    plain = all(len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels) and up == expected and middle
    if not plain or any("time_stack" in name or "time_mix" in name for name in shapes):
        depths = [[depth for _, depth in level] for level in levels]
        raise ValueError(
            f"{header.path} holds a UNet of depths {depths}, {middle} and {up}: a distilled or a video model, which isn't known here"
        )
    deep = [level[0][1] for level in levels]
    if deep[-1] not in (0, middle):
        raise ValueError(f"{header.path} holds a UNet with {middle} blocks in its middle, which isn't known here")
    attention = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    return {
        "in_channels": channels,
        "out_channels": shapes["out.2.weight"][0],
        "sample_size": 64 if width == 320 and "label_emb.0.0.weight" not in shapes else 128,
        "block_out_channels": [level[0][0] for level in levels],
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in deep],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(deep)],
        "transformer_layers_per_block": [depth or middle for depth in deep],
        "cross_attention_dim": shapes[attention][1],
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }


def _predicts_v(header: Header, prefix: str) -> bool:
    """Whether a Stable Diffusion 2 was trained to predict v: nothing says so but the spread of one of its weights."""
    name = f"{prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    return name in header.shapes and float(header.read(name)[""].float().std(correction=0)) > 0.09


def _stable_diffusion_3(header: Header, prefix: str, shapes: Shapes) -> Recognised:
    if any(name.startswith("context_processor.") for name in shapes):
        raise ValueError(
            f"{header.path} holds a variant of Stable Diffusion 3 with a context processor, which isn't known here"
        )
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = _count(shapes, "joint_blocks.")
    dual = [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    config = {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": depth,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": hidden // HEAD_WIDTH,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": hidden,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(math.sqrt(shapes["pos_embed"][1])),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if "joint_blocks.0.context_block.attn.ln_q.weight" in shapes else None,
    }
    network = "SD3Transformer2DModel"
    return Recognised("Stable Diffusion 3", "StableDiffusion3Pipeline", network, "transformer", prefix, config)


def _flux(header: Header, prefix: str, shapes: Shapes) -> Recognised:
    hidden, channels = shapes["img_in.weight"]
    if channels != 64:
        raise ValueError(
            f"{header.path} holds a FLUX.1 of {channels // 4} channels (Fill, Canny, Depth), which isn't known here"
        )
    head = shapes["double_blocks.0.img_attn.norm.key_norm.scale"][0]
    config = {
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": _count(shapes, "double_blocks."),
        "num_single_layers": _count(shapes, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }
    return Recognised("FLUX.1", "FluxPipeline", "FluxTransformer2DModel", "transformer", prefix, config)

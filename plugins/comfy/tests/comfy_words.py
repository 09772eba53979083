"""Tiny text encoders in ComfyUI's folders, under the names of those who trained them, and tokenizers of single letters.

What ComfyUI takes as given is as it expects: CLIP's vocabulary and its two special tokens, a chunk of 77, heads of 64 channels, T5 of 4096.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CLIP_L, CLIP_G, CLIP_H, T5 = 64, 128, 64, 4096
LAYERS = {"clip_l": 3, "clip_g": 32, "clip_h": 24}
VOCABULARY, BEGIN, END = 49408, 49406, 49407
T5_VOCABULARY = 128


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights that are nowhere 0 and keep what passes through them at about the same size."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            looked_up = "embedding" in name or "shared" in name or "bias" in name
            value *= 1.0 if looked_up else (0.1 if ".q." in name else 0.5) * shape[-1] ** -0.5
        else:
            value = value * 0.1 + float("norm" in name and name.endswith("weight"))
        found[name] = value.to(torch.float16)
    return found


@cache
def clip(part: str) -> dict[str, Tensor]:
    """A CLIP, with ``text_model.`` in front, and its projection."""
    width = {"clip_l": CLIP_L, "clip_g": CLIP_G, "clip_h": CLIP_H}[part]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (VOCABULARY, width),
        "embeddings.position_embedding.weight": (77, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for k in range(LAYERS[part]):
        linear = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (width, width), "mlp.fc2": (width, width)}
        for name, shape in [*linear.items(), ("layer_norm1", (width,)), ("layer_norm2", (width,))]:
            shapes |= {f"encoder.layers.{k}.{name}.weight": shape, f"encoder.layers.{k}.{name}.bias": (width,)}
    state = _random({f"text_model.{name}": shape for name, shape in shapes.items()}, len(part) + width + LAYERS[part])
    return state | _random({"text_projection.weight": (width, width)}, 1)


@cache
def t5() -> dict[str, Tensor]:
    """The encoder of a T5 1.1 of two layers."""
    attention, feed = (f"encoder.block.{{}}.layer.{n}" for n in ("0.SelfAttention", "1.DenseReluDense"))
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (T5_VOCABULARY, T5),
        "encoder.final_layer_norm.weight": (T5,),
    }
    for k in range(2):
        shapes |= {f"{attention.format(k)}.{n}.weight": (64, T5) for n in "qkv"}
        shapes |= {f"{attention.format(k)}.o.weight": (T5, 64), f"{feed.format(k)}.wo.weight": (T5, 64)}
        shapes |= {f"{feed.format(k)}.wi_{n}.weight": (64, T5) for n in (0, 1)}
        shapes |= {f"encoder.block.{k}.layer.{n}.layer_norm.weight": (T5,) for n in (0, 1)}
    shapes[f"{attention.format(0)}.relative_attention_bias.weight"] = (32, 1)
    return _random(shapes, 5)


def open_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP as OpenCLIP names it: three linear layers in one, the projection from the other side."""
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T.contiguous()
        elif name.startswith("encoder.layers."):
            _, _, k, rest = name.split(".", 3)
            inside, _, kind = rest.rpartition(".")
            if inside in names:
                found[f"{prefix}transformer.resblocks.{k}.{names[inside]}.{kind}"] = value
            elif inside == "self_attn.q_proj":
                joined = [state[f"text_model.encoder.layers.{k}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                found[f"{prefix}transformer.resblocks.{k}.attn.in_proj_{kind}"] = torch.cat(joined)
        else:
            plain = name.replace("embeddings.token_embedding", "token_embedding").replace(
                "final_layer_norm", "ln_final"
            )
            found[prefix + plain.replace("embeddings.position_embedding.weight", "positional_embedding")] = value
    return found


def scaled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A T5 whose linear layers are 8-bit floats times a number."""
    found = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if value.ndim == 2 and "shared" not in name and "bias" not in name:
            scale = value.float().abs().max() / 448
            found[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            found[name] = value
    return found


def _prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _without_projection(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("text_projection")}


FILES: dict[str, Any] = {
    "text_encoders/clip_l": lambda: clip("clip_l"),
    "clip/clip_g": lambda: clip("clip_g"),
    "text_encoders/t5xxl": t5,
    "text_encoders/t5xxl_fp8_e4m3fn": lambda: {n: v.to(torch.float8_e4m3fn) for n, v in t5().items()},
    "text_encoders/t5xxl_scaled": lambda: scaled(t5()),
    "checkpoints/sd1": lambda: _prefixed(_without_projection(clip("clip_l")), "cond_stage_model.transformer."),
    "checkpoints/sd2": lambda: open_clip(clip("clip_h"), "cond_stage_model.model."),
    "checkpoints/sdxl": lambda: (
        _prefixed(_without_projection(clip("clip_l")), "conditioner.embedders.0.transformer.")
        | open_clip(clip("clip_g"), "conditioner.embedders.1.model.")
    ),
    "checkpoints/refiner": lambda: open_clip(clip("clip_g"), "conditioner.embedders.0.model."),
    "checkpoints/sd3": lambda: (
        _prefixed(clip("clip_l"), "text_encoders.clip_l.transformer.")
        | _prefixed(clip("clip_g"), "text_encoders.clip_g.transformer.")
        | _prefixed(t5(), "text_encoders.t5xxl.transformer.")
        | {"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}
    ),
    "loras/words": lambda: lora(),
    "embeddings/two": lambda: {"emb_params": vectors(2, CLIP_L)},
    "embeddings/sub/one": lambda: {"emb_params": vectors(1, CLIP_L)[0]},
    "embeddings/both": lambda: {"clip_g": vectors(2, CLIP_G), "clip_l": vectors(2, CLIP_L)},
}
"""What can be made, by its place in the folder of models."""


def vectors(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))


def lora() -> dict[str, Tensor]:
    """For some layers of CLIP-L and CLIP-G, as kohya names them."""
    found: dict[str, Tensor] = {}
    for te, width, name in (
        ("te1", CLIP_L, "text_model_encoder_layers_0_mlp_fc1"),
        ("te1", CLIP_L, "text_model_encoder_layers_1_self_attn_q_proj"),
        ("te2", CLIP_G, "text_model_encoder_layers_3_self_attn_out_proj"),
    ):
        generator = torch.Generator().manual_seed(len(found))
        found[f"lora_{te}_{name}.lora_up.weight"] = torch.randn(width, 2, generator=generator) * 0.3
        found[f"lora_{te}_{name}.lora_down.weight"] = torch.randn(2, width, generator=generator) * 0.3
        found[f"lora_{te}_{name}.alpha"] = torch.tensor(1.0)
    return found


def build(models: Path, *names: str) -> Path:
    """Write these of FILES, or all, and the tokenizers beside as ComfyUI has them; returns ``models``."""
    for name in names or FILES:
        path = models / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(FILES[name](), path)
    if "embeddings/two" in names or not names:
        old = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(3, CLIP_L)}, "name": "old", "step": 10}
        torch.save(old, models / "embeddings/old.pt")
    clip_tokenizer(models.parent / "comfy/sd1_tokenizer")
    t5_tokenizer(models.parent / "comfy/text_encoders/t5_tokenizer")
    return models


def summary(values: Tensor) -> list[float]:
    """A few numbers out of ``[L, D]``, of which each value is a part: blocks of seven tokens, all channels, each times its own cosine."""
    length, width = values.shape
    along, across = (torch.cos(torch.arange(n, dtype=torch.float64) ** 1.5) for n in (length, width))
    each = (values.double() @ across) * along / width**0.5
    return [round(float(block.sum()), 7) for block in each.split(7)]


def clip_tokenizer(folder: Path) -> Path:
    """Of letters, and a few pairs, in CLIP's manner: a byte, or a byte that ends a word."""
    plain = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    plain += [chr(256 + k) for k in range(68)]
    merges = [("t", "h"), ("a", "n"), ("f", "o"), ("fo", "x</w>"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>")]
    words = [*plain, *(f"{c}</w>" for c in plain), *("".join(pair) for pair in merges)]
    vocabulary = {word: k for k, word in enumerate(words)} | {"<|startoftext|>": BEGIN, "<|endoftext|>": END}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    end = "<|endoftext|>"
    about = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def t5_tokenizer(folder: Path) -> Path:
    """Of letters, in T5's manner: blanks are a letter, and one is put in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    inner = Tokenizer(models.Unigram([(word, -float(k)) for k, word in enumerate(words)], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder

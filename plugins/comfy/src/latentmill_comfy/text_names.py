"""The names of text encoders' tensors in ComfyUI's files, and in LoRAs, and which encoder a file holds.

Here a tensor is called ``PART.NAME``: the part is ``clip_l``, ``clip_g``, ``clip_h`` or ``t5xxl``, the name transformers' own,
``clip_l.encoder.layers.0.mlp.fc1.weight`` say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentmill import weights
from latentmill_diffusers.single_file import SAFETENSORS

IN_CHECKPOINTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cond_stage_model.transformer.", ("clip_l",)),
    ("cond_stage_model.model.", ("clip_h",)),
    ("conditioner.embedders.0.transformer.", ("clip_l",)),
    ("conditioner.embedders.0.model.", ("clip_g", "clip_h")),
    ("conditioner.embedders.1.model.", ("clip_g",)),
    ("text_encoders.clip_l.transformer.", ("clip_l",)),
    ("text_encoders.clip_g.transformer.", ("clip_g",)),
    ("text_encoders.t5xxl.transformer.", ("t5xxl",)),
)
"""How the tensors of a whole model's text encoders begin, and which encoders they may be."""
LAYERS = {"clip_g": 31, "clip_h": 23, "clip_l": 1}
"""By how many layers a CLIP has at least it is told which it is."""
_OPEN_CLIP = (
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("token_embedding.", "embeddings.token_embedding."),
    ("ln_final.", "final_layer_norm."),
    ("transformer.resblocks.", "encoder.layers."),
)
_OPEN_CLIP_LAYER = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)
_WANTED = re.compile(
    r"(embeddings\.(token|position)_embedding|encoder\.layers\.\d+\..*|final_layer_norm|text_projection"
    r"|shared|encoder\.(embed_tokens|block\..*|final_layer_norm))\.(weight|bias|scale_weight)|scaled_fp8"
)
"""Names of transformers that a network is made of; the rest of a file is of others, as a CLIP's half for pictures."""


def parts_of(path: Path, whole: bool) -> dict[str, dict[str, str]]:
    """The text encoders in a file: of each, the names of its tensors there, by those here.

    ``whole``: it is a checkpoint, with the rest of the model; else a text encoder's file. Raises ValueError.
    """
    names = _names(path)
    if not whole:
        here = _renamed(names, "")
        part = _part(here)
        if part is None:
            raise ValueError(f"{path} is no text encoder that is known here: CLIP-L, CLIP-G, CLIP-H and T5 are")
        return {part: here}
    found: dict[str, dict[str, str]] = {}
    for prefix, candidates in IN_CHECKPOINTS:
        if here := _renamed(names, prefix):
            part = _part(here) if len(candidates) > 1 else candidates[0]
            found[part or candidates[0]] = here
    if not found:
        raise ValueError(f"{path} holds no text encoder that is known here: load it from a file of its own")
    return found


def family_of(path: Path, parts: Iterable[str]) -> str:
    """Which family a checkpoint with these text encoders is of."""
    parts = frozenset(parts)
    if any(".double_blocks." in name for name in _names(path)):
        return "flux"
    if any(".joint_blocks." in name for name in _names(path)):
        return "sd3"
    known = {frozenset({"clip_l"}): "sd1", frozenset({"clip_h"}): "sd2", frozenset({"clip_g"}): "refiner"}
    return known.get(parts) or ("sdxl" if parts == {"clip_l", "clip_g"} else "sd3")


def shapes(path: Path, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors, by our names, without reading them."""
    with safe_open(path, "pt") as file:
        lie = {here: tuple(file.get_slice(there).get_shape()) for here, there in names.items()}
    return {here: shape[::-1] if _turned(names[here]) else shape for here, shape in lie.items()}


def read(path: Path, parts: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
    """The tensors of these parts, ``PART.NAME``, as they lie, with OpenCLIP's joined ones parted. Raises ValueError."""
    weights.record(path)
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            for part, names in parts.items():
                for here, there in names.items():
                    tensor: Tensor = file.get_tensor(there)
                    for name, value in _parted(here, there, tensor):
                        state[f"{part}.{name}"] = value
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file that can be read: {error}") from error
    for name, tensor in state.items():
        if tensor.element_size() > 1 and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{path}: {name} is not finite: the file is damaged, or its training failed")
    return state


def _names(path: Path) -> list[str]:
    if path.suffix not in SAFETENSORS:
        raise ValueError(f"{path}: a pickle, which may run code when it is read: convert it to safetensors")
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no safetensors file that can be read: {error}") from error


def _renamed(names: Iterable[str], prefix: str) -> dict[str, str]:
    found = {}
    for there in names:
        if there.startswith(prefix):
            here = _here(there.removeprefix(prefix))
            if _WANTED.fullmatch(here) or here.endswith((".in_proj_weight", ".in_proj_bias")):
                found[here] = there
    return found


def _here(name: str) -> str:
    name = name.removeprefix("text_model.")
    for theirs, ours in _OPEN_CLIP:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in _OPEN_CLIP_LAYER:
        name = name.replace(theirs, ours)
    if name == "text_projection":
        return "text_projection.weight"
    return name.replace("encoder.embed_tokens.weight", "shared.weight")


def _parted(here: str, there: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if here.endswith((".in_proj_weight", ".in_proj_bias")):
        layer, _, kind = here.partition(".attn.in_proj_")
        for name, value in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
            yield f"{layer}.self_attn.{name}.{kind}", value
    elif _turned(there):
        yield here, tensor.T.contiguous()
    else:
        yield here, tensor


def _turned(there: str) -> bool:
    """Whether a tensor lies the other way round: OpenCLIP multiplies from the other side."""
    return there.endswith("text_projection")


def parted_names(names: Iterable[str]) -> list[str]:
    """What ``read`` gives of tensors with these names."""
    found = []
    for name in names:
        layer, joined, kind = name.partition(".attn.in_proj_")
        found += [f"{layer}.self_attn.{n}_proj.{kind}" for n in "qkv"] if joined else [name]
    return found


def _part(names: Iterable[str]) -> str | None:
    names = set(names)
    for part, layers in LAYERS.items():
        if f"encoder.layers.{layers - 1}.mlp.fc1.weight" in names:
            return part
    return "t5xxl" if "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in names else None


def lora_names(state: Iterable[str]) -> dict[str, str]:
    """Which tensor of ``state`` a LoRA means, by what trainers call its layer: kohya's, diffusers', OneTrainer's.

    Those of eight bits that are times a number are left out.
    """
    there = {*state}
    state = [n for n in there if n.endswith(".weight") and f"{n.removesuffix('weight')}scale_weight" not in there]
    parts = {name.partition(".")[0] for name in state}
    clips = [part for part in ("clip_l", "clip_h", "clip_g") if part in parts]
    found: dict[str, str] = {}
    for name in state:
        part, _, inside = name.removesuffix(".weight").partition(".")
        theirs = inside if part == "t5xxl" else f"text_model.{inside}".replace("text_model.text_p", "text_p")
        found[f"text_encoders.{part}.transformer.{theirs}"] = name
        for pattern in _calls(part, clips):
            found[pattern(theirs)] = name
    return found


def _calls(part: str, clips: Sequence[str]) -> list[Callable[[str], str]]:
    def kohya(number: str) -> Callable[[str], str]:
        return lambda name: f"lora_te{number}_{name.replace('.', '_')}"

    if part == "t5xxl":
        numbers = {(): ("1",), ("clip_l",): ("2", "3"), ("clip_g",): ("2",)}.get(tuple(clips), ("3",))
        return [kohya(number) for number in numbers]
    if part == "clip_g" and "clip_l" in clips:
        return [kohya("2"), lambda name: f"text_encoder_2.{name}"]
    return [kohya(""), *([] if part == "clip_g" else [kohya("1")]), lambda name: f"text_encoder.{name}"]

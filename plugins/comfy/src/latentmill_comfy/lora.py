"""LoRA as ComfyUI merges it: all files in order, in float32, each weight rounded once at the end.

Files in the forms of kohya, diffusers, peft and LyCORIS: LoRA (Hu et al. 2021, arXiv:2106.09685), with Tucker's core for convolutions,
LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098), LoKr (Yeh et al. 2023, arXiv:2309.14859), DoRA (Liu et al. 2024, arXiv:2402.09353), and whole differences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from latentmill import weights
from latentmill.text import one_line
from latentmill_comfy.folders import find
from latentmill_comfy.headers import Header

ENDINGS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".set_weight": "set_weight",
    **{
        f".{name}": name
        for name in "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w2 lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2".split()
    },
}
"""What a tensor is, by the end of its name; before it stands a layer's name."""
OTHER_ENDINGS = (
    ".oft_blocks",
    ".oft_diag",
    ".rescale",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".reshape_weight",
)
"""How names end of what changes weights in other ways (OFT, BOFT, GLoRA, FLUX.1's control LoRAs)."""
TEXT = ("lora_te", "text_encoder", "lora_prior_te")
"""How names of layers begin that are a text encoder's."""


@dataclass(frozen=True)
class Lora:
    """A file, and how much of it: strength_model for a network, strength_clip for text encoders."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class SomeRows:
    """Some of a tensor's rows: a layer of diffusers may be a part of its authors', or have its rows in another order."""

    name: str
    rows: Tensor


Target: TypeAlias = "str | SomeRows"


def loras_of(models: str, settings: Sequence[Mapping[str, Any]]) -> tuple[Lora, ...]:
    """``[{file: NAME, weight: 0.8}]`` of a job, looked for in ComfyUI's ``loras``. Raises ValueError, naming the entry that is wrong."""
    found = []
    for entry in settings:
        if not isinstance(entry, Mapping) or "file" not in entry or not set(entry) <= {"file", "weight"}:
            raise ValueError(f"loras: {entry!r}: expected {{file: its name, weight: a number}}")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"loras: the weight of {entry['file']} must be a number, not {weight!r}")
        found.append(Lora(Header(find(models, "loras", str(entry["file"]))).path, float(weight)))
    return tuple(found)


def fingerprint(loras: Sequence[Lora]) -> str:
    """Hex digits over files and weights, in order; none for none."""
    if not loras:
        return ""
    found = zip(weights.digests(lora.path for lora in loras), loras)
    text = "".join(f"{content} {lora.weight!r}\0" for content, lora in found)
    return "+" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def parted(name: str) -> tuple[str, str] | None:
    """The layer, and what of it a tensor of this name is; None for what is unknown."""
    end = max((end for end in ENDINGS if name.endswith(end)), key=len, default=None)
    return None if end is None else (name.removesuffix(end), ENDINGS[end])


def notices(loras: Sequence[Lora], keys: Mapping[str, Target], part: str) -> list[str]:
    """A line for each file that has tensors for the ``part`` which ComfyUI passes over, too.

    Raises ValueError for a file of which nothing fits: it is another model's; and for one that changes weights in a way that isn't known.
    """
    said = []
    for lora in loras:
        names, text = list(Header(lora.path).shapes), any(key.startswith(TEXT) for key in keys)
        if other := next((name for name in names if name.endswith(OTHER_ENDINGS)), None):
            raise ValueError(f"the LoRA {lora.path} has {other}: a kind (OFT, GLoRA, control) that isn't known here")
        own = [name for name in names if name.startswith(TEXT) == text]
        lost = [name for name in own if (found := parted(name)) is None or found[0] not in keys]
        if lost and len(lost) == len(own) and (not text or len(own) == len(names)):
            raise ValueError(
                f"the LoRA {lora.path} has nothing for this {part}: {lost[0]} names no layer of it; it is another kind of model's"
            )
        if lost:
            said.append(f"of the LoRA {lora.path.name} {len(lost)} tensors name no layer of the {part}: {lost[0]}, ...")
    return said


@torch.no_grad()
def fuse(state: dict[str, Tensor], loras: Sequence[Lora], keys: Mapping[str, Target]) -> None:
    """Add to ``state``'s tensors, in place of them, what the files have for the layers that ``keys`` names.

    Raises ValueError, naming file and layer, for what can't be added.
    """
    weights.record(*(lora.path for lora in loras))
    changed: dict[str, Tensor] = {}
    for lora in loras:
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in Header(lora.path).read().items():
            if (found := parted(name)) is not None and found[0] in keys:
                layers.setdefault(found[0], {})[found[1]] = tensor
        for layer, given in layers.items():
            try:
                _change(state, changed, keys[layer], given, lora.weight)
            except (ValueError, RuntimeError, KeyError) as error:
                raise ValueError(f"the LoRA {lora.path} can't be added to {layer}: {one_line(error)}") from error
    for name, tensor in changed.items():
        state[name] = tensor.to(state[name].dtype)


def _change(
    state: Mapping[str, Tensor],
    changed: dict[str, Tensor],
    target: Target,
    given: Mapping[str, Tensor],
    strength: float,
) -> None:
    """Add what a file has for a layer to its weight and bias in ``changed``, float32, as other files left them."""
    name, rows = (target, slice(None)) if isinstance(target, str) else (target.name, target.rows)
    bias = f"{name.removesuffix('.weight')}.bias"
    parts = {name: given.keys() - {"diff_b", "alpha"}, bias: given.keys() & {"diff_b"}}
    for tensor in (each for each, forms in parts.items() if forms):
        whole = changed[tensor] if tensor in changed else state[tensor].to(torch.float32, copy=True)
        of = {"diff": given["diff_b"]} if tensor == bias else {n: v for n, v in given.items() if n != "diff_b"}
        if isinstance(rows, Tensor) and len(rows) == len(
            whole
        ):  # the change is put in order, and no more, as in ComfyUI
            whole = merged(whole, of, strength, rows)
        else:
            whole[rows] = merged(whole[rows], of, strength)
        changed[tensor] = whole


def merged(weight: Tensor, given: Mapping[str, Tensor], strength: float, order: Tensor | None = None) -> Tensor:
    """``W + strength * scale * dW``, float32, shaped as the ``weight``; ``scale`` is alpha / rank, or 1 where no alpha is said.

    ``order``: to which row of W each row of dW is added.

    With a ``dora_scale`` m, the merged weight is ``m (W + scale dW) / |W|``, of which ``strength`` is taken.
    """
    given = {name: tensor.float() for name, tensor in given.items()}
    if "set_weight" in given:
        return given["set_weight"].reshape(weight.shape)
    delta, rank = (given["diff"], None) if "diff" in given else _delta(given)
    delta = delta.reshape(weight.shape)
    if order is not None:
        delta = torch.empty_like(delta).index_copy_(0, order, delta)
    scale = float(given["alpha"]) / rank if "alpha" in given and rank else 1.0
    if "dora_scale" not in given:
        return weight + (strength * scale) * delta
    return _decomposed(weight, delta * scale, given["dora_scale"], strength)


def _delta(given: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """The change that a file's factors make, and their rank."""
    if "up" in given:
        up, down = given["up"], given["down"]
        if "mid" in given:
            return torch.einsum("rs...,or,si->oi...", given["mid"], up.flatten(1), down.flatten(1)), down.shape[0]
        return up.flatten(1) @ down.flatten(1), down.shape[0]
    if "hada_w1_a" in given:
        first, second = (_product(given, f"hada_w{n}", given.get(f"hada_t{n}")) for n in "12")
        return first * second, given["hada_w1_b"].shape[0]
    rank: int | None = None
    factors = []
    for n in "12":
        if f"lokr_w{n}" in given:
            factors.append(given[f"lokr_w{n}"])
        else:
            rank = given[f"lokr_w{n}_b"].shape[0]
            factors.append(_product(given, f"lokr_w{n}", given.get("lokr_t2") if n == "2" else None))
    if factors[1].ndim == 4:
        factors[0] = factors[0][:, :, None, None]
    return torch.kron(*factors), rank


def _product(given: Mapping[str, Tensor], name: str, core: Tensor | None) -> Tensor:
    """``A B``, or with Tucker's core between them."""
    a, b = given[f"{name}_a"], given[f"{name}_b"]
    return a @ b if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)


def _decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """DoRA, as ComfyUI has it: magnitudes of the outputs are over the norms of W itself, those of the inputs over the changed one's."""
    changed = weight + delta
    if magnitude.shape[0] == changed.shape[0]:
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in weight.shape[1:]))
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in weight.shape[2:]))
    changed = changed * (magnitude / (norm + torch.finfo(weight.dtype).eps))
    taken: Tensor = changed if strength == 1.0 else weight + strength * (changed - weight)
    return taken

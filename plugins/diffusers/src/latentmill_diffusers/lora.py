"""LoRA: low-rank changes of weights, added to them once when a part is loaded, so that they cost nothing afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from latentmill_diffusers.folder import digest_of


@dataclass(frozen=True)
class Lora:
    """A file of LoRA weights, in diffusers' format or one that it converts (kohya's, say), and how much of it."""

    path: Path
    weight: float = 1.0


def loras_of(settings: Sequence[Mapping[str, Any]]) -> tuple[Lora, ...]:
    """``[{path: ..., weight: ...}]`` of a job. Raises ValueError, naming the entry that is wrong."""
    found = []
    for entry in settings:
        if not isinstance(entry, Mapping) or "path" not in entry or not set(entry) <= {"path", "weight"}:
            raise ValueError(f"loras: {entry!r}: expected {{path: a .safetensors file, weight: a number}}")
        path, weight = Path(str(entry["path"])).expanduser(), entry.get("weight", 1.0)
        if path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(f"loras: there is no file {path} of .safetensors")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"loras: the weight of {path} must be a number, not {weight!r}")
        found.append(Lora(path, float(weight)))
    return tuple(found)


def fingerprint(loras: Sequence[Lora]) -> str:
    """Hex digits over files and weights; none for none."""
    if not loras:
        return ""
    text = b"".join(digest_of(lora.path) + repr(lora.weight).encode() for lora in loras)
    return "+" + hashlib.blake2b(text, digest_size=8).hexdigest()


def fuse(model: Any, part: str, pipeline: Any, loras: Sequence[Lora], unet: Mapping[str, Any] | None) -> None:
    """Add to a part's weights what the files have for it. ``unet`` is that part's config, for files of another format.

    Raises ValueError if a file has nothing for a network; most have nothing for text encoders.
    """
    network = not part.startswith("text_encoder")
    more = {"unet_config": SimpleNamespace(**unet)} if unet is not None else {}
    for i, lora in enumerate(loras):
        found = pipeline.lora_state_dict(str(lora.path), use_safetensors=True, return_lora_metadata=True, **more)
        state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
        own, scales, about = (
            {k: v for k, v in (d or {}).items() if k.startswith(f"{part}.")} for d in (state, alphas, metadata)
        )
        if network and not own:
            raise ValueError(f"the LoRA {lora.path} has nothing for the {part}: it is another kind of model's")
        if network:
            said = {"metadata": about} if about else {"network_alphas": scales or None}
            model.load_lora_adapter(own, prefix=part, adapter_name=f"lora_{i}", **said)
            model.set_adapters([f"lora_{i}"], [lora.weight])
            model.fuse_lora(adapter_names=[f"lora_{i}"])
            model.unload_lora()
        elif own:
            own, about = ({k.removeprefix(f"{part}."): v for k, v in d.items()} for d in (own, about))
            _add(model, own, scales, about, part, lora)


@torch.no_grad()
def _add(
    model: Any, state: dict[str, Tensor], alphas: Mapping[str, Any], about: Mapping[str, Any], part: str, lora: Lora
) -> None:
    """``W + weight * alpha / rank * B A`` (Hu et al. 2021, arXiv:2106.09685, sec. 4.1), alpha being the rank if it isn't said.

    It is said in ``alphas``, a tensor for each layer, or in ``about``, peft's config of the adapter; that may ask for the root of
    the rank in place of the rank (Kalajdzievski 2023, arXiv:2312.03732). For text encoders: transformers loads adapters with
    the newest peft alone. Raises ValueError for weights of other kinds (DoRA, LoKr, ...).
    """
    from diffusers.utils import convert_state_dict_to_peft

    if not any(".lora_A." in key for key in state):  # names of an older format
        state = convert_state_dict_to_peft(state)
    known = (".lora_A.weight", ".lora_B.weight", ".alpha")
    if other := next((key for key in state if not key.endswith(known)), None):
        raise ValueError(f"the LoRA {lora.path} has {part}.{other}, which is no plain LoRA's")
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        down, up = state[key].float(), state[f"{name}.lora_B.weight"].float()
        alpha = about.get("alpha_pattern", {}).get(name, about.get("lora_alpha", len(down)))
        alpha = next((float(v) for k, v in alphas.items() if k.startswith(f"{part}.{name}.")), alpha)
        scale = lora.weight * alpha / (len(down) ** 0.5 if about.get("use_rslora") else len(down))
        target = model.get_submodule(name).weight
        if type(target) is not torch.nn.Parameter:
            raise ValueError(
                f"no LoRA can be added to {part}.{name}, which is quantised: leave out text_encoder.quantization"
            )
        target += (scale * up @ down).to(target)

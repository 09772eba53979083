"""LoRA: low-rank changes of weights, added to them once when a part is loaded, so that they cost nothing afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from latentmill import weights
from latentmill.text import one_line

HALVES = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"))
"""What the names of a layer's two matrices end in, ``W + B A``."""


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
    found = zip(weights.digests(lora.path for lora in loras), loras)
    text = "".join(f"{content} {lora.weight!r}\0" for content, lora in found)
    return "+" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fuse(
    model: Any,
    part: str,
    pipeline: Any,
    loras: Sequence[Lora],
    unet: Mapping[str, Any] | None,
    parts: Collection[str] | None = None,
) -> None:
    """Add to a part's weights what the files have for it. ``unet`` is that part's config, for files of another format.

    With ``parts``, the names of all parts of the model, each file is followed as a whole. Raises ValueError, naming the first
    tensors, if one of a file's tensors would be left out: diffusers and peft log that at most, and go on with the rest.
    Also if a file has nothing for a network; most have nothing for text encoders.
    """
    weights.record(*(lora.path for lora in loras))
    network = not part.startswith("text_encoder")
    more = {"unet_config": SimpleNamespace(**unet)} if unet is not None else {}

    def converted(file: Any) -> Any:
        return pipeline.lora_state_dict(file, use_safetensors=True, return_lora_metadata=True, **more)

    for i, lora in enumerate(loras):
        with _naming(lora):
            state, *alphas, metadata = converted(str(lora.path))
            if any(alphas):
                state, *alphas, _ = converted(_with_alphas(load_file(lora.path)))
                if left := [*chain(*filter(None, alphas))]:
                    raise ValueError(f"{left[0]} is the alpha of no pair of matrices")
            own, about = ({k: v for k, v in (d or {}).items() if k.startswith(f"{part}.")} for d in (state, metadata))
            if network and not own:
                raise ValueError(f"it has nothing for the {part}: it is another kind of model's")
            if parts is not None:
                _require_converted(lora, lambda tensors: converted(tensors)[0])
                known = [part, *(name for name in parts if name.startswith("text_encoder"))]
                lost = [k for k in state if k.split(".")[0] not in known]
                _require_none(state, lost, f"neither the {part} nor a text encoder of the model")
            if network:
                model.load_lora_adapter(own, prefix=part, adapter_name=f"lora_{i}", metadata=about or None)
                _require_loaded(model, f"lora_{i}", {k.removeprefix(f"{part}."): v for k, v in own.items()}, part)
                model.set_adapters([f"lora_{i}"], [lora.weight])
                model.fuse_lora(adapter_names=[f"lora_{i}"])
                model.unload_lora()
            elif own:
                own, about = ({k.removeprefix(f"{part}."): v for k, v in d.items()} for d in (own, about))
                _add(model, own, about, part, lora.weight)


def _with_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA without alphas: one of each pair of matrices has ``alpha / rank`` in it.

    Where a format has other names than the model, diffusers hands alphas on by names that peft finds no layer for, and all those have
    one alpha then: the one that most layers have, or their rank.
    """
    found = dict(tensors)
    for name in tensors:
        for up, down in HALVES:
            of = name.removesuffix(up)
            if of != name and f"{of}.alpha" in tensors and of + down in tensors:
                found[name] = tensors[name].float() * (float(found.pop(f"{of}.alpha")) / len(tensors[of + down]))
    return found


@contextmanager
def _naming(lora: Lora) -> Iterator[None]:
    """Errors in one line that names the file."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # the libraries' own converters
        said = one_line(error)
        said = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        raise ValueError(f"the LoRA {lora.path}: {said[:600]}") from error


def _require_none(all_of: Collection[str], left: Sequence[str], where: str) -> None:
    if left:
        raise ValueError(
            f"{len(left)} of its {len(all_of)} tensors fit {where}: {', '.join(left[:3])}{', ...' * (len(left) > 3)}; "
            "they would be left out, and the pictures be another LoRA's"
        )


class _Followed(Tensor):
    """A tensor that knows the names of those that it was made of."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # mypy does not see behind super() that it is torch's.
        made = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        given = [leaf.sources for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, _Followed)]
        for leaf in tree_leaves(made):
            if isinstance(leaf, _Followed):
                leaf.sources = leaf.sources.union(*given)
        return made


def _require_converted(lora: Lora, convert: Callable[[dict[str, Tensor]], Mapping[str, Any]]) -> None:
    """Raise ValueError if a tensor of the file, other than an alpha or one of zeros, is lost where its names are converted."""
    followed = {}
    for name, tensor in load_file(lora.path).items():
        followed[name] = tensor.as_subclass(_Followed)
        followed[name].sources = frozenset([name])
    weighing = [k for k, v in followed.items() if "alpha" not in k.rpartition(".")[2] and bool((v != 0).any())]
    kept = frozenset[str]().union(*(v.sources for v in convert(dict(followed)).values() if isinstance(v, _Followed)))
    left = [name for name in weighing if name not in kept]
    if scales := [name for name in left if "dora_scale" in name]:
        raise ValueError(
            f"it is a DoRA, and diffusers leaves out its {len(scales)} dora_scale ({scales[0]}): a DoRA can be added that "
            "peft saved, with lora_magnitude_vector"
        )
    _require_none(followed, left, "no name that diffusers knows")


def _require_loaded(model: Any, adapter: str, own: Mapping[str, Tensor], part: str) -> None:
    """Raise ValueError unless the adapter in the model has all of a file's tensors, but those of zeros, and no others."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft import get_peft_model_state_dict

    wanted = {name: name for name in own}
    if "lora_A" not in next(iter(own)) and not any(".lokr_" in name for name in own):  # as diffusers does it
        wanted = {key: name for name in own for key in convert_unet_state_dict_to_peft({name: own[name]})}
    loaded = get_peft_model_state_dict(model, adapter_name=adapter)
    lost = [name for key, name in wanted.items() if key not in loaded and bool((own[name] != 0).any())]
    _require_none(own, lost, f"no layer of the {part}")
    if missing := sorted(loaded.keys() - wanted.keys()):
        raise ValueError(f"it has no {missing[0]}, which belongs to its others for the {part}")


@torch.no_grad()
def _add(model: Any, state: dict[str, Tensor], about: Mapping[str, Any], part: str, weight: float) -> None:
    """``W + weight * alpha / rank * B A`` (Hu et al. 2021, arXiv:2106.09685, sec. 4.1), alpha being the rank if it isn't said.

    It is said in ``about``, peft's config of the adapter, by the ends of layers' names or for all; that may ask for the root of
    the rank in place of the rank (Kalajdzievski 2023, arXiv:2312.03732). For text encoders: transformers loads adapters with
    the newest peft alone. Raises ValueError for weights of other kinds (DoRA, LoKr, ...), and for those that fit no layer.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, Any] = about.get("alpha_pattern") or {}
    if not any(".lora_A." in key for key in state):  # names of an older format
        state = convert_state_dict_to_peft(state)
    known = (".lora_A.weight", ".lora_B.weight")
    if other := next((key for key in state if not key.endswith(known)), None):
        raise ValueError(f"it has {part}.{other}, which is no plain LoRA's")
    layers = {key.rpartition(".lora_")[0]: None for key in state}
    modules = {name: _layer(model, name) for name in layers}
    lost = [key for key in state if modules[key.rpartition(".lora_")[0]] is None]
    _require_none(state, lost, f"no layer of the {part}")
    for name, module in modules.items():
        for half in ("lora_A", "lora_B"):
            if f"{name}.{half}.weight" not in state:
                raise ValueError(f"it has no {part}.{name}.{half}.weight, which belongs to its other half")
        down, up = state[f"{name}.lora_A.weight"].float(), state[f"{name}.lora_B.weight"].float()
        alpha = float(patterns.get(get_pattern_key([*patterns], name), about.get("lora_alpha", len(down))))
        scale = weight * alpha / (len(down) ** 0.5 if about.get("use_rslora") else len(down))
        target = module.weight
        if type(target) is not torch.nn.Parameter:
            raise ValueError(
                f"no LoRA can be added to {part}.{name}, which is quantised: leave out text_encoder.quantization"
            )
        target.add_((scale * up @ down).to(target))


def _layer(model: Any, name: str) -> Any:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        return None
    return found if hasattr(found, "weight") else None

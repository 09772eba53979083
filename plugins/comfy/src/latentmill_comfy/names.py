"""What LoRA files call the layers of a network, as ComfyUI understands them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from latentmill_comfy.headers import FP8_SCALES, NETWORK, Header
from latentmill_comfy.lora import SomeRows, Target
from latentmill_comfy.recognition import Recognised


def network_keys(found: Recognised, header: Header, cls: Any) -> dict[str, Target]:
    """Layers of the network of diffusers' class ``cls``, by all names that files have for them: their tensors, without the file's prefix."""
    shapes = {name: shape for name, shape in header.under(found.prefix).items() if not name.endswith("scaled_fp8")}
    keys: dict[str, Target] = {}
    for name in shapes:
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            keys[f"lora_unet_{layer.replace('.', '_')}"] = name
            keys[f"diffusion_model.{layer}"] = name
            if found.part == "transformer" and layer.endswith(".linear1"):
                hidden = shapes[name][1]
                keys[f"diffusion_model.{layer}_qkv"] = SomeRows(name, torch.arange(3 * hidden))
    for name, target in converted(shapes, cls, found.config).items():
        if name.endswith(".weight"):
            for key in _theirs(name.removesuffix(".weight"), found):
                keys[key] = target
    return keys


def _theirs(layer: str, found: Recognised) -> list[str]:
    """What files call a layer that diffusers calls ``layer``."""
    flat = layer.replace(".", "_")
    if found.part == "unet":
        spelled = layer.replace(".to_", ".processor.to_")
        spelled = spelled.removesuffix(".0") if spelled.endswith(".to_out.0") else spelled
        return [f"lora_unet_{flat}", f"lycoris_{flat}", spelled, f"unet.{spelled}"]
    more = [f"base_model.model.{layer}"] if found.network.startswith("SD3") else []
    return [f"transformer.{layer}", f"lora_transformer_{flat}", f"lycoris_{flat}", *more]


def unread(found: Recognised, header: Header, cls: Any) -> list[str]:
    """Tensors of the network in a file of which no layer of it is made: another's, which ComfyUI passes over, too."""
    from accelerate import init_empty_weights

    # Names alone count, and a large table of places takes seconds.
    small = {"pos_embed_max_size": 1} if "pos_embed_max_size" in found.config else {}
    with init_empty_weights():
        wanted = cls.from_config({**found.config, **small}).state_dict().keys()
    shapes = header.under(found.prefix)
    made = converted(shapes, cls, found.config)
    read = {target if isinstance(target, str) else target.name for name, target in made.items() if name in wanted}
    return [name for name in shapes if name not in read and not name.endswith(FP8_SCALES)]


def converted(shapes: dict[str, tuple[int, ...]], cls: Any, config: dict[str, Any]) -> dict[str, Target]:
    """Of which tensor, or which of its rows, diffusers makes each of its own: what its converter does with the rows' numbers."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    names, begins, count = list(shapes), [], 0
    numbers: dict[str, Tensor] = {}
    for name in names:
        rows, *rest = shapes[name] or (1,)
        numbers[NETWORK + name] = torch.arange(count, count + rows).reshape(rows, *(1 for _ in rest))
        begins.append(count)
        count += rows
    convert = cast(Any, SINGLE_FILE_LOADABLE_CLASSES)[cls.__name__]["checkpoint_mapping_fn"]
    found: dict[str, Target] = {}
    edges = torch.tensor(begins)
    for theirs, tensor in convert(checkpoint=numbers, config=config).items():
        rows = tensor.flatten()
        of = torch.searchsorted(edges, rows, right=True) - 1
        name = names[int(of[0])]
        if bool((of == of[0]).all()):
            local = rows - begins[int(of[0])]
            whole = len(local) == (shapes[name] or (1,))[0] and bool((local.diff() == 1).all())
            found[theirs] = name if whole else SomeRows(name, local)
    return found

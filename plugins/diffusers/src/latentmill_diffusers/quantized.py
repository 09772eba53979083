"""Weights of fewer bits: those of a ``.gguf`` file, and those that are quantised while they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from latentmill.text import one_line


def require(package: str, by: str) -> None:
    """Raise ValueError unless a package is installed that not everyone needs."""
    if find_spec(package) is None:
        raise ValueError(f"{by} needs the package {package}: pip install {package}")


def package_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The package that quantises so, or none."""
    method = settings.get("quant_method") or (
        "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & settings.keys() else ""
    )
    return (str(method),) if method else ()


def of_gguf(dtype: torch.dtype) -> Any:
    """What diffusers is told to read a ``.gguf``: each weight is computed, where it is used, in ``dtype``."""
    from diffusers import GGUFQuantizationConfig

    return GGUFQuantizationConfig(compute_dtype=dtype)


def restore(model: nn.Module, dtype: torch.dtype) -> None:
    """Dequantise once, in place, what a ``.gguf`` held of layers that are not linear: diffusers computes none but those."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, GGUFParameter) and not (isinstance(module, GGUFLinear) and name == "weight"):
                plain = dequantize_gguf_tensor(parameter).to(dtype)
                setattr(module, name, nn.Parameter(plain, requires_grad=False))


def of_settings(settings: Mapping[str, Any], library: str) -> Any:
    """What ``diffusers`` or ``transformers``, the library, is told to quantise plain weights with while it loads them.

    ``settings`` are those of the library's class for ``quant_method``. With torchao ``quant_type`` names one of its configs,
    Int8WeightOnlyConfig say, and what else there is, but ``modules_to_not_convert``, are that one's settings.
    Raises ValueError, saying what is wrong with them or which package is missing.
    """
    told = dict(settings)
    method = "".join(package_of(told))
    if method in ("torchao", "bitsandbytes"):
        require(method, f"quantization by {method}")
    try:
        if method == "torchao":
            kept = told.pop("modules_to_not_convert", None)
            del told["quant_method"]
            config = torchao_config(str(told.pop("quant_type", None)), told)
            return import_module(library).TorchAoConfig(config, modules_to_not_convert=kept)
        if library == "diffusers":
            from diffusers.quantizers.auto import DiffusersAutoQuantizer

            return DiffusersAutoQuantizer.from_dict(told)
        from transformers.quantizers.auto import AutoQuantizationConfig

        return AutoQuantizationConfig.from_dict(told)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"quantization: {one_line(error)}") from error


def torchao_config(name: str, settings: Mapping[str, Any]) -> Any:
    """One of torchao's configs by its name. Raises ValueError if it has none so called."""
    from torchao import quantization
    from torchao.core.config import AOBaseConfig

    classes = {n: c for n, c in vars(quantization).items() if isinstance(c, type) and issubclass(c, AOBaseConfig)}
    if name not in classes:
        raise ValueError(f"torchao's quant_type must be one of {', '.join(sorted(classes))}, not {name!r}")
    return classes[name](**settings)


def require_quantized(model: nn.Module) -> None:
    """Raise ValueError if no weight was: a quantiser passes over layers whose sizes it can't divide, and says nothing."""
    if all(type(p) is nn.Parameter and p.is_floating_point() for p in model.parameters()):
        raise ValueError("quantization: no layer of it could be quantised: choose another kind or group size")

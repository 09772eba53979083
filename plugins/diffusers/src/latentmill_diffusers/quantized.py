"""Weights of fewer bits: those of a ``.gguf`` file, and those that are quantised while they are loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def require(package: str, by: str) -> None:
    """Raise ValueError unless a package is installed that not everyone needs."""
    if find_spec(package) is None:
        raise ValueError(f"{by} needs the package {package}: pip install {package}")


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

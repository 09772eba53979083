"""What a file of weights says of its tensors before one is read: names, shapes and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from latentmill_diffusers.loading import naming
from latentmill_diffusers.single_file import SAFETENSORS

NETWORK = "model.diffusion_model."
"""How checkpoints begin the names of the network's tensors."""
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Dtypes of eight bits, as files name them."""
FP8_SCALES = ("scaled_fp8", ".scale_weight", ".scale_input")
"""How the names of tensors end that scale others, or say that there are such."""
OTHER_SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant", ".absmax", ".quant_map")
"""Those of other quantisers, without which weights would be read as numbers that they are not."""


class Header:
    """The header of a .safetensors file. Raises ValueError if it is a file of another kind, or can't be read."""

    def __init__(self, path: Path) -> None:
        if path.suffix not in SAFETENSORS:
            raise ValueError(f"{path} is a pickle, or may be one: such weights are refused; convert it to .safetensors")
        self.path = path

    @cached_property
    def _said(self) -> dict[str, tuple[tuple[int, ...], str]]:
        with naming(self.path), safe_open(self.path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (tuple(found.get_shape()), str(found.get_dtype())) for name, found in slices.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the tensors' names."""
        return {name: shape for name, (shape, _) in self._said.items()}

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes of those whose names begin so, by the rest of their names."""
        return {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def require_known_scales(self, prefix: str) -> None:
        """Raise ValueError if weights under ``prefix`` are quantised in a way that isn't known here."""
        if other := next((name for name in self.under(prefix) if name.endswith(OTHER_SCALES)), None):
            raise ValueError(f"{self.path} has {other}: weights that are quantised in this way aren't known here")

    def main_dtype(self, prefix: str) -> str:
        """The dtype of most numbers under ``prefix``, as files name it."""
        counts: Counter[str] = Counter()
        for name, (shape, dtype) in self._said.items():
            if name.startswith(prefix):
                counts[dtype] += prod(shape)
        return counts.most_common(1)[0][0]

    def read(self, prefix: str = "", only: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names, which begin as one of ``only``. Raises ValueError."""
        with naming(self.path), safe_open(self.path, "pt") as file:
            wanted = [name for name in self.under(prefix) if name.startswith(only)]
            return {name: file.get_tensor(prefix + name) for name in wanted}


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype, kept_in: torch.dtype | None) -> dict[str, Tensor]:
    """Weights to compute with in ``dtype``: of files of eight bits times their scales; ``kept_in``: rounded to that dtype first.

    Raises ValueError, naming it, for a tensor that is no plain number: other kinds of quantisation.
    """
    done = {}
    for name, tensor in state.items():
        if name.endswith(FP8_SCALES):
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: weights that are quantised in this way aren't known here")
        if kept_in is not None:
            tensor = tensor.to(kept_in)
        scale = state.get(f"{name.removesuffix('.weight')}.scale_weight") if name.endswith(".weight") else None
        done[name] = tensor.to(dtype) if scale is None else tensor.to(dtype) * scale.to(dtype)
    return done

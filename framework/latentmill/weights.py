"""Weights out of files, checked, for plugins: names, shapes and numbers are right, or an error says what is not."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

MAX_HEADER = 100_000_000
"""Bytes; safetensors itself reads no larger one."""


def load(
    path: str | os.PathLike[str], expected: Mapping[str, Tensor] | None = None, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, by name.

    ``expected`` (a model's ``state_dict()``, on the meta device too) says which there must be, and of which shapes; dtypes may
    differ. A pickle (``.pt``, ``.ckpt``, ``.bin``) is refused, whatever it is called, unless ``allow_pickle``; then torch's
    loader for weights alone reads it. Raises ValueError, in one line, for whatever is wrong: a file of another kind, a
    name that is there twice, which safetensors itself accepts, NaN or infinity, tensors missing, unknown or of other shapes.
    """
    with open(path, "rb") as file:
        head = file.read(9)
        if head[8:] == b"{":
            length = int.from_bytes(head[:8], "little")
            if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
                raise ValueError(f"{path}: no safetensors file: its header would have {length} bytes")
            _require_single(path, b"{" + file.read(length - 1))
    if head[8:] == b"{":
        try:
            found = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: no safetensors file that can be read: {error}") from error
    else:
        found = _unpickled(path, head, allow_pickle)
    if expected is not None:
        _require_expected(path, found, expected)
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(_finite(tensor)):
            raise ValueError(f"{path}: {name} is not finite: the file is damaged, or its training failed")
    return found


def _require_single(path: str | os.PathLike[str], header: bytes) -> None:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"{path}: {twice} is in its header twice")
        return found

    try:
        json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no safetensors file: its header is no JSON: {error}") from error


def _unpickled(path: str | os.PathLike[str], head: bytes, allow_pickle: bool) -> dict[str, Tensor]:
    if not head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip, and pickles before it
        raise ValueError(f"{path}: no safetensors file")
    if not allow_pickle:
        raise ValueError(f"{path}: a pickle, which may run code when it is read: convert it to safetensors")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle ends in whatever its bytes lead to
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: a pickle of more than weights, or a damaged one: {said:.200}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path}: holds no tensors by name")
    return {str(name): tensor for name, tensor in found.items()}


def _require_expected(
    path: str | os.PathLike[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for what, names in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path}: tensors that are {what}: {', '.join(sorted(names)[:3])}{more}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} is of shape {tuple(found[name].shape)}, and {tuple(tensor.shape)} was expected"
            )


def _finite(tensor: Tensor) -> Tensor:
    if tensor.element_size() == 1:  # of the 8-bit floats torch knows little more than how to widen them
        tensor = tensor.to(torch.float32)
    return tensor.isfinite().all()

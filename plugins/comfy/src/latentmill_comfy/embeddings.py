"""Textual inversions: vectors out of files, in the place of a prompt's tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from latentmill import weights
from latentmill.plugin import RowError
from latentmill.text import one_line

EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


class Embeddings:
    """Those of a folder, with all folders in it; of None there are none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else Path(os.path.abspath(folder))
        self._found: dict[str, Path | None] = {}
        self._read: dict[Path, Any] = {}

    @cached_property
    def _folders(self) -> list[Path]:
        found, seen = [], set[str]()
        for folder, inside, _ in os.walk(self.folder, followlinks=True) if self.folder is not None else ():
            if (real := os.path.realpath(folder)) in seen:  # a link leads round in a circle
                inside.clear()
                continue
            seen.add(real)
            inside.sort()
            found.append(Path(folder))
        return found

    def find(self, name: str) -> Path | None:
        """The file of a name, as prompts write it: with or without its suffix and the folder that it is in."""
        if name not in self._found:
            self._found[name] = next((path for folder in self._folders for path in _named(folder, name)), None)
        return self._found[name]

    def exists(self, name: str) -> bool:
        return self.find(name) is not None

    def vectors(self, name: str, key: str, width: int) -> Tensor:
        """``[n, its width]``, float32, for the text encoder ``key`` (``clip_l``, ...) of this width; another model's has another.

        Raises RowError for a file that can't be read. A pickle is read by torch's loader for weights alone, which runs none of it.
        """
        path = self.find(name)
        assert path is not None
        if path not in self._read:
            self._read[path] = _read(path)
        found = _of(self._read[path], key, width)
        if found is None:
            raise RowError(f"the embedding {path.name} holds no vectors that are known there")
        return found.to(torch.float32)


def _named(folder: Path, name: str) -> list[Path]:
    path = Path(os.path.normpath(folder / name))  # a link is where it lies, not where it leads
    if folder not in path.parents:
        return []
    return [each for each in (path, *(Path(f"{path}{suffix}") for suffix in EMBEDDING_SUFFIXES)) if _there(each)]


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False


def _read(path: Path) -> Any:
    weights.record(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle ends in whatever its bytes lead to
        raise RowError(f"the embedding {path.name} can't be read: {one_line(error, 200)}") from error


def _of(file: Any, key: str, width: int) -> Tensor | None:
    """What a file has for a text encoder: trainers agree on little."""
    if isinstance(file, list):
        named = (tensor for each in file if isinstance(each, Mapping) for tensor in each.values())
        fitting = [tensor for each in named if (tensor := _vectors(each)) is not None and tensor.shape[1] == width]
        return torch.cat(fitting) if fitting else None
    if not isinstance(file, Mapping):
        return None
    if "string_to_param" in file:
        return _first(file["string_to_param"])
    if key in file:
        return _vectors(file[key])
    for suffix in (".string_to_param.*", f".{key}"):  # those that lie in a LoRA's file
        bundled = [_vectors(t) for n, t in file.items() if n.startswith("bundle_emb.") and n.endswith(suffix)]
        fitting = [each for each in bundled if each is not None and each.shape[1] == width]
        if bundled:
            return torch.cat(fitting) if fitting else bundled[0]
    return _first(file)


def _first(named: object) -> Tensor | None:
    return _vectors(next(iter(named.values()), None)) if isinstance(named, Mapping) else None


def _vectors(found: object) -> Tensor | None:
    """``[n, width]`` of a vector or several; None for anything else."""
    if not isinstance(found, Tensor) or not 1 <= found.ndim <= 2 or not found.numel():
        return None
    return found.reshape(-1, found.shape[-1])

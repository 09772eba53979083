"""Textual inversions: vectors out of files, in the place of a prompt's tokens."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentmill import weights
from latentmill.plugin import RowError
from latentmill.text import one_line

EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


class Embeddings:
    """Those of a folder, with all folders in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Path | None] = {}
        self._read: dict[Path, Any] = {}

    @cached_property
    def files(self) -> list[Path]:
        """All that may be one, sorted."""
        return sorted(
            path for path in self.folder.rglob("*") if path.suffix.lower() in EMBEDDING_SUFFIXES and path.is_file()
        )

    @cached_property
    def _folders(self) -> list[Path]:
        return [self.folder, *sorted(path for path in self.folder.rglob("*") if path.is_dir())]

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
        return found.reshape(-1, found.shape[-1]).to(torch.float32)


def _named(folder: Path, name: str) -> list[Path]:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return []
    return [
        each
        for each in (path, *(path.with_name(path.name + suffix) for suffix in EMBEDDING_SUFFIXES))
        if each.is_file()
    ]


def _read(path: Path) -> Any:
    weights.record(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise RowError(f"the embedding {path.name} can't be read: {one_line(error, 200)}") from error


def _of(file: Any, key: str, width: int) -> Tensor | None:
    """What a file has for a text encoder: trainers agree on little."""
    if isinstance(file, list):
        fitting = [t.reshape(-1, width) for each in file for t in each.values() if t.shape[-1] == width]
        return torch.cat(fitting) if fitting else None
    if not isinstance(file, Mapping):
        return None
    if "string_to_param" in file:
        return _first(file["string_to_param"])
    if key in file:
        found: Tensor = file[key]
        return found
    for suffix in (".string_to_param.*", f".{key}"):  # those that lie in a LoRA's file
        if bundled := [t for n, t in file.items() if n.startswith("bundle_emb.") and n.endswith(suffix)]:
            return torch.cat(bundled)
    return _first(file)


def _first(named: Mapping[str, Any]) -> Tensor | None:
    found = next(iter(named.values()), None)
    return found if isinstance(found, Tensor) and 1 <= found.ndim <= 2 else None

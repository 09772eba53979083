"""A part of a file of ComfyUI's, as the plugin diffusers loads it: with configs that were found out, and tensors made ready."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from latentmill.weights import digest
from latentmill_comfy.headers import Header
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.single_file import SingleFile


class Part(Folder):
    """A model's folder that is a file and ``configs``, by the names of the small files that hold them."""

    def __init__(self, header: Header, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self._written = TemporaryDirectory(prefix="latentmill-comfy-")  # for as long as this object is there
        for name, config in configs.items():
            path = Path(self._written.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config), encoding="utf-8")
        super().__init__(str(header.path), None, self._written.name)
        told = json.dumps(configs, sort_keys=True)
        self._told = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def tensors(self, make: Callable[[], dict[str, Tensor]]) -> None:
        """Have the part made of these tensors, when it is loaded, and not of the file as it lies."""
        self.single_file = ReadyFile(self, make)

    def fingerprint(self, *parts: str, index: bool = True) -> str:
        """16 hex digits over the file, which is read once, and the configs."""
        assert self.single_file is not None
        found = f"{digest(self.single_file.path)}\0{self._told}"
        return hashlib.blake2b(found.encode(), digest_size=8).hexdigest()


class ReadyFile(SingleFile):
    """A file whose tensors are made ready before diffusers is given them."""

    def __init__(self, part: Part, make: Callable[[], dict[str, Tensor]]) -> None:
        assert part.single_file is not None
        super().__init__(str(part.single_file.path), str(part.root))
        self.make = make

    def checkpoint(self) -> str | dict[str, Tensor]:
        return self.make()

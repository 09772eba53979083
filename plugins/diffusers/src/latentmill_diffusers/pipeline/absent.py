"""What stands in a pipeline for the parts that a stage doesn't load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from latentmill_diffusers.configs import completed
from latentmill_diffusers.folder import Folder


class Reached(BaseException):
    """The pipeline has come to its network."""


class Absent:
    """Stands in a pipeline for a part that this stage doesn't load. It knows the part's config."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config", {})
        if isinstance(config, Mapping) and name in config:
            return config[name]
        raise AttributeError(name)


class AbsentNetwork(Absent):
    """The network, where prompts are encoded: the call ends when it comes here, and has encoded what it wants."""

    near = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.near and not name.startswith("_"):
                raise Reached from None
            raise

    def __call__(self, *positional: Any, **named: Any) -> NoReturn:
        raise Reached


def config_of(cls: Any, folder: Folder, part: str) -> Any:
    """A model's config without the model."""
    if hasattr(cls, "config_class") and cls.config_class is not None:
        return cls.config_class.from_pretrained(folder / part)
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(completed(cls, folder.config(part)))

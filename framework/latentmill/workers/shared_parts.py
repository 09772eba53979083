"""The parts of stages that share a worker, and what of them the worker's next run takes over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, ref

from latentmill import weights
from latentmill.config import Job
from latentmill.plan import Plan
from latentmill.plugin import VAE, Denoiser, Plugin, TextEncoder

if TYPE_CHECKING:  # stages that only read rows, or write files, have no part with weights
    import torch

SHARED = VAE, TextEncoder, Denoiser
"""What has weights, as a rule."""
WEIGHTED = ("vae", "text_encoder", "denoiser")
"""They, by what they are called in a stage's needs."""


def part_key(job: Job, plan: Plan, place: str, gpu: bool) -> str:
    """What a part at a place in the plan is, in 32 hex digits: two of one key are the same weights with the same settings, on the same kind of device."""
    about = [place, gpu, plan.plugins[place], job.choice(place), plan.libraries]
    return hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class SharedParts:
    """The parts of stages that share a worker: those that work with the same one, at one place in the plan and on one device, have one copy of it.

    The contract allows it: nothing is kept from one call to the next, and of a worker's stages one computes at a time.
    """

    def __init__(self) -> None:
        self.there: WeakValueDictionary[str, Plugin] = WeakValueDictionary()
        """By their keys."""

    def __reduce__(self) -> tuple[type[SharedParts], tuple[()]]:
        return SharedParts, ()

    def of(self, key: str, build: Callable[[], Any]) -> Any:
        """The plugin of a key; ``build`` makes it, if it isn't there."""
        plugin = self.there.get(key)
        if plugin is None:
            plugin = build()
            if isinstance(plugin, SHARED):
                with suppress(AttributeError, TypeError):  # of slots, or frozen
                    plugin.load = _Loads(plugin)  # type: ignore[method-assign]  # each of the stages asks for it
                    self.there[key] = plugin
        return plugin

    def hand_on(self, keys: Collection[str]) -> dict[str, Plugin]:
        """Those of these keys, for a later run. What they have read will be told again, since each dataset is told what its rows were made by."""
        found = {key: plugin for key, plugin in self.there.items() if key in keys}
        for plugin in found.values():
            plugin.load.told = False  # type: ignore[attr-defined]
        return found


class _Loads:
    """The ``load`` of a part that several stages, and runs, load once."""

    def __init__(self, plugin: Plugin) -> None:
        self.there = ref(plugin)
        self.files: list[tuple[Path, str]] | None = None
        """What was read, once it is loaded."""
        self.told = False

    def __call__(self, device: torch.device) -> None:
        if (plugin := self.there()) is None:
            return
        if self.files is None:
            with weights.noting() as files:
                type(plugin).load(plugin, device)
            self.files = files
        elif not self.told:
            weights.tell(self.files)
        self.told = True

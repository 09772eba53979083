"""The networks of diffusers' image models, on our schedulers, every row at a time of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentmill.plugin import Denoiser, LatentSpec, NoisePath, Prediction
from latentmill_diffusers.families import Family, Network, family_of
from latentmill_diffusers.folder import Folder, dtype_of
from latentmill_diffusers.scheduler import (
    path_of,
    prediction_of,
    scheduler_of,
    starts_with_unit_variance,
    times_of,
    told_of,
)


class DiffusersDenoiser(Denoiser):
    """The network of the model at ``path``: its UNet or transformer, with noise path, prediction and grid as its config says."""

    contract = 1

    def __init__(self, path: str = "", revision: str | None = None, dtype: str = "float32") -> None:
        self.folder = Folder(path, revision)
        self.logical = dtype_of(dtype)
        self.family: Family = family_of(self.folder.pipeline)
        self.config = self.folder.config(self.family.network)
        self.guidance_embedded = bool(
            self.config.get("guidance_embeds")
            or self.config.get("time_cond_proj_dim")
            or self.folder.index.get("is_distilled")
        )
        self._network: Network | None = None

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler that the model names."""
        return scheduler_of(self.folder)

    @cached_property
    def path(self) -> NoisePath:  # type: ignore[override]
        return path_of(self.scheduler)

    @cached_property
    def prediction(self) -> Prediction:  # type: ignore[override]
        return prediction_of(self.scheduler)

    def fingerprint(self) -> str:
        return self.folder.fingerprint(self.family.network, "scheduler")

    def times(self, steps: int, shape: Sequence[int]) -> Tensor:
        scheduler = scheduler_of(self.folder)  # of its own: it keeps what it is told
        return times_of(scheduler, self.path, steps, self.family.schedule(scheduler.config, steps, shape))

    def start_scale(self, t: Tensor) -> Tensor:
        if starts_with_unit_variance(self.scheduler):
            return torch.ones_like(t)
        return super().start_scale(t)

    def guide(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        if self.family.guide is None:
            return super().guide(prompt, negative, scale)
        return self.family.guide(prompt, negative, scale)

    def check(self, spec: LatentSpec) -> None:
        expected = int(self.config["in_channels"]) // self.family.packed**2
        if spec.channels != expected:
            raise ValueError(f"the network takes latents of {expected} channels, and the VAE's have {spec.channels}")

    def load(self, device: torch.device) -> None:
        import diffusers

        cls = getattr(diffusers, self.config["_class_name"])
        model = self.folder.load(cls, self.family.network, self.logical).to(device)
        self._network = Network(model, self.folder.downscale)

    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        assert self._network is not None, "load() comes first"
        told = {n: v.to(self.logical) if v.is_floating_point() else v for n, v in conditioning.items()}
        timestep = told_of(self.scheduler, self.path.timestep(t))
        if self.family.told is not None:
            timestep = self.family.told(self.scheduler.config, timestep, x.shape[1:])
        predicted = self._called(self._network, x.to(self.logical), timestep.to(x.device, torch.float32), told)
        if predicted.shape[1] == 2 * x.shape[1]:  # the network learned a variance, too
            predicted = predicted.chunk(2, dim=1)[0]
        return predicted.float()

    def _called(self, network: Network, x: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        if not self.family.pad:
            return self.family.call(network, x, timestep, told)
        each = []
        for i, length in enumerate(told["length"].tolist()):
            one = {name: value[i : i + 1] for name, value in told.items() if name != "length"}
            one["embeds"] = one["embeds"][:, :length]
            each.append(self.family.call(network, x[i : i + 1], timestep[i : i + 1], one))
        return torch.cat(each)

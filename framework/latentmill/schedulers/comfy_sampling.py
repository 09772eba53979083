"""What ComfyUI knows of a model's noise: a table of sigmas, and how sigma and a timestep of its own go together.

Sigma is its own, too: sigma / alpha on a noise schedule of betas, the time on that of a flow model. All is float32, as there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import NoiseSchedule
from latentmill.schedulers.noise_schedules import RectifiedFlow, VarianceExploding, shifted

ZERO_TERMINAL_SNR = 4.8973451890853435e-08
"""The last alpha² of a schedule that ends in pure noise: there has to be a last sigma, 4518.8."""
HIGHEST = 999999999.9
"""A sigma above all that there are."""


class ModelSampling(ABC):
    """A model's ``sigmas``, ascending, and the two functions between sigma and timestep."""

    sigmas: Tensor
    noise: ClassVar[float] = HIGHEST
    """The sigma of 0 percent."""

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """The sigma of a timestep, float32."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of a sigma, float32."""

    def percent(self, share: float) -> float:
        """The sigma at which a ``share`` of the sampling is done: 0 is above all sigmas, or that of pure noise, and 1 is clean."""
        if 0.0 < share < 1.0:
            return self.left(1.0 - share)
        return self.noise if share <= 0.0 else 0.0

    @abstractmethod
    def left(self, share: float) -> float:
        """The sigma at which a ``share`` of the sampling, between 0 and 1, is left."""

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]


class DiscreteSampling(ModelSampling):
    """Betas: a sigma for each timestep, between which the logarithm is linear."""

    def __init__(self, ratios: Tensor) -> None:
        """``ratios``: sigma / alpha at each timestep, ascending; of pure noise it is infinite."""
        last = math.sqrt((1 - ZERO_TERMINAL_SNR) / ZERO_TERMINAL_SNR)
        ratios = torch.where(ratios.isfinite(), ratios.double(), last)
        self.sigmas, self.log_sigmas = ratios.float(), ratios.log().float()

    def sigma(self, timestep: Tensor) -> Tensor:
        t = timestep.float().clamp(0, len(self.sigmas) - 1)
        below, above = (self.log_sigmas[whole.long()] for whole in (t.floor(), t.ceil()))
        return torch.exp(below * (1 - t.frac()) + above * t.frac())

    def timestep(self, sigma: Tensor) -> Tensor:
        """The nearest in the logarithm: a whole number."""
        return (sigma.log()[..., None] - self.log_sigmas).abs().argmin(-1)

    def left(self, share: float) -> float:
        return float(self.sigma(torch.tensor(share * 999.0)))


class FlowSampling(ModelSampling):
    """Flow models: times moved by ``shift``, told to the network times ``multiplier`` (SD3 3.0 and 1000, AuraFlow 1.73 and 1)."""

    noise = 1.0

    def __init__(self, shift: float = 1.0, multiplier: float = 1000.0, count: int = 1000) -> None:
        self.shift, self.multiplier = float(shift), float(multiplier)
        self.sigmas = self.sigma(torch.arange(1, count + 1) / count * self.multiplier)

    def sigma(self, timestep: Tensor) -> Tensor:
        return shifted(timestep / self.multiplier, self.shift)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def left(self, share: float) -> float:
        return float(self.sigma(torch.tensor(share * self.multiplier, dtype=torch.float64)))


class FluxSampling(FlowSampling):
    """Flux: a table of 10,000 times, moved by the exponential of ``mu``; the network is told sigma itself."""

    def __init__(self, mu: float = 1.15) -> None:
        super().__init__(math.exp(mu), 1.0, 10_000)

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.shift / (self.shift + (1 / timestep - 1))  # as it is, pure noise is 1 whatever the shift is


class EDMSampling(ModelSampling):
    """Continuous EDM: any sigma between two, whose network is told ``log(sigma) / 4``."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 120.0) -> None:
        self.sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), 1000).exp()

    def sigma(self, timestep: Tensor) -> Tensor:
        return (timestep / 0.25).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()

    def left(self, share: float) -> float:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return math.exp((high - low) * share + low)


class SampledFlow(RectifiedFlow):
    """Rectified flow that knows how ComfyUI samples the model."""

    def __init__(self, sampling: FlowSampling) -> None:
        self.sampling: ModelSampling = sampling


class SampledEDM(VarianceExploding):
    """EDM's noise between two sigmas, as ComfyUI samples it."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 120.0) -> None:
        super().__init__(sigma_max)
        self.sampling: ModelSampling = EDMSampling(sigma_min, sigma_max)


def sampling_of(noise_schedule: NoiseSchedule) -> ModelSampling:
    """How ComfyUI would sample a model with this noise schedule: as it says itself, or else by the kind that it is."""
    found = getattr(noise_schedule, "sampling", None)
    if isinstance(found, ModelSampling):
        return found
    if noise_schedule.sigma_is_time:
        return FlowSampling()
    count = noise_schedule.timesteps or 1000
    alpha, sigma = noise_schedule.scale(torch.arange(1, count + 1, dtype=torch.float64) / count)
    if noise_schedule.timesteps is not None:
        return DiscreteSampling(sigma / alpha)
    return EDMSampling(sigma_max=float(sigma[-1] / alpha[-1]))

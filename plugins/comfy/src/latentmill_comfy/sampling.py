"""How ComfyUI samples a model: its noise, what the network predicts, and what it is told of a sigma."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentmill.plugin import NoiseSchedule, Prediction
from latentmill.schedulers.comfy_sampling import DiscreteSampling, FlowSampling, FluxSampling, SampledFlow
from latentmill_comfy.recognition import Recognised
from latentmill_diffusers.schedule import ModelBetas

PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "v_prediction": "v", "x0": "sample", "lcm": "sample"}
"""By what the node ModelSamplingDiscrete calls them."""
ZERO_TERMINAL = 4.8973451890853435e-08
"""The last alpha² of betas that end in pure noise: sigma there is 4518.8, and not infinite."""
SHIFT = {"StableDiffusion3Pipeline": (3.0, 1000.0), "FluxPipeline": (1.0, 1.0)}
"""Shift and multiplier of a flow model without a node for them; FLUX.1's are schnell's."""
MU = 1.15
"""FLUX.1 dev's, without a node."""
TOKENS = (256, 4096)
"""Numbers of tokens between which the node ModelSamplingFlux has mu grow."""


class Betas(ModelBetas):
    """Stable Diffusion's: scaled linear betas, sigmas as float32, of which the logarithm is linear between two; the nearest timestep is told."""

    def __init__(self, zsnr: bool = False) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        bars = torch.cumprod(1.0 - betas, 0)
        sigmas = ((1 - bars) / bars) ** 0.5
        if zsnr:  # Lin et al. 2024, arXiv:2305.08891, algorithm 1
            alphas = (1 / (sigmas**2 + 1)).sqrt()
            bars = ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2
            bars[-1] = ZERO_TERMINAL
            sigmas = ((1 - bars) / bars) ** 0.5
        super().__init__(bars, logarithmic=True, told="whole")
        self.ratios[1:] = sigmas.float().double()

    def timestep(self, t: Tensor) -> Tensor:
        return super().timestep(t).clamp(min=0.0)


class DistilledSampling(DiscreteSampling):
    """Latent consistency models: every twentieth of the timesteps, the last one among them."""

    every = 20

    def __init__(self, ratios: Tensor) -> None:
        super().__init__(ratios[self.every - 1 :: self.every])

    def sigma(self, timestep: Tensor) -> Tensor:
        return super().sigma((timestep - (self.every - 1)) / self.every)

    def timestep(self, sigma: Tensor) -> Tensor:
        return super().timestep(sigma) * self.every + (self.every - 1)


class DistilledBetas(Betas):
    """Stable Diffusion's betas for a latent consistency model, and what makes its answers at sigma 0 the latents themselves."""

    def __init__(self, zsnr: bool = False) -> None:
        super().__init__(zsnr)
        self.sampling = DistilledSampling(self.ratios[1:])

    def timestep(self, t: Tensor) -> Tensor:
        alpha, sigma = self.scale(t)
        return self.sampling.timestep((sigma / alpha).float()).double()

    def clean(self, noise: Tensor, x: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """The clean latents of a network that predicts ``noise`` in ``x``, both ``[B, ...]``, x over alpha (Luo et al. 2023, arXiv:2310.04378, eq. 9)."""
        scaled = 10.0 * timestep
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return out * (x - sigma * noise) + skip * x


@dataclass(frozen=True)
class Wanted:
    """What the nodes ModelSampling... of a workflow say; None where there are none."""

    shift: float | None = None
    multiplier: float | None = None
    max_shift: float | None = None
    base_shift: float | None = None
    shift_size: tuple[int, int] | None = None
    prediction: str | None = None
    zsnr: bool | None = None


def sampled(found: Recognised, wanted: Wanted) -> tuple[NoiseSchedule, Prediction]:
    """Noise schedule and prediction of a network. Raises ValueError for what doesn't fit it."""
    flow = (wanted.shift, wanted.multiplier, wanted.max_shift, wanted.base_shift, wanted.shift_size)
    if found.prediction != "flow":
        if any(each is not None for each in flow):
            raise ValueError(f"denoiser: shifts are for flow models, and {found.family} is none")
        name = wanted.prediction or found.prediction
        if name not in PREDICTIONS:
            raise ValueError(f"denoiser.prediction must be {', '.join(PREDICTIONS)}, not {name!r}")
        betas = DistilledBetas if name == "lcm" else Betas
        return betas(found.zsnr if wanted.zsnr is None else wanted.zsnr), PREDICTIONS[name]
    if wanted.prediction or wanted.zsnr:
        raise ValueError(f"denoiser: prediction and zsnr are for models of betas, and {found.family} is a flow model")
    return SampledFlow(_flow(found, wanted)), "flow"


def _flow(found: Recognised, wanted: Wanted) -> FlowSampling:
    if wanted.shift is not None or wanted.multiplier is not None:
        if wanted.max_shift is not None or wanted.base_shift is not None:
            raise ValueError("denoiser: shift and max_shift exclude each other: they are two nodes' ways")
        return FlowSampling(1.0 if wanted.shift is None else wanted.shift, wanted.multiplier or 1000.0)
    if wanted.max_shift is not None or wanted.base_shift is not None:
        return FluxSampling(mu_of(wanted))
    if found.pipeline == "FluxPipeline" and found.config["guidance_embeds"]:
        return FluxSampling(MU)
    return FlowSampling(*SHIFT[found.pipeline])


def mu_of(wanted: Wanted) -> float:
    """``mu`` of the node ModelSamplingFlux: linear in the number of tokens of its width and height."""
    most, least = (
        (MU if wanted.max_shift is None else wanted.max_shift),
        (wanted.base_shift if wanted.base_shift is not None else 0.5),
    )
    width, height = wanted.shift_size or (1024, 1024)
    slope = (most - least) / (TOKENS[1] - TOKENS[0])
    return width * height / (8 * 8 * 2 * 2) * slope + least - slope * TOKENS[0]

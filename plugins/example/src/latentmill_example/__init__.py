"""A VAE and a scheduler for latentmill; the smallest there are that are of use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.plugin import VAE, Field, LatentSpec, Scheduler, State


class Patches(VAE):
    """Each patch of side x side pixels becomes one latent pixel, with a channel for every value. Nothing is lost."""

    contract = 2

    def __init__(self, side: int = 4) -> None:
        if side < 1:
            raise ValueError(f"side must be 1 or more, not {side}")
        self.side = side

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(
            channels=3 * self.side**2,
            downscale=self.side,
            scale=1.0,
            shift=0.0,
            dtype="float32",
            fingerprint=f"patches-{self.side}",  # a VAE with weights hashes them
        )

    def encode(self, images: Tensor) -> Tensor:
        return pixel_unshuffle(images, self.side)

    def decode(self, latents: Tensor) -> Tensor:
        return pixel_shuffle(latents, self.side)


class Trapezoid(Scheduler):
    """Second order from two evaluations: the trapezoidal rule, on any noise schedule.

    ``x_s = keep * x + (alpha_s - keep * alpha_t) * x0`` with ``keep = sigma_s / sigma_t``, where x0 is the mean of the clean
    estimates at both ends of the step (Lu et al. 2022, arXiv:2211.01095, eq. 8). The step to t = 0, where sigma is 0, is
    Euler's.
    """

    contract = 2
    evaluations = 2
    order = 2

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = field.scale(t), field.scale(s)
        keep = sigma_s / sigma_t
        clean = field.clean(x, t)
        euler = keep * x + (alpha_s - keep * alpha_t) * clean
        if not bool((s > 0).any()):
            return euler, state
        mean = (clean + field.clean(euler, s)) / 2
        return keep * x + (alpha_s - keep * alpha_t) * torch.where(sigma_s > 0, mean, clean), state

"""The numbers of one step, and the moves that most solvers are made of: finite at both ends of every path."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from latentmill.plugin import Field


class Step:
    """From times ``t[B]`` to ``s[B]``. All numbers are float64, shaped to multiply with ``x[B, ...]``.

    ``ratio`` is sigma / alpha, infinite where alpha is 0; ``log_ratio`` is lambda = log(alpha / sigma) of the papers; ``h`` is
    the step in it.
    """

    def __init__(self, field: Field, t: Tensor, s: Tensor) -> None:
        """Where the latents are."""
        field.expect(t, s)
        (self.alpha_t, self.sigma_t), (self.alpha_s, self.sigma_s) = field.scale(t), field.scale(s)

    @classmethod
    def on_cpu(cls, field: Field, t: Tensor, s: Tensor) -> Step:
        """On the CPU, wherever the latents are."""
        step = cls.__new__(cls)
        (step.alpha_t, step.sigma_t), (step.alpha_s, step.sigma_s) = field.numbers(t), field.numbers(s)
        return step

    @cached_property
    def ratio_t(self) -> Tensor:
        return self.sigma_t / self.alpha_t

    @cached_property
    def ratio_s(self) -> Tensor:
        return self.sigma_s / self.alpha_s

    @cached_property
    def lambda_t(self) -> Tensor:
        return -self.ratio_t.log()

    @cached_property
    def lambda_s(self) -> Tensor:
        return -self.ratio_s.log()

    @cached_property
    def h(self) -> Tensor:
        return self.lambda_s - self.lambda_t

    def euler(self, x: Tensor, clean: Tensor, sigma_s: Tensor | None = None) -> Tensor:
        """Along the straight line in (x / alpha, ratio): to ``sigma_s``, or a smaller one that leaves room for noise."""
        keep = (self.sigma_s if sigma_s is None else sigma_s) / self.sigma_t
        return keep * x + (self.alpha_s - keep * self.alpha_t) * clean

    def noise(self, x: Tensor, clean: Tensor) -> Tensor:
        """The noise that is in ``x``, if ``clean`` is what it hides."""
        return (x - self.alpha_t * clean) / self.sigma_t

    def bent(self, change: Tensor, sigma_s: Tensor | None = None) -> Tensor:
        """What ``euler`` misses if the noise along the step is by ``change`` another than at its begin.

        0 where the ratio at t is infinite, and so the straight line is all there is.
        """
        weight = (self.sigma_s if sigma_s is None else sigma_s) - self.alpha_s * self.ratio_t
        return finite(weight * change)

    def halfway(self, field: Field, ratio_s: Tensor) -> Tensor:
        """The time ``[B]`` half-way in lambda to ``ratio_s``; that of its end, if the step begins infinitely far away."""
        mean = torch.sqrt(self.ratio_t * ratio_s)
        return field.time(torch.where(mean.isfinite(), mean, ratio_s))

    def ancestral(self, eta: float) -> tuple[Tensor, Tensor]:
        """``(down, up)``: sigma_s parted into what is kept of the old noise and what is new, ``down² + up² = sigma_s²``.

        ``up = eta * sigma_s * sqrt(1 - (ratio_s / ratio_t)²)``: eq. 16 of Song et al. 2021 (DDIM, arXiv:2010.02502).
        """
        share = self.alpha_t * self.sigma_s / (self.alpha_s * self.sigma_t)
        up = eta * self.sigma_s * torch.sqrt((1 - share**2).clamp(min=0))
        return torch.sqrt((self.sigma_s**2 - up**2).clamp(min=0)), up


def finite(values: Tensor) -> Tensor:
    """``values``, with 0 for what is not finite: a term that has no meaning at one end of a path is left out there."""
    return values.nan_to_num(0.0, 0.0, 0.0)

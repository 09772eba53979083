"""Noise paths: how much of the clean latent and how much noise is in a latent at time t."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmill.plugin import NoisePath


class VP(NoisePath):
    """Variance preserving: ``alpha² + sigma² = 1``, from the betas of a discrete training schedule.

    ``alpha(t)²`` is alpha bar of Ho et al. 2020 (arXiv:2006.11239, eq. 4). Timestep k of ``steps`` is at time
    ``t = (k + 1) / steps``, and t = 0 is clean; in between, log alpha bar is linear. The defaults are Stable Diffusion's
    (``scaled_linear``: the square roots of the betas are equally spaced).
    """

    def __init__(
        self, betas: str = "scaled_linear", beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000
    ) -> None:
        if betas == "scaled_linear":
            each = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
        elif betas == "linear":
            each = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        else:
            raise ValueError(f"betas must be linear or scaled_linear, not {betas!r}")
        self.steps = steps
        self.log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-each).cumsum(0)])
        """At times 0, 1 / steps, ... 1."""

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.double().clamp(0.0, 1.0) * self.steps
        below = place.floor().long().clamp(max=self.steps - 1)
        low, high = self.log_alpha_bar[below.cpu()], self.log_alpha_bar[below.cpu() + 1]
        log_alpha_bar = torch.lerp(low, high, (place - below).cpu()).to(t.device)
        return torch.exp(0.5 * log_alpha_bar), torch.sqrt(-torch.expm1(log_alpha_bar))

    def time(self, ratio: Tensor) -> Tensor:
        wanted = torch.log1p(ratio.double().square())  # -log alpha bar
        knots = -self.log_alpha_bar
        above = torch.searchsorted(knots, wanted.contiguous()).clamp(1, self.steps)
        low, high = knots[above - 1], knots[above]
        return ((above - 1 + (wanted - low) / (high - low)) / self.steps).clamp(0.0, 1.0)

    def timestep(self, t: Tensor) -> Tensor:
        """The discrete step k, 0 to ``steps - 1``."""
        return self.steps * t - 1.0


class Flow(NoisePath):
    """Rectified flow, a straight line: ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2022, arXiv:2209.03003)."""

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1.0 - t, t

    def time(self, ratio: Tensor) -> Tensor:
        ratio = ratio.double()
        return torch.where(ratio.isinf(), 1.0, ratio / (1.0 + ratio))

"""Noise schedules: how much of the clean latent and how much noise is in a latent at time t."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmill.plugin import NoiseSchedule


class VariancePreserving(NoiseSchedule):
    """Variance preserving (VP), DDPM's: ``alpha² + sigma² = 1``, from the betas of a discrete training schedule.

    ``alpha(t)²`` is alpha bar of Ho et al. 2020 (arXiv:2006.11239, eq. 4). Timestep k of ``steps`` is at time
    ``t = (k + 1) / steps``, and t = 0 is clean; in between, log alpha bar is linear. ``betas``, by diffusers' names:
    ``scaled_linear`` (the square roots are equally spaced; Stable Diffusion's, with the defaults), ``linear`` (Ho et al.),
    ``squaredcos_cap_v2`` (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17), ``sigmoid`` (GeoDiff).
    ``zero_terminal_snr`` shifts alpha so that it ends at 0 (Lin et al. 2024, arXiv:2305.08891, algorithm 1).
    """

    timesteps: int

    def __init__(
        self,
        betas: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        if betas == "scaled_linear":
            each = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
        elif betas == "linear":
            each = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        elif betas == "squaredcos_cap_v2":
            angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * torch.pi / 2
            each = (1 - (angle.cos() ** 2)[1:] / (angle.cos() ** 2)[:-1]).clamp(max=0.999)
        elif betas == "sigmoid":
            each = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start
        else:
            raise ValueError(f"betas must be scaled_linear, linear, squaredcos_cap_v2 or sigmoid, not {betas!r}")
        self.timesteps = steps
        log_alpha_bar = torch.log1p(-each).cumsum(0)
        if zero_terminal_snr:
            alpha = (0.5 * log_alpha_bar).exp()
            log_alpha_bar = 2 * ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).log()
        self.log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_bar])
        """At times 0, 1 / steps, ... 1; the last is -inf with ``zero_terminal_snr``."""
        self.ends_in_noise = bool(self.log_alpha_bar[-1].isinf())

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.double().cpu().clamp(0.0, 1.0) * self.timesteps
        below = place.floor().long().clamp(max=self.timesteps - 1)
        low, high = self.log_alpha_bar[below], self.log_alpha_bar[below + 1]
        share = place - below
        log_alpha_bar = torch.lerp(low, high, share)
        if self.ends_in_noise:  # alpha itself is linear: to 0 at t = 1
            log_alpha_bar = torch.where(high.isinf(), low + 2 * torch.log1p(-share), log_alpha_bar)
        log_alpha_bar = log_alpha_bar.to(t.device)
        return torch.exp(0.5 * log_alpha_bar), torch.sqrt(-torch.expm1(log_alpha_bar))

    def time(self, ratio: Tensor) -> Tensor:
        wanted = torch.log1p(ratio.double().square())  # -log alpha bar
        knots = -self.log_alpha_bar
        above = torch.searchsorted(knots, wanted.contiguous()).clamp(1, self.timesteps)
        low, high = knots[above - 1], knots[above]
        share = torch.where(high.isinf(), -torch.expm1((low - wanted) / 2), (wanted - low) / (high - low))
        return ((above - 1 + share) / self.timesteps).clamp(0.0, 1.0)


class VarianceExploding(NoiseSchedule):
    """Variance exploding (VE), EDM's: ``alpha = 1``, ``sigma = sigma_max * t^7`` (Karras et al. 2022, arXiv:2206.00364).

    With rho = 7, equal steps of t are their grid. The networks are told ``log(sigma) / 4``, eq. 7 and table 1.
    """

    def __init__(self, sigma_max: float = 80.0) -> None:
        self.sigma_max = sigma_max

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return torch.ones_like(t), self.sigma_max * t**7

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio.double() / self.sigma_max).pow(1 / 7).clamp(0.0, 1.0)

    def timestep(self, t: Tensor) -> Tensor:
        """``log(sigma) / 4``."""
        return torch.log(self.scale(t)[1]) / 4


class RectifiedFlow(NoiseSchedule):
    """Rectified flow, a straight line: ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2022, arXiv:2209.03003).

    Flow matching, as SD3, Flux, Qwen-Image and most of what came after were trained. Grids may shift its times.
    """

    shiftable = True
    sigma_is_time = True
    strength_rounds_up = True

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1.0 - t, t

    def time(self, ratio: Tensor) -> Tensor:
        ratio = ratio.double()
        return torch.where(ratio.isinf(), 1.0, ratio / (1.0 + ratio))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise: ``shift * t / (1 + (shift - 1) * t)`` (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)

"""Samplers of distilled models: jump to the clean estimate, and add noise again."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step


class LCM(Scheduler):
    """Multistep consistency sampling: ``x_s = alpha_s * x0 + sigma_s * noise`` (Song et al. 2023, arXiv:2303.01469, alg. 1).

    As latent consistency models use it (Luo et al. 2023, arXiv:2310.04378).
    """

    contract = 2
    stochastic = True

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        alpha_s, sigma_s = field.scale(s)
        return alpha_s * field.clean(x, t) + sigma_s * field.noise(t, s), state


class TCD(Scheduler):
    """Strategic stochastic sampling: to the time ``(1 - gamma) * s`` without noise, and back to s with it.

    Zheng et al. 2024 (arXiv:2402.19159), alg. 2 and eq. 20. ``gamma`` 0 is Euler (DDIM), 1 is LCM.
    """

    contract = 2
    stochastic = True

    def __init__(self, gamma: float = 0.3) -> None:
        if isinstance(gamma, bool) or not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be from 0 to 1, not {gamma!r}")
        self.gamma = float(gamma)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        below = (1.0 - self.gamma) * s
        field.expect(below)
        at, down = Step(field, t, s), Step(field, t, below)
        clean = field.clean(x, t)
        moved = at.alpha_s / down.alpha_s * down.euler(x, clean)
        # What noise is missing at s: the variances must add up to sigma_s squared.
        up = torch.sqrt((at.sigma_s**2 - (at.alpha_s * down.ratio_s) ** 2).clamp(min=0))
        return moved + up * field.noise(t, s), state

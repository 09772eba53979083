"""First-order solvers: Euler on any path, which is DDIM on a variance-preserving one; with fresh noise; with churn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step


class Euler(Scheduler):
    """One evaluation, first order; exact if the clean estimate does not change.

    With ``eps = (x - alpha_t * x0) / sigma_t`` a step is ``alpha_s * x0 + sqrt(sigma_s² - up²) * eps + up * noise``, where
    ``up = eta * sigma_s * sqrt(1 - (alpha_t * sigma_s / (alpha_s * sigma_t))²)``: eq. 12 and 16 of Song et al. 2021
    (DDIM, arXiv:2010.02502), written for any path. ``eta`` 0 is Euler's method on the probability flow ODE, 1 the ancestral
    sampler (DDPM on a variance-preserving path).
    """

    contract = 2

    def __init__(self, eta: float = 0.0) -> None:
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
        self.eta = float(eta)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        if not self.eta:
            return at.euler(x, field.clean(x, t)), state
        down, up = at.ancestral(self.eta)
        return at.euler(x, field.clean(x, t), down) + up * field.noise(t, s), state


class EulerAncestral(Euler):
    """Euler with fresh noise at every step (``sample_euler_ancestral`` of k-diffusion): ``eta`` 1 unless it is given."""

    contract = 2
    stochastic = True

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__(eta)


class EDMEuler(Scheduler):
    """The stochastic sampler of Karras et al. 2022 (arXiv:2206.00364), algorithm 2, without its second-order correction.

    ``churn`` is the paper's S_churn / N, so that a step knows it without the grid; ratios of sigma to alpha between ``s_min``
    and ``s_max`` are raised by the factor ``1 + min(churn, sqrt(2) - 1)``, with noise of standard deviation ``s_noise``.
    """

    contract = 2
    stochastic = True

    def __init__(self, churn: float = 0.1, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0) -> None:
        for name, value in (("churn", churn), ("s_min", s_min), ("s_max", s_max), ("s_noise", s_noise)):
            if isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} must be a number from 0 on, not {value!r}")
        self.churn, self.s_min, self.s_max, self.s_noise = float(churn), float(s_min), float(s_max), float(s_noise)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        alpha, sigma = field.numbers(t)
        ratio = sigma / alpha
        raised = self._raised(ratio)
        up = torch.where(raised, ratio * (1.0 + min(self.churn, math.sqrt(2) - 1)), ratio)
        # A path ends somewhere: no further than there.
        back = torch.where(raised.flatten(), field.time(up), t)
        field.expect(back)
        (alpha, sigma), (alpha_b, sigma_b) = field.scale(t), field.scale(back)
        ratio = sigma / alpha
        added = torch.sqrt(((sigma_b / alpha_b) ** 2 - ratio**2).clamp(min=0))
        moved = alpha_b * (x / alpha + self.s_noise * added * field.noise(t, back))
        x = torch.where(self._raised(ratio), moved, x)
        at = Step(field, back, s)
        return at.euler(x, field.clean(x, back)), state

    def _raised(self, ratio: Tensor) -> Tensor:
        return (ratio >= self.s_min) & (ratio <= self.s_max) & ratio.isfinite()

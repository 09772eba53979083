"""First-order solvers: Euler on any path, which is DDIM on a variance-preserving one, and with noise the ancestral one."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State


class Euler(Scheduler):
    """One evaluation, first order; exact if the clean estimate does not change.

    With ``eps = (x - alpha_t * x0) / sigma_t`` a step is ``alpha_s * x0 + sqrt(sigma_s² - up²) * eps + up * noise``, where
    ``up = eta * sigma_s * sqrt(1 - (alpha_t * sigma_s / (alpha_s * sigma_t))²)``: eq. 12 and 16 of Song et al. 2021
    (DDIM, arXiv:2010.02502), written for any path. ``eta`` 0 is Euler's method on the probability flow ODE, 1 the ancestral
    sampler (DDPM on a variance-preserving path).
    """

    contract = 1

    def __init__(self, eta: float = 0.0) -> None:
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
        self.eta = float(eta)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = field.scale(t), field.scale(s)
        up = torch.zeros_like(sigma_s)
        if self.eta:
            up = self.eta * sigma_s * torch.sqrt((1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2).clamp(min=0))
        keep = torch.sqrt((sigma_s**2 - up**2).clamp(min=0)) / sigma_t
        x = keep * x + (alpha_s - keep * alpha_t) * field.clean(x, t)
        if self.eta:
            x = x + up * field.noise(t, s)
        return x, state


class EulerAncestral(Euler):
    """Euler with fresh noise at every step (``sample_euler_ancestral`` of k-diffusion): ``eta`` 1 unless it is given."""

    contract = 1
    stochastic = True

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__(eta)

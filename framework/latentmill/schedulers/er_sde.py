"""ER-SDE-Solver: the reverse SDE with more noise than the usual one at high noise, and less at low."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step, finite

POINTS = 200
"""Of the midpoint rule for the integral that has no closed form."""


class ERSDE(Scheduler):
    """Second order in the drift, from the clean estimate of the step before.

    Cui et al. 2023 (arXiv:2309.06169), eq. 21 and algorithm 2, with their best noise scale,
    ``phi(r) = r * (exp(r^0.3) + 10)`` of the ratio r = sigma / alpha.
    """

    contract = 2
    stochastic = True
    order = 2

    stages: ClassVar[int] = 2
    point: ClassVar[float] = 0.5
    """Where in its part of the integral a point is."""

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        far, zero = torch.full_like(alpha, torch.inf), torch.zeros_like(x)
        state = {"clean": zero, "ratio": far}
        return state if self.stages == 2 else {**state, "slope": zero.clone(), "ratio_2": far.clone()}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean = field.clean(x, t)
        kept = phi(at.ratio_s) / (torch.exp(at.ratio_t**0.3) + 10)  # phi_s / phi_t, times ratio_t
        share = kept / at.ratio_t
        moved = at.alpha_s * kept / at.sigma_t * x + at.alpha_s * (1 - share) * clean
        slope = (clean - state["clean"]) / (at.ratio_t - state["ratio"])
        places = (torch.arange(POINTS, dtype=torch.float64, device=x.device) + self.point) / POINTS
        length = at.ratio_t - at.ratio_s
        inside = at.ratio_s.unsqueeze(-1) + length.unsqueeze(-1) * places
        integral = (1 / phi(inside)).mean(-1) * length
        bent = (integral * phi(at.ratio_s) - length) * slope
        moved = moved + at.alpha_s * torch.where(at.sigma_s > 0, finite(bent), 0.0)
        new = {"clean": clean.to(x.dtype), "ratio": at.ratio_t}
        if self.stages == 3:
            curve = 2 * (slope - state["slope"]) / (at.ratio_t - state["ratio_2"])
            integral = ((inside - at.ratio_t.unsqueeze(-1)) / phi(inside)).mean(-1) * length
            bent = (length**2 / 2 + integral * phi(at.ratio_s)) * curve
            moved = moved + at.alpha_s * torch.where(at.sigma_s > 0, finite(bent), 0.0)
            new |= {"slope": slope.to(x.dtype), "ratio_2": state["ratio"]}
        up = at.alpha_s * torch.sqrt((at.ratio_s**2 - kept**2).clamp(min=0))
        return moved + up * field.noise(t, s), new


class ERSDE3(ERSDE):
    """Third order in the drift, from two estimates before (Cui et al. 2023, arXiv:2309.06169, algorithm 3).

    Its integrals are sums of left ends, as in the authors' code.
    """

    contract = 2
    stages, point = 3, 0.0


def phi(ratio: Tensor) -> Tensor:
    """The noise scale that the paper found best."""
    return ratio * (torch.exp(ratio**0.3) + 10)

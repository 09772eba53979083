"""DPM-Solver++: exponential integrators of the data prediction, in lambda = log(alpha / sigma), on the ODE and on the SDE.

Lu et al. 2022 (arXiv:2211.01095); those on the SDE in the forms of k-diffusion's ``sample_dpmpp_*``: ``eta`` 1 is the SDE,
0 the ODE, and h is the step in lambda.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step, finite


class DPMpp2M(Scheduler):
    """DPM-Solver++(2M): second order from one evaluation and the clean estimate of the step before.

    Algorithm 2 of Lu et al. 2022 (arXiv:2211.01095): ``x_s = sigma_s / sigma_t * x + alpha_s * (1 - exp(-h)) * D`` with
    ``h = lambda_s - lambda_t`` and ``D = x0 + h / (2 * h_before) * (x0 - x0_before)``. A row's first step is first order, and so is
    the step to t = 0, where h is infinite.
    """

    contract = 2
    order = 2

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        # As if the step before had begun infinitely far away: its weight in D is 0.
        return {"clean": torch.zeros_like(x), "log_ratio": torch.full_like(alpha, -torch.inf)}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean = field.clean(x, t)
        weight = finite(at.h / (2 * (at.lambda_t - state["log_ratio"])))  # at both ends of a path a lambda is infinite
        moved = at.euler(x, clean + weight * (clean - state["clean"]))
        return moved, {"clean": clean.to(x.dtype), "log_ratio": at.lambda_t}


class _Stochastic(Scheduler):
    contract = 2
    stochastic = True

    def __init__(self, eta: float = 1.0) -> None:
        if isinstance(eta, bool) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
        self.eta = float(eta)


class DPMpp2SAncestral(_Stochastic):
    """DPM-Solver++(2S), second order on the ODE from two evaluations, with ancestral noise (arXiv:2211.01095).

    Euler's where the ratio at t is infinite, and to t = 0.
    """

    evaluations = 2
    order = 2

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        middle = near.halfway(field, near.ancestral(self.eta)[0] / near.alpha_s)
        field.expect(middle)
        at = Step(field, t, s)
        down, up = at.ancestral(self.eta)
        clean = field.clean(x, t)
        there = field.clean(Step(field, t, middle).euler(x, clean), middle)
        inside = at.ratio_t.isfinite() & (down > 0)
        moved = at.euler(x, torch.where(inside, there, clean), down)
        return moved + up * field.noise(t, s), state


class DPMppSDE(_Stochastic):
    """DPM-Solver++(SDE): an ancestral step to the middle in lambda, and one over the whole with the estimate of there.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 1 on the SDE. The noise of the two is of one Brownian motion in sigma / alpha: the first half's is part of the whole's.
    """

    evaluations = 2
    order = 2

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        middle = near.halfway(field, near.ratio_s)
        field.expect(middle)
        at = Step(field, t, s)
        clean = field.clean(x, t)
        half = Step(field, t, middle)
        down, up = half.ancestral(self.eta)
        first, second = field.noise(t, middle), field.noise(middle, s)
        there = field.clean(half.euler(x, clean, down) + up * first, middle)
        inside = at.ratio_t.isfinite() & (at.sigma_s > 0)
        down, up = at.ancestral(self.eta)
        share = ((at.ratio_t - half.ratio_s) / (at.ratio_t - at.ratio_s)).clamp(0, 1)
        whole = torch.where(inside, share.sqrt() * first + (1 - share).sqrt() * second, second)
        return at.euler(x, torch.where(inside, there, clean), down) + up * whole, state


class DPMpp2MSDE(_Stochastic):
    """DPM-Solver++(2M) SDE: the drift is second order from the estimate of the step before (arXiv:2211.01095).

    The estimate half-way counts for the whole step; in ``DPMpp2MSDEHeun`` it is integrated.
    """

    order = 2

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        return {"clean": torch.zeros_like(x), "h": torch.full_like(alpha, torch.inf)}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean = field.clean(x, t)
        weight = finite(self._share(at.h) * at.h / state["h"])
        return _moved(self.eta, field, at, x, t, s, clean + weight * (clean - state["clean"])), {
            "clean": clean.to(x.dtype),
            "h": torch.where(at.h.isfinite(), at.h, torch.inf),
        }

    def _share(self, h: Tensor) -> Tensor | float:
        return 0.5


class DPMpp2MSDEHeun(DPMpp2MSDE):
    """DPM-Solver++(2M) SDE, Heun's form: the line through the estimates of this step and the one before is integrated (arXiv:2211.01095)."""

    def _share(self, h: Tensor) -> Tensor | float:
        length = h * (1 + self.eta)
        return 1 / -torch.expm1(-length) - 1 / length


class DPMpp3MSDE(_Stochastic):
    """DPM-Solver++(3M) SDE: a quadratic through the estimates of this step and the two before (arXiv:2211.01095).

    The quadratic is integrated exactly, which makes the drift third order. k-diffusion and diffusers give its square term half
    the weight, which leaves second order at best.
    """

    order = 3
    curvature: ClassVar[int] = 2

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        far, zero = torch.full_like(alpha, torch.inf), torch.zeros_like(x)
        return {"clean_1": zero, "clean_2": zero.clone(), "h_1": far, "h_2": far.clone()}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean = field.clean(x, t)
        one, two = state["h_1"].isfinite(), state["h_2"].isfinite()
        r0, r1 = state["h_1"] / at.h, state["h_2"] / at.h
        slope_0, slope_1 = (clean - state["clean_1"]) / r0, (state["clean_1"] - state["clean_2"]) / r1
        slope = slope_0 + (slope_0 - slope_1) * r0 / (r0 + r1)
        curve = (slope_0 - slope_1) / (r0 + r1)
        length = at.h * (1 + self.eta)
        phi_2 = torch.expm1(-length) / length + 1
        phi_3 = phi_2 / length - 0.5
        whole = -torch.expm1(-length)
        bend = torch.where(two, phi_2 * slope - self.curvature * phi_3 * curve, torch.where(one, phi_2 * slope_0, 0.0))
        return _moved(self.eta, field, at, x, t, s, clean + finite(bend / whole)), {
            "clean_1": clean.to(x.dtype),
            "clean_2": state["clean_1"],
            "h_1": torch.where(at.h.isfinite(), at.h, torch.inf),
            "h_2": state["h_1"],
        }


def _moved(eta: float, field: Field, at: Step, x: Tensor, t: Tensor, s: Tensor, clean: Tensor) -> Tensor:
    """The exact solution of the SDE over the step if the estimate were ``clean`` all the way."""
    keep = at.sigma_s / at.sigma_t * torch.exp(-eta * at.h)
    moved = keep * x + at.alpha_s * -torch.expm1(-(1 + eta) * at.h) * clean
    if eta:
        moved = moved + at.sigma_s * torch.sqrt(-torch.expm1(-2 * eta * at.h)) * field.noise(t, s)
    return moved

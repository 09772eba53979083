"""DPM-Solver++: exponential integrators of the data prediction, in lambda = log(alpha / sigma)."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State


class DPMpp2M(Scheduler):
    """DPM-Solver++(2M): second order from one evaluation and the clean estimate of the step before.

    Algorithm 2 of Lu et al. 2022 (arXiv:2211.01095): ``x_s = sigma_s / sigma_t * x + alpha_s * (1 - exp(-h)) * D`` with
    ``h = lambda_s - lambda_t`` and ``D = x0 + h / (2 * h_before) * (x0 - x0_before)``. A row's first step is first order, and so is
    the step to t = 0, where h is infinite.
    """

    contract = 1

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        # As if the step before had begun infinitely far away: its weight in D is 0.
        return {"clean": torch.zeros_like(x), "log_ratio": torch.full_like(alpha, -torch.inf)}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = field.scale(t), field.scale(s)
        lambda_t, lambda_s = torch.log(alpha_t / sigma_t), torch.log(alpha_s / sigma_s)
        clean = field.clean(x, t)
        weight = (lambda_s - lambda_t) / (2 * (lambda_t - state["log_ratio"]))
        weight = torch.where(weight.isfinite(), weight, 0.0)  # at both ends of a path a lambda is infinite
        keep = sigma_s / sigma_t
        moved = keep * x + (alpha_s - keep * alpha_t) * (clean + weight * (clean - state["clean"]))
        return moved, {"clean": clean.to(x.dtype), "log_ratio": lambda_t}

"""Second-order solvers that evaluate twice a step: at its begin, and at its end or on its way."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step, finite


class Heun(Scheduler):
    """Heun's method: the mean of the noise at both ends of the step.

    Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364) without churn: ``y_s = y_t + (r_s - r_t) * (eps_t + eps_s) / 2`` in
    ``y = x / alpha``, ``r = sigma / alpha``. Euler's where r_t is infinite, and to t = 0.
    """

    contract = 2
    evaluations = 2
    order = 2

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean = field.clean(x, t)
        moved = at.euler(x, clean)
        end = (moved - at.alpha_s * field.clean(moved, s)) / at.sigma_s
        return moved + at.bent(finite(end - at.noise(x, clean)) / 2), state


class HeunPP2(Scheduler):
    """Heun's method with the noise at the ends of this step and of the next, weighted by their sigmas against the first of all.

    Heun++ of the samplers that come with Stable Diffusion's interfaces; there is no paper. Of first order, since the weights don't know the
    step's length. Heun's with weights of that kind in the last step but one, Euler's in the last.
    """

    contract = 2
    evaluations = 3
    looks_ahead = True

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, sigma = field.scale(t)
        return {"first": sigma / alpha}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        following = field.following(s)
        left = following.isfinite().sum(-1)
        after = torch.where(left > 0, following[:, 0], s)
        field.expect(after)
        [more] = field.send(left.double())
        at, then = Step(field, t, s), Step(field, s, after)
        clean = field.clean(x, t)
        second = at.euler(x, clean)
        clean_2 = field.clean(second, s)
        third = torch.where(then.sigma_s > 0, then.euler(second, clean_2), clean_2)
        clean_3 = field.clean(third, after)
        noise = at.noise(x, clean)
        noise_2 = (second - at.alpha_s * clean_2) / at.sigma_s
        noise_3 = (third - then.alpha_s * clean_3) / then.sigma_s
        more = more.reshape(at.h.shape)
        parts = torch.where(more > 1, 3.0, 2.0) * state["first"]
        bent = at.ratio_s / parts * (noise_2 - noise)
        bent = bent + torch.where(more > 1, then.ratio_s / parts * (noise_3 - noise), 0.0)
        return second + at.bent(torch.where(more > 0, finite(bent), 0.0)), state


class DPM2(Scheduler):
    """The midpoint method in log(sigma): the noise half-way counts for the whole step.

    DPM-Solver-2 of Lu et al. 2022 (arXiv:2206.00927, algorithm 1) as ``sample_dpm_2`` of k-diffusion has it. ``eta`` above 0
    draws fresh noise (``sample_dpm_2_ancestral``). Euler's where the ratio at t is infinite, and to t = 0.
    """

    contract = 2
    evaluations = 2
    order = 2

    def __init__(self, eta: float = 0.0) -> None:
        if isinstance(eta, bool) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
        self.eta = float(eta)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        middle = near.halfway(field, near.ancestral(self.eta)[0] / near.alpha_s)
        field.expect(middle)
        at = Step(field, t, s)
        down, up = at.ancestral(self.eta)
        clean = field.clean(x, t)
        half = Step(field, t, middle)
        moved = half.euler(x, clean)
        there = (moved - half.alpha_s * field.clean(moved, middle)) / half.sigma_s
        moved = at.euler(x, clean, down) + at.bent(finite(there - at.noise(x, clean)), down)
        return (moved + up * field.noise(t, s) if self.eta else moved), state


class DPM2Ancestral(DPM2):
    """DPM2 with fresh noise at every step: ``eta`` 1 unless it is given (``sample_dpm_2_ancestral`` of k-diffusion)."""

    contract = 2
    stochastic = True

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__(eta)

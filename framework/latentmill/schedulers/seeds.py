"""SEEDS: exponential solvers of the reverse SDE, of two and of three stages, whose noise is of one motion over the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step, finite


class SEEDS2(Scheduler):
    """Two stages, the second at the middle of the step in lambda (Gonzalez et al. 2023, arXiv:2305.14267, in the clean latents).

    ``eta`` 1 is the SDE, 0 the ODE. Euler's where the ratio at t is infinite, and to t = 0.
    """

    contract = 2
    evaluations = 2
    stochastic = True
    order = 2
    places: ClassVar[Sequence[float]] = (1 / 2,)
    """Of the stages after the first, as shares of the step."""

    def __init__(self, eta: float = 1.0) -> None:
        if isinstance(eta, bool) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
        self.eta = float(eta)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        inside = near.ratio_t.isfinite() & (near.sigma_s > 0)
        ratios = [torch.where(inside, torch.exp(-(near.lambda_t + r * near.h)), near.ratio_s) for r in self.places]
        times = [field.time(ratio) for ratio in ratios]
        field.expect(*times)
        [within] = field.send(inside.double())
        whole, last = Step(field, t, s), t
        cleans, noise = [field.clean(x, t)], torch.zeros_like(x)
        for r, time in [*zip(self.places, times), (1.0, s)]:
            at, part = Step(field, t, time), Step(field, last, time)
            clean = cleans[0] + torch.where(
                within > 0, finite(self._bend(cleans, r, whole.h * r * (1 + self.eta))), 0.0
            )
            # Of the noise over the whole way so far, that which is older has decayed.
            up = torch.sqrt(-torch.expm1(-2 * self.eta * part.h))
            noise = torch.exp(-self.eta * part.h) * noise + up * field.noise(last, time) if self.eta else noise
            keep = at.sigma_s / at.sigma_t * torch.exp(-self.eta * at.h)
            moved = keep * x + at.alpha_s * -torch.expm1(-(1 + self.eta) * at.h) * clean
            moved, last = moved + at.sigma_s * finite(noise), time
            if r < 1:
                cleans.append(field.clean(moved, time))
        return moved, state

    def _bend(self, cleans: Sequence[Tensor], r: float, h: Tensor) -> Tensor:
        """What of the change of the estimate counts over ``r`` of the step, over which h, noise and all, is the length."""
        return (cleans[1] - cleans[0]) / (2 * self.places[0]) if r == 1 else torch.zeros_like(cleans[0])


class SEEDS3(SEEDS2):
    """Three stages, at one and two thirds of the step in lambda (Gonzalez et al. 2023, arXiv:2305.14267, in the clean latents)."""

    contract = 2
    evaluations = 3
    order = 3
    places = (1 / 3, 2 / 3)

    def _bend(self, cleans: Sequence[Tensor], r: float, h: Tensor) -> Tensor:
        if len(cleans) == 1:
            return torch.zeros_like(cleans[0])
        # The slope of the newest stage, integrated: phi_2 / phi_1 of the length.
        slope = (h + torch.expm1(-h)) / (h * -torch.expm1(-h))
        return slope * r / self.places[len(cleans) - 2] * (cleans[-1] - cleans[0])

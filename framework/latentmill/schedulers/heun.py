"""Second-order solvers that evaluate twice a step: at its begin, and at its end or on its way."""

from __future__ import annotations

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

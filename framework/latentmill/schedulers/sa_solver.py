"""SA-Solver: a stochastic Adams method, with a corrector that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.multistep import exponential_moments, quadrature
from latentmill.schedulers.step import Step, finite
from latentmill.schedulers.unipc import OF_TIMES, fewer, nothing_yet


class SASolver(Scheduler):
    """Predictor and corrector in the clean latents, in lambda, on an SDE whose noise is scaled by ``tau``.

    Xue et al. 2023 (arXiv:2309.05019), eq. 14 to 18: ``x_s = sigma_s / sigma_t * exp(-tau² h) * x + integral of
    (1 + tau²) * exp(-(1 + tau²) (lambda_s - l)) * x0(l) dl + sigma_s * sqrt(1 - exp(-2 tau² h)) * noise``. ``tau`` 0 is the ODE,
    on which ``max_order`` p is of order p + 1.
    """

    contract = 2
    stochastic = True
    order = 4
    on_cpu = OF_TIMES
    lower_order_final: ClassVar[bool] = False
    """Whether the last steps of a row that ends clean are of lower order, as its first ones are."""
    pece: ClassVar[bool] = False
    """Whether the network is asked again where the corrector has brought the latents."""

    def __init__(self, tau: float = 1.0, max_order: int = 3) -> None:
        if isinstance(tau, bool) or not 0.0 <= tau <= 2.0 or max_order not in (1, 2, 3):
            raise ValueError(f"tau must be from 0 to 2 and max_order 1, 2 or 3, not {tau!r} and {max_order!r}")
        self.tau, self.max_order = float(tau), max_order

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        return nothing_yet(field, x, t, self.max_order)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        before = state["t"].reshape(t.shape)
        near, back = Step.on_cpu(field, t, s), Step.on_cpu(field, before, t)
        old = [state[f"clean_{k}"] for k in range(1, self.max_order + 1)]
        ago = [state[f"at_{k}"] for k in range(1, self.max_order + 1)]
        taus = self.tau_at(field, s, near.h), self.tau_at(field, t, near.h)
        older, left = ago[: self.max_order - 1], torch.full(s.shape, 4)
        if self.lower_order_final:
            left = steps_left(field, s)
            older, ago = fewer(older, left - 1), [ago[0], *fewer(ago[1:], left - 1)]
        predictor = self._weights(near, [(place - near.lambda_t) / near.h for place in older], taus[0])
        corrector = self._weights(
            back, [torch.ones_like(back.h), *((place - back.lambda_t) / back.h for place in ago[1:])], taus[1]
        )
        corrector[0] = torch.where(left.reshape(back.h.shape) > 0, corrector[0], 1.0)
        there = ago[0].isfinite() & back.h.isfinite()
        field.expect(before)
        own = [tau for tau in taus if isinstance(tau, Tensor)]  # else it is one number for all, and nothing to send
        sent = field.send(*predictor, *corrector, there.double(), *own)
        weights, corrected = sent[: len(predictor) + len(corrector)], sent[len(predictor) + len(corrector)]
        tau, tau_before = sent[-2:] if own else taus

        clean = field.clean(x, t)
        if bool(ago[0].isfinite().any()):  # the step that led here once more, with the same noise and a better estimate
            cleans = [old[0], clean, *old[1:]]
            again = self._moved(field, state["x"], before, t, cleans, weights[len(predictor) :], tau_before)
            x = torch.where(corrected > 0, again, x)
        if self.pece:
            clean = field.clean(x, t)
        moved = self._moved(field, x, t, s, [clean, *old], weights[: len(predictor)], tau)
        cleans, places = [clean, *old], [near.lambda_t, *ago]
        new: State = {"x": x.to(moved.dtype), "t": t.double().clone()}
        for k in range(self.max_order):
            new[f"clean_{k + 1}"], new[f"at_{k + 1}"] = cleans[k].to(x.dtype), places[k]
        return moved, new

    def tau_at(self, field: Field, t: Tensor, like: Tensor) -> float | Tensor:
        """How much noise a step to time ``t[B]`` has: a number, or each row's, shaped as ``like``, on the CPU."""
        return self.tau

    def _weights(self, at: Step, nodes: list[Tensor], tau: float | Tensor) -> list[Tensor]:
        moments = exponential_moments((1 + tau**2) * at.h, len(nodes) + 1)
        return [finite(weight) for weight in quadrature(nodes, moments)]

    def _moved(
        self,
        field: Field,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cleans: list[Tensor],
        weights: Sequence[Tensor],
        tau: float | Tensor,
    ) -> Tensor:
        at, strength = Step(field, t, s), 1 + tau**2
        clean = cleans[0]
        for k, weight in enumerate(weights):
            clean = clean + weight * (cleans[k + 1] - cleans[0])
        decayed = -(tau**2) * at.h
        if isinstance(tau, Tensor):
            decayed = torch.where(tau > 0, decayed, 0.0)  # h may be infinite
        keep = at.sigma_s / at.sigma_t * torch.exp(decayed)
        moved = keep * x + at.alpha_s * -torch.expm1(-strength * at.h) * clean
        if self.tau:
            moved = moved + at.sigma_s * torch.sqrt(-torch.expm1(2 * decayed)) * field.noise(t, s)
        return moved


def steps_left(field: Field, s: Tensor) -> Tensor:
    """How many steps come after this one, of rows that end clean; four at most, and of others four."""
    following = torch.cat([s[:, None], field.following(s)], 1)
    left = following.isfinite().sum(1) - 1
    last = following.gather(1, left[:, None])[:, 0]
    return torch.where((last == 0) | (left == 4), left, 4)

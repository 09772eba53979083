"""UniPC: a predictor, and a corrector that costs nothing, for it uses the evaluation that the next step makes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.multistep import exponential_moments, quadrature
from latentmill.schedulers.step import Step, finite

OF_TIMES = ("t", "at_1", "at_2", "at_3")
"""What ``nothing_yet`` says of times."""


class UniPC(Scheduler):
    """Unified predictor-corrector of order 2 or 3 in the clean latents (Zhao et al. 2023, arXiv:2302.04867, eq. 3 to 9).

    ``variant`` is the paper's B(h): ``bh1`` is h, ``bh2`` is exp(h) - 1. A predictor of ``max_order`` p with its corrector is of
    order p + 1. A row's first step is of order 1, its second of 2.
    """

    contract = 2
    order = 3
    on_cpu = OF_TIMES
    lower_order_final: ClassVar[bool] = False
    """Whether a row's last steps are of lower order, as its first ones are."""

    def __init__(self, max_order: int = 2, variant: Literal["bh1", "bh2"] = "bh2") -> None:
        if max_order not in (1, 2, 3) or variant not in ("bh1", "bh2"):
            raise ValueError(f"max_order must be 1, 2 or 3 and variant bh1 or bh2, not {max_order!r} and {variant!r}")
        self.max_order, self.variant = max_order, variant

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        return nothing_yet(field, x, t, self.max_order)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        before = state["t"].reshape(t.shape)
        near, back = Step.on_cpu(field, t, s), Step.on_cpu(field, before, t)
        places = [near.lambda_t, *(state[f"at_{k}"] for k in range(1, self.max_order))]
        ago = [(state[f"at_{k}"] - back.lambda_t) / back.h for k in range(2, self.max_order + 1)]
        if self.lower_order_final:
            left = field.following(s).isfinite().sum(-1)
            places[1:], ago = fewer(places[1:], left), fewer(ago, left + 1)
        predictor = self._weights(near, [(p - places[0]) / near.h for p in places[1:]])
        corrector = self._weights(back, [torch.ones_like(back.h), *ago])
        there = state["at_1"].isfinite() & back.h.isfinite()
        field.expect(before)
        *weights, corrected = field.send(*predictor, *corrector, there.double())

        clean = field.clean(x, t)
        # The step that led to x once more, now that the estimate at its end is known.
        cleans = [state["clean_1"], clean, *(state[f"clean_{k}"] for k in range(2, self.max_order + 1))]
        bend = self._bend(cleans, weights[len(predictor) :])
        again = Step(field, before, t).euler(state["x"], cleans[0] + bend)
        x = torch.where(corrected > 0, again, x).to(x.dtype)
        cleans = [clean, *(state[f"clean_{k}"] for k in range(1, self.max_order))]
        moved = Step(field, t, s).euler(x, clean + self._bend(cleans, weights[: len(predictor)]))
        new: State = {"x": x, "t": t.double().clone()}
        for k in range(self.max_order):
            new[f"clean_{k + 1}"], new[f"at_{k + 1}"] = cleans[k].to(x.dtype), places[k]
        return moved, new

    def _weights(self, at: Step, nodes: list[Tensor]) -> list[Tensor]:
        """Of the other estimates: exact for polynomials in lambda if there are two or three.

        With one, the paper's choice: half of its slope, times B(h).
        """
        one = sum((node.isfinite().long() for node in nodes), torch.zeros_like(at.h, dtype=torch.long)) == 1
        scale = torch.ones_like(at.h) if self.variant == "bh2" else at.h / -torch.expm1(-at.h)
        weights = quadrature(nodes, exponential_moments(at.h, len(nodes) + 1))
        for k, weight in enumerate(weights):
            half = 0.5 * scale / nodes[k] if k == 0 else torch.zeros_like(at.h)
            weights[k] = finite(torch.where(one, half, weight))
        return weights

    def _bend(self, cleans: list[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """What the other estimates add to the first."""
        total = torch.zeros_like(cleans[0])
        for k, weight in enumerate(weights):
            total = total + weight * (cleans[k + 1] - cleans[0])
        return total


def fewer(places: Sequence[Tensor], limit: Tensor) -> list[Tensor]:
    """The first ``limit[B]`` of places, NaN for the others."""
    return [torch.where(limit.reshape(p.shape) > k, p, torch.nan) for k, p in enumerate(places)]


def nothing_yet(field: Field, x: Tensor, t: Tensor, count: int) -> State:
    """What a solver with a corrector remembers before its first step: where the last one began, and ``count`` estimates."""
    alpha, _ = field.numbers(t)
    state: State = {"x": torch.zeros_like(x), "t": t.double().clone()}
    for k in range(1, count + 1):  # NaN stands for a step that there has not been
        state[f"clean_{k}"], state[f"at_{k}"] = torch.zeros_like(x), torch.full_like(alpha, torch.nan)
    return state

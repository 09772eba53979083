"""Solvers that remember: one evaluation a step, and what was estimated at the steps before.

All are Adams-Bashforth methods: a quantity (the noise, or the clean latents) is taken for the polynomial, in some variable
u, through its newest values, and integrated over the step. They differ in quantity, variable and measure only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step, finite


class Adams(Scheduler):
    """What they have in common. ``max_order`` values count, the newest first; a row's first steps have fewer."""

    contract = 2
    limit = 4
    """The highest order there is."""
    on_cpu = ("at_1", "at_2", "at_3")
    cfg_pp: ClassVar[bool] = False
    """Whether the noise is that of the negative prompt alone (CFG++, Chung et al. 2024, arXiv:2406.08070)."""

    def __init__(self, max_order: int | None = None) -> None:
        self.max_order = self.limit if max_order is None else max_order
        if isinstance(self.max_order, bool) or not 1 <= self.max_order <= self.limit:
            raise ValueError(f"max_order must be from 1 to {self.limit}, not {max_order!r}")

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.numbers(t)
        state: State = {}
        for k in range(1, self.max_order):  # NaN stands for a step that there has not been
            state[f"value_{k}"], state[f"at_{k}"] = torch.zeros_like(x), torch.full_like(alpha, torch.nan)
        return state

    def nodes(self, state: State) -> list[Tensor]:
        """Where the values are, the newest first, on the CPU; NaN for those that there have not been."""
        return [state[f"at_{k}"] for k in range(1, self.max_order)]

    def sent(self, field: Field, weights: list[Tensor]) -> Sequence[Tensor]:
        """Weights of the values before: 0 for those that there have not been."""
        return field.send(*(finite(weight) for weight in weights))

    def sum(self, state: State, value: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """``sum of w_k * (value_k - value)`` over the steps before."""
        total = torch.zeros_like(value)
        for k, weight in enumerate(weights, start=1):
            total = total + weight * (state[f"value_{k}"] - value)
        return total

    def of_noise(
        self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State, weights: list[Tensor], place: Tensor
    ) -> tuple[Tensor, State]:
        """A step whose values are the noise: Euler's, bent by those before with their ``weights``. ``place``: where this one's is."""
        sent, at = self.sent(field, weights), Step(field, t, s)
        clean, own = field.guided(x, t) if self.cfg_pp else (field.clean(x, t),) * 2
        noise = at.noise(x, own)
        straight = at.alpha_s * clean + at.sigma_s * noise if self.cfg_pp else at.euler(x, clean)
        return straight + at.bent(self.sum(state, noise, sent)), self.remembered(state, noise, place, x)

    def remembered(self, state: State, value: Tensor, at: Tensor, x: Tensor) -> State:
        """The state for the next step: the newest first, the oldest forgotten."""
        values = [value.to(x.dtype), *(state[f"value_{k}"] for k in range(1, self.max_order - 1))]
        places = [at, *(state[f"at_{k}"] for k in range(1, self.max_order - 1))]
        new: State = {}
        for k in range(1, self.max_order):
            new[f"value_{k}"], new[f"at_{k}"] = values[k - 1], places[k - 1]
        return new


class LMS(Adams):
    """The noise as a polynomial in sigma / alpha (``sample_lms`` of k-diffusion; order 4).

    The classical Adams-Bashforth method, as Liu et al. 2022 (arXiv:2202.09778) first used it for diffusion, on any grid.
    """

    order = 4

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        length = near.ratio_s - near.ratio_t
        nodes = [(node - near.ratio_t) / length for node in self.nodes(state)]
        weights = quadrature(nodes, [1.0 / (m + 1) for m in range(4)])
        return self.of_noise(field, x, t, s, state, weights, near.ratio_t)


class IPNDM(Adams):
    """The noise, as if all steps were of one length (iPNDM of Zhang and Chen 2022, arXiv:2204.13902, eq. 14).

    The Adams-Bashforth coefficients of four equal steps in sigma / alpha; on a grid of others it is of second order at best.
    """

    order = 2
    WEIGHTS = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near, nodes = Step.on_cpu(field, t, s), self.nodes(state)
        there = sum((node.isfinite().long() for node in nodes), torch.zeros_like(near.h, dtype=torch.long))
        table = torch.tensor([[*row, *[0.0] * (3 - len(row))] for row in self.WEIGHTS], dtype=torch.float64)
        weights = [table[there, k] for k in range(len(nodes))]
        return self.of_noise(field, x, t, s, state, weights, near.ratio_t)


class DEIS(Adams):
    """The noise as a polynomial in log(sigma / alpha) (tAB-DEIS of Zhang and Chen 2022, arXiv:2204.13902; order 3)."""

    order = 3
    limit = 3

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        nodes = [(node - near.lambda_t) / near.h for node in self.nodes(state)]
        weights = quadrature(nodes, exponential_moments(-near.h, self.limit))
        return self.of_noise(field, x, t, s, state, weights, near.lambda_t)


class RESMultistep(Adams):
    """The clean latents as a polynomial in lambda (RES of Zhang et al. 2023, arXiv:2308.02157, multistep; order 2 or 3).

    Exponential Adams-Bashforth: ``x_s = sigma_s / sigma_t * x + sigma_s * (integral of exp(lambda) * x0 over the step)``.
    """

    order = 2
    limit = 3

    def __init__(self, max_order: int = 2) -> None:
        super().__init__(max_order)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        nodes = [(node - near.lambda_t) / near.h for node in self.nodes(state)]
        weights = self.sent(field, quadrature(nodes, exponential_moments(near.h, self.limit)))
        at = Step(field, t, s)
        clean = field.clean(x, t)
        moved = at.euler(x, clean + self.sum(state, clean, weights))
        return moved, self.remembered(state, clean, near.lambda_t, x)


class GradientEstimation(Adams):
    """Euler's step with twice the change of the noise since the step before.

    Permenter and Yuan 2023 (arXiv:2306.04848), sec. 5: ``eps + (gamma - 1) * (eps - eps_before)``.
    """

    limit = 2

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__(2)
        self.gamma = gamma

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        [before] = self.nodes(state)
        weights = [torch.where(before.isfinite(), 1.0 - self.gamma, 0.0).double()]
        return self.of_noise(field, x, t, s, state, weights, near.ratio_t)


def quadrature(nodes: list[Tensor], moments: list[Tensor] | list[float]) -> list[Tensor]:
    """Weights of the nodes, besides a node at 0, that integrate every polynomial of their degree exactly.

    ``sum of w_k * nodes_k^m = moments_m`` for m = 1 .. n, each row with as many nodes as it has finite ones: they come newest
    first, so the missing are the last. The weight of the node at 0 is ``moments_0`` less the others'.
    Where all nodes lie at 0 the step is infinitely long beside those before: they have no weight.
    """
    if not nodes:
        return []
    there = torch.stack([node.isfinite() & (node != 0) for node in nodes], -1)  # [..., n]
    there = there.long().cumprod(-1).bool()
    at = torch.where(there, torch.stack([finite(node) for node in nodes], -1), 0.0)
    rows = [torch.where(there[..., m : m + 1], at ** (m + 1), 0.0) for m in range(len(nodes))]
    matrix = torch.stack(rows, -2)
    matrix = matrix + torch.diag_embed((~there).double())  # a missing node: its weight is 0
    wanted = [
        torch.where(there[..., m], finite(torch.as_tensor(moments[m + 1]).double()), 0.0) for m in range(len(nodes))
    ]
    # Without a check: an idle slot of a fixed batch repeats a step, so that its nodes coincide, and nobody reads it.
    weights = torch.linalg.solve_ex(matrix, torch.stack(wanted, -1).unsqueeze(-1)).result.squeeze(-1)
    return list(weights.unbind(-1))


def exponential_moments(h: Tensor, count: int) -> list[Tensor]:
    """``integral of v^m exp(h v) dv over [0, 1], over that of exp(h v)``, for m = 0 .. count - 1."""
    whole = torch.expm1(h) / h
    moment, moments = whole, [torch.ones_like(h)]
    for m in range(1, count):
        moment = (torch.exp(h) - m * moment) / h
        moments.append(moment / whole)
    return moments


class PNDM(IPNDM):
    """Pseudo linear multistep: iPNDM whose first step is Heun's, at the price of one more evaluation.

    Liu et al. 2022 (arXiv:2202.09778), eq. 12, with the first step of Stable Diffusion's PLMS.
    """

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        first = state["at_1"].isnan()
        moved, new = super().step(field, x, t, s, state)
        if bool(first.any()):
            at = Step(field, t, s)
            end = (moved - at.alpha_s * field.clean(moved, s)) / at.sigma_s
            bent = moved + at.bent(finite(end - new["value_1"]) / 2)
            [chosen] = field.send(first.double())
            moved = torch.where(chosen > 0, bent, moved)
        return moved, new

"""Solvers that ComfyUI has of its own: what is the paper's with a difference, or reckoned in sigma on a flow model, too.

``ComfySampler`` chooses them. On a flow model it lets those of the ODE see a path of alpha 1 and sigma t: ratio is sigma here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.comfy_sampling import sampling_of
from latentmill.schedulers.dpmpp import DPMpp3MSDE
from latentmill.schedulers.multistep import Adams, GradientEstimation, exponential_moments
from latentmill.schedulers.sa_solver import SASolver
from latentmill.schedulers.step import Step, finite
from latentmill.schedulers.unipc import UniPC


class FlowAncestral(Scheduler):
    """Euler, and two methods of a midpoint, with fresh noise on a flow model: the step down is to ``s * (1 + (s / t - 1) * eta)``.

    ``middle``: none (Euler); sigma, where log(sigma) is half-way (DPM-Solver-2); ratio, where log(sigma / alpha) is (DPM-Solver++(2S)).
    """

    contract = 2
    stochastic = True

    def __init__(self, middle: str, eta: float = 1.0) -> None:
        self.middle, self.eta = middle, eta

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        below = s * (1 + (s / t - 1) * self.eta)
        if self.middle == "sigma":
            middle = (t * below).sqrt()
        else:
            ratio = (t / (1 - t) * below / (1 - below)).sqrt()
            middle = torch.where(t < 1, ratio / (1 + ratio), 0.9999)
        field.expect(below, *([middle] if self.middle != "none" else []))
        (_, sigma_t), (alpha_s, sigma_s), (alpha_b, sigma_b) = field.scale(t), field.scale(s), field.scale(below)
        clean = field.clean(x, t)
        moved = sigma_b / sigma_t * x + (1 - sigma_b / sigma_t) * clean
        if self.middle != "none":
            _, sigma_m = field.scale(middle)
            inside = sigma_m / sigma_t * x + (1 - sigma_m / sigma_t) * clean
            there = field.clean(inside, middle)
            if self.middle == "sigma":
                bent = x + (inside - there) / sigma_m * (sigma_b - sigma_t)
            else:
                bent = sigma_b / sigma_t * x + (1 - sigma_b / sigma_t) * there
            moved = torch.where(sigma_s > 0, bent, clean)
        down = sigma_b * alpha_s / alpha_b
        up = torch.sqrt((sigma_s**2 - down**2).clamp(min=0))
        return alpha_s / alpha_b * moved + up * field.noise(t, s), state


class RESAncestral(Scheduler):
    """RES of second order (Zhang et al. 2023, arXiv:2308.02157), multistep, with ancestral noise; ``cfg_pp``: see ``CFGpp``."""

    contract = 2
    stochastic = True

    def __init__(self, eta: float = 1.0, cfg_pp: bool = False) -> None:
        self.eta, self.cfg_pp = eta, cfg_pp

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        return {"clean": torch.zeros_like(x), "h": torch.full_like(alpha, torch.inf)}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean, other = field.guided(x, t)
        value = other if self.cfg_pp else clean
        down, up = at.ancestral(self.eta)
        h = -(down / at.alpha_s).log() - at.lambda_t
        second = state["h"].isfinite() & h.isfinite()
        _, slope = exponential_moments(h, 2)
        weight = torch.where(second, finite(slope * h / state["h"]), 0.0)
        mean = value + weight * (value - state["clean"])
        start = x + at.alpha_t * torch.where(second, clean - value, 0.0)
        moved = at.euler(start, mean, down)
        if self.cfg_pp:
            moved = torch.where(second, moved, at.alpha_s * clean + down * at.noise(x, other))
        moved = moved + up * field.noise(t, s) if self.eta else moved
        return moved, {"clean": value.to(x.dtype), "h": torch.where(h.isfinite(), h, torch.inf)}


class CFGpp(Scheduler):
    """Euler with the noise of the negative prompt alone (CFG++, Chung et al. 2024, arXiv:2406.08070), with ancestral noise of ``eta``."""

    contract = 2

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean, other = field.guided(x, t)
        down, up = at.ancestral(self.eta)
        if self.eta:  # from pure noise all of the noise is new, whatever eta is
            down, up = torch.where(at.alpha_t > 0, down, 0.0), torch.where(at.alpha_t > 0, up, at.sigma_s)
        moved = at.alpha_s * clean + down * at.noise(x, other)
        return (moved + up * field.noise(t, s) if self.eta else moved), state


class CFGpp2SAncestral(Scheduler):
    """DPM-Solver++(2S) with ancestral noise, whose latents are moved by what guidance adds to the estimate (CFG++)."""

    contract = 2
    evaluations = 2
    stochastic = True

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = eta

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        middle = near.halfway(field, near.ancestral(self.eta)[0] / near.alpha_s)
        field.expect(middle)
        at = Step(field, t, s)
        down, up = at.ancestral(self.eta)
        clean, other = field.guided(x, t)
        half = Step(field, t, middle)
        there, besides = field.guided(half.euler(x + at.alpha_t * (clean - other), clean), middle)
        moved = at.euler(x + at.alpha_t * (clean - besides), there, down)
        return torch.where(down > 0, moved, at.alpha_s * clean) + up * field.noise(t, s), state


class CFGpp2M(Scheduler):
    """DPM-Solver++(2M) with the negative prompt's estimate in the place of what the latents hold (CFG++)."""

    contract = 2

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        alpha, _ = field.scale(t)
        return {"clean": torch.zeros_like(x), "log_ratio": torch.full_like(alpha, -torch.inf)}

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        at = Step(field, t, s)
        clean, other = field.guided(x, t)
        weight = finite(at.h / (2 * (at.lambda_t - state["log_ratio"]))) * -torch.expm1(-at.h)
        bent = torch.where(at.sigma_s > 0, finite(weight) * (clean - state["clean"]), 0.0)
        moved = at.alpha_s * (clean + bent) + at.sigma_s * at.noise(x, other)
        return moved, {"clean": other.to(x.dtype), "log_ratio": at.lambda_t}


class CFGppGradient(GradientEstimation):
    """Gradient estimation with the noise of the negative prompt alone (CFG++)."""

    contract = 2
    cfg_pp = True


class UnequalIPNDM(Adams):
    """iPNDM for steps of any lengths (arXiv:2204.13902), with weights that are right for equal steps alone: of first order.

    Else they don't add up to 1. ``LMS`` is what was meant.
    """

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        excess, *weights = self.sent(field, self._weights([near.ratio_s, near.ratio_t, *self.nodes(state)]))
        at = Step(field, t, s)
        clean = field.clean(x, t)
        noise = at.noise(x, clean)
        moved = at.euler(x, clean) + at.bent(self.sum(state, noise, weights) + excess * noise)
        return moved, self.remembered(state, noise, near.ratio_t, x)

    def _weights(self, places: list[Tensor]) -> list[Tensor]:
        """By how much all are more than 1, and those of the values before: of a lower order, and what the next order changes."""
        h, a, b, c = (u - v for u, v in zip(places, places[1:]))
        third = finite((1 - h**2 / (3 * a * (a + b))) / 2)
        grown = h * (h + a) * (h + a + b) / (a * (a + b) * (a + b + c))
        fourth = finite(((1 - h / (3 * (h + a))) / 2 + (1 - h / (2 * (h + a))) * h / (6 * (h + a + b))) * grown)
        old, near, far = finite(a * (a + b) / (b * (b + c))), finite(a / b), finite(b / c)
        return [
            old * (far - near) * fourth,
            -(h / a) / 2 - (1 + near) * third - (1 + near + old) * fourth,
            near * third + (near + old * (1 + far)) * fourth,
            -old * near * fourth,
        ]


class DEISInTime(Adams):
    """The noise as a polynomial in the time of a linear schedule of betas (tAB-DEIS of Zhang and Chen 2022, arXiv:2204.13902).

    Its integral is a sum over 10,000 points, both ends among them: where the time is short, near sigma 0, it is not the integral's value.
    """

    limit = 3
    POINTS = 10_000

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        nodes = [near.ratio_t, *self.nodes(state)]
        weights = self.sent(field, self._weights(nodes, near.ratio_s))
        at = Step(field, t, s)
        clean = field.clean(x, t)
        noise = at.noise(x, clean)
        values = [noise, *(state[f"value_{k}"] for k in range(1, self.max_order))]
        total = torch.zeros_like(noise)
        for weight, value in zip(weights, values):
            total = total + weight * value
        return at.euler(x, clean) + at.alpha_s * total, self.remembered(state, noise, near.ratio_t, x)

    def _weights(self, nodes: list[Tensor], end: Tensor) -> list[Tensor]:
        """Of the noises, the newest first: what is beside Euler's step."""
        times = [_linear_time(node) for node in nodes]
        first, last = times[0], _linear_time(end)
        share = torch.linspace(0, 1, self.POINTS, dtype=torch.float64)
        at = first.unsqueeze(-1) + (last - first).unsqueeze(-1) * share
        grown, found = _growth(at), []
        for own in times:
            values = grown
            for other in times:
                if other is not own:
                    part = (at - other.unsqueeze(-1)) / (own - other).unsqueeze(-1)
                    values = values * torch.where(other.isfinite().unsqueeze(-1), part, 1.0)
            found.append((last - first) * values.mean(-1))
        found[0] = found[0] - (end - nodes[0])
        several = nodes[1].isfinite()  # the first step is Euler's
        return [torch.where(several, weight, 0.0) for weight in found]


BETA_D = 2 * (math.log(float(torch.tensor(0.002) ** 2 + 1)) / 1e-3 - math.log(6401.0)) / (1e-3 - 1)
BETA_MIN = math.log(6401.0) - 0.5 * BETA_D
"""Of betas that grow linearly, whose sigma is 0.002 at time 0.001 and 80 at 1."""


def _linear_time(sigma: Tensor) -> Tensor:
    return (torch.sqrt(BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)) - BETA_MIN) / BETA_D


def _growth(time: Tensor) -> Tensor:
    """How fast sigma grows there."""
    grown = BETA_D * time**2 / 2 + BETA_MIN * time
    return (BETA_D * time + BETA_MIN) * torch.exp(grown) / (2 * torch.sqrt(torch.expm1(grown)))


class HalvedDPMpp3MSDE(DPMpp3MSDE):
    """Its square term has half of the weight that integrates it."""

    contract = 2
    curvature = 1


class LastStepsUniPC(UniPC):
    """UniPC whose last steps are of lower orders."""

    contract = 2
    order = 2
    lower_order_final = looks_ahead = True


class MiddleSASolver(SASolver):
    """SA-Solver with noise in the middle part of the sampling alone, and lower orders at its end."""

    contract = 2
    lower_order_final = looks_ahead = True

    def tau_at(self, field: Field, t: Tensor, like: Tensor) -> Tensor:
        sampling = sampling_of(field.noise_schedule)
        alpha, sigma = field.numbers(t)
        ratio = t.reshape(like.shape) if field.noise_schedule.sigma_is_time else sigma / alpha
        inside = (ratio <= sampling.percent(0.2)) & (ratio >= sampling.percent(0.8))
        return torch.where(inside, self.tau, 0.0).double()


class MiddleSASolverPECE(MiddleSASolver):
    """The same, which evaluates once more where the corrector has brought the latents."""

    contract = 2
    evaluations = 2
    pece = True

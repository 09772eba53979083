"""DPM-Solver with stages (Lu et al. 2022, arXiv:2206.00927): as many evaluations as there are steps, or as many as an error asks for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers.step import Step, finite


class DPMSolverFast(Scheduler):
    """DPM-Solver-fast (section 3.4): each step is one evaluation, a stage of a longer step of order 3, or 2 or 1 where the row ends.

    Stages of order 3 lie at thirds of the longer step in lambda, those of order 2 at halves. With ``h`` the way in lambda from where it began to s,
    ``r`` the share of it at which the noise is eps, and eps_0 the noise where it began: Euler's from there, less
    ``sigma_s * ((exp(h) - 1) / h - 1) / r * (eps - eps_0)``; to the end of one of order 2, ``(exp(h) - 1) / 2`` instead.
    """

    contract = 2
    order = 3
    looks_ahead = True
    on_cpu = ("began", "left", "stages")

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        none = torch.zeros_like(t)
        return {
            "start": torch.zeros_like(x), "clean": torch.zeros_like(x), "began": t.clone(), "left": none, "stages": none.clone()
        }  # fmt: skip

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        begins = state["left"] == 0
        to_come = field.following(s).isfinite().sum(-1).to(t) + 1
        stages = torch.where(begins, torch.where(to_come > 3, 3.0, to_come.clamp(max=2)), state["stages"])
        left, began = torch.where(begins, stages, state["left"]), torch.where(begins, t, state["began"])
        near, (alpha_t, sigma_t) = Step.on_cpu(field, began, s), field.numbers(t)
        r = ((alpha_t / sigma_t).log() - near.lambda_t) / near.h
        ends_second = ((stages == 2) & (left == 1)).reshape(r.shape)
        bend = torch.where(ends_second, torch.expm1(near.h) / 2, torch.expm1(near.h) / near.h - 1) / r
        field.expect(began)
        bend, first = field.send(torch.where(begins.reshape(r.shape), 0.0, finite(bend)), begins.to(t).reshape(r.shape))
        at, whole = Step(field, t, s), Step(field, began, s)
        clean = field.clean(x, t)
        start = torch.where(first > 0, x, state["start"])
        clean_0 = torch.where(first > 0, clean, state["clean"].to(clean.dtype))
        moved = whole.euler(start, clean_0)
        moved = moved - whole.sigma_s * bend * (at.noise(x, clean) - whole.noise(start, clean_0))
        return moved, {
            "start": start, "clean": clean_0.to(x.dtype), "began": began, "left": left - 1, "stages": stages
        }  # fmt: skip


class DPMSolverAdaptive(Scheduler):
    """DPM-Solver-23 (appendix C): a step of ours is many of its own, whose lengths in lambda follow from an error, row by row.

    The error is the difference of order 2 and 3, against ``max(atol, rtol * |x / alpha|)``; k-diffusion's controller: the next length is
    ``1 + atan(error^(-1/3) - 1)`` times this one, which is made again if that is below 0.81. Three evaluations each. Euler's where t or s is at an
    end of the path.
    """

    contract = 2
    evaluations = 3
    order = 3
    rtol = 0.05
    atol = 0.0078
    h_init = 0.05
    ACCEPTED = 0.81
    NEAR = 1e-5
    """In lambda: as good as there."""

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        near = Step.on_cpu(field, t, s)
        at, end = near.lambda_t.flatten(), near.lambda_s.flatten()
        going, time = at.isfinite() & end.isfinite(), t
        length = torch.full_like(at, self.h_init)
        if not bool(going.all()):
            straight, inside = Step(field, t, s).euler(x, field.clean(x, t)), self._like(field, going, x)
            x = torch.where(inside, x, straight)
        low_before = x / field.scale(t)[0]
        while bool((going := going & (at < end - self.NEAR)).any()):
            reached = going & (at + length >= end)
            h = torch.where(reached, end - at, torch.where(going, length, self.h_init))
            whole = torch.where(reached, s, field.time(torch.exp(-(at + h))))
            low, high, alpha = self._attempt(field, x, time, at, h, whole)
            scale = torch.maximum(low.abs(), low_before.abs()).mul(self.rtol).clamp(min=self.atol)
            error = ((low - high) / scale).square().flatten(1).mean(-1).sqrt().cpu().to(h)
            factor = 1 + torch.atan((error + 1e-8) ** (-1 / 3) - 1)
            accepted = going & (factor >= self.ACCEPTED)
            lost = going & ~factor.isfinite()
            moves = self._like(field, accepted, x)
            x = torch.where(moves, (alpha * high).to(x.dtype), x)
            x = torch.where(self._like(field, lost, x), math.nan, x)
            low_before = torch.where(moves, low, low_before)
            time, at = torch.where(accepted, whole, time), torch.where(accepted, at + h, at)
            length, going = torch.where(going, h * factor, length), going & ~lost
        return x, state

    def _attempt(
        self, field: Field, x: Tensor, t: Tensor, at: Tensor, h: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents / alpha at ``s``, of order 2 and of order 3, and alpha."""
        third, two_thirds = (field.time(torch.exp(-(at + r * h))) for r in (1 / 3, 2 / 3))
        field.expect(t, third, two_thirds, s)
        grown, part = torch.expm1(h), torch.expm1(2 / 3 * h) / (2 / 3 * h) - 1
        of_low, of_middle, of_high = (
            self._shaped(each, x) for each in field.send(grown * 3 / 2, 2 * part, (grown / h - 1) * 3 / 2)
        )
        to_1, to_2, to_end = (Step(field, t, time) for time in (third, two_thirds, s))
        clean = field.clean(x, t)
        noise, straight = to_1.noise(x, clean), to_end.euler(x, clean)
        x_1 = to_1.euler(x, clean)
        bent_1 = (x_1 - to_1.alpha_s * field.clean(x_1, third)) / to_1.sigma_s - noise
        x_2 = to_2.euler(x, clean) - to_2.sigma_s * of_middle * bent_1
        bent_2 = (x_2 - to_2.alpha_s * field.clean(x_2, two_thirds)) / to_2.sigma_s - noise
        low, high = (straight - to_end.sigma_s * of * bent for of, bent in ((of_low, bent_1), (of_high, bent_2)))
        return low / to_end.alpha_s, high / to_end.alpha_s, to_end.alpha_s

    def _like(self, field: Field, rows: Tensor, x: Tensor) -> Tensor:
        [sent] = field.send(rows.double())
        return self._shaped(sent, x) > 0

    def _shaped(self, values: Tensor, x: Tensor) -> Tensor:
        return values.reshape(-1, *(1 for _ in x.shape[1:]))

"""Data whose every answer is known, and how well a scheduler finds it: Gaussians, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentmill.plugin import Field, NoiseSchedule, Scheduler, State
from latentmill.schedulers import noise
from latentmill.schedulers.noise_schedules import RectifiedFlow, VarianceExploding, VariancePreserving

NOISE_SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "VP": VariancePreserving,
    "VE": VarianceExploding,
    "flow": RectifiedFlow,
}
"""The noise schedules on which a scheduler is checked."""


class GaussianField(Field):
    """The exact answers for data that are Gaussian, ``x0 ~ N(mean, std²)`` in every element, for B rows of one shape."""

    def __init__(
        self, schedule: NoiseSchedule, mean: Tensor, std: float, seeds: list[int], shape: tuple[int, ...] = (3,)
    ) -> None:
        """``mean[B]`` is each row's own, so that a row that takes another's values shows."""
        self.noise_schedule, self.std, self.seeds, self.shape = schedule, std, seeds, shape
        self.mean = self._column(mean.double())
        self.evaluations, self.draws = 0, 0
        self.ahead: Tensor | None = None
        """The times ``[B, n]`` behind a step, where they are known."""
        self._scaled: dict[bytes, tuple[Tensor, Tensor]] = {}
        """By times: a step asks for the same ones several times, and the next step for the last of them."""

    def take(self, rows: list[int]) -> GaussianField:
        """The field of some of the rows, in that order."""
        mean = self.mean.flatten()[rows]
        return GaussianField(self.noise_schedule, mean, self.std, [self.seeds[row] for row in rows], self.shape)

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._scale(t)
        return alpha.clone(), sigma.clone()

    def _scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``scale``, read only."""
        key = t.numpy().tobytes()
        if key not in self._scaled:
            alpha, sigma = self.noise_schedule.scale(t)
            self._scaled[key] = self._column(alpha), self._column(sigma)
        return self._scaled[key]

    def time(self, ratio: Tensor) -> Tensor:
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[x0 | x]``, of a Gaussian prior and Gaussian noise."""
        self.evaluations += 1
        alpha, sigma = self._scale(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def following(self, s: Tensor) -> Tensor:
        found = super().following(s)
        if self.ahead is not None:
            found[:, : self.ahead.shape[1]] = self.ahead[:, :4]  # of four at most
        return found

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        self.draws += 1
        drawn = [noise.between(seed, a, b, self.shape) for seed, a, b in zip(self.seeds, t.tolist(), s.tolist())]
        return torch.stack(drawn).double()

    def start(self, t: Tensor) -> Tensor:
        """Latents at times ``t[B]``, distributed as the noised data are, fixed by each row's seed."""
        alpha, sigma = self._scale(t)
        drawn = torch.stack([noise.start(seed, self.shape) for seed in self.seeds]).double()
        return alpha * self.mean + torch.sqrt(alpha**2 * self.std**2 + sigma**2) * drawn

    def exact(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow ODE carries ``x`` from ``t`` to ``s``: quantiles stay quantiles."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scale(t), self.scale(s)
        spread = torch.sqrt((alpha_s**2 * self.std**2 + sigma_s**2) / (alpha_t**2 * self.std**2 + sigma_t**2))
        return alpha_s * self.mean + spread * (x - alpha_t * self.mean)

    def _column(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1 for _ in self.shape))


def follow(scheduler: Scheduler, field: Field, x: Tensor, times: Tensor) -> Tensor:
    """Carry ``x[B, ...]`` along ``times[B, n + 1]``, all rows at once."""
    state = scheduler.init(field, x, times[:, 0])
    for i in range(times.shape[1] - 1):
        x, state = advance(scheduler, field, x, times, i, state)
    return x


def advance(scheduler: Scheduler, field: Field, x: Tensor, times: Tensor, i: int, state: State) -> tuple[Tensor, State]:
    """Step ``i`` of all rows along ``times[B, n + 1]``."""
    if isinstance(field, GaussianField):
        field.ahead = times[:, i + 2 :]
    return scheduler.step(field, x, times[:, i], times[:, i + 1], state)


def measure_order(scheduler: Scheduler, schedule: NoiseSchedule, steps: tuple[int, int] = (80, 160)) -> float:
    """The order of convergence on Gaussian data, in float64: how the error shrinks when the steps are doubled.

    Steps are of one length h in lambda = log(alpha / sigma), from where sigma / alpha is 2.5 to where it is 0.45: nearer the
    ends errors of different sign cancel, and what is measured at a few steps is chance. They begin with h³ and double up to
    h, so that the first steps of a multistep solver, which have no history and so are of low order, don't hide the order of
    the others.
    """
    field = GaussianField(schedule, torch.tensor([0.7]), 0.5, [3], (64,))
    first, last = math.log(2.5), math.log(0.45)
    errors = []
    for count in steps:
        length = abs(last - first) / count
        lengths = [length**3]
        while lengths[-1] < length / 2:
            lengths.append(lengths[-1] * 2)
        walked = torch.tensor([0.0, *lengths, *[length] * count], dtype=torch.float64).cumsum(0)
        ratios = torch.exp(first + (last - first) * walked[walked < abs(last - first) * (1 + 1e-9)] / abs(last - first))
        times = schedule.time(ratios)[None]
        x = field.start(times[:, 0])
        error = follow(scheduler, field, x.clone(), times) - field.exact(x, times[:, 0], times[:, -1])
        errors.append(float(error.square().mean().sqrt()))
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


class ImpulseField(GaussianField):
    """Answers for one row whose elements are each moved by one draw alone: the first by none, the second by what latents begin with.

    The last is moved by all draws, as ``weights`` say. A solver that is affine in each element carries that one to the same sum of the
    others; so what it does to any draws is known.
    """

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float, draws: int) -> None:
        super().__init__(schedule, torch.tensor([mean]), std, [0], (draws + 3,))
        self.weights = torch.randn(draws + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.drawn: dict[tuple[float, float], int] = {}
        """The number of each draw, by its times: the same times are the same draw."""

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        self.draws += 1
        return self._impulse(1 + self.drawn.setdefault((float(t), float(s)), len(self.drawn)))

    def start(self, t: Tensor) -> Tensor:
        alpha, sigma = self._scale(t)
        return alpha * self.mean + torch.sqrt(alpha**2 * self.std**2 + sigma**2) * self._impulse(0)

    def _impulse(self, number: int) -> Tensor:
        drawn = torch.zeros(1, *self.shape, dtype=torch.float64)
        if number < len(self.weights):
            drawn[0, 1 + number], drawn[0, -1] = 1.0, self.weights[number]
        return drawn


def moments(
    scheduler: Scheduler, schedule: NoiseSchedule, times: Tensor, mean: float, std: float
) -> tuple[float, float] | None:
    """Mean and variance of what comes out of ``times[1, n + 1]``, of all draws that there may be; None if the solver is not affine."""
    field, steps = ImpulseField(schedule, mean, std, 0), times.shape[1] - 1
    follow(scheduler, field, field.start(times[:, 0]), times[:, :2])
    draws = len(field.drawn) * steps  # if each step draws as the first does; what is never drawn gains nothing
    while True:
        field = ImpulseField(schedule, mean, std, draws)
        x = follow(scheduler, field, field.start(times[:, 0]), times)[0]
        if len(field.drawn) <= draws:
            break
        draws = len(field.drawn)
    gains = x[1:-1] - x[0]
    if abs(float(x[0] + field.weights @ gains - x[-1])) > 1e-6 * float(x.abs().max()):
        return None
    return float(x[0]), float(gains @ gains)


def check_moments(
    scheduler: Scheduler, schedule: NoiseSchedule, name: str, samples: int = 100_000, steps: int = 1000
) -> None:
    """Fail unless mean and variance of Gaussian data are reached within four standard errors of so many samples.

    They are reckoned; of a solver that is not affine in each element they are those of the samples.
    """
    mean, std = 0.7, 0.5
    # Equal steps in lambda. Stochastic solvers are of first order: at 1000 steps their bias is a third of what is allowed.
    alpha, sigma = schedule.scale(torch.tensor(0.995, dtype=torch.float64))
    first, last = math.log(float(sigma / alpha)), math.log(0.01)
    inner = schedule.time(torch.exp(torch.linspace(first, last, steps, dtype=torch.float64)))
    times = torch.cat([inner, torch.zeros(1, dtype=torch.float64)])[None]
    found = moments(scheduler, schedule, times, mean, std)
    if found is None:
        field = GaussianField(schedule, torch.tensor([mean]), std, [5], (samples,))
        x = follow(scheduler, field, field.start(times[:, 0]), times)
        found = float(x.mean()), float(x.var())
    found_mean, found_variance = found
    mean_error, variance_error = std / math.sqrt(samples), std**2 * math.sqrt(2 / samples)
    assert abs(found_mean - mean) <= 4 * mean_error, (
        f"mean {found_mean:.4f} on the {name} noise schedule, where the data's is {mean} +- {mean_error:.4f}"
    )
    assert abs(found_variance - std**2) <= 4 * variance_error, (
        f"variance {found_variance:.4f} on the {name} noise schedule, where the data's is {std**2} +- {variance_error:.4f}"
    )

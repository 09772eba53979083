"""Checks that a plugin inherits: subclass a suite in a test file, name the plugin, and pytest runs them.

class TestTrapezoid(SchedulerSuite):
    scheduler = Trapezoid
    order = 2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import tensors
from latentmill.plugin import VAE, Conditioning, Denoiser, Field, NoiseSchedule, RowError, Scheduler, State
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

    def take(self, rows: list[int]) -> GaussianField:
        """The field of some of the rows, in that order."""
        mean = self.mean.flatten()[rows]
        return GaussianField(self.noise_schedule, mean, self.std, [self.seeds[row] for row in rows], self.shape)

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.noise_schedule.scale(t)
        return self._column(alpha), self._column(sigma)

    def time(self, ratio: Tensor) -> Tensor:
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[x0 | x]``, of a Gaussian prior and Gaussian noise."""
        self.evaluations += 1
        alpha, sigma = self.scale(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        self.draws += 1
        drawn = [noise.between(seed, a, b, self.shape) for seed, a, b in zip(self.seeds, t.tolist(), s.tolist())]
        return torch.stack(drawn).double()

    def start(self, t: Tensor) -> Tensor:
        """Latents at times ``t[B]``, distributed as the noised data are, fixed by each row's seed."""
        alpha, sigma = self.scale(t)
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
        x, state = scheduler.step(field, x, times[:, i], times[:, i + 1], state)
    return x


class SchedulerSuite:
    """What every scheduler must hold: rows that don't touch each other, state as a value, exact answers."""

    scheduler: ClassVar[type[Scheduler]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    steps: ClassVar[int] = 1000
    """Steps after which a stochastic scheduler's bias is to be within the sampling error; fewer where its drift allows."""

    def test_rows_do_not_touch_each_other(self) -> None:
        """Each row of a mixed batch, at times of its own, against the row alone."""
        for name, schedule in NOISE_SCHEDULES.items():
            field, times = _mixed(schedule())
            together = follow(self.scheduler(), field, field.start(times[:, 0]), times)
            for row in range(len(times)):
                alone = field.take([row])
                wanted = follow(self.scheduler(), alone, alone.start(times[row : row + 1, 0]), times[row : row + 1])
                assert torch.allclose(together[row], wanted[0], rtol=1e-9, atol=1e-12), (
                    f"on the {name} noise schedule row {row} came out otherwise in a batch than alone: "
                    "a step must treat each row by its own times and state, and keep nothing in the scheduler"
                )

    def test_state_is_a_value(self) -> None:
        """Rows saved to Arrow in the middle, read back in another order by another instance, go on as if nothing was."""
        order = [3, 0, 2, 1]
        field, times = _mixed(VariancePreserving())
        x = field.start(times[:, 0])
        wanted = follow(self.scheduler(), field, x, times)
        scheduler = self.scheduler()
        state = scheduler.init(field, x, times[:, 0])
        for i in range(2):
            x, state = scheduler.step(field, x, times[:, i], times[:, i + 1], state)
        for name, value in state.items():
            assert value.shape[:1] == (len(times),), (
                f"state {name!r} of shape {tuple(value.shape)}: the batch axis comes first"
            )
        table = tensors.with_tensor(pa.table({"row": list(range(len(times)))}), "x", x)
        for name, value in state.items():
            table = tensors.with_tensor(table, f"state:{name}", value)
        table = table.take(order)
        restored: State = {
            name: tensors.from_arrow(table, f"state:{name}").clone().reshape(len(order), *value.shape[1:])
            for name, value in state.items()
        }
        x, field, times, scheduler = (
            tensors.from_arrow(table, "x").clone(),
            field.take(order),
            times[order],
            self.scheduler(),
        )
        for i in range(2, times.shape[1] - 1):
            x, restored = scheduler.step(field, x, times[:, i], times[:, i + 1], restored)
        assert torch.equal(x, wanted[order]), (
            "rows that were saved after two steps and resumed elsewhere came out otherwise: "
            "everything that a step remembers must be in the state that it returns"
        )

    def test_both_ends_are_finite(self) -> None:
        """From pure noise to clean, in one step and in five."""
        for name, schedule in NOISE_SCHEDULES.items():
            for steps in (1, 2, 5):
                times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).repeat(2, 1)
                field = GaussianField(schedule(), torch.tensor([0.5, -2.0]), 0.3, [1, 2])
                x = follow(self.scheduler(), field, field.start(times[:, 0]), times)
                assert bool(x.isfinite().all()), (
                    f"not finite after {steps} steps from t = 1 to t = 0 on the {name} noise schedule: "
                    "alpha may be 0 at t = 1, and sigma is 0 at t = 0"
                )

    def test_a_point_is_reached(self) -> None:
        """Data that are one point have one clean estimate, and every solver must end there."""
        for name, schedule in NOISE_SCHEDULES.items():
            times = torch.linspace(1.0, 0.0, 9, dtype=torch.float64).repeat(2, 1)
            field = GaussianField(schedule(), torch.tensor([0.5, -2.0]), 0.0, [1, 2])
            x = follow(self.scheduler(), field, field.start(times[:, 0]), times)
            assert torch.allclose(x, field.mean.expand_as(x), rtol=1e-9, atol=1e-9), (
                f"data that are the one point {field.mean.flatten().tolist()} came out as {x[:, 0].tolist()} on the {name} noise schedule"
            )

    def test_the_distribution_is_reached(self) -> None:
        """Deterministic: the measured order of convergence. Stochastic: mean and variance of 100,000 samples."""
        for name, schedule in NOISE_SCHEDULES.items():
            if self.scheduler().stochastic:
                check_moments(self.scheduler(), schedule(), name, steps=self.steps)
            else:
                measured = measure_order(self.scheduler(), schedule())
                promised = self.scheduler().order
                assert measured >= 0.9 * promised, (
                    f"order {measured:.2f} on the {name} noise schedule, where {promised} was promised: a coefficient is wrong"
                )

    def test_it_is_what_it_says(self) -> None:
        """``evaluations`` counts the calls of ``field.clean``, ``stochastic`` says whether noise is drawn."""
        scheduler, schedule = self.scheduler(), VariancePreserving()
        times = torch.linspace(0.9, 0.5, 6, dtype=torch.float64).repeat(2, 1)
        field = GaussianField(schedule, torch.tensor([0.5, -2.0]), 0.3, [1, 2])
        x = field.start(times[:, 0])
        state = scheduler.init(field, x, times[:, 0])
        for i in range(4):
            x, state = scheduler.step(field, x, times[:, i], times[:, i + 1], state)
        field.evaluations = field.draws = 0
        scheduler.step(field, x, times[:, 4], times[:, 5], state)
        assert field.evaluations == scheduler.evaluations, (
            f"a step called field.clean {field.evaluations} times, and `evaluations` says {scheduler.evaluations}"
        )
        assert bool(field.draws) == scheduler.stochastic, (
            f"a step drew noise {field.draws} times, and `stochastic` says {scheduler.stochastic}"
        )


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
        error = follow(scheduler, field, x, times) - field.exact(x, times[:, 0], times[:, -1])
        errors.append(float(error.square().mean().sqrt()))
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


def check_moments(
    scheduler: Scheduler, schedule: NoiseSchedule, name: str, samples: int = 100_000, steps: int = 1000
) -> None:
    """Fail unless mean and variance of Gaussian data are reached within four standard errors."""
    mean, std = 0.7, 0.5
    field = GaussianField(schedule, torch.tensor([mean]), std, [5], (samples,))
    # Equal steps in lambda. Stochastic solvers are of first order: at 1000 steps their bias is a third of what is allowed.
    alpha, sigma = schedule.scale(torch.tensor(0.995, dtype=torch.float64))
    first, last = math.log(float(sigma / alpha)), math.log(0.01)
    inner = schedule.time(torch.exp(torch.linspace(first, last, steps, dtype=torch.float64)))
    times = torch.cat([inner, torch.zeros(1, dtype=torch.float64)])[None]
    x = follow(scheduler, field, field.start(times[:, 0]), times)
    found_mean, found_variance = float(x.mean()), float(x.var())
    mean_error, variance_error = std / math.sqrt(samples), std**2 * math.sqrt(2 / samples)
    assert abs(found_mean - mean) <= 4 * mean_error, (
        f"mean {found_mean:.4f} on the {name} noise schedule, where the data's is {mean} +- {mean_error:.4f}"
    )
    assert abs(found_variance - std**2) <= 4 * variance_error, (
        f"variance {found_variance:.4f} on the {name} noise schedule, where the data's is {std**2} +- {variance_error:.4f}"
    )


def _mixed(schedule: NoiseSchedule) -> tuple[GaussianField, Tensor]:
    """Four rows with their own means, seeds and times ``[4, 7]``; the first two end clean, the last two on the way."""
    ends = [(1.0, 0.0), (0.6, 0.0), (0.9, 0.2), (0.3, 0.1)]
    times = torch.stack([torch.linspace(first, last, 7, dtype=torch.float64) for first, last in ends])
    return GaussianField(schedule, torch.tensor([0.5, -2.0, 3.0, 0.0]), 0.3, [11, 12, 13, 14]), times


class VAESuite:
    """What every VAE must hold. Runs on the CPU."""

    vae: ClassVar[type[VAE]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    size: ClassVar[tuple[int, int]] = (64, 64)
    """Height and width of the pictures it is tried on, in pixels."""
    min_psnr: ClassVar[float] = 20.0
    """What a smooth picture must come back with, in dB."""

    def test_the_space_is_known_before_loading_and_is_the_same_everywhere(self) -> None:
        """The driver asks for the spec, and never loads."""
        first, second = self.vae(), self.vae()
        spec = first.spec
        assert spec == second.spec, f"two instances are of different spaces: {spec} and {second.spec}"
        first.load(torch.device("cpu"))
        assert first.spec == spec, f"loading changed the space from {spec} to {first.spec}"
        assert spec.fingerprint, "the spec needs a fingerprint, so that other weights' latents can be refused"

    def test_shapes_are_what_the_spec_says(self) -> None:
        """``encode`` gives what ``spec.shape`` says, ``decode`` the picture's shape, both finite."""
        vae, pictures = self._loaded()
        latents = vae.encode(pictures)
        wanted = (len(pictures), *vae.spec.shape(*self.size))
        assert tuple(latents.shape) == wanted, f"latents of shape {tuple(latents.shape)}, and the spec says {wanted}"
        decoded = vae.decode(latents)
        assert decoded.shape == pictures.shape, f"pictures of shape {tuple(decoded.shape)} from {tuple(pictures.shape)}"
        assert bool(latents.isfinite().all() and decoded.isfinite().all()), "latents or pictures are not finite"
        try:
            vae.spec.shape(self.size[0] * vae.spec.downscale + 1, self.size[1])
        except RowError:
            return
        assert vae.spec.downscale == 1, "a size that isn't a multiple of downscale must raise RowError"

    def test_pictures_come_back(self) -> None:
        """And what was handed in is not written into."""
        vae, pictures = self._loaded()
        before = pictures.clone()
        latents = vae.encode(pictures)
        kept = latents.clone()
        error = float((vae.decode(latents).clamp(-1, 1) - pictures).square().mean())
        psnr = 10 * math.log10(4 / max(error, 1e-12))
        assert psnr >= self.min_psnr, (
            f"{psnr:.1f} dB after encode and decode, {self.min_psnr} expected: scale or shift?"
        )
        assert torch.equal(pictures, before) and torch.equal(latents, kept), "an input was written into"

    def test_rows_do_not_touch_each_other(self) -> None:
        """A picture's latent is the same alone as in company."""
        vae, pictures = self._loaded()
        together = vae.encode(pictures)
        decoded = vae.decode(together)
        for row in range(len(pictures)):
            alone = vae.encode(pictures[row : row + 1])
            assert torch.allclose(alone[0], together[row], rtol=1e-3, atol=1e-4), (
                f"encode: row {row} depends on its company"
            )
            alone = vae.decode(together[row : row + 1])
            assert torch.allclose(alone[0], decoded[row], rtol=1e-3, atol=1e-4), (
                f"decode: row {row} depends on its company"
            )

    def _loaded(self) -> tuple[VAE, Tensor]:
        vae = self.vae()
        vae.load(torch.device("cpu"))
        height, width = self.size
        y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
        colours = [torch.stack([x + 0 * y, 0 * x + y, x * y]) * gain for gain in (0.8, -0.6, 0.3)]
        return vae, torch.stack(colours).contiguous()


class DenoiserSuite:
    """What every denoiser must hold. Runs on the CPU."""

    denoiser: ClassVar[type[Denoiser]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    shape: ClassVar[tuple[int, ...]] = (4, 16, 16)
    """Of the latents that it is tried on."""
    has_grid: ClassVar[bool] = False
    """Whether it has a grid of its own."""

    def conditioning(self) -> Conditioning:
        """That of three different prompts, as its text encoder makes it."""
        raise NotImplementedError

    def test_path_and_prediction_are_known_before_loading(self) -> None:
        """The driver asks for them, and never loads."""
        denoiser = self.denoiser()
        assert denoiser.prediction in ("epsilon", "v", "sample", "flow"), f"prediction {denoiser.prediction!r}"
        alpha, sigma = denoiser.noise_schedule.scale(torch.linspace(0, 1, 11, dtype=torch.float64))
        assert float(sigma[0]) == 0.0 and bool((sigma.diff() > 0).all()), "sigma must grow with t, from 0"
        assert bool((alpha.diff() <= 0).all() and alpha[0] > 0), "alpha must not grow with t"

    def test_predictions_are_finite_and_shaped_as_the_latents(self) -> None:
        """From noise to nearly clean; and what was handed in is not written into."""
        denoiser, x, t, told = self._loaded()
        before = x.clone(), {name: value.clone() for name, value in told.items()}
        predicted = denoiser.predict(x, t, told)
        assert predicted.shape == x.shape, f"a prediction of shape {tuple(predicted.shape)} of latents {tuple(x.shape)}"
        assert bool(predicted.isfinite().all()), f"not finite at some of the times {t.tolist()}"
        same = torch.equal(x, before[0]) and all(torch.equal(told[name], value) for name, value in before[1].items())
        assert same, "an input was written into"

    def test_rows_do_not_touch_each_other(self) -> None:
        """A row at a time of its own, alone and in company."""
        denoiser, x, t, told = self._loaded()
        together = denoiser.predict(x, t, told)
        for i in range(len(x)):
            alone = denoiser.predict(
                x[i : i + 1], t[i : i + 1], {name: value[i : i + 1] for name, value in told.items()}
            )
            assert torch.allclose(alone[0], together[i], rtol=1e-3, atol=1e-4), f"row {i} depends on its company"

    def test_latents_times_and_prompts_count(self) -> None:
        """Each changes the prediction."""
        denoiser, x, t, told = self._loaded()
        first = denoiser.predict(x, t, told)
        others = {name: value.roll(1, 0) for name, value in told.items()}
        for what, changed in (
            ("latents", (x.roll(1, 0), t, told)),
            ("times", (x, t.roll(1), told)),
            ("prompts", (x, t, others)),
        ):
            assert not torch.allclose(denoiser.predict(*changed), first, rtol=1e-5, atol=1e-7), (
                f"the {what} change nothing"
            )

    def test_its_grid_descends_from_noise_to_clean(self) -> None:
        """For few steps and many; or there is none, and it says so."""
        denoiser = self.denoiser()
        for steps in (1, 4, 20):
            if not self.has_grid:
                try:
                    denoiser.times(steps, self.shape)
                except ValueError:
                    continue
                raise AssertionError("a denoiser without a grid must raise ValueError")
            times = denoiser.times(steps, self.shape)
            assert times.dtype == torch.float64 and times.shape == (steps + 1,), (
                f"{steps} steps are {tuple(times.shape)} times"
            )
            inside = float(times[0]) <= 1 and float(times[-1]) >= 0
            assert inside and bool((times.diff() < 0).all()), (
                f"times must descend from 1 at most to 0 at least: {times}"
            )

    def _loaded(self) -> tuple[Denoiser, Tensor, Tensor, Conditioning]:
        denoiser = self.denoiser()
        denoiser.load(torch.device("cpu"))
        x = torch.randn(3, *self.shape, generator=torch.Generator().manual_seed(0))
        told = self.conditioning()
        if denoiser.guidance_embedded:
            told = {**told, "guidance_scale": torch.tensor([1.0, 3.5, 7.0])}
        return denoiser, x, torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64), told

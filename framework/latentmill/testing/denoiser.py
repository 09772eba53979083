"""What every denoiser must hold."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Conditioning, Denoiser, FollowsAuthors


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
        authors = FollowsAuthors.of(self.denoiser())
        for steps in (1, 4, 20):
            if not self.has_grid:
                try:
                    authors.times(steps, self.shape)
                except ValueError:
                    continue
                raise AssertionError("a denoiser without a grid must raise ValueError")
            times = authors.times(steps, self.shape)
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

"""What every denoiser must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Conditioning, Denoiser, FollowsAuthors, LatentSpec
from latentmill.testing.behaviour import Arguments, MethodCall, loaded
from latentmill.testing.suite import RowsSuite, identity, without_weights


class DenoiserSuite(RowsSuite):
    """What every denoiser must hold. Runs on the CPU."""

    kind = "denoiser"
    denoiser: ClassVar[type[Denoiser]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    shape: ClassVar[tuple[int, ...]] = (4, 16, 16)
    """Of the latents that it is tried on; of clips ``(C, t, h, w)``."""
    other_shapes: ClassVar[Sequence[tuple[int, ...]] | None] = None
    """Others that it takes: sides of 3 by 5 and 5 by 3 times ``multiple_of``, and of clips other numbers of frames, unless it is said."""
    has_grid: ClassVar[bool] = False
    """Whether it has a grid of its own."""

    def conditioning(self) -> Conditioning:
        """That of three different prompts, as its text encoder makes it; and values of its ``row_fields`` that have no default.

        Not ``mask`` and ``masked`` of a denoiser that ``inpaints``: the suite makes them.
        """
        raise NotImplementedError

    def test_schedule_and_prediction_are_known_before_loading(self) -> None:
        """The driver asks for them, and never loads."""
        denoiser = self.denoiser()
        assert denoiser.prediction in ("epsilon", "v", "sample", "flow"), (
            f"prediction {denoiser.prediction!r} is unknown: it is epsilon, v, sample or flow"
        )
        alpha, sigma = denoiser.noise_schedule.scale(torch.linspace(0, 1, 11, dtype=torch.float64))
        assert float(sigma[0]) == 0.0 and bool((sigma.diff() > 0).all()), (
            "the noise schedule's sigma must be 0 at t = 0 and grow with t"
        )
        assert bool((alpha.diff() <= 0).all() and alpha[0] > 0), "the noise schedule's alpha must not grow with t"

    def test_check_needs_no_weights(self) -> None:
        """The driver asks it of the VAE's space, and never loads."""
        without_weights(self.denoiser(), "check", _spec(self.shape))

    def test_predictions_are_finite_and_shaped_as_the_latents(self) -> None:
        """From noise to nearly clean; odd and oblong latents, too."""
        denoiser = loaded(self.denoiser)
        self._check_prediction(denoiser, self._rows())
        for shape in self._other_shapes():
            try:
                self._check_prediction(denoiser, self._rows(shape))
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(
                    f"predict raises {type(error).__name__} for latents {[3, *shape]}: latents may be of any sides that are "
                    f"multiples of multiple_of, {denoiser.multiple_of}; or name in `other_shapes` those that it takes\n{error}"
                ) from error

    def _check_prediction(self, denoiser: Denoiser, rows: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            predicted = predict(denoiser, rows)["prediction"]
        assert predicted.shape == rows["x"].shape, (
            f"predict gives the shape {list(predicted.shape)} for latents {list(rows['x'].shape)}: a prediction is shaped as the latents"
        )
        assert bool(predicted.isfinite().all()), (
            f"predict gives numbers that are not finite at some of the times {rows['t'].tolist()}"
        )

    def test_latents_times_and_prompts_count(self) -> None:
        """Each changes the prediction."""
        denoiser, rows = loaded(self.denoiser), self._rows()
        others = {"x", "t", "guidance_scale", *(field.name for field in self.denoiser().row_fields)}
        told = [name for name in rows if name not in others]
        with torch.no_grad():
            first = predict(denoiser, rows)["prediction"].clone()
            for what, names in (("latents", ["x"]), ("times", ["t"]), ("prompts", told)):
                other = {name: value.roll(1, 0) if name in names else value for name, value in rows.items()}
                assert not torch.allclose(predict(denoiser, other)["prediction"], first, rtol=1e-5, atol=1e-7), (
                    f"the {what} change nothing in the prediction: predict does not read them"
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
                raise AssertionError(
                    "times gives a grid, and the suite's has_grid says there is none: set it, or raise ValueError"
                )
            times = authors.times(steps, self.shape)
            assert times.dtype == torch.float64 and times.shape == (steps + 1,), (
                f"times gives {list(times.shape)} times of {times.dtype} for {steps} steps: they are [steps + 1], float64"
            )
            inside = float(times[0]) <= 1 and float(times[-1]) >= 0
            assert inside and bool((times.diff() < 0).all()), (
                f"times must descend from 1 at most to 0 at least\n{times}"
            )

    def _other_shapes(self) -> Sequence[tuple[int, ...]]:
        if self.other_shapes is not None:
            return self.other_shapes
        channels, *frames = self.shape[:-2]
        of = self.denoiser().multiple_of
        sides = ((2, (3 * of, 5 * of)), (-1, (5 * of, 3 * of)))
        return [(channels, *(count + more for count in frames), *each) for more, each in sides]

    def _rows(self, shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        x = torch.randn(3, *(shape or self.shape), generator=torch.Generator().manual_seed(0))
        rows = {"x": x, "t": torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64), **self.conditioning()}
        denoiser = self.denoiser()
        if denoiser.guidance_embedded:
            rows["guidance_scale"] = torch.tensor([1.0, 3.5, 7.0])
        for field in denoiser.row_fields:
            if field.default is not None:
                rows.setdefault(field.name, torch.tensor([field.default] * 3))
        if denoiser.inpaints:
            rows |= {"mask": (x[:, :1].roll(1, -1) > 0).float(), "masked": x.flip(-1)}
        return rows

    def _question(self) -> Callable[[Any], dict[str, Any]]:
        return partial(asked, shape=tuple(self.shape))

    def _calls(self) -> list[MethodCall]:
        return [MethodCall("predict", predict, self._rows())]


def asked(denoiser: Denoiser, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the driver asks a denoiser."""
    alpha, sigma = denoiser.noise_schedule.scale(torch.linspace(0, 1, 11, dtype=torch.float64))
    return {
        **identity(denoiser),
        "prediction": denoiser.prediction,
        "the noise schedule's alpha": alpha,
        "the noise schedule's sigma": sigma,
        "check": str(without_weights(denoiser, "check", _spec(shape))),
    }


def predict(denoiser: Denoiser, rows: Arguments) -> dict[str, Tensor]:
    """``predict`` as a call."""
    told = {name: value for name, value in rows.items() if name not in ("x", "t")}
    return {"prediction": denoiser.predict(rows["x"], rows["t"], told)}


def _spec(shape: tuple[int, ...]) -> LatentSpec:
    return LatentSpec(shape[0], 8, 1.0, 0.0, "float32", "the suite's", time_downscale=4 if len(shape) > 3 else 0)

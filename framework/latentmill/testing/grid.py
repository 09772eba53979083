"""What every grid must hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentmill.plugin import Grid, NoiseSchedule, Start
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.testing.behaviour import GENERATORS, alike, copied, seed_all
from latentmill.testing.gaussian import NOISE_SCHEDULES
from latentmill.testing.suite import PluginSuite

SCHEDULES: Mapping[str, Callable[[], NoiseSchedule]] = {
    **NOISE_SCHEDULES,
    "zero terminal SNR": partial(VariancePreserving, zero_terminal_snr=True),
}
"""The noise schedules on which a grid is checked; in the last sigma / alpha has no end."""


class GridSuite(PluginSuite):
    """What every grid must hold: times that fall, as many as there are steps, and above 0, where the last step leads."""

    kind = "grid"
    grid: ClassVar[type[Grid]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    steps: ClassVar[Sequence[int]] = (1, 2, 5, 50)
    """The numbers of steps that it is tried on."""
    made_on: ClassVar[Sequence[str]] = tuple(NOISE_SCHEDULES)
    """Those of ``VP``, ``VE``, ``flow`` and ``zero terminal SNR`` on which it can be made: on the others it may raise ValueError."""

    def test_times_fall_from_noise_to_what_is_nearly_clean(self) -> None:
        """One for each step, at which it begins, on every noise schedule."""
        for (name, steps), found in times(self.grid(), self.steps).items():
            about = f"for {steps} {'step' if steps == 1 else 'steps'} on the {name} noise schedule"
            if isinstance(found, Exception):
                assert name not in self.made_on and isinstance(found, ValueError), (
                    f"times raises {type(found).__name__} {about}: raise ValueError where it can't be made, and say in `made_on` "
                    f"where it can\n{found}"
                )
                continue
            right = isinstance(found, Tensor) and found.dtype == torch.float64 and found.device.type == "cpu"
            assert right and found.ndim == 1, (
                f"times gives {_about(found)} {about}: it gives float64 times on the CPU, [steps]"
            )
            assert len(found) == steps, (
                f"times gives {len(found)} times {about}: it gives the time at which each step begins, and not where the last one leads"
            )
            assert bool(found.isfinite().all()), f"times gives times that are not finite {about}\n{found}"
            assert bool((found.diff() < 0).all()), (
                f"times do not fall {about}: from noise to clean, each below the last\n{found}"
            )
            assert float(found[0]) <= 1, (
                f"times begin at {float(found[0]):.3g} {about}: 1 is noise, and no time is above it"
            )
            assert float(found[-1]) > 0, (
                f"times end at {float(found[-1]):.3g} {about}: the last step begins above 0, and the framework lets it lead there"
            )

    def test_a_row_that_it_says_whole_is_a_way_from_noise(self) -> None:
        """``start`` says nothing, or falling times between 1 and 0, and with how much noise the first of them begins."""
        for name, make in SCHEDULES.items():
            for steps, strength in ((steps, strength) for steps in self.steps for strength in (1.0, 0.5, 0.0)):
                try:
                    found = self.grid().start(make(), steps, strength, (4, 8, 8))
                except ValueError:
                    continue
                about = f"start, for {steps} steps of strength {strength:g} on the {name} noise schedule, gives"
                if found is None:
                    continue
                assert isinstance(found, Start) and isinstance(found.times, Tensor), f"{about} no Start: {found!r:.80}"
                times = found.times
                assert times.dtype == torch.float64 and times.ndim == 1 and len(times) > 0, (
                    f"{about} {_about(times)} as times"
                )
                falls = bool((times.diff() < 0).all()) and float(times[-1]) >= 0 and float(times[0]) <= 1
                assert falls, f"{about} times that do not fall, from 1 at most to 0 at least\n{times}"
                numbers = found.alpha, found.sigma, found.scale
                assert all(0 <= number < math.inf for number in numbers) and 0 < found.leaves < math.inf, (
                    f"{about} alpha, sigma and scale {numbers}, and leaves {found.leaves}"
                )
                assert not found.state, f"{about} a state, {[*found.state]}: a grid knows no solver"

    def test_the_noise_schedule_is_left_as_it_was(self) -> None:
        """It is the denoiser's, which goes on with it."""
        grid = self.grid()
        for name, make in SCHEDULES.items():
            schedule = make()
            before = copied(vars(schedule))
            for steps in self.steps:
                ask(grid, schedule, steps)
                asked_whole(grid, schedule, steps)
            changed = [
                key for key in {**before, **vars(schedule)} if not alike(before.get(key), vars(schedule).get(key))
            ]
            assert not changed, (
                f"times writes into the {name} noise schedule, its {changed[0]!r}: it is the denoiser's, which goes on with it"
            )

    def test_nothing_is_remembered_between_calls(self) -> None:
        """A row's times are the same whatever rows came before."""
        assert not self._remembers(), (
            "times gives other times after an earlier call: it remembers what it was asked, or has a generator of its own; times "
            "must follow from the settings, the noise schedule and the steps alone"
        )

    def test_no_global_random_generator_is_used(self) -> None:
        """Of torch, numpy and random, seeded two ways."""
        name = self._draws()
        assert not name, (
            f"times draws from the global random generator of {name}: times must follow from the settings, the noise schedule "
            "and the steps alone"
        )

    def _remembers(self) -> bool:
        alone = {(name, n): times(self.grid(), [n], [name])[name, n] for name in SCHEDULES for n in self.steps}
        grid = self.grid()
        return not all(
            same(found[key], alone[key]) for found in (times(grid, self.steps) for _ in "ab") for key in alone
        )

    def _draws(self) -> str:
        wanted = times(self.grid(), self.steps)
        for at, name in enumerate(GENERATORS):
            found = times(self.grid(), self.steps, seeds=[int(i == at) for i in range(3)])
            if not all(same(found[key], wanted[key]) for key in wanted):
                return name
        return ""

    def _explained(self) -> bool:
        return self._remembers() or bool(self._draws())

    def _work(self) -> Callable[[Any], Mapping[str, Any]]:
        return partial(all_times, steps=tuple(self.steps))


def all_times(grid: Grid, steps: Sequence[int]) -> dict[str, Any]:
    """The times of all noise schedules and numbers of steps, by name."""
    return {f"times.{name}.{count}": found for (name, count), found in times(grid, steps).items()}


def times(
    grid: Grid, steps: Sequence[int], schedules: Iterable[str] = tuple(SCHEDULES), seeds: Sequence[int] = (0, 0, 0)
) -> dict[tuple[str, int], Any]:
    """The times, or what was raised instead, by noise schedule and number of steps."""
    made = {name: SCHEDULES[name]() for name in schedules}
    return {(name, count): ask(grid, schedule, count, seeds) for name, schedule in made.items() for count in steps}


def ask(grid: Grid, schedule: NoiseSchedule, steps: int, seeds: Sequence[int] = (0, 0, 0)) -> Any:
    """A copy of the times, or what was raised instead, with the global generators at ``seeds``."""
    seed_all(seeds)
    try:
        return copied(grid.times(schedule, steps))
    except Exception as error:
        return error


def asked_whole(grid: Grid, schedule: NoiseSchedule, steps: int) -> None:
    """Ask for a whole row, which not every noise schedule can have."""
    with suppress(ValueError):
        grid.start(schedule, steps, 0.5, (4, 8, 8))


def same(a: Any, b: Any) -> bool:
    """Whether two answers are the same, to the last bits: nothing is summed up here."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=0, equal_nan=True)
    return alike(a, b)


def _about(found: Any) -> str:
    return f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"

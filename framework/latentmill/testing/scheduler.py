"""What every scheduler must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyarrow as pa
import torch
from torch import Tensor

from latentmill.plugin import NoiseSchedule, Scheduler, State, tensors
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.testing.behaviour import Arguments, MethodCall, draws, writes
from latentmill.testing.gaussian import NOISE_SCHEDULES, GaussianField, advance, check_moments, follow, measure_order
from latentmill.testing.suite import PluginSuite, identity


class SchedulerSuite(PluginSuite):
    """What every scheduler must hold: rows that don't touch each other, state as a value, exact answers."""

    kind = "scheduler"
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
                assert (
                    torch.allclose(together[row], wanted[0], rtol=1e-9, atol=1e-12, equal_nan=True) or self._draws()
                ), (
                    f"on the {name} noise schedule row {row} came out otherwise in a batch than alone: "
                    "a step must treat each row by its own times and state, and keep nothing in the scheduler"
                )

    def test_state_is_a_value(self) -> None:
        """Rows saved to Arrow in the middle, read back in another order by another instance, go on as if nothing was."""
        order = [3, 0, 2, 1]
        field, times = _mixed(VariancePreserving())
        x = field.start(times[:, 0])
        wanted = follow(self.scheduler(), field, x.clone(), times)
        scheduler = self.scheduler()
        state = scheduler.init(field, x, times[:, 0])
        for i in range(2):
            x, state = advance(scheduler, field, x, times, i, state)
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
            x, restored = advance(scheduler, field, x, times, i, restored)
        assert torch.equal(x, wanted[order]) or self._draws(), (
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
        """Deterministic: the measured order of convergence. Stochastic: mean and variance, of all draws that there may be."""
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
            x, state = advance(scheduler, field, x, times, i, state)
        field.evaluations = field.draws = 0
        advance(scheduler, field, x, times, 4, state)
        assert field.evaluations == scheduler.evaluations, (
            f"a step called field.clean {field.evaluations} times, and `evaluations` says {scheduler.evaluations}"
        )
        assert bool(field.draws) == scheduler.stochastic, (
            f"a step drew noise {field.draws} times, and `stochastic` says {scheduler.stochastic}"
        )

    def test_arguments_are_left_as_they_were(self) -> None:
        """The latents, and the state, which other rows' steps may share."""
        sentence = writes(self.scheduler, self._calls()[0])
        assert not sentence, sentence

    def test_no_global_random_generator_is_used(self) -> None:
        """All noise comes from ``field.noise``, so that it follows from each row's seed."""
        sentence = self._draws()
        assert not sentence, sentence

    def _draws(self) -> str:
        return draws(self.scheduler, self._calls()[0])

    def _question(self) -> Callable[[Any], dict[str, Any]]:
        return asked

    def _calls(self) -> list[MethodCall]:
        field, times = _mixed(VariancePreserving())
        scheduler = self.scheduler()
        x = field.start(times[:, 0])
        state = scheduler.init(field, x, times[:, 0])
        x, state = advance(scheduler, field, x, times, 0, state)
        rows = {"x": x, "t": times[:, 1], "s": times[:, 2], **{f"state {name}": value for name, value in state.items()}}
        return [MethodCall("step", step, rows)]


def asked(scheduler: Scheduler) -> dict[str, Any]:
    """What is asked of a scheduler."""
    return {
        **identity(scheduler),
        "evaluations": scheduler.evaluations,
        "stochastic": scheduler.stochastic,
        "order": scheduler.order,
    }


def step(scheduler: Scheduler, rows: Arguments) -> dict[str, Tensor]:
    """``step`` of the mixed rows as a call."""
    field, _ = _mixed(VariancePreserving())
    state = {name.removeprefix("state "): value for name, value in rows.items() if name.startswith("state ")}
    x, after = scheduler.step(field, rows["x"], rows["t"], rows["s"], state)
    return {"latents": x, **{f"state {name}": value for name, value in after.items()}}


def _mixed(schedule: NoiseSchedule) -> tuple[GaussianField, Tensor]:
    """Four rows with their own means, seeds and times ``[4, 7]``; the first two end clean, the last two on the way."""
    ends = [(1.0, 0.0), (0.6, 0.0), (0.9, 0.2), (0.3, 0.1)]
    times = torch.stack([torch.linspace(first, last, 7, dtype=torch.float64) for first, last in ends])
    return GaussianField(schedule, torch.tensor([0.5, -2.0, 3.0, 0.0]), 0.3, [11, 12, 13, 14]), times

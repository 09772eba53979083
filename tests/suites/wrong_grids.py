"""Grids, each with one mistake."""

import math
import random

import torch
from tests.suites.mistakes import Mistake, suite_of
from tests.suites.wrong_denoisers import GPU, MEMORY, PLUGIN, PROCESS, RANDOM

from latentmill.plugin import CONTRACT, Grid, Start
from latentmill.testing import GridSuite


class Right(Grid):
    """Equal steps from t = 1 down."""

    contract = CONTRACT

    def times(self, noise_schedule, steps):
        return 1 - torch.arange(steps, dtype=torch.float64) / steps


class Climbs(Right):
    def times(self, noise_schedule, steps):
        return super().times(noise_schedule, steps).flip(0)


class Stands(Right):
    """On the timesteps of a schedule of ten, so that neighbours become one."""

    def times(self, noise_schedule, steps):
        return (super().times(noise_schedule, steps) * 10).ceil() / 10


class WithTheEnd(Right):
    """Where the last step leads, too."""

    def times(self, noise_schedule, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


class EndsClean(Right):
    def times(self, noise_schedule, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[1:]


class InTimesteps(Right):
    """1000 is noise."""

    def times(self, noise_schedule, steps):
        return 1000 * super().times(noise_schedule, steps)


class OneGapLess(Right):
    """Divides by the number of gaps, which is 0 if there is one step."""

    def times(self, noise_schedule, steps):
        return 1 - 0.999 * torch.arange(steps, dtype=torch.float64) / torch.tensor(steps - 1)


class InfiniteSigma(Right):
    """Equal steps of sigma / alpha, which may have no end."""

    def times(self, noise_schedule, steps):
        alpha, sigma = noise_schedule.scale(torch.ones(1, dtype=torch.float64))
        if noise_schedule.sigma_is_time:
            return super().times(noise_schedule, steps)
        return noise_schedule.time(sigma / alpha * super().times(noise_schedule, steps))


class Float32(Right):
    def times(self, noise_schedule, steps):
        return super().times(noise_schedule, steps).float()


class PlainList(Right):
    def times(self, noise_schedule, steps):
        return super().times(noise_schedule, steps).tolist()


class NeedsTimesteps(Right):
    def times(self, noise_schedule, steps):
        return super().times(noise_schedule, steps) * noise_schedule.timesteps / noise_schedule.timesteps


class SaysWhere(Right):
    """Can be made of many steps only, and says so."""

    def times(self, noise_schedule, steps):
        if steps < 5:
            raise ValueError("five steps at least")
        return super().times(noise_schedule, steps)


class SetsTimesteps(Right):
    def times(self, noise_schedule, steps):
        noise_schedule.timesteps = steps
        return super().times(noise_schedule, steps)


class WritesTheBetas(Right):
    def times(self, noise_schedule, steps):
        if noise_schedule.timesteps is not None:
            noise_schedule.log_alpha_bar[1:] -= 0.01
        return super().times(noise_schedule, steps)


class Remembers(Right):
    last = 0

    def times(self, noise_schedule, steps):
        before, self.last = self.last, steps
        return super().times(noise_schedule, steps) * (1 - before / 1000)


class CachesBySteps(Right):
    """Whatever the noise schedule is."""

    def __init__(self):
        self.cache = {}

    def times(self, noise_schedule, steps):
        end = 1.0 if noise_schedule.timesteps is None else 0.999
        return self.cache.setdefault(steps, super().times(noise_schedule, steps) * end)


class Jitters(Right):
    def times(self, noise_schedule, steps):
        return super().times(noise_schedule, steps) - random.random() / 1000


class Hashes(Right):
    def times(self, noise_schedule, steps):
        return super().times(noise_schedule, steps) * (1 - hash("jitter") % 1000 / 1001)


class RowClimbs(Right):
    """As whole rows, too."""

    def start(self, noise_schedule, steps, strength, shape):
        return Start(self.times(noise_schedule, steps).flip(0), {}, 0.0, 1.0, 1.0)


class RowBeginsAtInfinity(Right):
    def start(self, noise_schedule, steps, strength, shape):
        return Start(self.times(noise_schedule, steps), {}, 0.0, math.inf, 1.0)


class Cuda(Right):
    def __init__(self):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"


class NoContract(Grid):
    times = Right.times


def grid(what, plugin, caught_by, says, **settings):
    return Mistake(what, suite_of(GridSuite, plugin, **settings), set(caught_by.split()), says)


FALLS, SCHEDULE = "times_fall_from_noise_to_what_is_nearly_clean", "the_noise_schedule_is_left_as_it_was"

WHOLE = "a_row_that_it_says_whole_is_a_way_from_noise"

MISTAKES = [
    grid("climbs from clean to noise", Climbs, FALLS, "times do not fall for 2 steps on the VP noise schedule"),
    grid("stands for a step", Stands, FALLS, "times do not fall for 50 steps"),
    grid("the end of the last step, too", WithTheEnd, FALLS, "times gives 2 times for 1 step on the VP noise schedule"),
    grid("ends at 0", EndsClean, FALLS, "times end at 0 for 1 step"),
    grid("timesteps for times", InTimesteps, FALLS, "times begin at 1e+03"),
    grid("divides by 0 if there is one step", OneGapLess, FALLS, "times gives times that are not finite for 1 step"),
    grid("begins at an infinite sigma", InfiniteSigma, FALLS, "times do not fall for 2 steps on the zero terminal SNR noise schedule"),
    grid("float32", Float32, FALLS, "times gives torch.float32 of shape [1]"),
    grid("a list of numbers", PlainList, FALLS, "times gives a list for 1 step"),
    grid("needs a discrete noise schedule", NeedsTimesteps, FALLS, "times raises TypeError for 1 step on the VE noise schedule"),
    grid("needs more steps than the suite is told", SaysWhere, FALLS, "times raises ValueError for 1 step"),
    grid("sets the schedule's timesteps", SetsTimesteps, SCHEDULE, "times writes into the VP noise schedule, its 'timesteps'"),
    grid("writes into the schedule's betas", WritesTheBetas, SCHEDULE, "times writes into the VP noise schedule, its 'log_alpha_bar'"),
    grid("begins where the last row began", Remembers, MEMORY, "times gives other times after an earlier call"),
    grid("caches by the number of steps", CachesBySteps, MEMORY, "times gives other times after an earlier call"),
    grid("a number of the module random", Jitters, RANDOM, "times draws from the global random generator of random"),
    grid("numbers that hang on `hash()`", Hashes, PROCESS, "times gives other results in another process"),
    grid("a whole row that climbs", RowClimbs, WHOLE, "start, for 2 steps of strength 1 on the VP noise schedule, gives times that do not fall"),
    grid("a whole row's infinite noise", RowBeginsAtInfinity, WHOLE, "start, for 1 steps of strength 1 on the VP noise schedule, gives alpha"),
    grid("asks for a GPU in `__init__`", Cuda, GPU, "Cuda.__init__ calls torch.cuda.is_available before load(device)"),
    grid("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
]  # fmt: skip

RIGHT = [suite_of(GridSuite, Right), suite_of(GridSuite, SaysWhere, steps=(5, 50))]

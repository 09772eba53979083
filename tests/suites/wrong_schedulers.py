"""Schedulers, each with one mistake."""

import torch
from tests.suites.mistakes import Mistake, suite_of

from latentmill.plugin import CONTRACT, Scheduler
from latentmill.schedulers.dpmpp import DPMpp2MSDE
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.testing import SchedulerSuite


class Remembers(Euler):
    """Keeps the last latents in itself."""

    last = None

    def step(self, field, x, t, s, state):
        moved, state = super().step(field, x, t, s, state)
        moved = moved if self.last is None or self.last.shape != moved.shape else moved + 1e-3 * self.last
        self.last = moved
        return moved, state


class FirstRowSTime(Euler):
    def step(self, field, x, t, s, state):
        return super().step(field, x, t[:1].expand_as(t), s[:1].expand_as(s), state)


class WrongCoefficient(Euler):
    """alpha_t where alpha_s belongs."""

    def step(self, field, x, t, s, state):
        (alpha_t, sigma_t), (_, sigma_s) = field.scale(t), field.scale(s)
        keep = sigma_s / sigma_t
        return keep * x + (alpha_t - keep * alpha_t) * field.clean(x, t), state


class RatioOfAlphas(Euler):
    """The form that is 0/0 at the noise end of a flow schedule."""

    def step(self, field, x, t, s, state):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = field.scale(t), field.scale(s)
        ratio = alpha_s / alpha_t
        return ratio * x + (sigma_s - ratio * sigma_t) * (x - alpha_t * field.clean(x, t)) / sigma_t, state


class TooMuchNoise(EulerAncestral):
    def step(self, field, x, t, s, state):
        moved, state = super().step(field, x, t, s, state)
        return moved + 0.05 * field.scale(s)[1] * field.noise(t, s), state


class SaysTwo(Euler):
    evaluations = 2


class Quiet(EulerAncestral):
    stochastic = False


class Boasts(Euler):
    order = 2


class Writes(Euler):
    def step(self, field, x, t, s, state):
        moved, state = super().step(field, x, t, s, state)
        return x.copy_(moved), state


class OwnNoise(DPMpp2MSDE):
    """Noise that no row's seed fixes, where the row's was to be taken: what comes out can't be reckoned, only drawn."""

    def step(self, field, x, t, s, state):
        return super().step(Unseeded(field), x, t, s, state)


class Unseeded:
    def __init__(self, field):
        self.field = field

    def __getattr__(self, name):
        return getattr(self.field, name)

    def noise(self, t, s):
        return torch.randn(self.field.noise(t, s).shape)


class StateWithoutBatch(Euler):
    def step(self, field, x, t, s, state):
        moved, _ = super().step(field, x, t, s, state)
        return moved, {"mean": moved.mean()}


class Cuda(Euler):
    def __init__(self):
        super().__init__()
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None


class NoContract(Scheduler):
    __init__, step = Euler.__init__, Euler.step


class Right(Euler):
    contract = CONTRACT


def scheduler(what, plugin, caught_by, says, steps=300):
    return Mistake(what, suite_of(SchedulerSuite, plugin, steps=steps), set(caught_by.split()), says)


STATE, ENDS, POINT = "state_is_a_value", "both_ends_are_finite", "a_point_is_reached"
REACHED, IS = "the_distribution_is_reached", "it_is_what_it_says"
ROWS, WRITES, RANDOM = (
    "rows_do_not_touch_each_other", "arguments_are_left_as_they_were", "no_global_random_generator_is_used",
)  # fmt: skip
GPU, PLUGIN = "building_and_asking_touch_no_gpu", "it_is_a_plugin_of_this_contract"

MISTAKES = [
    scheduler("keeps the last latents in itself", Remembers, f"{STATE} {POINT} {REACHED}",
              "everything that a step remembers must be in the state"),
    scheduler("the first row's times for all", FirstRowSTime, f"{ROWS} {STATE}", "row 1 came out otherwise in a batch than alone"),
    scheduler("alpha_t where alpha_s belongs", WrongCoefficient, f"{POINT} {REACHED}", "a coefficient is wrong"),
    scheduler("divides by alpha", RatioOfAlphas, f"{ENDS} {POINT}", "alpha may be 0 at t = 1"),
    scheduler("too much noise", TooMuchNoise, REACHED, "variance"),
    scheduler("a count of evaluations that is wrong", SaysTwo, IS, "`evaluations` says 2"),
    scheduler("draws noise, and says it does not", Quiet, f"{IS} {REACHED}", "`stochastic` says False"),
    scheduler("an order that is not reached", Boasts, REACHED, "where 2 was promised"),
    scheduler("writes into the latents", Writes, WRITES, "step writes into its argument 'x'"),
    scheduler("noise of torch's global generator", OwnNoise, RANDOM, "global random generator of torch", steps=100),
    scheduler("state without the batch axis", StateWithoutBatch, STATE, "the batch axis comes first"),
    scheduler("asks for a GPU in `__init__`", Cuda, GPU, "Cuda.__init__ calls torch.cuda.is_available before load(device)"),
    scheduler("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
]  # fmt: skip

RIGHT = [suite_of(SchedulerSuite, Right)]

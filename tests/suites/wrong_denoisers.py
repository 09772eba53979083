"""Denoisers, each with one mistake."""

import torch
from tests.suites.mistakes import Mistake, suite_of

from latentmill.plugin import CONTRACT, Denoiser, FollowsAuthors, LatentSpec
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.testing import DenoiserSuite


class Right(Denoiser):
    """A network that adds what it is told."""

    contract = CONTRACT
    prediction = "epsilon"
    noise_schedule = VariancePreserving()

    def __init__(self, weight=0.5):
        self.weight = weight

    def fingerprint(self):
        return f"adds-{self.weight}"

    def predict(self, x, t, conditioning):
        return self.weight * x + (t + conditioning["embeds"]).reshape(-1, 1, 1, 1).float()


class UnknownPrediction(Right):
    prediction = "noise"


class Backwards(Right):
    """1 is clean, 0 is noise."""

    class noise_schedule(VariancePreserving):
        def scale(self, t):
            return super().scale(1 - t)

    noise_schedule = noise_schedule()


class ChecksWithWeights(Right):
    weights = None

    def check(self, spec):
        if self.weights["channels"] != spec.channels:
            raise ValueError("other channels")


class Flat(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning).flatten(1)


class FirstTime(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, t[:1].expand_as(t), conditioning)


class NoTime(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, torch.zeros_like(t), conditioning)


class NoPrompt(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, {"embeds": torch.zeros(len(x))})


class Divides(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning) / (t < 0.8).reshape(-1, 1, 1, 1).float()


class Writes(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning) + 0 * x.mul_(0.5)


class WritesConditioning(Right):
    def predict(self, x, t, conditioning):
        found = super().predict(x, t, conditioning)
        conditioning["embeds"].zero_()
        return found


class Momentum(Right):
    last = 0.0

    def predict(self, x, t, conditioning):
        found = super().predict(x, t, conditioning)
        before, self.last = self.last, found.mean()
        return found + 0.1 * before


class Noisy(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning) + 0.1 * torch.rand(len(x), 1, 1, 1)


class NormalisesOverBatch(Right):
    def predict(self, x, t, conditioning):
        return super().predict(x - x.mean(0, keepdim=True), t, conditioning)


class EvenSides(Right):
    """Halves the sides and doubles them again."""

    def predict(self, x, t, conditioning):
        half = super().predict(x, t, conditioning)[:, :, ::2, ::2]
        return half.repeat_interleave(2, 2).repeat_interleave(2, 3)


class SaysEvenSides(EvenSides):
    multiple_of = 2


class Square(Right):
    """Has a learned place for each latent pixel of one size."""

    places = torch.zeros(16, 16)

    def predict(self, x, t, conditioning):
        return super().predict(x + self.places, t, conditioning)


class Turned(Right):
    """Takes the height for the width when it takes its tokens apart again."""

    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning).reshape(*x.shape[:2], x.shape[3], x.shape[2])


class Climbs(FollowsAuthors, Right):
    def times(self, steps, shape):
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


class OneTimeTooFew(FollowsAuthors, Right):
    def times(self, steps, shape):
        return torch.linspace(1, 0, steps, dtype=torch.float64)


class Cuda(Right):
    def fingerprint(self):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else super().fingerprint()


class AddressPrint(Right):
    """The default text of an object has its address in it."""

    def fingerprint(self):
        return str(object())


class ConstantPrint(Right):
    def fingerprint(self):
        return ""


class NoContract(Denoiser):
    prediction, noise_schedule, weight = "epsilon", VariancePreserving(), 0.5
    fingerprint, predict = Right.fingerprint, Right.predict


class Suite(DenoiserSuite):
    def conditioning(self):
        return {"embeds": torch.tensor([0.0, 1.0, 2.0])}


def denoiser(what, plugin, caught_by, says, **settings):
    settings.setdefault("has_grid", issubclass(plugin, FollowsAuthors))
    return Mistake(what, suite_of(Suite, plugin, **settings), set(caught_by.split()), says)


KNOWN, CHECK = "schedule_and_prediction_are_known_before_loading", "check_needs_no_weights"
FINITE, COUNT = "predictions_are_finite_and_shaped_as_the_latents", "latents_times_and_prompts_count"
GRID, PLUGIN = "its_grid_descends_from_noise_to_clean", "it_is_a_plugin_of_this_contract"
PROCESS, GPU, PRINT = (
    "another_process_finds_the_same", "building_and_asking_touch_no_gpu", "the_fingerprint_follows_the_weights",
)  # fmt: skip
ROWS, WRITES, MEMORY, RANDOM = (
    "rows_do_not_touch_each_other", "arguments_are_left_as_they_were", "nothing_is_remembered_between_calls",
    "no_global_random_generator_is_used",
)  # fmt: skip

SPEC = LatentSpec(4, 8, 1.0, 0.0, "float32", "the test's")
"""A space that the right denoiser takes."""

MISTAKES = [
    denoiser("a prediction of no known name", UnknownPrediction, KNOWN, "prediction 'noise' is unknown"),
    denoiser("time runs backwards", Backwards, KNOWN, "sigma must be 0 at t = 0 and grow with t"),
    denoiser("`check` reads weights", ChecksWithWeights, f"{CHECK} {PROCESS}", "check needs weights"),
    denoiser("a prediction of another shape", Flat, FINITE, "a prediction is shaped as the latents"),
    denoiser("not finite near t = 1", Divides, FINITE, "predict gives numbers that are not finite"),
    denoiser("even sides only, and does not say so", EvenSides, FINITE, "predict gives the shape [3, 4, 4, 6] for latents [3, 4, 3, 5]"),
    denoiser("one size only", Square, FINITE, "predict raises RuntimeError for latents [3, 4, 3, 5]"),
    denoiser("height for width", Turned, FINITE, "predict gives the shape [3, 4, 5, 3] for latents [3, 4, 3, 5]"),
    denoiser("does not read the times", NoTime, COUNT, "the times change nothing in the prediction"),
    denoiser("does not read the prompts", NoPrompt, COUNT, "the prompts change nothing in the prediction"),
    denoiser("the first row's time for all", FirstTime, ROWS, "predict gives row 1 otherwise in a batch than alone"),
    denoiser("takes a mean over the batch", NormalisesOverBatch, ROWS, "predict gives row 0 otherwise in a batch than alone"),
    denoiser("writes into the latents", Writes, WRITES, "predict writes into its argument 'x'"),
    denoiser("writes into the conditioning", WritesConditioning, WRITES, "predict writes into its argument 'embeds'"),
    denoiser("momentum in the network", Momentum, MEMORY, "predict gives other results after an earlier call"),
    denoiser("noise of torch's global generator", Noisy, RANDOM, "global random generator of torch"),
    denoiser("a grid that climbs", Climbs, GRID, "times must descend from 1 at most to 0 at least"),
    denoiser("a grid that is one time short", OneTimeTooFew, GRID, "they are [steps + 1], float64"),
    denoiser("a grid that the suite isn't told of", OneTimeTooFew, GRID, "the suite's has_grid says there is none", has_grid=False),
    denoiser("asks for a GPU in `fingerprint`", Cuda, GPU, "Cuda.fingerprint calls torch.cuda.is_available before load(device)"),
    denoiser("an address in the fingerprint", AddressPrint, PROCESS, "the fingerprint differs between processes"),
    denoiser("no fingerprint", ConstantPrint, PRINT, "the fingerprint stays when the weights change",
             changed=lambda self: ConstantPrint(2.0)),
    denoiser("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
]  # fmt: skip

RIGHT = [
    suite_of(Suite, Right, changed=lambda self: Right(2.0)),
    suite_of(Suite, SaysEvenSides),
]

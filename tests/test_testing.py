"""The suites that plugins inherit: what is wrong on purpose must be found, and the message must say what."""

import pytest
import torch

from latentmill.plugin import VAE, Denoiser, FollowsAuthors, LatentSpec
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.testing import DenoiserSuite, SchedulerSuite, VAESuite


def failures(suite):
    """What each of a suite's tests says, of those that fail."""
    said = {}
    for name in dir(suite):
        if name.startswith("test_"):
            try:
                getattr(suite(), name)()
            except AssertionError as error:
                said[name] = str(error).splitlines()[0]
    return said


class Remembers(Euler):
    """Keeps the last clean estimate in itself."""

    last = None

    def step(self, field, x, t, s, state):
        moved, state = super().step(field, x, t, s, state)
        moved = moved if self.last is None or self.last.shape != moved.shape else moved + 1e-3 * self.last
        self.last = moved
        return moved, state


class FirstRowSTime(Euler):
    """Treats all rows by the first one's times."""

    def step(self, field, x, t, s, state):
        return super().step(field, x, t[:1].expand_as(t), s[:1].expand_as(s), state)


class WrongCoefficient(Euler):
    """alpha_t where alpha_s belongs."""

    def step(self, field, x, t, s, state):
        (alpha_t, sigma_t), (_, sigma_s) = field.scale(t), field.scale(s)
        keep = sigma_s / sigma_t
        return keep * x + (alpha_t - keep * alpha_t) * field.clean(x, t), state


class RatioOfAlphas(Euler):
    """The form that is 0/0 at the noise end of a flow path."""

    def step(self, field, x, t, s, state):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = field.scale(t), field.scale(s)
        ratio = alpha_s / alpha_t
        return ratio * x + (sigma_s - ratio * sigma_t) * (x - alpha_t * field.clean(x, t)) / sigma_t, state


class TooMuchNoise(EulerAncestral):
    def step(self, field, x, t, s, state):
        moved, state = super().step(field, x, t, s, state)
        sigma_s = field.scale(s)[1]
        return moved + 0.05 * sigma_s * field.noise(t, s), state


class SaysTwo(Euler):
    evaluations = 2


class Quiet(EulerAncestral):
    stochastic = False


@pytest.mark.parametrize(
    ("wrong", "test", "says"),
    [
        (Remembers, "test_state_is_a_value", "everything that a step remembers must be in the state"),
        (FirstRowSTime, "test_rows_do_not_touch_each_other", "row 1 came out otherwise in a batch than alone"),
        (WrongCoefficient, "test_a_point_is_reached", "came out as"),
        (WrongCoefficient, "test_the_distribution_is_reached", "a coefficient is wrong"),
        (RatioOfAlphas, "test_both_ends_are_finite", "alpha may be 0 at t = 1"),
        (TooMuchNoise, "test_the_distribution_is_reached", "variance"),
        (SaysTwo, "test_it_is_what_it_says", "`evaluations` says 2"),
        (Quiet, "test_it_is_what_it_says", "`stochastic` says False"),
    ],
)
def test_a_wrong_scheduler_is_found_and_told(wrong, test, says):
    assert says in failures(type("Suite", (SchedulerSuite,), {"scheduler": wrong}))[test]


def test_an_order_that_is_not_reached_is_told():
    suite = type("Suite", (SchedulerSuite,), {"scheduler": type("Boasts", (Euler,), {"order": 2})})
    assert (
        "order 1.00 on the VP noise schedule, where 2 was promised"
        in failures(suite)["test_the_distribution_is_reached"]
    )


class Plain(VAE):
    """Pictures as latents of three channels, at full size."""

    contract = 2

    def __init__(self):
        self.gain = 1.0

    @property
    def spec(self):
        return LatentSpec(3, 1, 1.0, 0.0, "float32", "plain")

    def encode(self, images):
        return images * self.gain

    def decode(self, latents):
        return latents / self.gain


class Unnamed(Plain):
    spec = LatentSpec(3, 1, 1.0, 0.0, "float32", "")


class OneMore(Plain):
    spec = LatentSpec(4, 1, 1.0, 0.0, "float32", "plain")


class BatchMean(Plain):
    def encode(self, images):
        return images - images.mean(0, keepdim=True)


class InPlace(Plain):
    def encode(self, images):
        return images.mul_(1.0 + 1e-3)


class NoScale(Plain):
    def encode(self, images):
        return images * 0.5


class Infinite(Plain):
    def decode(self, latents):
        return latents / torch.zeros(())


@pytest.mark.parametrize(
    ("wrong", "test", "says"),
    [
        (Unnamed, "test_the_space_is_known_before_loading_and_is_the_same_everywhere", "needs a fingerprint"),
        (OneMore, "test_shapes_are_what_the_spec_says", "the spec says"),
        (BatchMean, "test_rows_do_not_touch_each_other", "encode: row 0 depends on its company"),
        (InPlace, "test_pictures_come_back", "written into"),
        (NoScale, "test_pictures_come_back", "scale or shift?"),
        (Infinite, "test_shapes_are_what_the_spec_says", "not finite"),
    ],
)
def test_a_wrong_vae_is_found_and_told(wrong, test, says):
    suite = type("Suite", (VAESuite,), {"vae": wrong, "min_psnr": 40.0})
    assert says in failures(suite)[test]


def test_a_right_one_passes():
    assert failures(type("Suite", (VAESuite,), {"vae": Plain, "min_psnr": 100.0})) == {}
    assert failures(type("Suite", (SchedulerSuite,), {"scheduler": Euler})) == {}


class Linear(Denoiser):
    """A network that adds what it is told."""

    contract = 2

    prediction = "epsilon"
    noise_schedule = VariancePreserving()

    def predict(self, x, t, conditioning):
        return 0.5 * x + (t + conditioning["embeds"]).reshape(-1, 1, 1, 1).float()


class Nameless(Linear):
    prediction = "noise"


class Flat(Linear):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning).flatten(1)


class Mixes(Linear):
    def predict(self, x, t, conditioning):
        return super().predict(x, t.mean().expand_as(t), conditioning)


class Deaf(Linear):
    def predict(self, x, t, conditioning):
        return super().predict(x, t, {"embeds": torch.zeros(len(x))})


class Writes(Linear):
    def predict(self, x, t, conditioning):
        return x.mul_(0.5) + (t + conditioning["embeds"]).reshape(-1, 1, 1, 1).float()


class Climbs(FollowsAuthors, Linear):
    def times(self, steps, shape):
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("wrong", "test", "says"),
    [
        (Nameless, "test_path_and_prediction_are_known_before_loading", "prediction 'noise'"),
        (Flat, "test_predictions_are_finite_and_shaped_as_the_latents", "a prediction of shape (3, 1024) of latents"),
        (Mixes, "test_rows_do_not_touch_each_other", "row 0 depends on its company"),
        (Deaf, "test_latents_times_and_prompts_count", "the prompts change nothing"),
        (Writes, "test_predictions_are_finite_and_shaped_as_the_latents", "an input was written into"),
        (Climbs, "test_its_grid_descends_from_noise_to_clean", "times must descend from 1 at most to 0 at least"),
        (Linear, "test_its_grid_descends_from_noise_to_clean", None),
    ],
)
def test_a_wrong_denoiser_is_found_and_told(wrong, test, says):
    class Suite(DenoiserSuite):
        denoiser = wrong
        has_grid = wrong is Climbs

        def conditioning(self):
            return {"embeds": torch.tensor([0.0, 1.0, 2.0])}

    said = failures(Suite)
    if says is None:
        assert said == {}
    else:
        assert said[test].startswith(says)

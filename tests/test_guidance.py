"""Guidance and predictions: formulas, exactly, and diffusers' own rescaling."""

import pytest
import torch

from latentmill.plugin import Denoiser
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.stages.guidance import Guidance, ModelField, to_clean


class Pointing(Denoiser):
    """Predicts its conditioning, whatever it sees. Counts the rows that it evaluates."""

    contract = 2

    prediction = "sample"
    noise_schedule = VariancePreserving()

    def __init__(self):
        self.evaluated = []

    def predict(self, x, t, conditioning):
        self.evaluated.append(len(x))
        return conditioning["answer"]


PROMPT, NEGATIVE = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
OFF = Guidance(4.0, on=False)
T = torch.tensor([0.9, 0.5, 0.3, 0.1], dtype=torch.float64)


def clean(*guidance, fixed=False):
    denoiser = Pointing()
    field = ModelField(
        denoiser,
        {"answer": PROMPT},
        {"answer": NEGATIVE},
        guidance,
        [0] * 4,
        PROMPT.shape[1:],
        torch.device("cpu"),
        fixed,
    )
    return field.clean(torch.zeros(4, 2, 8, 8), T), denoiser.evaluated


@pytest.mark.parametrize("fixed", [False, True])
def test_guidance_is_the_formula_where_the_time_is_in_the_interval(fixed):
    """Guided where stop < t <= start; elsewhere, and for a row that is not guided, the prompt's own prediction and one evaluation."""
    found, evaluated = clean(
        Guidance(4.0), Guidance(4.0, start=0.5), Guidance(4.0, start=0.25), Guidance(4.0, stop=0.1), fixed=fixed
    )
    wanted = PROMPT.clone()
    for row in (0, 1):
        wanted[row] = NEGATIVE[row] + 4.0 * (PROMPT[row] - NEGATIVE[row])
    assert torch.equal(found, wanted)
    assert evaluated == ([4, 4] if fixed else [6])
    found, evaluated = clean(OFF, OFF, OFF, Guidance(4.0, start=0.05), fixed=fixed)
    assert torch.equal(found, PROMPT) and evaluated == [4]


def test_rescaled_guidance_is_diffusers():
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    found, _ = clean(Guidance(7.5, 0.7), Guidance(7.5), Guidance(3.0, 1.0), Guidance(1.0, 0.7, on=False))
    for row, (scale, rescale) in enumerate([(7.5, 0.7), (7.5, 0.0), (3.0, 1.0), (1.0, 0.0)]):
        guided = NEGATIVE[row : row + 1] + scale * (PROMPT[row : row + 1] - NEGATIVE[row : row + 1])
        wanted = rescale_noise_cfg(guided, PROMPT[row : row + 1], guidance_rescale=rescale)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-6, atol=1e-6)


def test_what_a_step_costs():
    guided = Guidance(4.0, start=0.6, stop=0.2)
    assert [guided.guides(*step) for step in [(0.9, 0.7), (0.9, 0.6), (0.5, 0.4), (0.3, 0.1), (0.2, 0.0)]] == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert not OFF.guides(0.5, 0.4) and Guidance(1.1).guides(1.0, 0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_every_prediction_stands_for_the_same_clean_latents(prediction):
    x0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.7)
    said = {"epsilon": eps, "v": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[prediction]
    torch.testing.assert_close(
        to_clean(prediction, said, alpha * x0 + sigma * eps, alpha, sigma), x0, rtol=1e-6, atol=1e-6
    )


def test_a_denoiser_may_guide_by_a_formula_of_its_own():
    class Further(Pointing):
        def guide(self, prompt, negative, scale):
            return prompt + scale * (prompt - negative)

    field = ModelField(
        Further(), {"answer": PROMPT}, {"answer": NEGATIVE}, [Guidance(2.0)] * 3 + [OFF], [0] * 4,
        PROMPT.shape[1:], torch.device("cpu"), False,
    )  # fmt: skip
    found = field.clean(torch.zeros(4, 2, 8, 8), T)
    assert torch.equal(found[:3], (PROMPT + 2.0 * (PROMPT - NEGATIVE))[:3]) and torch.equal(found[3], PROMPT[3])

"""Denoisers and text encoders of each family by the framework's suite; rows in mixed company; what they load."""

from functools import partial

import pytest
import torch

from latentmill.testing import DenoiserSuite
from latentmill_diffusers import tiny
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.text_encoder import DiffusersTextEncoder

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "", "two houses by the sea, at night, and a boat that is longer than both of them"]


@pytest.fixture(scope="module")
def encoded(model):
    """The conditioning of PROMPTS, by family; encoded once."""
    made = {}

    def conditioning(name):
        if name not in made:
            encoder = DiffusersTextEncoder(str(model(name)))
            encoder.load(CPU)
            with torch.inference_mode():
                made[name] = {key: value.clone() for key, value in encoder.encode(PROMPTS).items()}
        return made[name]

    return conditioning


@pytest.fixture(params=tiny.BUILDERS)
def name(request):
    return request.param


class TestSuite(DenoiserSuite):
    has_grid = True

    @pytest.fixture(autouse=True)
    def _of(self, name, model, encoded):
        folder = str(model(name))
        type(self).denoiser = staticmethod(partial(DiffusersDenoiser, folder))
        config = DiffusersDenoiser(folder)
        type(self).shape = (config.config["in_channels"] // config.family.packed**2, 8, 16)
        type(self).told = encoded(name)
        with torch.inference_mode():
            yield

    def conditioning(self):
        return dict(type(self).told)

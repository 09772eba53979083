"""Text encoders and a whole pipeline's stages by the suites that plugins inherit; denoisers, VAEs and schedulers are beside what they are about."""

from functools import partial

import pyarrow as pa
import pytest
import tiny
import torch

from latentmill.plugin import TensorSpec
from latentmill.testing import StageSuite, TextEncoderSuite
from latentmill.testing.batches import rows
from latentmill_diffusers.pipeline import PipelineDenoise, PipelineEncode
from latentmill_diffusers.text_encoder import DiffusersTextEncoder


class TestTextEncoder(TextEncoderSuite):
    """CLIP twice with zeros for no negative prompt, and a chat model that is padded here."""

    name = "diffusers"

    @pytest.fixture(autouse=True, params=["StableDiffusionXLPipeline", "QwenImagePipeline"])
    def _of(self, request, model):
        type(self).text_encoder = staticmethod(partial(DiffusersTextEncoder, str(model(request.param))))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in tiny.BUILDERS),
        ("QwenImagePipeline", {"max_length": 77}),
        ("StableDiffusionXLPipeline", {"compel": True, "max_length": 154}),
        ("FluxPipeline", {"compel": True}),
    ],
)
def test_what_is_said_of_each_family_s_conditioning_is_what_it_makes(name, settings, model):
    """In bfloat16, which a pipeline could lose, and from configs alone: of another object than the one with weights."""
    bare, encoder = (DiffusersTextEncoder(str(model(name)), dtype="bfloat16", **settings) for _ in range(2))
    said = bare.conditioning_spec()
    assert bare._pipeline is None
    encoder.load(torch.device("cpu"))
    with torch.inference_mode():
        found = encoder.encode(["two houses by the sea"])
    assert said == {name: TensorSpec.of(value[0]) for name, value in found.items()}


class TestTextEncoderThatRefusesWhatIsLong(TextEncoderSuite):
    refused = "word, " * 100

    @pytest.fixture(autouse=True)
    def _of(self, model):
        folder = str(model("StableDiffusionPipeline"))
        type(self).text_encoder = staticmethod(partial(DiffusersTextEncoder, folder, long_prompts="error"))


class TestTextEncoderOfCompel(TextEncoderSuite):
    """Which is asked what it can read before there are weights."""

    prompts = ("a (red fox)1.3", "two houses by the sea", "")
    refused = '("a", "b").blend(1)'

    @pytest.fixture(autouse=True)
    def _of(self, model):
        folder = str(model("StableDiffusionPipeline"))
        type(self).text_encoder = staticmethod(partial(DiffusersTextEncoder, folder, compel=True))


class TestPipelineEncode(StageSuite):
    """One row is of a scheduler, which a pipeline's own loop has not."""

    name = "pipeline_encode"

    @pytest.fixture(autouse=True)
    def _of(self, model):
        type(self).stage = staticmethod(partial(PipelineEncode, str(model("StableDiffusionPipeline"))))

    def batch(self):
        return of_schedulers("", "", "euler", "")


@pytest.fixture(scope="module")
def encoded(model):
    """Rows as the encode stage hands them on."""
    stage = PipelineEncode(str(model("StableDiffusionPipeline")))
    stage.load(torch.device("cpu"))
    [table] = stage(of_schedulers("", "", ""), lambda at, reason: pytest.fail(reason))
    return table.combine_chunks()


class TestPipelineDenoise(StageSuite):
    name = "pipeline_denoise"

    @pytest.fixture(autouse=True)
    def _of(self, model, encoded):
        folder = str(model("StableDiffusionPipeline"))
        vae = {"name": "diffusers", "path": folder}
        type(self).stage, type(self).given = staticmethod(partial(PipelineDenoise, folder, vae=vae)), encoded

    def batch(self):
        return self.given


def of_schedulers(*names):
    """A row for each of these schedulers."""
    batch = rows(len(names), 32, 32)
    at = batch.schema.get_field_index("scheduler")
    return batch.set_column(at, batch.schema.field(at), pa.array(names))

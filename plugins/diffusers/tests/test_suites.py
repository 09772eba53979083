"""Text encoders and a whole pipeline's stages by the suites that plugins inherit; denoisers, VAEs and schedulers are beside what they are about."""

from functools import partial

import pyarrow as pa
import pytest
import torch

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


class TestTextEncoderThatRefusesWhatIsLong(TextEncoderSuite):
    refused = "word, " * 100

    @pytest.fixture(autouse=True)
    def _of(self, model):
        folder = str(model("StableDiffusionPipeline"))
        type(self).text_encoder = staticmethod(partial(DiffusersTextEncoder, folder, long_prompts="error"))


class TestTextEncoderOfCompel(TextEncoderSuite):
    """Which is asked what it can read before there are weights."""

    prompts = ("a (red fox)1.3", "two houses by the sea, at night, and a boat that is longer", "")
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

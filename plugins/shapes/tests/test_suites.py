"""The suites that every plugin inherits, and how one is told apart from another."""

from __future__ import annotations

import torch

from latentmill.plugin import Conditioning
from latentmill.testing import DenoiserSuite, TextEncoderSuite, VAESuite
from latentmill_shapes.plugin import ShapesDenoiser, ShapesTextEncoder, ShapesVAE

PROMPTS = (
    "a red ring on a blue background",
    "a white star left of a green cross on a black background",
    "",
)


class TestVAE(VAESuite):
    """Trained on pictures of plain shapes: of the suite's, which fade from side to side, it gives back less."""

    vae = ShapesVAE
    name = "shapes"
    min_psnr = 12.0


class TestTextEncoder(TextEncoderSuite):
    text_encoder = ShapesTextEncoder
    name = "shapes"
    prompts = PROMPTS
    refused = "a strawberry on a red background"


class TestDenoiser(DenoiserSuite):
    denoiser = ShapesDenoiser
    name = "shapes"

    def conditioning(self) -> Conditioning:
        encoder = ShapesTextEncoder()
        encoder.load(torch.device("cpu"))
        with torch.inference_mode():
            return {name: value.clone() for name, value in encoder.encode(PROMPTS).items()}

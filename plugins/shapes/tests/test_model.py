"""The weights in the package: what they promise on captions and pictures that training never saw."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from latentmill.plugin import RowError
from latentmill_shapes.draw import draw, training_scenes
from latentmill_shapes.evaluate import accuracy, generate, held_out, psnr, reconstruct
from latentmill_shapes.plugin import WEIGHTS, ShapesDenoiser, ShapesTextEncoder, ShapesVAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> ShapesVAE:
    vae = ShapesVAE()
    vae.load(CPU)
    return vae


@pytest.fixture(scope="module")
def text_encoder() -> ShapesTextEncoder:
    encoder = ShapesTextEncoder()
    encoder.load(CPU)
    return encoder


@pytest.fixture(scope="module")
def denoiser() -> ShapesDenoiser:
    denoiser = ShapesDenoiser()
    denoiser.load(CPU)
    return denoiser


def test_the_weights_fit_in_eight_megabytes() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.glob("*.safetensors")) <= 8_000_000


LOADING = """
import sys, latentmill_shapes.judge
assert "torch" not in sys.modules

import torch
from latentmill_shapes.plugin import ShapesDenoiser, ShapesTextEncoder, ShapesVAE
for part in (ShapesVAE(), ShapesTextEncoder(), ShapesDenoiser()):
    part.load(torch.device("cpu"))
assert not {"torch._dynamo", "sympy"} & sys.modules.keys(), "torch's compiler takes more than a second of each process"
"""


def test_importing_the_package_loads_no_torch_and_its_models_no_compiler() -> None:
    subprocess.run([sys.executable, "-c", LOADING], check=True)


def test_the_autoencoder_returns_held_out_pictures_at_30_db() -> None:
    pictures = draw(held_out(64), seed=0)
    assert psnr(reconstruct(pictures), pictures) >= 30


def test_psnr_is_the_textbook_s() -> None:
    zeros = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert psnr(zeros + np.uint8(51), zeros) == pytest.approx(20 * np.log10(5))


@torch.inference_mode()
def test_scaled_latents_have_mean_0_and_standard_deviation_1(vae: ShapesVAE) -> None:
    pictures = draw(training_scenes()[336::160], seed=9)
    latents = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert latents.shape[1:] == vae.spec.shape(64, 64) == (4, 16, 16)
    assert float(latents.mean()) == pytest.approx(0, abs=0.1)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)


def test_nine_in_ten_held_out_captions_are_drawn_right() -> None:
    scenes = held_out(60, seed=1)
    pictures = generate([s.caption for s in scenes], steps=10)  # twenty draw no more of them right
    assert accuracy(scenes, pictures)["all"] >= 0.85


@torch.inference_mode()
def test_v_at_little_noise_points_back_to_the_clean_latents(
    vae: ShapesVAE, text_encoder: ShapesTextEncoder, denoiser: ShapesDenoiser
) -> None:
    scenes = held_out(16)
    x0 = vae.encode(torch.from_numpy(draw(scenes, 0)).permute(0, 3, 1, 2).float() / 127.5 - 1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((16,), 0.3, dtype=torch.float64)
    alpha, sigma = (a.float().reshape(-1, 1, 1, 1) for a in denoiser.noise_schedule.scale(t))
    v = denoiser.predict(alpha * x0 + sigma * noise, t, text_encoder.encode([s.caption for s in scenes]))
    error = (alpha * (alpha * x0 + sigma * noise) - sigma * v - x0).square().mean()
    assert float(error) < 0.02


@torch.inference_mode()
def test_rows_do_not_touch_each_other(text_encoder: ShapesTextEncoder, denoiser: ShapesDenoiser) -> None:
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    prompts = ["", "a red ring on a blue background", "a white star left of a green cross on a black background"]
    together = denoiser.predict(x, t, text_encoder.encode(prompts))
    for i, prompt in enumerate(prompts):
        alone = denoiser.predict(x[i : i + 1], t[i : i + 1], text_encoder.encode([prompt]))
        assert torch.allclose(alone, together[i : i + 1], atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 20), (32, 32)])
@torch.inference_mode()
def test_other_sizes_run(
    height: int, width: int, vae: ShapesVAE, text_encoder: ShapesTextEncoder, denoiser: ShapesDenoiser
) -> None:
    x = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    v = denoiser.predict(
        x, torch.tensor([1.0, 0.001], dtype=torch.float64), text_encoder.encode(["", "star star star"])
    )
    assert v.shape == x.shape
    assert bool(v.isfinite().all())
    assert vae.decode(v).shape == (2, 3, 4 * height, 4 * width)


def test_what_does_not_fit_is_refused_by_name(
    vae: ShapesVAE, text_encoder: ShapesTextEncoder, denoiser: ShapesDenoiser
) -> None:
    denoiser.check(vae.spec)
    with pytest.raises(ValueError, match=r"shapes VAE .*not of abc"):
        denoiser.check(dataclasses.replace(vae.spec, fingerprint="abc"))
    with pytest.raises(RowError, match="'strawberry'"):
        text_encoder.check("a strawberry on a red background")
    with pytest.raises(RowError, match="multiple of 4"):
        vae.spec.shape(64, 62)

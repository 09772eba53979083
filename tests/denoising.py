"""Denoising a batch of rows of which each differs from the others, with the exact denoiser of a Gaussian."""

import pytest
import torch

from latentmill.batch import from_dicts, with_latents
from latentmill.plugin import Denoiser, LatentSpec, StageContext, tensors
from latentmill.schedulers.dpmpp import DPMpp2M
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.stages.denoise import Denoise

SPEC = LatentSpec(channels=2, downscale=8, scale=1.0, shift=0.0, dtype="float32", fingerprint="test")
SCHEDULERS = {"euler": Euler(), "euler_ancestral": EulerAncestral(), "dpmpp_2m": DPMpp2M()}


def denoise_with(denoiser, schedulers, grid, batch_size, fixed=None, first_noise="latentmill", until=0.0, **more):
    stage = Denoise()
    context = StageContext.of(
        {"denoiser": denoiser, "scheduler": None},
        batch_size=batch_size,
        fixed=fixed,
        sampling={"until": until, "first_noise": first_noise},
        choices={"scheduler": {"name": "euler", "grid": grid}},
        scheduler_of=schedulers,
        **more,
    )
    stage.prepare(context)
    return stage


class Gaussian(Denoiser):
    """The exact denoiser of x0 ~ N(mean, 0.25), with the mean as conditioning; counts what it evaluates."""

    contract = 2

    prediction = "sample"
    noise_schedule = VariancePreserving()

    def __init__(self):
        self.evaluated = []

    def predict(self, x, t, conditioning):
        self.evaluated.append(len(x))
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in self.noise_schedule.scale(t))
        mean = conditioning["mean"].reshape(-1, 1, 1, 1)
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return (mean + gain * (x - alpha * mean)).float()


def batch(numbers, **changes):
    """Rows that differ in everything; each by its number alone."""
    per_row = [
        {
            "row": n, "row_id": str(n), "prompt": "", "negative_prompt": "", "seed": 1000 + n, "steps": 3 + n % 5,
            "guidance_scale": 1.0 if n % 2 else 1.5 + n, "strength": [1.0, 0.4, 0.0][n % 3], "width": 24, "height": 32,
            "scheduler": ["dpmpp_2m", "euler", "euler_ancestral"][n % 3], **changes,
        }
        for n in numbers
    ]  # fmt: skip
    table = from_dicts(per_row)
    start = torch.stack([torch.full((2, 4, 3), float(n)) for n in numbers])
    table = with_latents(table, start, SPEC)
    table = tensors.with_tensor(table, "prompt:mean", torch.tensor([0.5 + n for n in numbers]))
    return tensors.with_tensor(table, "negative:mean", torch.tensor([-1.0 - n for n in numbers]))


def denoise(table, fixed=None, denoiser=None):
    stage = denoise_with(denoiser or Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, fixed)
    stage.load(torch.device("cpu"))
    parts = list(stage(table, lambda i, reason: pytest.fail(reason)))
    return {
        number: tensors.from_arrow(part, "latents")[i]
        for part in parts
        for i, number in enumerate(part.column("row").to_pylist())
    }


def latents_of(parts):
    return {
        number: tensors.from_arrow(part, "latents")[i]
        for part in parts
        for i, number in enumerate(part.column("row").to_pylist())
    }

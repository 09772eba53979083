"""A small network for solvers, fixed and not linear, and what diffusers' schedulers make with it, in float64."""

import importlib
import math

import diffusers
import torch

from latentmill.plugin import Field
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.stages.guidance import to_clean

SHAPE = (2, 3, 4, 4)
NOISES = torch.randn(400, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
"""The k-th noise that is asked for, whoever asks."""


class Network:
    """A fixed, smooth, non-linear function of latents and timestep."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 3, generator=generator).double() / 2
        self.bias = torch.randn(3, 1, 1, generator=generator).double()

    def __call__(self, x, timestep):
        mixed = torch.einsum("ij,bjhw->bihw", self.weight, x)
        return 0.6 * x + torch.tanh(mixed + self.bias * math.cos(float(timestep) / 300))


class NetworkField(Field):
    """Ours: the same network behind what a scheduler may ask."""

    def __init__(self, schedule, prediction="epsilon"):
        self.noise_schedule, self.prediction, self.network, self.asked = schedule, prediction, Network(), 0

    def scale(self, t):
        return tuple(v.reshape(-1, 1, 1, 1) for v in self.noise_schedule.scale(t))

    def time(self, ratio):
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x, t):
        return to_clean(self.prediction, self.network(x, self.noise_schedule.timestep(t[0])), x, *self.scale(t))

    def noise(self, t, s):
        self.asked += 1
        return NOISES[self.asked]


def theirs(monkeypatch, name, steps, **settings):
    """The final latents of a diffusers scheduler, and the sigmas (over alpha) that it went through."""
    cls = getattr(diffusers, name)
    asked = iter(range(1, 400))
    module = importlib.import_module(cls.__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: NOISES[next(asked)].to(k.get("dtype")))
    scheduler = cls(**settings)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()  # else its sums of large polynomials in lambda are float32's
    network, x = Network(), NOISES[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(given, t), t, x).prev_sample
    return x, scheduler


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {**SD, "timestep_spacing": "trailing"}
DPM = {**TRAILING, "final_sigmas_type": "zero"}


class Interpolated(VariancePreserving):
    """Between timesteps diffusers interpolates log(sigma); where a solver evaluates half-way, ours must say the same."""

    def timestep(self, t):
        alpha, sigma = self.scale(torch.arange(1, 1001, dtype=torch.float64) / 1000)
        table = torch.log(sigma / alpha)
        alpha, sigma = self.scale(t)
        wanted = torch.log(sigma / alpha).clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted).clamp(1, 999)
        return above - 1 + (wanted - table[above - 1]) / (table[above] - table[above - 1])

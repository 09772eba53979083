"""Solver by solver against diffusers: the same network, the same times, the same noise, in float64.

The network is small, fixed and not linear, and answers in epsilon. diffusers is given its own grid; ours gets the times of
the sigmas that it chose, so that only the solver differs. diffusers keeps sigmas in float32, which is what the tolerance of
1e-6 is for. Where we differ on purpose, the test says so and pins it.
"""

import importlib
import math

import diffusers
import pytest
import torch

from latentmill.guidance import to_clean
from latentmill.plugin import Field
from latentmill.schedulers import noise
from latentmill.schedulers.consistency import LCM
from latentmill.schedulers.dpmpp import DPMpp2M, DPMpp2MSDE
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.heun import DPM2, DPM2Ancestral, Heun
from latentmill.schedulers.multistep import DEIS, LMS, PNDM
from latentmill.schedulers.paths import VP, Flow
from latentmill.schedulers.unipc import UniPC
from latentmill.testing import follow

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

    def __init__(self, path, prediction="epsilon"):
        self.path, self.prediction, self.network, self.asked = path, prediction, Network(), 0

    def scale(self, t):
        return tuple(v.reshape(-1, 1, 1, 1) for v in self.path.scale(t))

    def time(self, ratio):
        return self.path.time(ratio.flatten())

    def clean(self, x, t):
        return to_clean(self.prediction, self.network(x, self.path.timestep(t[0])), x, *self.scale(t))

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
    network, x = Network(), NOISES[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(given, t), t, x).prev_sample
    return x, scheduler


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {**SD, "timestep_spacing": "trailing"}
DPM = {**TRAILING, "final_sigmas_type": "zero"}
PLAIN = {"clip_sample": False}

CASES = {
    "ddim": (Euler(), "DDIMScheduler", {**TRAILING, **PLAIN}),
    "euler": (Euler(), "EulerDiscreteScheduler", TRAILING),
    "euler on karras' grid": (Euler(), "EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    "ddpm": (EulerAncestral(), "DDPMScheduler", {**TRAILING, **PLAIN}),
    "euler_ancestral": (EulerAncestral(), "EulerAncestralDiscreteScheduler", TRAILING),
    "heun": (Heun(), "HeunDiscreteScheduler", TRAILING),
    "dpm2": (DPM2(), "KDPM2DiscreteScheduler", TRAILING),
    "dpm2_ancestral": (DPM2Ancestral(), "KDPM2AncestralDiscreteScheduler", TRAILING),
    "lms": (LMS(), "LMSDiscreteScheduler", TRAILING),
    "deis": (DEIS(2), "DEISMultistepScheduler", {**TRAILING, "solver_order": 2, "lower_order_final": False}),
    "dpmpp_2m": (DPMpp2M(), "DPMSolverMultistepScheduler", {**DPM, "lower_order_final": False}),
    "dpmpp_2m_sde": (
        DPMpp2MSDE(),
        "DPMSolverMultistepScheduler",
        {**DPM, "algorithm_type": "sde-dpmsolver++", "lower_order_final": False},
    ),
    "unipc bh2": (UniPC(2, "bh2"), "UniPCMultistepScheduler", {**DPM, "solver_order": 2}),
    # With a last sigma of 0 theirs is NaN: infinity times nothing.
    "unipc bh1": (
        UniPC(2, "bh1"),
        "UniPCMultistepScheduler",
        {
            **TRAILING,
            "solver_order": 2,
            "solver_type": "bh1",
            "final_sigmas_type": "sigma_min",
            "lower_order_final": False,
        },
    ),
    # A last sigma above 0, since with one of 0 theirs lowers the order of the last but one step, too.
    "unipc order 3": (
        UniPC(3, "bh2"),
        "UniPCMultistepScheduler",
        {**TRAILING, "solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "lcm": (LCM(), "LCMScheduler", {**TRAILING, "original_inference_steps": 50, "timestep_scaling": 1e9}),
}
TOLERANCE = {"deis": 1e-5, "dpm2_ancestral": 2e-6, "unipc order 3": 2e-6}
"""Where float32 shows: DEIS divides by differences of sigmas, which at 50 steps are near each other; and the split of sigma
into old and new noise takes a root of a difference."""


class Interpolated(VP):
    """Between timesteps diffusers interpolates log(sigma); where a solver evaluates half-way, ours must say the same."""

    def timestep(self, t):
        alpha, sigma = self.scale(torch.arange(1, 1001, dtype=torch.float64) / 1000)
        table = torch.log(sigma / alpha)
        alpha, sigma = self.scale(t)
        wanted = torch.log(sigma / alpha).clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted).clamp(1, 999)
        return above - 1 + (wanted - table[above - 1]) / (table[above] - table[above - 1])


def final_sigmas(name, scheduler, steps):
    """The ratios of sigma to alpha at the ends of the steps, the last one 0."""
    if hasattr(scheduler, "sigmas") and name not in ("DDPMScheduler",):
        sigmas = scheduler.sigmas.double()
        if name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
        return sigmas
    bars = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return torch.cat([((1 - bars) / bars).sqrt(), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("case", CASES)
def test_the_same_latents_as_diffusers(case, steps, monkeypatch):
    ours, name, settings = CASES[case]
    wanted, scheduler = theirs(monkeypatch, name, steps, **settings)
    path = Interpolated()
    sigmas = final_sigmas(name, scheduler, steps)
    sigmas = sigmas[: steps + 1] if len(sigmas) > steps + 1 else sigmas
    times = path.time(sigmas).repeat(2, 1)
    field = NetworkField(path)
    alpha, _ = field.scale(times[:, 0])
    variance_preserving = float(scheduler.init_noise_sigma) == 1.0
    x = NOISES[0] if variance_preserving else NOISES[0] * float(scheduler.init_noise_sigma) * alpha
    found = follow(ours, field, x, times)
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= TOLERANCE.get(case, 1e-6), f"{case}, {steps} steps: relative error {error:.1e}"


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_pndm_is_plms(steps, monkeypatch):
    """Their PLMS takes leading timesteps, evaluates the second twice, and ends at the alpha of timestep 0."""
    wanted, scheduler = theirs(monkeypatch, "PNDMScheduler", steps, **SD, skip_prk_steps=True, steps_offset=0)
    at = [int(t) for t in scheduler.timesteps]
    times = (torch.tensor([at[0], *at[2:], 0]).double() + 1) / 1000
    found = follow(PNDM(), NetworkField(VP()), NOISES[0], times.repeat(2, 1)[:, : steps + 1])
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-6


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "ours"), [("Euler", Euler()), ("Heun", Heun())])
def test_flow_matching(name, ours, steps, monkeypatch):
    """On a flow path the network answers in flow, ``noise - x0``."""
    wanted, scheduler = theirs(monkeypatch, f"FlowMatch{name}DiscreteScheduler", steps)
    sigmas = scheduler.sigmas.double()
    times = sigmas if name == "Euler" else torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    found = follow(ours, NetworkField(Flow(), "flow"), NOISES[0], times.repeat(2, 1))
    if name == "Euler":
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6
    else:
        # On purpose: ours is Heun's method in (x / alpha, sigma / alpha) on every path; theirs, in (x, t), is another
        # second-order method, and the first step of ours, from an infinite ratio, is Euler's.
        assert 1e-6 < float((found - wanted).norm() / wanted.norm()) < 0.5


def test_the_first_noise_of_a_known_seed():
    """What a pipeline's ``prepare_latents`` draws, by its own ``randn_tensor``."""
    from diffusers.utils.torch_utils import randn_tensor

    wanted = randn_tensor((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(1234))
    assert torch.equal(noise.start_of_diffusers(1234, (4, 8, 8)), wanted[0])

"""Solver by solver against diffusers: the same network, the same times, the same noise, in float64.

The network is small, fixed and not linear, and answers in epsilon. diffusers is given its own grid; ours gets the times of
the sigmas that it chose, so that only the solver differs. diffusers computes its sigmas in float32, which is what the tolerance of
1e-6 is for; from there on they are float64.
"""

import pytest
import torch
from tests.parity.networks import DPM, NOISES, SD, TRAILING, Interpolated, NetworkField, theirs

from latentmill.schedulers import noise
from latentmill.schedulers.consistency import LCM
from latentmill.schedulers.dpmpp import DPMpp2M, DPMpp2MSDE
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.heun import DPM2, DPM2Ancestral, Heun
from latentmill.schedulers.multistep import DEIS, LMS
from latentmill.schedulers.noise_schedules import RectifiedFlow
from latentmill.schedulers.unipc import UniPC
from latentmill.testing import follow

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
    schedule = Interpolated()
    sigmas = final_sigmas(name, scheduler, steps)
    sigmas = sigmas[: steps + 1] if len(sigmas) > steps + 1 else sigmas
    times = schedule.time(sigmas).repeat(2, 1)
    field = NetworkField(schedule)
    alpha, _ = field.scale(times[:, 0])
    variance_preserving = float(scheduler.init_noise_sigma) == 1.0
    x = NOISES[0] if variance_preserving else NOISES[0] * float(scheduler.init_noise_sigma) * alpha
    found = follow(ours, field, x, times)
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= 1e-6, f"{case}, {steps} steps: relative error {error:.1e}"


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "ours"), [("Euler", Euler()), ("Heun", Heun())])
def test_flow_matching(name, ours, steps, monkeypatch):
    """On a flow path the network answers in flow, ``noise - x0``."""
    wanted, scheduler = theirs(monkeypatch, f"FlowMatch{name}DiscreteScheduler", steps)
    sigmas = scheduler.sigmas.double()
    times = sigmas if name == "Euler" else torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    found = follow(ours, NetworkField(RectifiedFlow(), "flow"), NOISES[0], times.repeat(2, 1))
    if name == "Euler":
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6
    else:
        # On purpose: ours is Heun's method in (x / alpha, sigma / alpha) on every schedule; theirs, in (x, t), is another
        # second-order method, and the first step of ours, from an infinite ratio, is Euler's.
        assert 1e-6 < float((found - wanted).norm() / wanted.norm()) < 0.5


def test_the_first_noise_of_a_known_seed():
    """What a pipeline's ``prepare_latents`` draws, by its own ``randn_tensor``."""
    from diffusers.utils.torch_utils import randn_tensor

    wanted = randn_tensor((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(1234))
    assert torch.equal(noise.start_of_diffusers(1234, (4, 8, 8)), wanted[0])

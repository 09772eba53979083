"""Solvers that diffusers has with other steps, noise or networks than ours, put together so that they must agree.

As in test_diffusers. Where we differ on purpose, the test says so and pins it.
"""

import importlib
import math

import diffusers
import pytest
import torch
from tests.parity.networks import DPM, NOISES, SD, TRAILING, Interpolated, Network, NetworkField, theirs

from latentmill.plugin import NoiseSchedule
from latentmill.schedulers.consistency import TCD
from latentmill.schedulers.dpmpp import DPMpp2SAncestral, DPMpp3MSDE, DPMppSDE
from latentmill.schedulers.euler import EDMEuler
from latentmill.schedulers.multistep import IPNDM, PNDM
from latentmill.schedulers.noise_schedules import VarianceExploding, VariancePreserving
from latentmill.schedulers.sa_solver import SASolver
from latentmill.testing import follow


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_pndm_is_plms(steps, monkeypatch):
    """Their PLMS takes leading timesteps, evaluates the second twice, and ends at the alpha of timestep 0."""
    wanted, scheduler = theirs(monkeypatch, "PNDMScheduler", steps, **SD, skip_prk_steps=True, steps_offset=0)
    at = [int(t) for t in scheduler.timesteps]
    times = (torch.tensor([at[0], *at[2:], 0]).double() + 1) / 1000
    found = follow(PNDM(), NetworkField(VariancePreserving()), NOISES[0], times.repeat(2, 1)[:, : steps + 1])
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-6


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_dpmpp_sde(steps, monkeypatch):
    """Their noise is that of a Brownian tree; here both take halves of the same motion, the whole's made of the two."""
    count = iter(range(1, 200))

    def brownian(sigma, sigma_next):
        if brownian.half is None:  # to the middle
            brownian.half = float(sigma), float(sigma_next), next(count), next(count)
            return NOISES[brownian.half[2]]
        begin, middle, first, second = brownian.half
        brownian.half = None
        share = (begin - middle) / (begin - float(sigma_next))
        return math.sqrt(share) * NOISES[first] + math.sqrt(1 - share) * NOISES[second]

    brownian.half = None
    scheduler = diffusers.DPMSolverSDEScheduler(**TRAILING)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.noise_sampler = brownian
    network, x = Network(), NOISES[0] * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    sigmas = scheduler.sigmas
    schedule = Interpolated()
    times = schedule.time(torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])).repeat(2, 1)
    field = NetworkField(schedule)
    start = NOISES[0] * float(scheduler.init_noise_sigma) * field.scale(times[:, 0])[0]
    found = follow(DPMppSDE(), field, start, times)
    assert float((found - x).norm() / x.norm()) <= 1e-6


class Sine(NoiseSchedule):
    """The schedule that diffusers' IPNDMScheduler is on: sigma = sin²(pi t / 2), with timesteps of its own."""

    def scale(self, t):
        sigma = torch.sin(t * math.pi / 2) ** 2
        return torch.sqrt(1 - sigma**2), sigma

    def time(self, ratio):
        return 2 / math.pi * torch.asin(torch.sqrt(torch.sin(torch.atan(ratio))))

    def timestep(self, t):
        alpha, sigma = self.scale(t)
        return torch.atan2(sigma, alpha) / math.pi * 2


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_ipndm(steps, monkeypatch):
    """From the second step on. Their network answers in v; at sigma 1 they divide by alpha, 0, and lose its answer, which ours uses."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps)
    whole = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    scheduler.betas = torch.sin(whole * math.pi / 2) ** 2  # as theirs, but not in float32
    scheduler.alphas = (1 - scheduler.betas**2).sqrt()
    network, x = Network(), NOISES[0]
    first, *rest = scheduler.timesteps
    x = scheduler.step(network(x, first), first, x).prev_sample
    assert torch.equal(x, NOISES[0] * scheduler.betas[1].double())
    begin, scheduler.ets = x, []
    for t in rest:
        x = scheduler.step(network(x, t), t, x).prev_sample
    times = whole[1:].repeat(2, 1)
    found = follow(IPNDM(), NetworkField(Sine(), "v"), begin, times)
    assert float((found - x).norm() / x.norm()) <= 1e-6


class KeyedField(NetworkField):
    """The noise of a step is the same whenever it is asked for."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.drawn = {}

    def noise(self, t, s):
        return self.drawn.setdefault((float(t[0]), float(s[0])), NOISES[1 + len(self.drawn)])


class Unmoved(list):
    """SASolverScheduler's coefficients of order 2, to which it would add a term of order h^3 of its own: ours has none."""

    def __getitem__(self, at):
        return super().__getitem__(at).clone()  # or it would be added to in place

    def __setitem__(self, at, value):
        pass


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_sa_solver(tau, steps, monkeypatch):
    """Predictor of order 3, corrector of order 4."""
    coefficients = diffusers.SASolverScheduler.get_coefficients_fn
    monkeypatch.setattr(
        diffusers.SASolverScheduler, "get_coefficients_fn", lambda *a, **k: Unmoved(coefficients(*a, **k))
    )
    settings = {**TRAILING, "predictor_order": 3, "corrector_order": 4, "lower_order_final": False}
    wanted, scheduler = theirs(monkeypatch, "SASolverScheduler", steps, **settings, tau_func=lambda t: tau)
    schedule = VariancePreserving()
    times = schedule.time(scheduler.sigmas.double()).repeat(2, 1)
    found = follow(SASolver(tau), KeyedField(schedule), NOISES[0] * float(scheduler.init_noise_sigma), times)
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= 1e-6, error


class Told(VariancePreserving):
    """The network is told what their scheduler tells it at the nearest of its sigmas."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def timestep(self, t):
        alpha, sigma = self.scale(t)
        return self.scheduler.timesteps[(self.scheduler.sigmas[:-1] - sigma / alpha).abs().argmin()]


@pytest.mark.parametrize("steps", [5, 11, 21, 51])
def test_dpmpp_2s(steps, monkeypatch):
    """DPMSolverSinglestepScheduler takes two steps of its grid for one of ours: with sigmas a constant factor apart the first ends where ours evaluates. Without noise, of which it has none."""
    settings = {**SD, "solver_order": 2, "final_sigmas_type": "zero", "use_exponential_sigmas": True}
    wanted, scheduler = theirs(monkeypatch, "DPMSolverSinglestepScheduler", steps, **settings)
    schedule = Told(scheduler)
    sigmas = scheduler.sigmas
    times = schedule.time(torch.cat([sigmas[:-1:2], sigmas[-1:]])).repeat(2, 1)
    found = follow(DPMpp2SAncestral(eta=0), NetworkField(schedule), NOISES[0], times)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-6


def test_dpmpp_3m_has_the_whole_square_term(monkeypatch):
    """Where theirs has half of it, as k-diffusion: a quadratic through three values is integrated exactly, or it is of second order.

    The third step is the first that has the term. Ours less theirs is half of it, and what comes before is the same.
    """
    settings = {**DPM, "solver_order": 3, "solver_type": "heun", "lower_order_final": False}
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings)
    scheduler.set_timesteps(10)
    scheduler.sigmas = scheduler.sigmas.double()
    network, x, latents = Network(), NOISES[0], []
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(network(x, t), t, x).prev_sample
        latents.append(x)
    schedule = Interpolated()
    times = schedule.time(scheduler.sigmas.double()).repeat(2, 1)
    field, ours = NetworkField(schedule), DPMpp3MSDE(eta=0)
    assert float((follow(ours, field, NOISES[0], times[:, :3]) - latents[1]).norm()) <= 1e-6 * float(latents[1].norm())
    found = follow(ours, field, NOISES[0], times[:, :4])
    cleans = [field.clean(x, times[:, k]) for k, x in enumerate([NOISES[0], *latents[:2]])]
    alpha, sigma = schedule.scale(times[0, :4])
    at = torch.log(alpha / sigma)
    h = float(at[3] - at[2])
    slopes = [(cleans[2] - cleans[1]) / (at[2] - at[1]), (cleans[1] - cleans[0]) / (at[1] - at[0])]
    square = (slopes[0] - slopes[1]) / (at[2] - at[0])  # the clean latents' second divided difference in lambda
    half = alpha[3] * (h**2 / 2 - (h - 1 + math.exp(-h))) * square
    assert float(half.norm() / x.norm()) > 1e-3
    assert float((found - latents[2] - half).norm() / x.norm()) <= 1e-6


class Floored(VariancePreserving):
    """Time is the timestep itself, over 1000, and only whole ones count: so does TCDScheduler round (1 - gamma) * s."""

    def scale(self, t):
        return super().scale((torch.floor(1000 * t + 1e-6) + 1) / 1000)

    def timestep(self, t):
        return 1000 * t


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_tcd(steps, gamma, monkeypatch):
    """Ours does not round; on a schedule of whole timesteps that is no difference."""
    asked = iter(range(1, 400))
    module = importlib.import_module(diffusers.TCDScheduler.__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: NOISES[next(asked)])
    scheduler = diffusers.TCDScheduler(**SD)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    network, x = Network(), NOISES[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, eta=gamma).prev_sample
    times = torch.cat([scheduler.timesteps.double(), torch.zeros(1, dtype=torch.float64)]).repeat(2, 1) / 1000
    found = follow(TCD(gamma), NetworkField(Floored()), NOISES[0], times)
    assert float((found - x).norm() / x.norm()) <= 1e-6


class Preconditioned(NetworkField):
    """The network as EDM uses it: ``clean = c_skip * x + c_out * network(c_in * x, c_noise)``, eq. 7 of arXiv:2206.00364."""

    def clean(self, x, t):
        _, sigma = self.scale(t)
        data = 0.5
        total = (sigma**2 + data**2).sqrt()
        predicted = self.network(x / total, 0.25 * math.log(float(sigma[0])))
        return data**2 / total**2 * x + sigma * data / total * predicted


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_edm_euler(steps, monkeypatch):
    """Without churn, since theirs raises the noise after the network has answered (ours before, as the paper does).

    With churn, ours is algorithm 2 written down, without its second-order correction.
    """
    wanted, scheduler = theirs(monkeypatch, "EDMEulerScheduler", steps)
    schedule = VarianceExploding(sigma_max=100.0)
    times = schedule.time(scheduler.sigmas.double()).repeat(2, 1)
    field = Preconditioned(schedule)
    start = NOISES[0] * float(scheduler.init_noise_sigma)
    assert float((follow(EDMEuler(churn=0), field, start, times) - wanted).norm() / wanted.norm()) <= 1e-6

    churn, x = 0.2, start
    for i in range(steps):
        sigma, after = (float(schedule.scale(times[0, k])[1]) for k in (i, i + 1))
        raised = sigma * (1 + churn)
        x = x + 1.003 * math.sqrt(raised**2 - sigma**2) * NOISES[i + 1]
        clean = field.clean(x, schedule.time(torch.tensor([raised, raised]).double()))
        x = x + (after - raised) * (x - clean) / raised
    found = follow(EDMEuler(churn=churn, s_noise=1.003), Preconditioned(schedule), start, times)
    assert float((found - x).norm() / x.norm()) <= 1e-6

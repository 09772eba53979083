"""Solver by solver against diffusers: the same network, the same times, the same noise, in float64.

The network is small, fixed and not linear, and answers in epsilon. diffusers is given its own grid; ours gets the times of
the sigmas that it chose, so that only the solver differs. diffusers computes its sigmas in float32, which is what the tolerance of
1e-6 is for; from there on they are float64. Where we differ on purpose, the test says so and pins it.
"""

import importlib
import math

import diffusers
import pytest
import torch

from latentmill.plugin import Field, NoiseSchedule
from latentmill.schedulers import noise
from latentmill.schedulers.consistency import LCM, TCD
from latentmill.schedulers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp2SAncestral, DPMpp3MSDE, DPMppSDE
from latentmill.schedulers.euler import EDMEuler, Euler, EulerAncestral
from latentmill.schedulers.heun import DPM2, DPM2Ancestral, Heun
from latentmill.schedulers.multistep import DEIS, IPNDM, LMS, PNDM
from latentmill.schedulers.noise_schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from latentmill.schedulers.sa_solver import SASolver
from latentmill.schedulers.unipc import UniPC
from latentmill.stages.guidance import to_clean
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


class Interpolated(VariancePreserving):
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

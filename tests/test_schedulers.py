"""Solvers, paths, grids and noise, against numbers that were not computed by them."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from latentmill import registry
from latentmill.schedulers import grids, noise
from latentmill.schedulers.comfy_sampler import ComfySampler
from latentmill.schedulers.consistency import LCM, TCD
from latentmill.schedulers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp2MSDEHeun, DPMpp2SAncestral, DPMpp3MSDE, DPMppSDE
from latentmill.schedulers.er_sde import ERSDE
from latentmill.schedulers.euler import EDMEuler, Euler, EulerAncestral
from latentmill.schedulers.heun import DPM2, DPM2Ancestral, Heun, HeunPP2
from latentmill.schedulers.multistep import DEIS, IPNDM, LMS, PNDM, GradientEstimation, RESMultistep
from latentmill.schedulers.noise_schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from latentmill.schedulers.sa_solver import SASolver
from latentmill.schedulers.seeds import SEEDS2, SEEDS3
from latentmill.schedulers.unipc import UniPC
from latentmill.testing import GaussianField, SchedulerSuite, follow, measure_order

ORDERS = {}


def order_of(scheduler, schedule):
    """``measure_order``, once for each solver, its settings and path: the suite and the table ask for the same."""
    key = tuple((type(each), repr(sorted(vars(each).items()))) for each in (scheduler, schedule))
    if key not in ORDERS:  # those that evaluate more than others show their order sooner
        steps = (20, 40) if isinstance(scheduler, (ComfySampler, HeunPP2)) else (40, 80)
        ORDERS[key] = measure_order(scheduler, schedule, steps)
    return ORDERS[key]


@pytest.fixture(autouse=True, scope="module")
def orders_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentmill.testing.scheduler.measure_order", order_of)
        yield


def suite(scheduler, **settings):
    """The suite that plugins inherit, on one of ours. Stochastic solvers with a better drift need fewer steps."""
    return type("Suite", (SchedulerSuite,), {"scheduler": scheduler, **settings})


TestEuler = suite(Euler)
TestEulerAncestral = suite(EulerAncestral)
TestHeun = suite(Heun)
TestDPM2 = suite(DPM2)
TestDPM2Ancestral = suite(DPM2Ancestral, steps=300)
TestLMS = suite(LMS)
TestIPNDM = suite(IPNDM)
TestPNDM = suite(PNDM)
TestDEIS = suite(DEIS)
TestRESMultistep = suite(RESMultistep)
TestGradientEstimation = suite(GradientEstimation)
TestDPMpp2M = suite(DPMpp2M)
TestDPMpp2SAncestral = suite(DPMpp2SAncestral, steps=300)
TestDPMppSDE = suite(DPMppSDE, steps=300)
TestDPMpp2MSDE = suite(DPMpp2MSDE, steps=150)
TestDPMpp3MSDE = suite(DPMpp3MSDE, steps=150)
TestUniPC = suite(UniPC)
TestSASolver = suite(SASolver, steps=200)
TestERSDE = suite(ERSDE, steps=300)
TestSEEDS2 = suite(SEEDS2, steps=100)
TestSEEDS3 = suite(SEEDS3, steps=60)
TestHeunPP2 = suite(HeunPP2)
TestDPMpp2MSDEHeun = suite(DPMpp2MSDEHeun, steps=100)
TestComfySampler = suite(ComfySampler)
TestComfyUniPC = suite(partial(ComfySampler, "uni_pc"))


class TestEDMEuler(SchedulerSuite):
    """With little churn: it is first order in the churn as well, and 10% a step is far from the limit."""

    class scheduler(EDMEuler):
        def __init__(self):
            super().__init__(churn=0.002)


class Consistency(GaussianField):
    """A distilled model's answer: where the ODE ends."""

    def clean(self, x, t):
        super().clean(x, t)
        return self.exact(x, t, torch.zeros_like(t))


class TestLCM(SchedulerSuite):
    """Made for models that answer with the end of the ODE: with such a one every step's distribution is exact."""

    scheduler = LCM

    def test_the_distribution_is_reached(self):
        for schedule in (VariancePreserving(), RectifiedFlow()):
            field = Consistency(schedule, double(0.7), 0.5, [5], (100_000,))
            times = torch.linspace(1, 0, 5, dtype=torch.float64)[None]
            x = follow(LCM(), field, field.start(times[:, 0]), times)
            assert abs(float(x.mean()) - 0.7) < 4 * 0.5 / math.sqrt(1e5)
            assert abs(float(x.var()) - 0.25) < 4 * 0.25 * math.sqrt(2 / 1e5)


class TestTCD(SchedulerSuite):
    """Between Euler and LCM; trained for jumps that a posterior mean doesn't know, so its ends are what can be checked."""

    scheduler = TCD

    def test_the_distribution_is_reached(self):
        field = GaussianField(VariancePreserving(), double(0.7), 0.5, [5], (50,))
        times = torch.linspace(1, 0, 6, dtype=torch.float64)[None]
        x = field.start(times[:, 0])
        for gamma, same in ((0.0, Euler()), (1.0, LCM())):
            torch.testing.assert_close(follow(TCD(gamma), field, x, times), follow(same, field, x, times))


@pytest.mark.parametrize(
    "scheduler", [partial(UniPC, 2, "bh1"), partial(UniPC, 3), partial(RESMultistep, 3), partial(DEIS, 2)]
)
def test_other_orders_and_variants_converge_as_they_should(scheduler):
    order = {UniPC: scheduler.args[0] + 1}.get(scheduler.func, scheduler.args[0])
    for schedule in (VariancePreserving(), RectifiedFlow()):
        assert order_of(scheduler(), schedule) > 0.9 * order


@pytest.mark.parametrize(
    "scheduler",
    [
        DPM2Ancestral(0),
        DPMpp2SAncestral(0),
        DPMppSDE(0),
        DPMpp2MSDE(0),
        DPMpp3MSDE(0),
        SASolver(tau=0),
        SEEDS2(0),
        SEEDS3(0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_stochastic_solvers_without_noise_have_the_order_of_their_drift(scheduler):
    for schedule in (VariancePreserving(), VarianceExploding(), RectifiedFlow()):
        assert order_of(scheduler, schedule) > 0.9 * scheduler.order


def test_the_table_of_orders(capsys):
    """Every deterministic solver on both paths; euler 0.95 and more, second order 1.8, third 2.6."""
    for entry in registry.entries("scheduler"):
        if entry.distribution != "latentmill":
            continue
        scheduler = registry.build("scheduler", {"name": f"{entry.distribution}:{entry.name}"})
        if not scheduler.stochastic:
            measured = [
                order_of(scheduler, schedule)
                for schedule in (VariancePreserving(), VarianceExploding(), RectifiedFlow())
            ]
            with capsys.disabled():
                print(
                    f"\n{entry.name:<20} order {scheduler.order}  VP {measured[0]:.2f}  VE {measured[1]:.2f}  flow {measured[2]:.2f}",
                    end="",
                )
            assert (
                min(measured)
                >= {1: 0.9 if entry.name == "gradient_estimation" else 0.95, 2: 1.8, 3: 2.6, 4: 3.5}[scheduler.order]
            )


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- solvers


def test_ddim_is_euler_on_a_variance_preserving_path():
    """Eq. 12 of Song et al. 2021, written out with alpha bar, eta 0.5."""
    schedule, t, s, eta = VariancePreserving(), double(0.8), double(0.6), 0.5
    field = GaussianField(schedule, double(0.7), 0.5, [3])
    x = field.start(t)
    bar_t, bar_s = float(schedule.scale(t)[0] ** 2), float(schedule.scale(s)[0] ** 2)
    x0 = field.clean(x, t)
    eps = (x - math.sqrt(bar_t) * x0) / math.sqrt(1 - bar_t)
    up = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    wanted = math.sqrt(bar_s) * x0 + math.sqrt(1 - bar_s - up**2) * eps + up * field.noise(t, s)
    moved, _ = Euler(eta=eta).step(field, x, t, s, {})
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-12)


def test_dpmpp_2m_is_algorithm_2():
    """Two steps of Lu et al. 2022 in their own notation."""
    schedule = VariancePreserving()
    times = double(0.9, 0.7, 0.4)
    field = GaussianField(schedule, double(0.7), 0.5, [3])
    x = first = field.start(times[:1])
    (a0, a1, a2), (s0, s1, s2) = (v.tolist() for v in schedule.scale(times))
    l0, l1, l2 = (math.log(a / s) for a, s in ((a0, s0), (a1, s1), (a2, s2)))
    d0 = field.clean(x, times[:1])
    x = s1 / s0 * x - a1 * math.expm1(-(l1 - l0)) * d0
    d1, r = field.clean(x, times[1:2]), (l1 - l0) / (l2 - l1)
    x = s2 / s1 * x - a2 * math.expm1(-(l2 - l1)) * ((1 + 1 / (2 * r)) * d1 - 1 / (2 * r) * d0)
    torch.testing.assert_close(follow(DPMpp2M(), field, first, times[None]), x, rtol=1e-12, atol=1e-12)


def test_second_order_is_second_and_first_is_first():
    for schedule in (VariancePreserving(), RectifiedFlow()):
        assert order_of(Euler(), schedule) == pytest.approx(1.0, abs=0.1)
        assert order_of(DPMpp2M(), schedule) > 1.8


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), True, "1"])
def test_an_eta_that_is_none_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be from 0 to 1"):
        Euler(eta=eta)


# ------------------------------------------------------------------------------------------------------------ paths


def test_vp_is_stable_diffusion_s():
    schedule = VariancePreserving()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    alpha, sigma = schedule.scale(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    np.testing.assert_allclose(alpha**2, alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(sigma**2, 1 - alpha_bar, rtol=1e-9)
    # The largest and smallest sigma in units of alpha, as everybody quotes them.
    assert float((sigma / alpha)[-1]) == pytest.approx(14.6146, abs=1e-4)
    assert float((sigma / alpha)[0]) == pytest.approx(0.0292, abs=1e-4)
    assert schedule.timestep(double(1.0, 0.001)).tolist() == pytest.approx([999.0, 0.0], abs=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [
        VariancePreserving(), VariancePreserving("linear", 1e-4, 0.02), VariancePreserving("squaredcos_cap_v2"), VariancePreserving("sigmoid"), VariancePreserving(zero_terminal_snr=True),
        VariancePreserving("squaredcos_cap_v2", zero_terminal_snr=True), VarianceExploding(), VarianceExploding(700.0), RectifiedFlow(),
    ],
)  # fmt: skip
def test_time_is_the_inverse_of_the_ratio(schedule):
    t = torch.linspace(0, 1, 777, dtype=torch.float64)[1:-1]
    alpha, sigma = schedule.scale(t)
    torch.testing.assert_close(schedule.time(sigma / alpha), t, rtol=1e-9, atol=1e-12)
    assert schedule.scale(double(0.0))[1].tolist() == [0.0] and schedule.scale(double(0.0))[0].tolist() == [1.0]
    assert schedule.time(double(0.0, math.inf)).tolist() == [0.0, 1.0]


def test_every_solver_is_finite_where_alpha_ends_at_zero():
    schedule = VariancePreserving(zero_terminal_snr=True)
    assert float(schedule.scale(double(1.0))[0]) == 0.0
    field = GaussianField(schedule, double(0.7), 0.5, [3])
    for entry in registry.entries("scheduler"):
        if (
            entry.distribution == "latentmill-diffusers"
        ):  # those are a model's, or wrap others, and have their own tests
            continue
        scheduler = registry.build("scheduler", {"name": f"{entry.distribution}:{entry.name}"})
        times = torch.linspace(1, 0, 6, dtype=torch.float64)[None]
        assert bool(follow(scheduler, field, field.start(times[:, 0]), times).isfinite().all()), entry


def test_unknown_betas_are_refused():
    with pytest.raises(ValueError, match="betas must be"):
        VariancePreserving(betas="cosinee")


# ------------------------------------------------------------------------------------------------------------ grids


VP = VariancePreserving()


def timesteps(grid, steps, strength=1.0):
    times = grids.times(grid, VP, steps, strength)
    assert times[-1] == 0.0 and bool((times.diff() < 0).all()) and times.dtype == torch.float64
    return [round(k, 6) for k in VP.timestep(times[:-1]).tolist()]


def test_spacings_are_diffusers_():
    """``timesteps`` of DDIMScheduler(timestep_spacing=...) with Stable Diffusion's settings, and steps_offset 1."""
    assert timesteps("trailing", 5) == [999, 799, 599, 399, 199]
    assert timesteps("trailing", 7) == [999, 856, 713, 570, 428, 285, 142]
    assert timesteps("leading", 5) == [801, 601, 401, 201, 1]
    assert timesteps({"name": "leading", "offset": 0}, 7) == [852, 710, 568, 426, 284, 142, 0]
    assert timesteps("linspace", 4) == [999, 666, 333, 0]


def test_karras_is_the_formula():
    schedule, steps = VariancePreserving(), 6
    high, low = 14.614641229333639, 0.029167533673379
    wanted = [(high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(steps)]
    alpha, sigma = schedule.scale(grids.times("karras", schedule, steps)[:-1])
    np.testing.assert_allclose((sigma / alpha).numpy(), wanted, rtol=1e-4)
    flow = grids.times({"name": "karras", "sigma_min": 0.01, "rho": 3}, RectifiedFlow(), 3)
    np.testing.assert_allclose(flow, [1.0, ((1 + 0.01 ** (1 / 3)) / 2) ** 3, 0.01, 0.0], rtol=1e-12)


def test_strength_keeps_the_last_steps():
    assert timesteps("trailing", 5, strength=0.6) == [599, 399, 199]
    assert timesteps("trailing", 5, strength=0.1) == [199], "some strength is some step"
    assert grids.times("trailing", VariancePreserving(), 5, strength=0.0).tolist() == [0.0]


def test_strength_on_a_flow_path_rounds_up_as_diffusers_flow_pipelines_do():
    """``t_start = int(max(n - min(n * strength, n), 0))``, written out."""
    for steps, strength in ((10, 0.55), (28, 0.6), (20, 0.33), (20, 1.0), (4, 0.5)):
        wanted = steps - int(max(steps - min(steps * strength, steps), 0))
        assert len(grids.times("trailing", RectifiedFlow(), steps, strength)) == wanted + 1


def test_trailing_is_diffusers_for_every_number_of_steps():
    trailing = grids.choose("trailing")
    for steps in range(1, 1001):
        theirs = np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
        assert timesteps(trailing, steps) == theirs.tolist(), steps


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="1001 steps are more than the 1000 timesteps"):
        grids.times("trailing", VariancePreserving(), 1001)


def test_flow_times_are_not_rounded():
    assert grids.times("trailing", RectifiedFlow(), 3).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-15)


@pytest.mark.parametrize("grid", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
def test_every_grid_descends_for_any_number_of_steps(grid, schedule, steps):
    times = grids.times(grid, schedule, steps)
    assert len(times) == steps + 1 and bool((times.diff() < 0).all()) and 0 < times[0] <= 1


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("karass", r"no grid 'karass' \(did you mean 'karras'\?\); there are align_your_steps, beta"),
        ({"name": "karras", "roh": 7}, r"no setting 'roh' \(did you mean 'rho'\?\)"),
        ({"name": "karras", "rho": "x"}, "rho must be float"),
        ({"rho": 7}, "there is no grid 'None'"),
    ],
)
def test_a_wrong_grid_is_refused(grid, said):
    with pytest.raises(ValueError, match=said):
        grids.choose(grid)


def test_karras_sigmas_must_be_in_order():
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        grids.times({"name": "karras", "sigma_min": 20.0}, VariancePreserving(), 5)


# ------------------------------------------------------------------------------------------------------------ noise


def test_noise_is_pinned():
    """A change here changes every dataset that was ever begun."""
    np.testing.assert_allclose(noise.start(7, (4,)), [-0.8454878, -0.4546587, -0.6130754, -0.3023468], rtol=1e-6)
    np.testing.assert_allclose(
        noise.between(7, 0.5, 0.25, (4,)), [-0.9292151, -0.9760167, -0.0593633, 0.2673389], rtol=1e-6
    )


def test_noise_hangs_on_seed_and_times_and_on_nothing_else():
    shape = (4, 8, 8)
    assert torch.equal(noise.between(1, 0.5, 0.4, shape), noise.between(1, 0.5, 0.4, shape))
    draws = [
        noise.start(1, shape), noise.start(2, shape), noise.start(2**64 - 1, shape), noise.between(1, 0.5, 0.4, shape),
        noise.between(1, 0.5, 0.3, shape), noise.between(1, 0.4, 0.5, shape), noise.between(2, 0.5, 0.4, shape),
    ]  # fmt: skip
    flat = torch.stack(draws).flatten(1)
    assert float((torch.corrcoef(flat) - torch.eye(len(draws))).abs().max()) < 0.3  # 256 numbers: 1/16 is one sigma
    many = noise.start(3, (100_000,)).double()
    assert abs(float(many.mean())) < 4 / math.sqrt(1e5) and abs(float(many.var()) - 1) < 4 * math.sqrt(2 / 1e5)

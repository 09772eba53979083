"""Grids against diffusers' own sigmas and timesteps, and against the formulas where diffusers has none."""

import math

import diffusers
import numpy as np
import pytest
import torch

from latentmill import registry
from latentmill.schedulers import grids
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = [5, 10, 20, 50]


def ratios(grid, steps):
    """Sigma over alpha at a grid's times on Stable Diffusion's schedule."""
    alpha, sigma = VariancePreserving().scale(grids.times(grid, VariancePreserving(), steps))
    return (sigma / alpha).numpy()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("grid", ["karras", "exponential", "beta"])
def test_sigmas_of_euler(grid, steps):
    theirs = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="linspace", **{f"use_{grid}_sigmas": True})
    theirs.set_timesteps(steps)
    np.testing.assert_allclose(ratios(grid, steps), theirs.sigmas, rtol=2e-5)  # their ends are float32


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("grid", ["trailing", "leading", "linspace"])
def test_timesteps_of_ddim_and_euler(grid, steps):
    name = "EulerDiscreteScheduler" if grid == "linspace" else "DDIMScheduler"
    theirs = getattr(diffusers, name)(**SD, timestep_spacing=grid, steps_offset=1)
    theirs.set_timesteps(steps)
    ours = VariancePreserving().timestep(grids.times(grid, VariancePreserving(), steps)[:-1])
    np.testing.assert_allclose(ours, np.asarray(theirs.timesteps, dtype=np.float64), rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_of_flow_matching(shift, steps):
    """Flux hands its scheduler ``linspace(1, 1 / n, n)``, which is trailing; Stable Diffusion 3 shifts by 3."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    np.testing.assert_allclose(
        grids.times({"name": "trailing", "shift": shift}, RectifiedFlow(), steps), theirs.sigmas, rtol=1e-6
    )


@pytest.mark.parametrize("side", [64, 128, 90])
def test_the_dynamic_shift_is_flux_s(side):
    """mu is what ``calculate_shift`` of the Flux pipeline gives for a latent of ``side``."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = (side // 2) ** 2 * slope + 0.5 - slope * 256
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist(), mu=mu)
    ours = grids.times({"name": "trailing", "shift": "dynamic"}, RectifiedFlow(), 20, shape=(16, side, side))
    np.testing.assert_allclose(ours, theirs.sigmas, rtol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
def test_linear_quadratic_is_mochi_s(steps):
    """``linear_quadratic_schedule`` of diffusers' Mochi pipeline, which can't be imported without transformers."""
    linear, threshold = steps // 2, 0.025
    quadratic, rest = steps - linear, linear - threshold * steps
    a, b = rest / (linear * quadratic**2), threshold / linear - 2 * rest / quadratic**2
    wanted = [1 - i * threshold / linear for i in range(linear)]
    wanted += [1 - (a * i**2 + b * i + a * linear**2) for i in range(linear, steps)]
    np.testing.assert_allclose(grids.times("linear_quadratic", RectifiedFlow(), steps)[:-1], wanted, rtol=1e-12)


@pytest.mark.parametrize("steps", STEPS)
def test_formulas_that_diffusers_does_not_have(steps):
    """kl_optimal, sgm_uniform and simple, as ComfyUI computes them: by sigmas, the smallest first in its table."""
    schedule = VariancePreserving()
    alpha, sigma = schedule.scale(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    table = (sigma / alpha).numpy()
    low, high = table[0], table[-1]
    at = np.arange(steps) / (steps - 1)
    wanted = np.tan(at * math.atan(low) + (1 - at) * math.atan(high))
    np.testing.assert_allclose(ratios("kl_optimal", steps)[:-1], wanted, rtol=1e-9)
    wanted = [table[-(1 + int(i * 1000 / steps))] for i in range(steps)]
    np.testing.assert_allclose(ratios("simple", steps)[:-1], wanted, rtol=1e-12)
    timesteps = np.linspace(999, 0, steps + 1)[:-1]
    np.testing.assert_allclose(
        schedule.timestep(grids.times("sgm_uniform", schedule, steps)[:-1]), timesteps, rtol=1e-9
    )


def test_align_your_steps_is_the_authors_table():
    np.testing.assert_allclose(ratios("align_your_steps", 10)[:-1], grids.ALIGNED["sd"][:-1], rtol=1e-3)
    wanted = np.exp(np.interp(np.linspace(0, 1, 21), np.linspace(0, 1, 11), np.log(grids.ALIGNED["sdxl"])))
    found = ratios({"name": "align_your_steps", "model": "sdxl"}, 20)
    np.testing.assert_allclose(found[1:-1], wanted[1:-1], rtol=1e-6)


@pytest.mark.parametrize("grid", [entry.name for entry in registry.entries("grid") if entry.name != "times"])
@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_grid_on_every_path_with_both_ends(grid, schedule, end):
    if grid == "align_your_steps" and schedule.shiftable:
        with pytest.raises(ValueError, match="not for flow models"):
            grids.times(grid, schedule, 5)
        return
    if grid == "comfy" and end == "sigma_min":
        with pytest.raises(ValueError, match="says itself where a row ends"):
            grids.times({"name": grid, "end": end}, schedule, 5)
        return
    for steps in (2, 7, 40):
        times = grids.times({"name": grid, "end": end}, schedule, steps)
        assert len(times) == steps + 1 and 0 < float(times[0]) <= 1
        assert (float(times[-1]) == 0.0) == (end == "zero")


def test_own_times_and_what_makes_no_sense():
    assert grids.times({"times": [0.9, 0.5]}, RectifiedFlow(), 2).tolist() == [0.9, 0.5, 0.0]
    for grid, schedule, said in (
        ({"times": [0.9, 0.5]}, RectifiedFlow(), "has 2 steps, and 3 were asked for"),
        ({"times": [0.5, 0.9, 0.1]}, RectifiedFlow(), "must descend"),
        ({"name": "trailing", "shift": 3.0}, VariancePreserving(), "shift is for flow models"),
        (
            {"name": "align_your_steps", "model": "sd3"},
            VariancePreserving(),
            "model must be sd or sdxl or svd, not 'sd3'",
        ),
        ({"name": "trailing", "end": "one"}, VariancePreserving(), "end must be zero or sigma_min"),
    ):
        with pytest.raises(ValueError, match=said):
            grids.times(grid, schedule, 3)


@pytest.mark.parametrize(
    "model",
    [("sd", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas"), ("svd", "StableDiffusionVideoSigmas")],
)
def test_align_your_steps_are_diffusers_tables(model):
    ours, theirs = model
    # They end at 0; the authors' tables at a sigma, from which other numbers of steps are interpolated.
    assert grids.ALIGNED[ours][:10] == list(diffusers.schedulers.AysSchedules[theirs])[:10]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_alpha_bars_are_diffusers(betas, zero):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": betas, "rescale_betas_zero_snr": zero}
    theirs = diffusers.DDIMScheduler(**settings).alphas_cumprod.double()
    alpha, _ = VariancePreserving(betas, 0.00085, 0.012, zero_terminal_snr=zero).scale(
        torch.arange(1, 1001).double() / 1000
    )
    np.testing.assert_allclose(alpha**2, theirs, rtol=2e-4, atol=1e-7)  # theirs are products of a thousand float32

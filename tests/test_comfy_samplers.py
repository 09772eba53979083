"""Scheduler ``comfy``, by ComfyUI's names, against latents of a run of ComfyUI itself (values/comfy_latents.json says which)."""

import json
import math
from pathlib import Path

import pytest
import torch

from latentmill.plugin import Field
from latentmill.schedulers.comfy_grid import ComfyGrid
from latentmill.schedulers.comfy_names import SAMPLERS, named_sampler
from latentmill.schedulers.comfy_sampler import ComfySampler
from latentmill.schedulers.comfy_sampling import FlowSampling, SampledFlow
from latentmill.schedulers.dpm_solver import DPMSolverAdaptive
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving
from latentmill.testing import GaussianField, follow

VALUES = json.loads((Path(__file__).parent / "values" / "comfy_latents.json").read_text())["rows"]
SCHEDULES = {"eps": VariancePreserving, "flow": lambda: SampledFlow(FlowSampling(3.0))}
ADAPTIVE = {"eps": (24, 24), "flow": (12, 24)}
"""The evaluations that ComfyUI's dpm_adaptive made, by the model, in the order of the values."""


class Smooth(Field):
    """A denoiser that is no one's data, in ComfyUI's units, and noise that hangs on the sigmas of a step: as in the run."""

    def __init__(self, schedule):
        self.noise_schedule, self.ahead, self.evaluations = schedule, [], 0

    def scale(self, t):
        alpha, sigma = self.noise_schedule.scale(t)
        return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)

    def time(self, ratio):
        return self.noise_schedule.time(ratio.flatten())

    def sigma(self, t):
        alpha, sigma = self.scale(t)
        return t.reshape(-1, 1, 1, 1) if self.noise_schedule.sigma_is_time else sigma / alpha

    def guided(self, x, t):
        self.evaluations += 1
        sigma, (alpha, _) = self.sigma(t), self.scale(t)
        x = (x if self.noise_schedule.sigma_is_time else x / alpha) / (1 + sigma)
        share = sigma / (1 + sigma)
        return torch.tanh(1.5 * x) + 0.2 * torch.cos(3 * share), 0.9 * torch.tanh(1.2 * x) - 0.1 * share

    def clean(self, x, t):
        return self.guided(x, t)[0]

    def following(self, s):
        found = super().following(s)
        found[:, : len(self.ahead)] = torch.tensor(self.ahead, dtype=found.dtype)
        return found

    def noise(self, t, s):
        first, last = (round(float(self.sigma(each)) * 1e4) for each in (t, s))
        generator = torch.Generator().manual_seed(first * 1000003 + last)
        return torch.randn(1, 2, 1, 3, generator=generator, dtype=torch.float64)


def sampled(row, sampler=None, asked=True):
    schedule, known = SCHEDULES[row["model"]](), named_sampler(row["sampler"])
    settings = {**known.grid, **known.of_steps} if asked else {}
    start = ComfyGrid(row["scheduler"], **settings).start(schedule, row["steps"], 1.0, ())
    sampler, field = sampler or ComfySampler(row["sampler"], **row["settings"]), Smooth(schedule)
    drawn = torch.randn(1, 2, 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, times = start.sigma * drawn, start.times[None]
    state = sampler.init(field, x, times[:, 0])
    for i in range(len(start.times) - 1):
        field.ahead = start.times[i + 2 : i + 6].tolist()
        x, state = sampler.step(field, x, times[:, i], times[:, i + 1], state)
    return x.flatten() / start.leaves, field


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_those_of_comfyui(name):
    rows = [row for row in VALUES if row["sampler"] == name]
    made = {model: iter(counts) for model, counts in ADAPTIVE.items()}
    assert {(row["model"], row["scheduler"], row["steps"]) for row in rows} == {
        ("eps", "karras", 5), ("eps", "normal", 9), ("flow", "simple", 5), ("flow", "normal", 9)
    } | ({("eps", "simple", 4)} if name == "dpm_fast" else set())  # fmt: skip
    near = 1e-4 if name.startswith("uni_pc") else 1e-5  # that one keeps float32
    for row in rows:
        found, field = sampled(row)
        torch.testing.assert_close(
            found, torch.tensor(row["latents"], dtype=torch.float64), rtol=near, atol=near, msg=str(row)
        )
        steps = row["steps"] * ComfySampler(name).evaluations
        steps = next(made[row["model"]]) if name == "dpm_adaptive" else steps
        assert field.evaluations == steps, "what it says that a step costs is what it costs"


class Strict(DPMSolverAdaptive):
    """Of ComfyUI's sampler with other settings, so that a step is too long once."""

    rtol, atol, h_init = 0.005, 0.00078, 2.0


def test_a_step_that_is_too_long_is_made_again():
    row = {"sampler": "dpm_adaptive", "model": "eps", "scheduler": "karras", "steps": 5}
    found, field = sampled(row, Strict())
    made = [1.0841963, 0.97691136, 0.74668945, 1.0782797, -0.47335008, -0.093996676]
    torch.testing.assert_close(found, torch.tensor(made, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert field.evaluations == 9 * 3, "8 steps, one of them twice"


def test_a_row_that_the_network_loses_ends():
    class Lost(Smooth):
        def guided(self, x, t):
            clean, other = super().guided(x, t)
            return torch.where(self.sigma(t) < 1.0, math.nan, clean), other

    field = Lost(VariancePreserving())
    times = torch.tensor([[0.9, 0.01], [0.9, 0.6]], dtype=torch.float64)
    moved, _ = DPMSolverAdaptive().step(field, torch.ones(2, 2, 1, 3), times[:, 0], times[:, 1], {})
    assert bool(moved[0].isnan().all()) and bool(moved[1].isfinite().all())


def test_no_way_between_the_sigmas_is_said():
    for between in ("evaluations", "ends"):
        with pytest.raises(
            ValueError, match="moves nothing of 1 step, since it ends at the last sigma above 0: 2 or more"
        ):
            ComfyGrid("karras", between=between).start(VariancePreserving(), 1, 1.0, ())


@pytest.mark.parametrize("name", ["seeds_2", "uni_pc", "dpm_2"])
def test_what_the_table_asks_of_the_grid_is_needed(name):
    row = next(row for row in VALUES if row["sampler"] == name and row["model"] == "flow")
    without, _ = sampled(row, asked=False)
    assert len(without) == 6 and not torch.allclose(
        without, torch.tensor(row["latents"]).double(), rtol=1e-4, atol=1e-4
    )


def test_a_name_that_ends_in_gpu_is_the_same():
    row = next(row for row in VALUES if row["sampler"] == "dpmpp_2m_sde" and row["settings"] == {})
    assert torch.equal(sampled(row)[0], sampled(row, ComfySampler("dpmpp_2m_sde_gpu"))[0])


def test_what_there_is_not_is_refused():
    for settings, says in (
        ({"sampler": "dpmpp2m"}, "did you mean 'dpmpp_2m'"),
        ({"sampler": "euler", "eta": 0.5}, "has no eta; it has no settings"),
        ({"sampler": "dpmpp_2m_sde", "solver_type": "euler"}, "midpoint or heun"),
        ({"sampler": "res_multistep_ancestral", "eta": 1.5}, "eta must be a number from 0 to 1, not 1.5"),
        ({"sampler": "euler_ancestral_cfg_pp", "eta": -1.0}, "eta must be a number from 0 to 1, not -1.0"),
        ({"sampler": "seeds_2", "s_noise": math.nan}, "s_noise must be a number from 0 to 100, not nan"),
    ):
        with pytest.raises(ValueError, match=says):
            ComfySampler(**settings)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_do_not_touch_each_other(name):
    """Three rows at times of their own, one of which ends, against each alone; on a flow model from pure noise."""
    for schedule in (VariancePreserving(), RectifiedFlow()):
        ends = [(1.0, 0.0), (0.6, 0.0), (0.9, 0.2)]
        times = torch.stack([torch.linspace(first, last, 5, dtype=torch.float64) for first, last in ends])
        field = GaussianField(schedule, torch.tensor([0.5, -2.0, 3.0]), 0.3, [11, 12, 13])
        together = follow(ComfySampler(name), field, field.start(times[:, 0]), times)
        assert bool(together.isfinite().all())
        for row in range(3):
            alone, own = field.take([row]), times[row : row + 1]
            torch.testing.assert_close(
                follow(ComfySampler(name), alone, alone.start(own[:, 0]), own)[0], together[row], rtol=1e-9, atol=1e-9
            )


def test_the_table_is_comfyui_s_list():
    """But for those that make their noise on the GPU."""
    assert {row["sampler"] for row in VALUES} == {*SAMPLERS}
    assert len(SAMPLERS) == 38

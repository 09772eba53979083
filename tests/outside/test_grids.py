"""A grid of somebody's own is chosen by its name, with its settings; a noise schedule of somebody's own gets the grids of its kind."""

import json

import pytest
import torch

from latentmill.plugin import NoiseSchedule
from latentmill.schedulers import grids

CODE = """
import torch
from latentmill.plugin import Denoiser, Grid, NoiseSchedule, TextEncoder

class Quadratic(Grid):
    contract = 2

    def __init__(self, power: float = 2.0):
        if power <= 0: raise ValueError("power must be above 0")
        self.power = power

    def times(self, noise_schedule, steps):
        if noise_schedule.timesteps is None: raise ValueError("it is for discrete noise schedules")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1] ** self.power

class Words(TextEncoder):
    contract = 2

    def encode(self, prompts):
        return {"embeds": torch.zeros(len(prompts), 1)}

class Fifty(NoiseSchedule):
    timesteps = 50

    def scale(self, t):
        sigma = t.double()
        return (1 - sigma**2).sqrt(), sigma

    def time(self, ratio):
        return ratio.double() / (1 + ratio.double() ** 2).sqrt()

class Tells(Denoiser):
    '''Adds up the timesteps that it is told.'''
    contract, prediction, noise_schedule = 2, "sample", Fifty()

    def __init__(self):
        self.told = []

    def predict(self, x, t, conditioning):
        self.told.append(self.noise_schedule.timestep(t).tolist())
        return torch.full_like(x, sum(each[0] for each in self.told))
"""
POINTS = """
[latentmill.grids]
quadratic = acme_grids:Quadratic
[latentmill.text_encoders]
words = acme_grids:Words
[latentmill.denoisers]
tells = acme_grids:Tells
"""


@pytest.fixture
def job(install, tmp_path):
    """A job of one row of two steps with the grid and the denoiser of a distribution that is installed for a test."""
    install("acme", POINTS, acme_grids=CODE)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x"}))
    size = ("sampling.width=4", "sampling.height=4", "sampling.steps=2", f"source.path={tmp_path / 'rows.jsonl'}")
    parts = ("denoiser.name=tells", "text_encoder.name=words", "scheduler.name=euler")
    return (
        "txt2img",
        "flow=[read,encode,denoise,write]",
        "cluster=inline",
        "samples_per_row=1",
        "vae.name=patches",
        "vae.side=1",
        *parts,
        *size,
    )


def test_a_grid_of_somebody_s_own_by_its_name_and_with_settings(latentmill, rows, job, tmp_path):
    for number, (grid, until) in enumerate((("quadratic", 0.25), ("{name: quadratic, power: 1}", 0.5))):
        out = tmp_path / f"out{number}"
        chosen = f"scheduler.grid={grid}"
        assert latentmill("run", *job, chosen, "sampling.until=0.6", f"output={out}") == 0, latentmill.said
        assert [row["time"] for row in rows(out)] == [until]
        assert json.loads((out / "plan.json").read_text())["libraries"]["acme"] == "1.0", "another version, other rows"


def test_what_is_wrong_with_a_grid_is_one_line(latentmill, job, tmp_path):
    for grid, said in (
        ("quadratik", "scheduler.grid: there is no grid 'quadratik' (did you mean 'quadratic'?)"),
        ("{name: quadratic, powr: 1}", "grid quadratic has no setting 'powr' (did you mean 'power'?)"),
        ("{name: quadratic, power: 0}", "power must be above 0"),
        ("{name: quadratic, shift: 3}", "shift is for flow models"),
        ("{name: quadratic, end: one}", "grid quadratic: end must be zero or sigma_min, not 'one'"),
    ):
        assert latentmill("plan", *job, f"scheduler.grid={grid}", f"output={tmp_path / 'out'}") != 0
        assert said in latentmill.err and "Traceback" not in latentmill.err


class Fifty(NoiseSchedule):
    """Discrete, and no relative of ours."""

    timesteps = 50

    def scale(self, t):
        return (1 - t.double() ** 2).sqrt(), t.double()

    def time(self, ratio):
        return ratio.double() / (1 + ratio.double() ** 2).sqrt()


class Shifts(Fifty):
    """Continuous, times may be shifted, and sigma is the time."""

    timesteps, shiftable, sigma_is_time, strength_rounds_up = None, True, True, True


def test_a_discrete_noise_schedule_of_somebody_s_own_gets_the_discrete_grids():
    fifty = Fifty()
    assert (grids.times("trailing", fifty, 4) * 50).tolist() == [50, 38, 25, 12, 0], "whole timesteps"
    assert (grids.times("leading", fifty, 4) * 50).tolist() == pytest.approx([38, 26, 14, 2, 0])
    assert float(grids.times("linspace", fifty, 4)[-2]) == 1 / 50
    assert fifty.timestep(torch.tensor([1.0, 0.02])).tolist() == pytest.approx([49, 0])
    with pytest.raises(ValueError, match="51 steps are more than the 50 timesteps"):
        grids.times("trailing", fifty, 51)
    with pytest.raises(ValueError, match="shift is for flow models"):
        grids.times({"name": "trailing", "shift": 3.0}, fifty, 4)


def test_what_a_noise_schedule_says_of_itself_is_what_the_grids_do():
    own = Shifts()
    assert grids.times({"name": "trailing", "shift": 3.0}, own, 2).tolist() == [1.0, 0.75, 0.0]
    assert grids.times({"name": "exponential", "sigma_min": 0.25}, own, 3).tolist() == pytest.approx([1, 0.5, 0.25, 0])
    assert [grids.kept(each, 10, 0.55) for each in (own, Fifty())] == [6, 5]

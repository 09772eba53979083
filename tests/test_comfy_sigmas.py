"""Grid ``comfy`` and first noise ``comfy``, against figures of a run of ComfyUI itself (values/comfy_sigmas.json says which)."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from latentmill.schedulers import noise
from latentmill.schedulers.comfy_grid import COMFY_SCHEDULERS, ComfyGrid
from latentmill.schedulers.comfy_sampling import EDMSampling, FlowSampling, FluxSampling, SampledEDM, SampledFlow
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving
from latentmill.testing import GridSuite

VALUES = json.loads((Path(__file__).parent / "values" / "comfy_sigmas.json").read_text())["rows"]
MODELS = {
    "discrete": VariancePreserving,
    "zsnr": partial(VariancePreserving, zero_terminal_snr=True),
    "sd3": lambda: SampledFlow(FlowSampling(3.0)),
    "aura": lambda: SampledFlow(FlowSampling(1.73, 1.0)),
    "flux": lambda: SampledFlow(FluxSampling(1.15)),
    "edm": SampledEDM,
}


def sigmas_of(schedule, times):
    alpha, sigma = schedule.scale(times)
    return times if schedule.sigma_is_time else sigma / alpha


@pytest.mark.parametrize("model", MODELS)
def test_sigmas_are_those_of_comfyui(model):
    schedule, rows = MODELS[model](), [row for row in VALUES if row["model"] == model]
    assert len(rows) >= 9
    for row in rows:
        found = ComfyGrid(**row["grid"]).start(schedule, row["steps"], row["strength"], (4, 8, 8))
        wanted = torch.tensor(row["sigmas"], dtype=torch.float64)
        if not row["sigmas"]:
            assert found.times.tolist() == [0.0], row  # ComfyUI gives the latents back
            continue
        assert len(found.times) == len(wanted), row
        torch.testing.assert_close(sigmas_of(schedule, found.times), wanted, rtol=1e-6, atol=0, msg=str(row))
        # Noise 1 on latents 0.5, on its scale, and as it leaves.
        alpha = 1.0 if schedule.sigma_is_time else found.alpha
        assert (found.alpha * 0.5 + found.sigma) / alpha == pytest.approx(row["begins"], rel=2e-6), row
        assert found.scale == found.sigma
        assert found.leaves == pytest.approx(float(schedule.scale(found.times[-1])[0]), rel=1e-12)


def test_every_scheduler_and_setting_is_in_the_figures():
    there = {(row["grid"]["scheduler"], name) for row in VALUES for name in row["grid"]}
    assert {
        (name, key) for name, (_, keys) in COMFY_SCHEDULERS.items() for key in (*keys, "scheduler")
    } - there == set()


def test_a_plain_noise_schedule_is_sampled_by_its_kind():
    flow = ComfyGrid("simple").start(RectifiedFlow(), 4, 1.0, ()).times
    assert flow.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert float(EDMSampling().sigmas[-1]) == pytest.approx(120)


def test_solvers_that_begin_or_end_elsewhere():
    flow = ComfyGrid("simple", below_one=True, last_sigma=0.001).start(MODELS["sd3"](), 4, 1.0, ())
    assert flow.times[0] == pytest.approx(3 * 0.9999 / (1 + 2 * 0.9999), rel=1e-6)
    assert (flow.alpha, flow.sigma) == (0.0, 1.0)  # the noise is that of where it would have begun
    assert (float(flow.times[-1]), flow.leaves) == pytest.approx((0.001, 0.999))
    assert ComfyGrid("simple", below_one=True).start(VariancePreserving(), 4, 1.0, ()).times[0] == pytest.approx(1)


def test_what_is_no_way_from_noise_to_clean_is_refused():
    with pytest.raises(ValueError, match="sigma 152.167 is above 14.61"):
        ComfyGrid("vp").start(VariancePreserving(), 8, 1.0, ())
    with pytest.raises(ValueError, match="don't fall"):
        ComfyGrid("simple").start(VariancePreserving(), 1500, 1.0, ())
    with pytest.raises(ValueError, match="has no setting rho"):
        ComfyGrid("normal", rho=3.0)
    for settings in ({"scheduler": "karras", "rho": 0}, {"scheduler": "beta", "alpha": -1.0}, {"sigma_min": math.nan}):
        with pytest.raises(ValueError, match=f"{[*settings][-1]} must be a number above 0"):
            ComfyGrid(**{"scheduler": "exponential", **settings})
    with pytest.raises(ValueError, match="karras"):
        ComfyGrid("karas")


def test_a_picture_of_a_batch_has_a_part_of_one_draw():
    batch = torch.randn((3, 4, 8, 6), generator=torch.Generator().manual_seed(7))
    for k in range(3):
        assert torch.equal(noise.start_of_comfy(7, (4, 8, 6), k), batch[k])


def test_pictures_that_are_chosen_from_a_batch_are_drawn_one_by_one():
    """As ComfyUI draws them; of multiples of 16 numbers that is the same."""
    for shape in ((4, 8, 6), (4, 13, 5)):
        generator = torch.Generator().manual_seed(7)
        drawn = [torch.randn((1, *shape), generator=generator)[0] for _ in range(3)]
        assert all(torch.equal(noise.each_of_comfy(7, shape, k), drawn[k]) for k in range(3))
        assert torch.equal(noise.start_of_comfy(7, shape, 1), drawn[1]) == (shape == (4, 8, 6))


@pytest.mark.parametrize(("shape", "index"), [((4, 8, 6), 9000), ((3, 5, 7), 12000), ((1, 2, 3), 2), ((1, 2, 3), 7)])
def test_what_comes_before_a_picture_is_drawn_in_pieces(shape, index):
    """Of a draw of any length, to its last picture: the same numbers."""
    batch = torch.randn((index + 1, *shape), generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise.start_of_comfy(7, shape, index), batch[index])


class TestComfyGrid(GridSuite):
    grid = ComfyGrid
    name = "comfy"

"""Rows of the denoise stage on grid ``comfy``: what they begin with, which steps they make, and what they are when they leave."""

import pyarrow as pa
import pytest
import torch
from tests.denoising import SCHEDULERS, Gaussian, batch, denoise_with, latents_of

from latentmill.fields import NOISE_INDEX
from latentmill.plugin import FixedShape, tensors
from latentmill.schedulers.comfy_grid import ComfyGrid
from latentmill.schedulers.comfy_sampler import ComfySampler
from latentmill.testing import GaussianField, follow

ROW = {"scheduler": "euler", "guidance_scale": 1.0, "strength": 1.0, "steps": 6}


def run(table, first_noise="comfy", **grid):
    grid = {"name": "comfy", "scheduler": "karras", **grid}
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, grid, 16, first_noise=first_noise)
    return latents_of(list(stage(table, lambda i, reason: pytest.fail(reason))))


def with_latents_of(table, latents):
    column = table.schema.get_field_index("latents")
    kept = tensors.with_tensor(table, "latents", torch.stack([*latents.values()]))
    metadata = table.schema.field(column).metadata
    return kept.set_column(column, kept.schema.field(column).with_metadata(metadata), kept.column(column))


def test_pictures_of_a_batch_begin_with_parts_of_one_draw():
    table = batch([2, 3], **ROW | {"seed": 77, "steps": 1})
    table = table.append_column(NOISE_INDEX.name, pa.array([0, 1], NOISE_INDEX.type))
    found = run(table)
    drawn = torch.randn((2, 2, 4, 3), generator=torch.Generator().manual_seed(77)).double()
    schedule = Gaussian.noise_schedule
    alpha, _ = (float(a) for a in schedule.scale(torch.tensor(1.0, dtype=torch.float64)))
    for k, n in enumerate((2, 3)):
        # Latents n, noise as strong as pure noise would be; one step of the exact denoiser of mean 0.5 + n.
        x = alpha * n + drawn[k]
        gain = alpha * 0.25 / (alpha**2 * 0.25 + 1 - alpha**2)
        wanted = 0.5 + n + gain * (x - alpha * (0.5 + n))
        # 24 numbers are no multiple of 16: the last 16 are those of the picture that ends its batch, the second here.
        first = None if k else 8
        torch.testing.assert_close(found[n].flatten()[:first].double(), wanted.flatten()[:first], rtol=1e-5, atol=1e-5)


def test_no_noise_is_the_latents_alone():
    [found] = run(batch([2], **ROW | {"steps": 1}), first_noise="none").values()
    schedule = Gaussian.noise_schedule
    alpha, sigma = (float(a) for a in schedule.scale(torch.tensor(1.0, dtype=torch.float64)))
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    torch.testing.assert_close(found, torch.full((2, 4, 3), 2.5 + gain * alpha * (2.0 - 2.5)))


def test_noise_at_a_sigma_without_a_step_is_the_row_s_error():
    """ComfyUI adds it and makes no step."""
    said, choice = [], {"name": "comfy", "scheduler": "laplace", "start_at_step": 5}
    for first_noise in ("comfy", "none"):
        stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, choice, 16, first_noise=first_noise)
        made = latents_of(list(stage(batch([2], **ROW), lambda i, reason: said.append(reason))))
    assert len(said) == 1 and "the grid is one sigma" in said[0]
    assert torch.equal(made[2], torch.full((2, 4, 3), 2.0)), "without noise nothing is lost"


@pytest.mark.parametrize("middle", [2, 5])
def test_a_row_that_leaves_with_noise_goes_on_where_it_was(middle):
    """As in two samplers one after the other: the first returns with leftover noise, the second adds none."""
    table = batch([2, 3, 4], **ROW)
    whole = run(table)
    first = run(table, end_at_step=middle, leftover_noise=True)
    assert min(float(x.std()) for x in first.values()) > 0.1
    second = run(with_latents_of(table, first), first_noise="none", start_at_step=middle)
    for n in whole:
        torch.testing.assert_close(second[n], whole[n], rtol=2e-5, atol=2e-5)


def test_what_leaves_with_noise_is_in_comfyui_s_units():
    """At sigma it is x0 + sigma * noise, whatever alpha is: the exact flow of a Gaussian."""
    [found] = run(batch([2], **ROW | {"steps": 200}), end_at_step=150, leftover_noise=True).values()
    drawn = torch.randn((1, 2, 4, 3), generator=torch.Generator().manual_seed(1002))[0].double()
    start = ComfyGrid("karras", end_at_step=150, leftover_noise=True).start(Gaussian.noise_schedule, 200, 1.0, ())
    field = GaussianField(Gaussian.noise_schedule, torch.tensor([2.5]), 0.5, [0], (2, 4, 3))
    x = (start.alpha * 2.0 + start.sigma * drawn)[None]
    exact = field.exact(x, start.times[:1], start.times[-1:])[0] / start.leaves
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=0.01)


def test_strength_is_counted_as_comfyui_counts_it():
    """All ``steps`` are made, from where so many of ``int(steps / strength)`` are left."""
    table = batch([2], **ROW | {"strength": 0.4})
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, {"name": "comfy"}, 16, first_noise="comfy")
    request = stage.take(table, lambda i, reason: pytest.fail(reason))
    assert [len(row.times) - 1 for row in request.rows] == [6]
    none = batch([2], **ROW | {"strength": 0.0})
    assert torch.equal(run(none)[2], torch.full((2, 4, 3), 2.0))


def rows_of(table, sampler, **grid):
    choice = {"name": "comfy", "scheduler": "karras", **grid}
    stage = denoise_with(Gaussian(), lambda name: sampler, choice, 16, first_noise="comfy")
    return latents_of(list(stage(table, lambda i, reason: pytest.fail(reason))))


@pytest.mark.parametrize("name", ["uni_pc", "sa_solver_pece", "heunpp2"])
def test_a_solver_that_looks_ahead_sees_its_own_row_s_end(name):
    """Rows of other numbers of steps in one batch, each against itself alone, and against the solver outside of the stage."""
    sampler, table = ComfySampler(name), batch([3, 4, 6], scheduler="euler", guidance_scale=1.0, strength=1.0)
    together = rows_of(table, sampler)
    for n in (3, 4, 6):
        alone = rows_of(batch([n], scheduler="euler", guidance_scale=1.0, strength=1.0), sampler)[n]
        torch.testing.assert_close(together[n], alone, rtol=1e-5, atol=1e-5)
        if name == "heunpp2":  # the others' last step shows whether they know that it is the last
            start = ComfyGrid("karras").start(Gaussian.noise_schedule, 3 + n % 5, 1.0, ())
            field = GaussianField(Gaussian.noise_schedule, torch.tensor([0.5 + n]), 0.5, [0], (2, 4, 3))
            drawn = torch.randn((1, 2, 4, 3), generator=torch.Generator().manual_seed(1000 + n))
            x = start.alpha * n + start.sigma * drawn.double()
            torch.testing.assert_close(
                alone.double(), follow(sampler, field, x, start.times[None])[0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.6])
@pytest.mark.parametrize("fixed", [None, FixedShape(batch_size=4, rows_per_shard=4)])
def test_cfg_pp_takes_the_noise_of_the_negative_prompt(fixed, scale):
    """That of scale 1, too."""
    table = batch([2], **ROW | {"guidance_scale": scale, "steps": 6})
    choice = {"name": "comfy", "scheduler": "karras", "end_at_step": 1, "leftover_noise": True}
    stage = denoise_with(
        Gaussian(), lambda name: ComfySampler("euler_cfg_pp"), choice, 16, fixed=fixed, first_noise="comfy"
    )
    [found] = latents_of(list(stage(table, lambda i, reason: pytest.fail(reason)))).values()
    start = ComfyGrid("karras", end_at_step=1, leftover_noise=True).start(Gaussian.noise_schedule, 6, 1.0, ())
    drawn = torch.randn((1, 2, 4, 3), generator=torch.Generator().manual_seed(1002))[0].double()
    (alpha, alpha_s), (sigma, sigma_s) = (each.tolist() for each in Gaussian.noise_schedule.scale(start.times))
    x = start.alpha * 2.0 + start.sigma * drawn
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    clean, other = (mean + gain * (x - alpha * mean) for mean in (2.5, -3.0))
    clean = other + scale * (clean - other)
    wanted = (alpha_s * clean + sigma_s * (x - alpha * other) / sigma) / alpha_s
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_cfg_pp_leaves_a_row_without_guidance_alone(name):
    """Row 3 is guided at no time: to the bit the same beside a row that is, in a deterministic job, and what it is in any other."""
    fixed, sampler = FixedShape(batch_size=4, rows_per_shard=4), ComfySampler(name)
    found = []
    for numbers, shape in (([3], fixed), ([3, 4], fixed), ([3, 4], None)):
        stage = denoise_with(Gaussian(), lambda _: sampler, {"name": "comfy"}, 16, fixed=shape, first_noise="comfy")
        table = batch(numbers, scheduler="euler", steps=4, strength=1.0, guidance_scale=4.0)
        guided = pa.array([1.0 if n == 3 else 0.0 for n in numbers], pa.float64())
        table = table.set_column(table.schema.get_field_index("guidance_until"), "guidance_until", guided)
        found.append(latents_of(list(stage(table, lambda i, reason: pytest.fail(reason))))[3])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=1e-5)


def test_the_picture_beside_a_mask_leaves_as_the_latents_do():
    """With the noise that is left, in ComfyUI's units: what its next sampler goes on with."""
    table = batch([2], **ROW)
    mask = torch.zeros(1, 1, 4, 3, dtype=torch.uint8)
    mask[..., 0] = 1
    table = tensors.with_tensor(table, "mask", mask)
    [found] = run(table, first_noise="diffusers", end_at_step=3, leftover_noise=True).values()
    drawn = torch.randn((1, 2, 4, 3), generator=torch.Generator().manual_seed(1002))[0].double()
    end = ComfyGrid("karras").start(Gaussian.noise_schedule, 6, 1.0, ()).times[3]
    alpha, sigma = (float(each) for each in Gaussian.noise_schedule.scale(end))
    wanted = 2.0 + sigma / alpha * drawn
    torch.testing.assert_close(found[..., 1:].double(), wanted[..., 1:], rtol=1e-5, atol=1e-5)
    assert float((found - wanted)[..., 0].abs().min()) > 1e-3


@pytest.mark.parametrize("name", ["uni_pc", "sa_solver", "heunpp2", "dpmpp_2m"])
def test_a_solver_that_looks_ahead_does_not_stop_half_way(name):
    """Before its end, that is: by ``until``. Where the grid itself ends is the row's end."""
    said, sampler = [], ComfySampler(name)
    choice = {"name": "comfy", "scheduler": "karras"}
    stage = denoise_with(Gaussian(), lambda _: sampler, choice, 16, first_noise="comfy", until=0.5)
    request = stage.take(batch([2], **ROW), lambda i, reason: said.append(reason))
    assert len(request.rows) == (name == "dpmpp_2m") and all("can't stop half-way" in reason for reason in said)
    assert len(said) == (name != "dpmpp_2m")

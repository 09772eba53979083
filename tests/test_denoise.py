"""Denoising: each row as if it were alone, strength, prediction types, grids of schedulers and denoisers."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.denoising import SCHEDULERS, SPEC, Gaussian, batch, denoise, denoise_with

from latentmill.batch import FixedShape, with_latents
from latentmill.plugin import FollowsAuthors, LatentSpec, Scheduler, Start, tensors
from latentmill.schedulers import grids, noise
from latentmill.schedulers.noise_schedules import VariancePreserving


def test_a_row_does_not_depend_on_its_company():
    together = denoise(batch(range(12)))
    for n in range(12):
        assert torch.allclose(together[n], denoise(batch([n]))[n], rtol=1e-5, atol=1e-6), n


def test_with_fixed_shapes_a_row_s_bits_do_not_depend_on_its_company():
    fixed = FixedShape(batch_size=12, rows_per_shard=12)
    together = denoise(batch(range(12)), fixed)
    for numbers in ([3], [0, 5, 11], [1, 2, 4, 6, 7]):
        for n, latents in denoise(batch(numbers), fixed).items():
            assert torch.equal(latents, together[n]), n


def test_the_first_noise_may_be_that_of_diffusers():
    """One Euler step from pure noise, from each."""
    table = batch([2], steps=1, scheduler="euler", guidance_scale=1.0, strength=1.0)
    found = {}
    for name, draw in (("latentmill", noise.start), ("diffusers", noise.start_of_diffusers)):
        stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, first_noise=name)
        [part] = stage(table, lambda i, reason: pytest.fail(reason))
        alpha, sigma = (float(a) for a in VariancePreserving().scale(torch.tensor(1.0, dtype=torch.float64)))
        x = alpha * 2.0 + sigma * draw(1002, (2, 4, 3)).double()
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        found[name] = tensors.from_arrow(part, "latents")[0]
        np.testing.assert_allclose(found[name], 2.5 + gain * (x - alpha * 2.5), rtol=1e-5)
    assert not torch.equal(found["latentmill"], found["diffusers"])


class Halves(Scheduler):
    """On a grid of its own: two steps, of which each keeps what its row's state says, and no network."""

    contract = 2

    def start(self, noise_schedule, steps, kept, shape):
        if steps != 2:
            raise ValueError("two steps, not more")
        times = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)[2 - kept :]
        return Start(times, {"keep": torch.tensor(0.5)}, alpha=0.1 * kept, sigma=3.0, scale=5.0)

    def step(self, field, x, t, s, state):
        return x * state["keep"].reshape(-1, 1, 1, 1), {"keep": state["keep"] / 2}


def test_a_scheduler_may_have_a_grid_of_its_own(monkeypatch):
    """It says where a row begins, in times, state and scale; a row that it can't begin is rejected, and the others go on."""
    monkeypatch.setitem(SCHEDULERS, "halves", Halves())
    table = pa.concat_tables(
        [
            batch([0, 2], steps=2, scheduler="halves", strength=1.0),
            batch([3], steps=2, scheduler="halves", strength=0.5),
            batch([5], steps=3, scheduler="halves", strength=1.0),
            batch([6], steps=2, scheduler="halves", strength=0.0),
        ]
    )
    table = table.append_column("from_noise", pa.array([number == 0 for number in table.column("row").to_pylist()]))
    stage, rejected = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16), {}
    [part] = stage(table, rejected.__setitem__)
    assert rejected == {3: "two steps, not more"} and part.column("row").to_pylist() == [0, 2, 3, 6]
    found = tensors.from_arrow(part, "latents")
    for n, at, kept in ((0, 0, 2), (2, 1, 2), (3, 2, 1)):
        x = (0.1 * kept * n + (3.0 if n else 5.0) * noise.start(1000 + n, (2, 4, 3)).double()) * (
            0.5 * 0.25 if kept == 2 else 0.5
        )
        np.testing.assert_allclose(found[at], x, rtol=1e-6)
    assert torch.equal(found[3], torch.full((2, 4, 3), 6.0))


def test_half_way_latents_of_another_scheduler_can_not_begin_on_such_a_grid(monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "halves", Halves())
    plain = {"strength": 1.0, "guidance_scale": 1.0, "steps": 2}
    for name in ("euler", "halves"):
        stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, until=0.6)
        [half] = stage(batch([1], **plain, scheduler=name), lambda i, reason: pytest.fail(reason))
        half = half.set_column(half.column_names.index("scheduler"), "scheduler", [["halves"]])
        for column in ("prompt:mean", "negative:mean"):
            half = tensors.with_tensor(half, column, torch.ones(1))
        rejected = {}
        [*parts] = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)(half, rejected.__setitem__)
        said = "the latents are half-way by another scheduler, and halves can begin only on its own grid"
        assert rejected == ({0: said} if name == "euler" else {}) and len(parts) == (name == "halves")
    whole = denoise(batch([1], **plain, scheduler="halves"))[1]
    assert torch.equal(tensors.from_arrow(parts[0], "latents")[0], whole)


def test_the_seed_decides():
    same = denoise(batch([0], seed=7))[0]
    assert torch.equal(same, denoise(batch([0], seed=7))[0])
    assert not torch.equal(same, denoise(batch([0], seed=8))[0])


def test_strength_zero_leaves_the_latent_alone_and_one_starts_from_noise():
    assert torch.equal(denoise(batch([4], strength=0.0))[4], torch.full((2, 4, 3), 4.0))
    plain = {"strength": 1.0, "guidance_scale": 1.0, "steps": 40, "scheduler": "dpmpp_2m"}
    # From pure noise the exact denoiser arrives near the conditioning's mean (std 0.5), wherever it started.
    assert denoise(batch([0], **plain))[0].mean() == pytest.approx(0.5, abs=0.4)


def test_one_euler_step_is_the_formula():
    table = batch([2], steps=1, scheduler="euler", guidance_scale=3.0, strength=1.0)
    [t, s] = grids.times("trailing", VariancePreserving(), 1)
    alpha, sigma = (float(a) for a in VariancePreserving().scale(t))
    x = alpha * 2.0 + sigma * noise.start(1002, (2, 4, 3)).double()
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    prompt, negative = 2.5 + gain * (x - alpha * 2.5), -3.0 + gain * (x + alpha * 3.0)
    assert float(s) == 0.0
    np.testing.assert_allclose(denoise(table)[2], negative + 3.0 * (prompt - negative), rtol=1e-5)


def test_a_row_whose_steps_cannot_be_is_rejected_alone():
    table = pa.concat_tables([batch([0], steps=3), batch([1], steps=1500), batch([2], steps=3)])
    rejected = {}
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)
    parts = list(stage(table, rejected.__setitem__))
    assert sorted(row for part in parts for row in part.column("row").to_pylist()) == [0, 2]
    assert rejected == {1: "1500 steps are more than the 1000 timesteps of the noise schedule"}


def test_latents_that_are_not_finite_are_rejected():
    table = batch([0, 1, 2], strength=1.0, scheduler="euler", steps=2)
    broken = table.set_column(
        table.column_names.index("prompt:mean"),
        table.schema.field("prompt:mean"),
        tensors.to_arrow(torch.tensor([0.0, float("nan"), 0.0])),
    )
    rejected = {}
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)
    [part] = stage(broken, rejected.__setitem__)
    assert part.column("row").to_pylist() == [0, 2]
    assert rejected == {1: "the denoised latents are not finite (nor was a prediction of denoiser Gaussian)"}


def test_clean_latents_have_the_space_s_dtype_wherever_they_began():
    half = LatentSpec(**{**vars(SPEC), "dtype": "float16"})
    table = batch([1, 2], strength=1.0)
    table = with_latents(table, tensors.from_arrow(table, "latents").float(), half)
    parts = list(denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)(table, pytest.fail))
    assert {tensors.from_arrow(part, "latents").dtype for part in parts} == {torch.float16}


class Particular(FollowsAuthors, Gaussian):
    """Has a grid of its own, starts with unit variance, and guides itself; remembers what it was told."""

    guidance_embedded = True

    def times(self, steps, shape):
        return torch.linspace(0.8, 0.0, steps + 1, dtype=torch.float64) * (1.0 if shape == (2, 4, 3) else torch.nan)

    def start_scale(self, t):
        return torch.ones_like(t)

    def predict(self, x, t, conditioning):
        self.told = conditioning["guidance_scale"].tolist(), t.tolist(), x
        return super().predict(x, t, conditioning)


def test_a_denoiser_may_say_its_grid_its_start_and_that_it_guides_itself():
    """Grid model is ``times``, after which strength counts; an empty latent starts from noise of ``start_scale``."""
    stage = denoise_with(Particular(), SCHEDULERS.__getitem__, "model", 16)
    table = batch([0], steps=4, guidance_scale=3.5, strength=1.0, scheduler="euler")
    table = with_latents(table, torch.zeros(1, 2, 4, 3), SPEC).append_column("from_noise", pa.array([True]))
    visit = stage.take(table, lambda i, reason: pytest.fail(reason))
    assert visit.rows[0].times == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    stage.advance()
    scale, times, x = stage.denoiser.told
    assert (scale, times) == ([3.5], [pytest.approx(0.8)]) and stage.denoiser.evaluated == [1]
    torch.testing.assert_close(x[0], noise.start(1000, (2, 4, 3)), rtol=1e-6, atol=1e-6)
    half = stage.take(batch([3], steps=4, strength=0.5, scheduler="euler"), lambda i, reason: pytest.fail(reason))
    assert half.rows[0].times == pytest.approx([0.4, 0.2, 0.0])
    alpha, sigma = (float(a) for a in VariancePreserving().scale(torch.tensor(0.4, dtype=torch.float64)))
    torch.testing.assert_close(half.rows[0].x, alpha * 3.0 + sigma * noise.start(1003, (2, 4, 3)))


def test_a_denoiser_without_a_grid_says_so():
    reasons = []
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "model", 16)
    list(stage(batch([0]), lambda i, reason: reasons.append(reason)))
    assert reasons == ["this denoiser has no grid of its own: choose one by its name"]

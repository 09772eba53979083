"""A mask keeps the picture where it is dark, with networks that were trained for it and with others."""

import pytest
import torch
from tests.denoising import SCHEDULERS, Gaussian, batch, denoise, denoise_with

from latentmill.plugin import tensors
from latentmill.schedulers import noise
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.stages.running_batch import InpaintingMask


def test_a_mask_keeps_the_picture_where_it_is_dark():
    """At every step the picture's latents with the row's first noise; at the end the latents themselves."""
    mask = torch.tensor([1, 0], dtype=torch.uint8).repeat(2, 1, 4, 6)[..., :3]  # light in the first and third column
    table = tensors.with_tensor(batch([3, 5], strength=0.8, steps=5, scheduler="dpmpp_2m"), "mask", mask)
    found, plain = denoise(table), denoise(batch([3, 5], strength=0.8, steps=5, scheduler="dpmpp_2m"))
    for n in (3, 5):
        assert torch.equal(found[n][..., 1], torch.full((2, 4), float(n)))
        assert torch.equal(found[n][..., 0], plain[n][..., 0])  # this denoiser looks at each number alone
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)
    visit = stage.take(table, lambda i, reason: pytest.fail(reason))
    stage.advance()
    [running] = stage.running.values()
    for row, x in zip(running.rows, running.x):
        alpha, sigma = VariancePreserving().scale(torch.tensor(row.times[1], dtype=torch.float64))
        wanted = float(alpha) * float(row.seed - 1000) + float(sigma) * noise.start(row.seed, (2, 4, 3))
        torch.testing.assert_close(x[..., 1], wanted[..., 1])
    assert not visit.done
    reasons = []
    list(
        denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, until=0.5)(
            table, lambda i, reason: reasons.append(reason)
        )
    )
    assert reasons == ["a row with a mask can't stop half-way: its picture would be lost"] * 2


class Painter(Gaussian):
    """Was trained for inpainting. Answers what it is told: the masked picture, and 9 where to paint."""

    inpaints = True

    def predict(self, x, t, conditioning):
        return (conditioning["masked"] + 9 * conditioning["mask"]).float()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_network_that_was_trained_for_inpainting_is_told_mask_and_masked_picture(guidance):
    mask = torch.zeros(2, 1, 4, 3, dtype=torch.uint8)
    mask[0, 0, 1], mask[1, 0, :, 2] = 1, 1
    masked = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    table = batch([3, 5], strength=0.8, steps=5, scheduler="euler", guidance_scale=guidance)
    reasons = []
    assert not list(
        denoise_with(Painter(), SCHEDULERS.__getitem__, "trailing", 16)(table, lambda i, said: reasons.append(said))
    )
    assert reasons == ["the network paints a part of a picture anew: image and mask are expected"] * 2
    table = tensors.with_tensor(tensors.with_tensor(table, "mask", mask), "masked", masked)
    found = denoise(table, denoiser=Painter())
    for number, told in zip((3, 5), masked + 9 * mask):
        torch.testing.assert_close(found[number], told)
    [part] = denoise_with(Painter(), SCHEDULERS.__getitem__, "trailing", 16)(
        table, lambda i, reason: pytest.fail(reason)
    )
    assert not {"mask", "masked"} & set(part.column_names)


def test_what_is_painted_anew_at_strength_1_has_nothing_of_the_picture_in_it():
    mask = torch.ones(2, 1, 4, 3, dtype=torch.uint8)
    settings = {"strength": 1.0, "steps": 3, "scheduler": "euler", "seed": 7, "guidance_scale": 1.0}
    table = batch([3, 5], **settings)
    same = tensors.with_tensor(table, "prompt:mean", torch.zeros(2))
    found = denoise(tensors.with_tensor(same, "mask", mask))
    assert torch.equal(found[3], found[5]) and not torch.equal(*denoise(same).values())


@pytest.mark.parametrize("frames", [(), (3,)], ids=["picture", "clip"])
def test_stacked_masks_blend_each_row_as_its_own_does(frames):
    """Two rows of two channels: a row's mask is for all its channels and frames."""
    x, clean, noise = torch.arange(3 * 2 * 2 * 12.0).reshape(3, 2, 2, *frames, 2, -1)
    each = [InpaintingMask(torch.tensor([[[k == 0], [k == 1]]]), clean[k], noise[k]) for k in range(2)]
    alpha, sigma = torch.tensor([0.25, 0.5]), torch.tensor([0.75, 0.5])
    column = (-1, *(1 for _ in x.shape[1:]))
    both = InpaintingMask.stacked(each).blend(x, alpha.reshape(column), sigma.reshape(column))
    for k in range(2):
        assert torch.equal(both[k], each[k].blend(x[k], alpha[k], sigma[k]))

"""VAEs and denoisers of clips, each with one mistake."""

import torch
from tests.suites import wrong_denoisers
from tests.suites.mistakes import Mistake, suite_of
from tests.suites.wrong_denoisers import FINITE
from tests.suites.wrong_vaes import BACK, ROWS, SHAPES
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.plugin import CONTRACT, VAE, LatentSpec
from latentmill.testing import VAESuite


class Right(VAE):
    """Two frames and four pixels are 24 channels, behind a first frame that stands alone; nothing is lost."""

    contract = CONTRACT
    time_downscale = 2

    def __init__(self, gain=1.0):
        self.gain = gain

    @property
    def spec(self):
        return LatentSpec(24, 2, 1.0, 0.0, "float32", f"clips-{self.gain}", self.time_downscale)

    def encode(self, images):
        pairs = torch.cat([images[:, :, :1], images], 2).unflatten(
            2, (-1, 2)
        )  # the first frame twice; [B, 3, t, 2, H, W]
        return pixel_unshuffle(pairs.movedim(3, 2).flatten(1, 2).movedim(2, 1), 2).movedim(1, 2) * self.gain

    def decode(self, latents):
        pairs = pixel_shuffle(latents.movedim(2, 1), 2).movedim(1, 2).unflatten(1, (3, 2))
        return pairs.movedim(2, 3).flatten(2, 3)[:, :, 1:] / self.gain


class TimeDownscale(Right):
    """Says that four frames are a latent frame."""

    time_downscale = 4

    def encode(self, images):
        return super().encode(images)


class Backwards(Right):
    def decode(self, latents):
        return super().decode(latents).flip(2)


class FirstFrameTwice(Right):
    """Keeps the frame by which the clip was filled up."""

    def decode(self, latents):
        found = super().decode(latents)
        return torch.cat([found[:, :, :1], found], 2)


class NeedsThreeFrames(Right):
    """Smooths over time, from one latent frame to the next, and forgets that there may be one alone."""

    def encode(self, images):
        found = super().encode(images)
        return torch.cat([found[:, :, :1], found[:, :, -1:]], 2) if found.shape[2] == 1 else found


class MixesFrames(Right):
    """Reads frames of one row into the next: batch and time were made one axis, and a mean was taken over it."""

    def encode(self, images):
        frames = images.movedim(2, 1).flatten(0, 1)
        frames = frames + 0.05 * torch.cat([frames[:1] * 0, frames[:-1]])
        return super().encode(frames.unflatten(0, (len(images), -1)).movedim(1, 2))


class TakesAnyCount(Right):
    @property
    def spec(self):
        return Lenient(*vars(super().spec).values())


class Lenient(LatentSpec):
    def shape(self, height, width, frames=None):
        return super().shape(height, width, 1 + (frames - 1) // 2 * 2)


class Denoiser(wrong_denoisers.Right):
    def predict(self, x, t, conditioning):
        return self.weight * x + (t + conditioning["embeds"]).reshape(-1, 1, 1, 1, 1).float()


class Stills(Denoiser):
    """Takes the frames for rows of the batch, and forgets one axis on the way back."""

    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning)[:, :, 0]


class FixedFrames(Denoiser):
    """Has a learned place for each of three latent frames."""

    places = torch.zeros(3, 1, 1)

    def predict(self, x, t, conditioning):
        return super().predict(x + self.places, t, conditioning)


class KeepsFrames(Denoiser):
    """Makes three latent frames whatever it is given."""

    def predict(self, x, t, conditioning):
        found = super().predict(x, t, conditioning)
        return found if x.shape[2] == 3 else found[:, :, :1].expand(-1, -1, 3, -1, -1)


def vae(what, plugin, caught_by, says):
    suite = suite_of(VAESuite, plugin, min_psnr=25.0, size=(16, 24))
    return Mistake(what, suite, set(caught_by.split()), says)


def denoiser(what, plugin, says):
    return Mistake(what, suite_of(wrong_denoisers.Suite, plugin, shape=(4, 3, 8, 6)), {FINITE}, says)


MISTAKES = [
    vae("of clips: a time_downscale that lies", TimeDownscale, SHAPES, "`time_downscale` must be what encode does"),
    vae("of clips: backwards", Backwards, BACK, "clips do not come back"),
    vae("of clips: a frame too many", FirstFrameTwice, f"{SHAPES} {BACK}", "decode gives the shape [3, 3, 6, 16, 24]"),
    vae("of clips: a clip of one frame is two", NeedsThreeFrames, SHAPES, "latents of 2 frames for 1 frame of"),
    vae("of clips: frames of the row before", MixesFrames, ROWS, "encode gives row 1 otherwise in a batch than alone"),
    vae("of clips: any number of frames will do", TakesAnyCount, SHAPES, "takes a number of frames that is not one more"),
    denoiser("of clips: stills come back", Stills, "predict gives the shape [3, 4, 8, 6] for latents [3, 4, 3, 8, 6]"),
    denoiser("of clips: as many frames as in training only", FixedFrames, "predict raises RuntimeError for latents [3, 4, 5, 3, 5]"),
    denoiser("of clips: three latent frames, whatever it is given", KeepsFrames, "predict gives the shape [3, 4, 3, 3, 5]"),
]  # fmt: skip

RIGHT = [
    suite_of(VAESuite, Right, min_psnr=100.0, size=(16, 24), changed=lambda self: Right(2.0)),
    suite_of(wrong_denoisers.Suite, Denoiser, shape=(4, 3, 8, 6)),
]

"""VAEs, each with one mistake."""

import itertools
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tests.suites.mistakes import Mistake, suite_of
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.plugin import CONTRACT, VAE, LatentSpec
from latentmill.testing import VAESuite


class Right(VAE):
    """Four pixels are twelve channels; nothing is lost."""

    contract = CONTRACT
    channels, downscale, scale, shift = 12, 2, 0.5, 0.25

    def __init__(self, gain=1.0):
        self.gain = gain

    def print(self):
        return f"right-{self.gain}"

    @property
    def spec(self):
        return LatentSpec(self.channels, self.downscale, self.scale, self.shift, "float32", self.print())

    def encode(self, images):
        return (pixel_unshuffle(images * self.gain, 2) - self.shift) * self.scale

    def decode(self, latents):
        return pixel_shuffle(latents / self.scale + self.shift, 2) / self.gain


class Writes(Right):
    def encode(self, images):
        return super().encode(images.mul_(0.99))


class WritesLatents(Right):
    def decode(self, latents):
        return super().decode(latents.mul_(1.01))


class Remembers(Right):
    last = torch.zeros(1)

    def encode(self, images):
        found = super().encode(images)
        if found.shape == self.last.shape:
            found = found + 0.01 * self.last
        self.last = found
        return found


class Caches(Right):
    """By the shape alone."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def encode(self, images):
        return self.cache.setdefault(images.shape, super().encode(images))


class DrawsTorch(Right):
    def encode(self, images):
        return super().encode(images) + 0.01 * torch.randn_like(images[:, :, ::2, ::2]).repeat(1, 4, 1, 1)


class DrawsNumpy(Right):
    def decode(self, latents):
        return super().decode(latents) + 0.01 * np.random.normal()


class Seeds(Right):
    def posterior(self, images):
        torch.manual_seed(0)
        return super().posterior(images)


class BatchMean(Right):
    def encode(self, images):
        return super().encode(images - 0.05 * images.mean(0, keepdim=True))


class Cuda(Right):
    def __init__(self):
        super().__init__()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"


class Moves(Right):
    @property
    def spec(self):
        with suppress(Exception):
            torch.zeros(1).cuda()
        return super().spec


class HashedPrint(Right):
    def print(self):
        return str(hash("weights"))


class SetPrint(Right):
    def print(self):
        return "-".join({*"abcdefghijklmnopqrstuvwxyz"})


class Numbered(Right):
    count = itertools.count()

    def __init__(self):
        super().__init__()
        self.number = next(self.count)

    def print(self):
        return str(self.number)


class ConstantPrint(Right):
    def print(self):
        return "my-vae"


class NoPrint(Right):
    def print(self):
        return ""


class LoadsScale(Right):
    scale = 1.0

    def load(self, device):
        self.scale = 0.5


class HashedWeights(Right):
    def encode(self, images):
        weights = torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(hash("weights") % 2**32))
        return super().encode(images) + 0.02 * weights


class ScaleInDecodeOnly(Right):
    def encode(self, images):
        return super().encode(images) / self.scale


class ScaleInEncodeOnly(Right):
    def decode(self, latents):
        return pixel_shuffle(latents + self.shift, 2)


class ShiftInEncodeOnly(Right):
    def decode(self, latents):
        return pixel_shuffle(latents / self.scale, 2)


class ZeroToOne(Right):
    def decode(self, latents):
        return super().decode(latents) / 2 + 0.5


class PosteriorNotScaled(Right):
    def posterior(self, images):
        mean = self.encode(images) / self.scale + self.shift
        return mean, torch.zeros_like(mean)


class LogVariance(Right):
    def posterior(self, images):
        mean = self.encode(images)
        return mean, torch.full_like(mean, -6.0)


class Downscale(Right):
    downscale = 4


class OneMoreChannel(Right):
    channels = 13


class Crops(Right):
    def decode(self, latents):
        return super().decode(latents)[..., :-1]


class PadsOddSides(Right):
    """Latents of an even side only, whatever the spec says."""

    def encode(self, images):
        found = super().encode(images)
        return torch.nn.functional.pad(found, (0, found.shape[3] % 2, 0, found.shape[2] % 2))


class InfiniteAtWhite(Right):
    def encode(self, images):
        return super().encode(images.atanh())

    def decode(self, latents):
        return super().decode(latents).tanh()


class TakesAnySize(Right):
    @property
    def spec(self):
        return Lenient(*vars(super().spec).values())


class Lenient(LatentSpec):
    def shape(self, height, width):
        return self.channels, height // self.downscale, width // self.downscale


class NoContract(VAE):
    spec = Right.spec
    channels, downscale, scale, shift, gain = 12, 2, 0.5, 0.25, 1.0
    print, encode, decode = Right.print, Right.encode, Right.decode


class OldContract(Right):
    contract = 0


class NoDecode(VAE):
    contract = CONTRACT
    spec = Right.spec
    channels, downscale, scale, shift, gain = 12, 2, 0.5, 0.25, 1.0
    print, encode = Right.print, Right.encode


def no_plugin():
    """Builds one, but is no class."""
    return Right()


@contextmanager
def installed():
    """With a distribution whose entry points name what they should not."""
    sys.path.insert(0, str(Path(__file__).parent / "installed"))
    try:
        yield
    finally:
        del sys.path[0]


def vae(what, plugin, caught_by, says, around=None, **settings):
    suite = suite_of(VAESuite, plugin, min_psnr=25.0, **settings)
    return Mistake(what, suite, set(caught_by.split()), says, **({"around": around} if around else {}))


SPACE, SHAPES = "the_space_is_known_before_loading_and_is_the_same_everywhere", "shapes_are_what_the_spec_says"
PLUGIN, PROCESS, GPU = (
    "it_is_a_plugin_of_this_contract",
    "another_process_finds_the_same",
    "building_and_asking_touch_no_gpu",
)
ROWS, WRITES, MEMORY, RANDOM = (
    "rows_do_not_touch_each_other", "arguments_are_left_as_they_were", "nothing_is_remembered_between_calls",
    "no_global_random_generator_is_used",
)  # fmt: skip
BACK, POSTERIOR, PRINT = (
    "pictures_come_back",
    "the_posterior_s_mean_is_what_encode_gives",
    "the_fingerprint_follows_the_weights",
)

MISTAKES = [
    vae("encode writes into the pictures", Writes, WRITES, "encode writes into its argument 'images'"),
    vae("decode writes into the latents", WritesLatents, WRITES, "decode writes into its argument 'latents'"),
    vae("adds some of the last result", Remembers, MEMORY, "encode gives other results after an earlier call"),
    vae("caches by shape", Caches, MEMORY, "encode gives other results after an earlier call"),
    vae("noise of torch's global generator", DrawsTorch, RANDOM, "global random generator of torch"),
    vae("noise of numpy's global generator", DrawsNumpy, RANDOM, "global random generator of numpy"),
    vae("seeds torch's global generator", Seeds, RANDOM, "posterior seeds the global random generator of torch"),
    vae("takes a mean over the batch", BatchMean, ROWS, "encode gives row 0 otherwise in a batch than alone"),
    vae("asks for a GPU in `__init__`", Cuda, GPU, "Cuda.__init__ calls torch.cuda.is_available before load(device)"),
    vae("moves a tensor to the GPU in `spec`", Moves, GPU, "Moves.spec calls torch.cuda.init before load(device)"),
    vae("a fingerprint by `hash()`", HashedPrint, PROCESS, "the fingerprint differs between processes"),
    vae("a fingerprint in the order of a set", SetPrint, PROCESS, "the fingerprint differs between processes"),
    vae("a fingerprint that counts instances", Numbered, f"{SPACE} {PROCESS}", "two instances are of different spaces"),
    vae("a fingerprint that is a name", ConstantPrint, PRINT, "the fingerprint stays when the weights change",
        changed=lambda self: ConstantPrint(2.0)),
    vae("no fingerprint", NoPrint, SPACE, "the spec has no fingerprint"),
    vae("the scale is known after loading only", LoadsScale, SPACE, "loading changes the spec"),
    vae("numbers that hang on `hash()`", HashedWeights, PROCESS, "encode gives other results in another process"),
    vae("the scale in decode only", ScaleInDecodeOnly, BACK, "leaves out the spec's scale"),
    vae("the scale in encode only", ScaleInEncodeOnly, BACK, "leaves out the spec's scale"),
    vae("the shift in encode only", ShiftInEncodeOnly, BACK, "leaves out the spec's shift"),
    vae("pictures from 0 to 1", ZeroToOne, BACK, "pictures do not come back"),
    vae("a posterior that is not scaled", PosteriorNotScaled, POSTERIOR, "posterior gives another mean than encode"),
    vae("the logarithm of the variance", LogVariance, POSTERIOR, "standard deviations that are negative"),
    vae("a downscale that lies", Downscale, SHAPES, "`downscale` must be what encode does"),
    vae("a channel too many in the spec", OneMoreChannel, SHAPES, "encode gives the shape"),
    vae("pictures that lose a column", Crops, f"{SHAPES} {BACK}", "decode gives the shape"),
    vae("latents padded to even sides", PadsOddSides, SHAPES, "`downscale` must be what encode does"),
    vae("infinite where a picture is white", InfiniteAtWhite, SHAPES, "encode gives numbers that are not finite"),
    vae("any size will do", TakesAnySize, SHAPES, "it must raise RowError"),
    vae("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
    vae("another contract", OldContract, PLUGIN, "was written for contract 0"),
    vae("no plugin class", partial(no_plugin), PLUGIN, "`vae` is no plugin class"),
    vae("an entry point that names no plugin", Right, PLUGIN, "is no subclass of latentmill.plugin.VAE", installed,
        name="function"),
    vae("an entry point that names another class", Right, PLUGIN, "names the class Downscale", installed, name="other"),
    vae("an entry point that names nothing", Right, PLUGIN, "can't be imported", installed, name="absent"),
]  # fmt: skip

RIGHT = [
    suite_of(VAESuite, Right, min_psnr=100.0, changed=lambda self: Right(2.0)),
    suite_of(VAESuite, partial(Right, gain=0.5), min_psnr=100.0),
]
INCOMPLETE = suite_of(VAESuite, NoDecode)

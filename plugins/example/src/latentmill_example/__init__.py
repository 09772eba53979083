"""A VAE, a scheduler and a stage for latentmill, the smallest there are that are of use; a sink is in ``arrow_stream``."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.plugin import VAE, Field, Filtered, LatentSpec, Reject, Scheduler, Stage, State, tensors


class Patches(VAE):
    """Each patch of side x side pixels becomes one latent pixel, with a channel for every value. Nothing is lost."""

    contract = 2

    def __init__(self, side: int = 4) -> None:
        if side < 1:
            raise ValueError(f"side must be 1 or more, not {side}")
        self.side = side

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(
            channels=3 * self.side**2,
            downscale=self.side,
            scale=1.0,
            shift=0.0,
            dtype="float32",
            fingerprint=f"patches-{self.side}",  # a VAE with weights hashes them
        )

    def encode(self, images: Tensor) -> Tensor:
        return pixel_unshuffle(images, self.side)

    def decode(self, latents: Tensor) -> Tensor:
        return pixel_shuffle(latents, self.side)


class Trapezoid(Scheduler):
    """Second order from two evaluations: the trapezoidal rule, on any noise schedule.

    ``x_s = keep * x + (alpha_s - keep * alpha_t) * x0`` with ``keep = sigma_s / sigma_t``, where x0 is the mean of the clean
    estimates at both ends of the step (Lu et al. 2022, arXiv:2211.01095, eq. 8). The step to t = 0, where sigma is 0, is
    Euler's.
    """

    contract = 2
    evaluations = 2
    order = 2

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = field.scale(t), field.scale(s)
        keep = sigma_s / sigma_t
        clean = field.clean(x, t)
        euler = keep * x + (alpha_s - keep * alpha_t) * clean
        if not bool((s > 0).any()):
            return euler, state
        mean = (clean + field.clean(euler, s)) / 2
        return keep * x + (alpha_s - keep * alpha_t) * torch.where(sigma_s > 0, mean, clean), state


BRIGHTNESS = pa.field("brightness", pa.float64(), nullable=False)


class Brightness(Stage):
    """Adds each picture's mean, ``brightness``, from 0 to 1, and filters pictures that are darker than ``least`` or lighter than ``most``."""

    contract = 2
    adds = (BRIGHTNESS,)

    def __init__(self, least: float = 0.0, most: float = 1.0) -> None:
        if not 0 <= least <= most <= 1:
            raise ValueError(f"least and most must be from 0 to 1, not {least!r} and {most!r}")
        self.least, self.most = least, most

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        images = tensors.from_arrow(batch, "image")  # read it, never write into it: others read the same memory
        found = [float(image.double().mean()) / 255 for image in images]
        kept = [i for i, value in enumerate(found) if self.least <= value <= self.most]
        for i, value in enumerate(found):
            if i not in kept:
                why = f"brightness {value:.3f}, which is not from {self.least} to {self.most}"
                reject(i, Filtered(why, {"brightness": value}))  # nothing is wrong with the row: it is not wanted
        if "brightness" in batch.column_names:  # the stage may stand twice in a job
            batch = batch.drop_columns(["brightness"])
        return batch.append_column(BRIGHTNESS, pa.array(found, pa.float64())).take(pa.array(kept, pa.int64()))

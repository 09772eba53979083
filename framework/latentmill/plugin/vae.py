"""VAEs, and the latent space that is theirs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from latentmill.errors import RowError
from latentmill.plugin.contract import Plugin

if TYPE_CHECKING:  # to list plugins takes none of them
    from torch import Tensor


@dataclass(frozen=True)
class LatentSpec:
    """What a VAE's latents are; travels with stored latents, and a VAE with another spec refuses them.

    Stored and travelling latents are *scaled*: ``(z - shift) * scale``, about unit variance, as a denoiser sees them
    (``scaling_factor`` and ``shift_factor`` of diffusers' VAE configs).
    """

    channels: int
    downscale: int
    """Pixels of the picture per latent pixel, on each side."""
    scale: float
    shift: float
    dtype: str
    """Logical dtype of stored latents: ``float32``, ``float16`` or ``bfloat16``."""
    fingerprint: str
    """Hash of the weights that define the latent space."""
    time_downscale: int = 0
    """0: latents of pictures, ``[C, h, w]``. From 1 on: of clips, ``[C, t, h, w]``, with that many frames a latent frame
    behind the first, which has its own, as causal video VAEs have it: ``t = 1 + (frames - 1) / time_downscale``."""
    statistics: str = field(default="", compare=False)
    """``statistics_digest`` of what the VAE takes off each channel before scale and shift; "" where that is nothing. Exports know the
    VAE by it. Not compared: it follows from what ``fingerprint`` is of, and datasets of older versions don't say it."""

    def shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Latent shape, ``(C, h, w)`` or ``(C, t, h, w)``, of ``height`` x ``width`` pixels, and of a clip's ``frames``.

        Raises RowError if it doesn't divide, or a space of pictures is asked for a clip or the other way round.
        """
        if height < 1 or width < 1 or height % self.downscale or width % self.downscale:
            raise RowError(f"size {width}x{height} is not a multiple of {self.downscale}, as the VAE needs")
        sides = height // self.downscale, width // self.downscale
        if not self.time_downscale:
            if frames is not None:
                raise RowError("a clip, and the VAE is one of pictures")
            return self.channels, *sides
        if frames is None:
            raise RowError("no clip and no latents, and the VAE is one of clips")
        if frames < 1 or (frames - 1) % self.time_downscale:
            raise RowError(
                f"{frames} frames are not one more than a multiple of {self.time_downscale}, as the VAE needs"
            )
        return self.channels, 1 + (frames - 1) // self.time_downscale, *sides

    def pixels(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``(height, width)`` of what latents of ``shape``, without the batch axis, decode to; of clips ``(frames, height, width)``."""
        sides = shape[-2] * self.downscale, shape[-1] * self.downscale
        return (1 + (shape[-3] - 1) * self.time_downscale, *sides) if self.time_downscale else sides

    @property
    def decoded(self) -> str:
        """The column that latents are decoded to: ``image``, uint8 ``[H, W, 3]``, or ``video``, uint8 ``[T, H, W, 3]``."""
        return "video" if self.time_downscale else "image"

    def about(self) -> dict[str, Any]:
        """What is stored of it, for JSON: all values, less those that only clips, or VAEs with statistics, have."""
        return {
            name: value for name, value in vars(self).items() if name not in ("time_downscale", "statistics") or value
        }


def statistics_digest(mean: Sequence[float], std: Sequence[float]) -> str:
    """16 hex digits for ``LatentSpec.statistics``: of each channel, that becomes ``(z - mean) / std``. Six digits of a number count.

    >>> statistics_digest([0.0, -0.7571], [1.0, 2.8184]) == statistics_digest([-0.0, -0.75710001], [1, 2.8183999])
    True
    """
    numbers = " ".join(f"{number + 0.0:.6g}" for number in (*mean, *std))
    return hashlib.blake2b(numbers.encode(), digest_size=8).hexdigest()


class VAE(Plugin, ABC):
    """Pictures to latents and back. ``latents`` here are scaled (see LatentSpec).

    Of a VAE of clips read ``[B, 3, T, H, W]`` for pictures and ``[B, C, t, h, w]`` for latents. What it is given is float32, on
    the device of ``load``, and is read only. What it returns may be of any floating dtype and on any device, and is the
    framework's: nothing that the VAE keeps or returns again.
    """

    @property
    @abstractmethod
    def spec(self) -> LatentSpec:
        """The latent space. Known before ``load``."""

    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]``, RGB in [-1, 1], to the posterior's mean ``[B, C, h, w]``, scaled."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, both as ``encode``'s result and scaled. Without one, 0 is the latter."""
        mean = self.encode(images)
        return mean, mean.new_zeros(mean.shape)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents ``[B, C, h, w]`` to pictures ``[B, 3, H, W]`` in [-1, 1]; what lies outside is clipped later."""

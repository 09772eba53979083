"""Whose latents a dataset's are: what a VAE's family does to them before a denoiser sees them, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # to list formats takes none of them
    import numpy.typing as npt

    from latentmill.plugin import LatentSpec

WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Of each channel, as the configs of Wan 2.1's and Qwen-Image's VAEs have them."""


@dataclass(frozen=True)
class VAEFamily:
    """VAEs whose latents one kind of denoiser is trained on. Scaled are ``((z - mean) / std - shift) * scale``."""

    name: str
    about: str
    channels: int
    downscale: int
    scale: float = 1.0
    shift: float = 0.0
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    """Of each channel, or one for all. Where they are statistics, our VAEs apply them, and LatentSpec says scale 1, shift 0 and which."""

    @property
    def statistics(self) -> str:
        """As LatentSpec has them; "" where there are none."""
        from latentmill.plugin import statistics_digest

        return statistics_digest(self.mean, self.std) if self.mean[1:] else ""

    def fits(self, spec: LatentSpec) -> bool:
        """Whether ``spec`` says what is true of the family."""
        numbers = (spec.scale, self.scale), (spec.shift, self.shift)
        shape = spec.channels, spec.downscale, spec.time_downscale
        return (*shape, spec.statistics) == (self.channels, self.downscale, 0, self.statistics) and all(
            math.isclose(found, known, rel_tol=1e-3) for found, known in numbers
        )

    def raw(self, scaled: npt.NDArray[Any], spread: bool = False) -> npt.NDArray[Any]:
        """What the VAE's encoder gave, float32, of scaled latents ``[C, h, w]``; or, of a standard deviation, its ``spread``.

        >>> import numpy as np
        >>> ones = np.ones((1, 1, 1), np.float32)
        >>> flux = VAE_FAMILIES["flux"]
        >>> print(f"{flux.raw(ones).item():.4f} {flux.raw(ones, spread=True).item():.4f}")  # 1 / 0.3611, and the shift of 0.1159
        2.8852 2.7693
        """
        import numpy as np

        mean, std = (np.array(of, np.float64)[:, None, None] for of in (self.mean, self.std))
        found = scaled.astype(np.float64) / self.scale
        found = found * std if spread else (found + self.shift) * std + mean
        return found.astype(np.float32)


VAE_FAMILIES: dict[str, VAEFamily] = {
    family.name: family
    for family in (
        VAEFamily("sd", "Stable Diffusion 1 and 2, PixArt-alpha, DiT", 4, 8, 0.18215),
        VAEFamily("sdxl", "Stable Diffusion XL, PixArt-Sigma", 4, 8, 0.13025),
        VAEFamily("sd3", "Stable Diffusion 3 and 3.5", 16, 8, 1.5305, 0.0609),
        VAEFamily("flux", "FLUX.1, Lumina 2, Z-Image, Chroma", 16, 8, 0.3611, 0.1159),
        VAEFamily("wan", "Qwen-Image, and Wan 2.1 for one frame", 16, 8, mean=WAN_MEAN, std=WAN_STD),
    )
}
"""By name. ``LatentSpec`` can't tell Qwen-Image's space from Wan's, whose statistics are the same."""


def family_of(spec: LatentSpec) -> VAEFamily | None:
    """The family that a dataset's latents are of; None if it is none that is known here."""
    return next((family for family in VAE_FAMILIES.values() if family.fits(spec)), None)


def space_in_words(spec: LatentSpec) -> str:
    """What a latent space is, for people."""
    family = family_of(spec)
    if family:
        return f"{family.name} ({family.about})"
    numbers = f"{spec.channels} channels, 1/{spec.downscale} of the sides, scale {spec.scale:g}, shift {spec.shift:g}"
    if spec.statistics:
        numbers += ", and statistics of each channel of its own"
    words = f"of no VAE that is known here ({numbers})"
    like = [each for each in VAE_FAMILIES.values() if each.fits(replace(spec, statistics=each.statistics))]
    if like and not spec.statistics:
        words += (
            f"; they don't say their statistics of each channel: if they are {like[0].name}'s ({like[0].about}), made by an older "
            "version, encode them again, into another output"
        )
    return words

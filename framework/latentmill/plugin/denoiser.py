"""Denoisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from latentmill.plugin.contract import Plugin
from latentmill.plugin.scheduler import NoiseSchedule
from latentmill.plugin.vae import LatentSpec

if TYPE_CHECKING:  # to list plugins takes none of them
    from torch import Tensor


Prediction: TypeAlias = Literal["epsilon", "v", "sample", "flow"]
"""What a network predicts: the noise; ``alpha * noise - sigma * x0``; the clean sample; ``noise - x0``."""


class Denoiser(Plugin, ABC):
    """The network: predicts, from noisy latents, what ``prediction`` says.

    Tensors that it is given are read only and on the device of ``load``, but for ``t`` and what ``parted_by`` names, which are on the CPU; what it returns is
    the framework's, on that device. Nothing may be kept from one call to the next: the next one's rows are others.

    Conditioning, by name: what the text encoder makes; ``guidance_scale``, ``mask`` and ``masked``, if asked for below; and what
    a stage before it adds as tensor columns ``prompt:NAME`` and ``negative:NAME`` ``[B, ...]``, of one shape for all rows that
    are to be moved together: a control picture, say, raw or encoded by the VAE. Both or, with
    ``guidance_embedded``, ``prompt:NAME`` alone. Dtypes are kept; float conditioning must be finite.
    """

    prediction: Prediction
    noise_schedule: NoiseSchedule
    guidance_embedded: bool = False
    """Whether the network is told a row's guidance scale, as conditioning ``guidance_scale[B]``, and so guides itself: one
    evaluation, without the negative prompt."""
    inpaints: bool = False
    """Whether the network was trained for inpainting: it is told, in both conditionings, ``mask[B, 1, h, w]``, 1 where to paint,
    and ``masked[B, C, h, w]``, the latents of the picture with gray there. Rows without a mask are errors."""
    multiple_of: int = 1
    """What the sides of latents must be multiples of: 2 where a transformer takes patches of 2x2. Pictures whose size nobody says are cut to
    it, and a row of other latents is its error: ``predict`` never sees it."""
    parted_by: Collection[str] = ()
    """Conditioning by which ``predict`` parts its rows into calls of the network, as the length of a prompt: given on the CPU, so
    that nobody waits for the device. In a deterministic job rows are then predicted one by one: who shares a call must not show.
    Names of the text encoder's and of stages' columns alone: ``row_fields``, ``guidance_scale``, ``mask`` and ``masked`` are on the device."""

    def check(self, spec: LatentSpec) -> None:
        """Raise ValueError, saying what was expected, if the network was not trained on latents of this space."""

    def guide(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """The guided prediction out of two ``[B, ...]``; ``scale`` broadcasts against them (Ho and Salimans 2022, eq. 6)."""
        return negative + scale * (prompt - negative)

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The prediction, shaped as latents ``x[B, C, h, w]`` (``[B, C, t, h, w]`` of clips), float32, at times ``t[B]``, float64 in [0, 1].

        One evaluation; guidance calls it with rows of both conditionings in one batch. The result is of any floating dtype.
        """


class FollowsAuthors:
    """What a denoiser may add that repeats its authors' pipeline: ``class Mine(FollowsAuthors, Denoiser)``.

    As it stands it is what is done for a denoiser without it.
    """

    noise_schedule: NoiseSchedule

    def times(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The grid that the model's authors intended, which ``scheduler.grid: model`` asks for.

        Float64 on the CPU, descending, ``[steps + 1]``, for latents of ``shape``. Raises ValueError where there is none.
        """
        raise ValueError("this denoiser has no grid of its own: choose one by its name")

    def start_scale(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise that a row without picture or latents starts from, at times ``t``, float64: sigma."""
        return self.noise_schedule.scale(t)[1]

    def guides(self, scale: float, negative_prompt: str | None) -> bool:
        """Whether a row of this guidance scale is guided, and so costs two evaluations a step; None: it gives no negative prompt."""
        return scale > 1.0

    @staticmethod
    def of(denoiser: Denoiser) -> FollowsAuthors:
        """The denoiser itself, if it follows its authors, else what is done for it."""
        if isinstance(denoiser, FollowsAuthors):
            return denoiser
        plain = FollowsAuthors()
        plain.noise_schedule = denoiser.noise_schedule
        return plain

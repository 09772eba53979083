"""A picture that stays where its mask is 0, by a network that was not trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InpaintingMask:
    """A row's mask, and the picture that stays where the mask is 0: at every time the clean latents with the row's first noise.

    One of bools holds after each step, as in diffusers' inpainting with a model that was not trained for it. One of numbers is soft, and
    holds for what the network is given and for what it makes of that, as in ComfyUI.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor

    def blend(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``x`` where the mask is 1, and the picture elsewhere. Of one row or, in ``stacked``, of all."""
        return torch.where(self.mask, x, alpha.to(x.dtype) * self.clean + sigma.to(x.dtype) * self.noise)

    @property
    def soft(self) -> bool:
        return self.mask.is_floating_point()

    def noisy(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is given in place of ``x[B, ...]``, with a soft mask."""
        stays = alpha.to(x.dtype) * self.clean + sigma.to(x.dtype) * self.noise
        return x * self.mask + stays * (1 - self.mask)

    def kept(self, x0: Tensor) -> Tensor:
        """What it makes clean, and the picture."""
        return x0 * self.mask + self.clean * (1 - self.mask)

    @classmethod
    def stacked(cls, masks: Sequence[InpaintingMask]) -> InpaintingMask:
        mask, clean, noise = (torch.stack([getattr(m, name) for m in masks]) for name in ("mask", "clean", "noise"))
        if mask.ndim < clean.ndim:  # of clips: a row's mask is for all its frames
            mask = mask.reshape(len(mask), *(1 for _ in range(clean.ndim - mask.ndim)), *mask.shape[1:])
        return cls(mask, clean, noise)

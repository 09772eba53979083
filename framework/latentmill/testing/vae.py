"""What every VAE must hold."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from latentmill.plugin import VAE, RowError


class VAESuite:
    """What every VAE must hold. Runs on the CPU."""

    vae: ClassVar[type[VAE]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    size: ClassVar[tuple[int, int]] = (64, 64)
    """Height and width of the pictures it is tried on, in pixels."""
    min_psnr: ClassVar[float] = 20.0
    """What a smooth picture must come back with, in dB."""

    def test_the_space_is_known_before_loading_and_is_the_same_everywhere(self) -> None:
        """The driver asks for the spec, and never loads."""
        first, second = self.vae(), self.vae()
        spec = first.spec
        assert spec == second.spec, f"two instances are of different spaces: {spec} and {second.spec}"
        first.load(torch.device("cpu"))
        assert first.spec == spec, f"loading changed the space from {spec} to {first.spec}"
        assert spec.fingerprint, "the spec needs a fingerprint, so that other weights' latents can be refused"

    def test_shapes_are_what_the_spec_says(self) -> None:
        """``encode`` gives what ``spec.shape`` says, ``decode`` the picture's shape, both finite."""
        vae, pictures = self._loaded()
        latents = vae.encode(pictures)
        wanted = (len(pictures), *vae.spec.shape(*self.size))
        assert tuple(latents.shape) == wanted, f"latents of shape {tuple(latents.shape)}, and the spec says {wanted}"
        decoded = vae.decode(latents)
        assert decoded.shape == pictures.shape, f"pictures of shape {tuple(decoded.shape)} from {tuple(pictures.shape)}"
        assert bool(latents.isfinite().all() and decoded.isfinite().all()), "latents or pictures are not finite"
        try:
            vae.spec.shape(self.size[0] * vae.spec.downscale + 1, self.size[1])
        except RowError:
            return
        assert vae.spec.downscale == 1, "a size that isn't a multiple of downscale must raise RowError"

    def test_pictures_come_back(self) -> None:
        """And what was handed in is not written into."""
        vae, pictures = self._loaded()
        before = pictures.clone()
        latents = vae.encode(pictures)
        kept = latents.clone()
        error = float((vae.decode(latents).clamp(-1, 1) - pictures).square().mean())
        psnr = 10 * math.log10(4 / max(error, 1e-12))
        assert psnr >= self.min_psnr, (
            f"{psnr:.1f} dB after encode and decode, {self.min_psnr} expected: scale or shift?"
        )
        assert torch.equal(pictures, before) and torch.equal(latents, kept), "an input was written into"

    def test_rows_do_not_touch_each_other(self) -> None:
        """A picture's latent is the same alone as in company."""
        vae, pictures = self._loaded()
        together = vae.encode(pictures)
        decoded = vae.decode(together)
        for row in range(len(pictures)):
            alone = vae.encode(pictures[row : row + 1])
            assert torch.allclose(alone[0], together[row], rtol=1e-3, atol=1e-4), (
                f"encode: row {row} depends on its company"
            )
            alone = vae.decode(together[row : row + 1])
            assert torch.allclose(alone[0], decoded[row], rtol=1e-3, atol=1e-4), (
                f"decode: row {row} depends on its company"
            )

    def _loaded(self) -> tuple[VAE, Tensor]:
        vae = self.vae()
        vae.load(torch.device("cpu"))
        height, width = self.size
        y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
        colours = [torch.stack([x + 0 * y, 0 * x + y, x * y]) * gain for gain in (0.8, -0.6, 0.3)]
        return vae, torch.stack(colours).contiguous()

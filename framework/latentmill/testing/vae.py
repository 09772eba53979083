"""What every VAE must hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentmill.plugin import VAE, LatentSpec, RowError
from latentmill.testing.behaviour import Arguments, MethodCall, loaded
from latentmill.testing.suite import RowsSuite, identity


class VAESuite(RowsSuite):
    """What every VAE must hold, of pictures or of clips. Runs on the CPU."""

    kind = "vae"
    vae: ClassVar[type[VAE]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    size: ClassVar[tuple[int, int]] = (64, 64)
    """Height and width of the pictures it is tried on, in pixels."""
    odd_sizes: ClassVar[Sequence[tuple[int, int]] | None] = None
    """Other heights and widths: 3 by 5 and 5 by 3 latents, unless it is said."""
    frames: ClassVar[int | None] = None
    """Of the clips that a VAE of clips is tried on: those of three latent frames, unless it is said."""
    other_frames: ClassVar[Sequence[int] | None] = None
    """Other numbers of frames: one, and those of two latent frames, unless it is said."""
    min_psnr: ClassVar[float] = 20.0
    """What a smooth picture must come back with, in dB."""

    def test_the_space_is_known_before_loading_and_is_the_same_everywhere(self) -> None:
        """The driver asks for the spec, and never loads."""
        first, second = self.vae(), self.vae()
        spec = first.spec
        assert spec == second.spec, (
            f"two instances are of different spaces: settings and weights alone make a space\n{spec} {second.spec}"
        )
        first.load(torch.device("cpu"))
        assert first.spec == spec, (
            f"loading changes the spec: the driver asks for it, and never loads\n{spec} {first.spec}"
        )
        assert spec.fingerprint, "the spec has no fingerprint: without one, latents of other weights can't be refused"

    def test_shapes_are_what_the_spec_says(self) -> None:
        """``encode`` gives what ``spec.shape`` says, ``decode`` the picture's shape, both finite; odd sizes, and clips of one frame, too."""
        vae = loaded(self.vae)
        spec = vae.spec
        for height, width, *frames in self._sizes():
            pictures = _pictures(height, width, *frames)
            with torch.no_grad():
                latents = vae.encode(pictures.clone())
                decoded = vae.decode(latents.clone())
            wanted = (len(pictures), *spec.shape(height, width, *frames))
            found = tuple(latents.shape)
            about = "".join(f"{count} frame{'s' * (count > 1)} of " for count in frames) + f"{width}x{height} pixels"
            if frames and len(found) == len(wanted) and (*found[:2], *found[3:]) == (*wanted[:2], *wanted[3:]):
                assert found == wanted, (
                    f"encode gives latents of {found[2]} frames for {about}, and the spec's time_downscale of {spec.time_downscale} "
                    f"says {wanted[2]}: `time_downscale` must be what encode does"
                )
            if found != wanted and len(found) == len(wanted) and found[:-2] == wanted[:-2]:
                raise AssertionError(
                    f"encode gives latents of {found[-1]}x{found[-2]} for {about}, and the spec's downscale of {spec.downscale} "
                    f"says {wanted[-1]}x{wanted[-2]}: `downscale` must be what encode does"
                )
            assert found == wanted, (
                f"encode gives the shape {list(found)} for {about}, and the spec says {list(wanted)}"
            )
            assert decoded.shape == pictures.shape, (
                f"decode gives the shape {list(decoded.shape)}, and the pictures were {list(pictures.shape)}"
            )
            for method, result in (("encode", latents), ("decode", decoded)):
                assert result.is_floating_point(), f"{method} gives {result.dtype}: latents and pictures are floats"
                assert bool(result.isfinite().all()), (
                    f"{method} gives numbers that are not finite; pictures may reach -1 and 1"
                )
        height, width, *frames = self._sizes()[0]
        assert spec.downscale == 1 or _refuses(spec, height * spec.downscale + 1, width, *frames), (
            "spec.shape takes a size that is no multiple of downscale: it must raise RowError"
        )
        assert spec.time_downscale < 2 or _refuses(spec, height, width, frames[0] + 1), (
            "spec.shape takes a number of frames that is not one more than a multiple of time_downscale: it must raise RowError"
        )

    def test_pictures_come_back(self) -> None:
        """Encoded and decoded, a smooth picture or clip is about itself."""
        vae, pictures = loaded(self.vae), _smooth(*self._sizes()[0])
        with torch.no_grad():
            latents = vae.encode(pictures.clone())
            psnr = _psnr(vae, latents, pictures)
            if psnr >= self.min_psnr or not bool(latents.isfinite().all()):
                return
            scale, shift = vae.spec.scale, vae.spec.shift
            for what, mended in (
                ("scale", latents * scale),
                ("scale", latents / scale),
                ("shift", latents + shift),
                ("shift", latents - shift),
                ("shift", latents + shift * scale),
                ("shift", latents - shift * scale),
                ("scale and shift", latents / scale + shift),
                ("scale and shift", (latents - shift) * scale),
            ):
                if _psnr(vae, mended, pictures) >= self.min_psnr:
                    raise AssertionError(
                        f"encode or decode leaves out the spec's {what}, and the other does not: encode gives (z - shift) * scale, "
                        f"and decode undoes it\n{psnr:.1f} dB after encode and decode"
                    )
        what = "clips" if vae.spec.time_downscale else "pictures"
        raise AssertionError(
            f"{what} do not come back: {psnr:.1f} dB after encode and decode, and min_psnr says {self.min_psnr}; is a scale or "
            "shift on one side only, or the range another than -1 to 1?"
        )

    def test_the_posterior_s_mean_is_what_encode_gives(self) -> None:
        """And its standard deviation is of the same shape, finite and not negative."""
        vae, pictures = loaded(self.vae), _pictures(*self._sizes()[0])
        with torch.no_grad():
            latents = vae.encode(pictures.clone())
            mean, std = vae.posterior(pictures.clone())
        assert mean.shape == latents.shape == std.shape, (
            f"posterior gives the shapes {list(mean.shape)} and {list(std.shape)}, and encode {list(latents.shape)}"
        )
        assert bool(std.isfinite().all() and (std >= 0).all()), (
            "posterior gives standard deviations that are negative or not finite: is it the logarithm, or the variance's?"
        )
        if not torch.allclose(mean, latents, rtol=1e-3, atol=1e-4, equal_nan=True) and not self._explained():
            raise AssertionError("posterior gives another mean than encode: both are scaled, (z - shift) * scale")

    def _sizes(self) -> list[tuple[int, ...]]:
        """Height and width, and of clips the frames, that it is tried on; the first is that of most checks."""
        spec = self.vae().spec
        down, time = spec.downscale, spec.time_downscale
        odd = self.odd_sizes
        if odd is None:
            odd = [(3 * down, 5 * down), (5 * down, 3 * down)]
        if not time:
            return [self.size, *odd]
        frames = 1 + 2 * time if self.frames is None else self.frames
        others = (1, 1 + time) if self.other_frames is None else self.other_frames
        return [(*self.size, frames), *((*self.size, other) for other in others), *((*size, frames) for size in odd)]

    def _question(self) -> Callable[[Any], dict[str, Any]]:
        return asked

    def _calls(self) -> list[MethodCall]:
        pictures = _pictures(*self._sizes()[0])
        latents = MethodCall("encode", encode, {"images": pictures}).of(loaded(self.vae))["latents"]
        return [
            MethodCall("encode", encode, {"images": pictures}),
            MethodCall("posterior", posterior, {"images": pictures}),
            MethodCall("decode", decode, {"latents": latents}),
        ]


def asked(vae: VAE) -> dict[str, Any]:
    """What the driver asks a VAE."""
    return {**identity(vae), "spec": vae.spec}


def encode(vae: VAE, rows: Arguments) -> dict[str, Tensor]:
    """``encode`` as a call."""
    return {"latents": vae.encode(rows["images"])}


def posterior(vae: VAE, rows: Arguments) -> dict[str, Tensor]:
    """``posterior`` as a call."""
    mean, std = vae.posterior(rows["images"])
    return {"mean": mean, "std": std}


def decode(vae: VAE, rows: Arguments) -> dict[str, Tensor]:
    """``decode`` as a call."""
    return {"pictures": vae.decode(rows["latents"])}


def _refuses(spec: LatentSpec, *size: int) -> bool:
    try:
        spec.shape(*size)
    except RowError:
        return True
    return False


def _psnr(vae: VAE, latents: Tensor, pictures: Tensor) -> float:
    error = float((vae.decode(latents.clone()).clamp(-1, 1) - pictures).square().mean())
    return 10 * math.log10(4 / max(error, 1e-12))


def _smooth(height: int, width: int, frames: int | None = None) -> Tensor:
    """Three pictures ``[3, 3, H, W]``, or clips ``[3, 3, T, H, W]`` that fade into their negatives."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
    found = torch.stack([torch.stack([x + 0 * y, 0 * x + y, x * y]) * gain for gain in (0.8, -0.6, 0.3)]).contiguous()
    return found if frames is None else found[:, :, None] * torch.linspace(1, -1, frames)[:, None, None]


def _pictures(height: int, width: int, frames: int | None = None) -> Tensor:
    """A smooth picture or clip, black and white squares, and all white."""
    squares = (torch.arange(height)[:, None] + torch.arange(width)[None, :]) // 2 % 2 * 2.0 - 1
    smooth = _smooth(height, width, frames)[0]
    return torch.stack([smooth, squares.expand_as(smooth), torch.ones_like(smooth)])

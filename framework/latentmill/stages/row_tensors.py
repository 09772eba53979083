"""The tensors of a source's row: pictures, clips and masks, brought to the row's size, and latents. Rows without any take no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentmill import buckets
from latentmill.batch import STATE_PREFIX
from latentmill.buckets import Size
from latentmill.pixels import cover, crop, fitted, require_few
from latentmill.plugin import LatentSpec, RowError


class RowTensors:
    """Makes them of what a source gave. All of its methods raise RowError."""

    def __init__(
        self,
        spec: LatentSpec | None,
        size: Size | None,
        max_pixels: int,
        multiple_of: int,
        masks: bool,
        from_comfy: bool,
    ) -> None:
        """``spec``: of the source's latents; ``size``: the job's; ``max_pixels``, ``multiple_of``: of a row's pictures; ``masks``: whether they
        are of use; ``from_comfy``: whether they are soft.
        """
        self.spec, self.size, self.max_pixels, self.multiple_of = spec, size, max_pixels, multiple_of
        self.masks, self.from_comfy = masks, from_comfy

    def latents(self, array: Any) -> Tensor:
        """A row's latents, of the source's space."""
        if self.spec is None:
            raise RowError("latents from a source that doesn't say of which space they are")
        latents = torch.tensor(array) if isinstance(array, np.ndarray) else torch.as_tensor(array)
        if (
            latents.ndim != (4 if self.spec.time_downscale else 3)
            or latents.shape[0] != self.spec.channels
            or not latents.numel()
        ):
            raise RowError(f"latents of shape {tuple(latents.shape)}, and {self.spec.channels} channels were expected")
        if not latents.is_floating_point() or not bool(latents.isfinite().all()):
            raise RowError("the latents are not finite numbers")
        return latents

    def state(self, given: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """What a scheduler remembers of a half-way row, by column."""
        return {STATE_PREFIX + name: torch.as_tensor(value) for name, value in (given or {}).items()}

    def picture(self, array: Any, width: int | None, height: int | None) -> Tensor:
        """A row's picture: of its width and height, or of its own, less what is over."""
        require_picture(array)
        if width is None or height is None:
            self._bound(*(side - side % self.multiple_of for side in array.shape[1::-1]))
            return torch.from_numpy(crop(array, self.multiple_of))
        self._bound(width, height)
        return torch.from_numpy(cover(array, width, height))

    def clip(self, array: Any, width: int | None, height: int | None) -> Tensor:
        """A clip ``[T, H, W, 3]``, each frame brought to size as a picture is."""
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise RowError("a clip must be a uint8 array [T, H, W, 3]")
        if not array.size:
            raise RowError("the clip has no pixels")
        self._bound(width or array.shape[2], height or array.shape[1], len(array))
        return torch.stack([self.picture(frame, width, height) for frame in array])

    def mask(self, found: Mapping[str, Any], width: int | None, height: int | None) -> Tensor:
        """The mask of a row's picture, of the picture's size, but ComfyUI stretches one where it is used."""
        mask = require_picture(found["mask"])
        if self.from_comfy and width is None and mask.shape != found["image"].shape:
            return self._light(torch.from_numpy(mask))
        _require_mask(found)
        return self._light(self.picture(mask, width, height))

    def _light(self, picture: Tensor) -> Tensor:
        light = picture.float().mean(-1)
        return light / 255 if self.from_comfy else (light >= 127.5).to(torch.uint8)

    def whole(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """A row's picture as it was opened, and its mask, or its clip: what is brought to a bucket."""
        whole = {}
        for name in ("image", "mask") if found.get("image") is not None else ("video",):
            if found.get(name) is not None and (name != "mask" or self.masks):
                frames = found[name] if name == "video" else [found[name]]
                whole[name] = torch.from_numpy(np.stack([require_picture(frame, self.size) for frame in frames]))
        if not whole:
            raise RowError("size is for rows with a picture, and there is none")
        if "mask" in whole:
            _require_mask(found)
        return whole

    def sized(
        self, size: Size, row: dict[str, Any], seed: int, whole: Mapping[str, Tensor], sample: int
    ) -> dict[str, Tensor]:
        """A sample's picture, brought to its bucket; the row is told how."""
        count, height, width = next(iter(whole.values())).shape[:3]
        own = row["width"], row["height"]
        fit = size.fit(width, height, sample) if own[0] is None else buckets.covering(own, width, height)
        self._bound(*fit.bucket, count)
        if size.pixels != "ours" and fit.scaled[0] * fit.scaled[1] > width * height:
            self._bound(*fit.scaled)  # all of it is made before it is cut
        found = {}
        for name, frames in whole.items():
            each = [fitted(frame, fit, size.draw(seed), size.pixels) for frame in frames.numpy()]
            found[name] = torch.from_numpy(np.stack([pixels for pixels, _ in each]))
            row["crop_ltrb"] = each[0][1]
        row |= {"original_size": (width, height), "bucket": fit.bucket, "width": fit.bucket[0], "height": fit.bucket[1]}
        return {
            name: frames if name == "video" else self._light(frames[0]) if name == "mask" else frames[0]
            for name, frames in found.items()
        }

    def bits(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
        """What makes tensors equal."""
        return {
            name: (value.shape, value.dtype, value.flatten().view(torch.uint8).numpy().tobytes())
            for name, value in tensors.items()
        }

    def stacked(self, each: Sequence[Tensor]) -> Tensor:
        """A column of them."""
        return torch.stack([*each])

    def _bound(self, width: int, height: int, frames: int = 1) -> None:
        require_few(width, height, self.max_pixels, frames)


def _require_mask(found: Mapping[str, Any]) -> None:
    if np.shape(found["mask"])[:2] != np.shape(found["image"])[:2]:
        raise RowError("the mask is of another size than the picture")


def require_picture(array: Any, size: Size | None = None) -> np.ndarray[Any, Any]:
    """The array, if it is a picture. Raises RowError."""
    channels = (3, 4) if size is not None and size.pixels == "musubi" else (3,)
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != np.uint8
        or array.ndim != 3
        or array.shape[2] not in channels
    ):
        raise RowError("a picture must be a uint8 array [H, W, 3]")
    if not array.size:
        raise RowError("the picture has no pixels")
    return array

"""Latents, or pictures, brought to another size between two stages: the small steps of a job that denoises twice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latentmill.batch import SPEC_KEY, spec_from_json, with_latents
from latentmill.plugin import Declaration, LatentSpec, Reject, Stage, StageContext, tensors
from latentmill.resampling import CROP_WAYS, OF_LATENTS, OF_PICTURES, resized
from latentmill.text import near


class Upscale(Stage):
    """Brings a tensor of each row to ``scale`` times its size, or to ``width`` x ``height`` pixels; the row's width and height follow.

    Of ``width`` and ``height`` one may be left out, and follows from the other. ``megapixels`` keeps the aspect, and makes about so many
    times 1024 x 1024 pixels of it. ``crop``: ``center`` cuts what is over of another aspect
    first. A row of more pixels than ``sampling.max_pixels`` is an error.
    """

    contract = 2
    shares_tensors = True
    methods: ClassVar[tuple[str, ...]] = ()
    least: ClassVar[int] = 1
    """Pixels of a side that follows from the other, at least."""

    def __init__(
        self,
        method: str,
        scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        crop: str = "disabled",
        megapixels: float | None = None,
    ) -> None:
        for name, value, known in (("method", method, self.methods), ("crop", crop, CROP_WAYS)):
            if value not in known:
                raise ValueError(
                    f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}{near(value, known)}"
                )
        if (scale, width or height, megapixels).count(None) != 2:
            raise ValueError("either scale, megapixels or width and height must be given")
        for name, side in (("scale", scale), ("width", width), ("height", height), ("megapixels", megapixels)):
            if side is not None and not 0 < side < 1 << 16:
                raise ValueError(f"{name} must be more than 0, not {side}")
        if crop != "disabled" and (width is None or height is None):
            raise ValueError("crop is for width and height, which must both be given")
        self.method, self.scale, self.width, self.height, self.crop = method, scale, width, height, crop
        self.pixels = None if megapixels is None else int(megapixels * 1024 * 1024)

    def prepare(self, context: StageContext) -> None:
        self.most = int(context.sampling.get("max_pixels") or 1 << 62)

    def sides(self, width: int, height: int, unit: int) -> tuple[int, int]:
        """What ``width`` x ``height`` pixels of something become, each ``unit`` pixels of a picture."""
        scale = self.scale if self.pixels is None else math.sqrt(self.pixels / (width * height)) / unit
        if scale is not None:
            return max(1, round(width * scale)), max(1, round(height * scale))
        wide = self.width or max(self.least, round(width * (self.height or 0) / height))
        high = self.height or max(self.least, round(height * wide / width))
        return max(1, wide // unit), max(1, high // unit)

    def _resized(self, x: Tensor, width: int, height: int) -> Tensor:
        """``x[B, C, (t,) h, w]`` so."""
        frames = x.movedim(2, 1) if x.ndim == 5 else x
        found = resized(frames.to(torch.float32), width, height, self.method, self.crop)
        return found.movedim(1, 2) if x.ndim == 5 else found

    def _followed(self, batch: pa.Table, width: int, height: int, reject: Reject) -> pa.Table:
        """The batch with its rows' width and height; none of its rows, if they are too many pixels."""
        if width * height > self.most:
            for row in range(len(batch)):
                reject(
                    row,
                    f"{width}x{height} are {width * height} pixels, more than sampling.max_pixels={self.most} allows",
                )
            return batch.slice(0, 0)
        for name, side in (("width", width), ("height", height)):
            at = batch.schema.get_field_index(name)
            field = batch.schema.field(at)
            batch = batch.set_column(at, field, pa.array([side] * len(batch), field.type))
        return batch


class LatentUpscale(Upscale):
    """As Upscale, of ``latents`` and of the masks beside them. The sides in pixels are what the latents decode to.

    ``nearest-exact``, ``bilinear``, ``area`` and ``bicubic`` are torch's; ``bislerp`` turns from one pixel's direction of channels to the next one's.
    """

    takes = ("latents",)
    methods = OF_LATENTS
    least = 64  # as in ComfyUI

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        spec = spec_from_json(batch.schema.field("latents").metadata[SPEC_KEY])
        high, wide = tensors.shape_of(batch.schema.field("latents"))[-2:]
        width, height = self.sides(wide, high, spec.downscale)
        batch = self._followed(batch, width * spec.downscale, height * spec.downscale, reject)
        if not len(batch):
            return batch
        for name in ("latents", "masked"):
            if name in batch.column_names:
                given = tensors.from_arrow(batch, name)
                found = self._unscaled(given, spec, width, height).to(given.dtype)
                batch = (
                    with_latents(batch, found, spec) if name == "latents" else tensors.with_tensor(batch, name, found)
                )
        if "mask" in batch.column_names and not (mask := tensors.from_arrow(batch, "mask")).is_floating_point():
            batch = tensors.with_tensor(batch, "mask", interpolate(mask, (height, width), mode="nearest"))
        return batch

    def _unscaled(self, x: Tensor, spec: LatentSpec, width: int, height: int) -> Tensor:
        """Of the VAE's own numbers, where a shift gives them other directions."""
        if self.method != "bislerp" or not spec.shift:
            return self._resized(x, width, height)
        return (self._resized(x.to(torch.float32) / spec.scale + spec.shift, width, height) - spec.shift) * spec.scale


class ImageUpscale(Upscale):
    """As Upscale, of ``image`` or ``video``, and of a picture's mask; ``keep_mask``: one with shades stays as it is, and is brought to size where it is used.

    Where a later stage encodes the picture, what is over a multiple of the VAE's downscale is cut evenly from both edges. Floats are
    not bounded, as ComfyUI's aren't: bicubic goes beyond black and white.
    """

    methods = OF_PICTURES
    cuts = True
    takes_floats = True

    def __init__(
        self,
        method: str,
        scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        crop: str = "disabled",
        megapixels: float | None = None,
        keep_mask: bool = False,
    ) -> None:
        super().__init__(method, scale, width, height, crop, megapixels)
        self.keep_mask = keep_mask

    def declare(self, context: StageContext) -> Declaration:
        there = {name for stage in context.before for name in stage.added()}
        shown = "video" if "video" in there else "image"
        takes = (shown,) if "latents" in there else ()
        return replace(super().declare(context), takes=takes, adds=(shown,), drops=(shown,))

    def prepare(self, context: StageContext) -> None:
        super().prepare(context)
        encodes = any("vae" in stage.needs and "latents" in stage.added() for stage in context.after)
        self.multiple_of = context.multiple_of if encodes else 1
        self.floats = context.gives_floats

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        name = next((each for each in ("image", "video") if each in batch.column_names), None)
        if name is None:  # a row without a picture, where others have one
            return batch
        high, wide = tensors.shape_of(batch.schema.field(name))[-3:-1]
        width, height = self.sides(wide, high, 1)
        kept = [side - side % self.multiple_of or side for side in (width, height)]
        batch = self._followed(batch, kept[0], kept[1], reject)
        if not len(batch):
            return batch
        given = tensors.as_floats(tensors.from_arrow(batch, name).movedim(-1, 1))
        found = self._resized(given, width, height)
        found = found if self.floats else tensors.as_bytes(found)
        batch = tensors.with_tensor(batch, name, self._cut(found).movedim(1, -1).contiguous())
        if "mask" in batch.column_names:
            mask = tensors.from_arrow(batch, "mask")[:, None]
            if self.keep_mask and mask.is_floating_point():
                return batch
            mask = interpolate(mask, (height, width), mode="nearest")
            batch = tensors.with_tensor(batch, "mask", self._cut(mask)[:, 0].contiguous())
        return batch

    def _cut(self, x: Tensor) -> Tensor:
        """The middle of ``x[..., H, W]`` with sides that the VAE can encode."""
        high, wide = x.shape[-2:]
        height, width = (side - side % self.multiple_of or side for side in (high, wide))
        top, left = (high - height) // 2, (wide - width) // 2
        return x[..., top : top + height, left : left + width]

"""Latents and pictures brought to another size, as ComfyUI's nodes do it: by torch's interpolation, by Pillow's Lanczos, or along arcs."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

OF_ALL = ("nearest-exact", "bilinear", "area", "bicubic")
"""Ways of ``torch.nn.functional.interpolate``, without antialiasing."""
OF_LATENTS = (*OF_ALL, "bislerp")
OF_PICTURES = (*OF_ALL, "lanczos")
CROP_WAYS = ("disabled", "center")

PARALLEL = 1e-5
"""How near to 1 the cosine of an angle may be before what lies between has no direction of its own."""


def resized(x: Tensor, width: int, height: int, method: str, crop: str = "disabled") -> Tensor:
    """``x[..., C, h, w]``, float32, as ``[..., C, height, width]``; with ``crop`` ``center`` what is over of another aspect is cut first.

    Each leading index is computed by itself: its numbers are the same in any company.
    """
    if crop == "center":
        x = _middle(x, width / height)
    each = [_one(one, width, height, method) for one in x.reshape(-1, 1, *x.shape[-3:])]
    return torch.cat(each).reshape(*x.shape[:-2], height, width)


def _middle(x: Tensor, aspect: float) -> Tensor:
    """The part of ``x[..., h, w]`` in the middle that is ``aspect`` times as wide as high, to the nearest pixel on each side."""
    height, width = x.shape[-2:]
    there = width / height
    left = round((width - width * (aspect / there)) / 2) if there > aspect else 0
    top = round((height - height * (there / aspect)) / 2) if there < aspect else 0
    return x[..., top : height - top, left : width - left]


def _one(x: Tensor, width: int, height: int, method: str) -> Tensor:
    if method == "bislerp":
        return _along_arcs(_along_arcs(x, width, -1), height, -2)
    if method == "lanczos":
        pixels = (x[0].movedim(0, -1) * 255).clamp(0, 255).to(torch.uint8).numpy()
        scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(scaled)).movedim(-1, 0)[None].to(x.dtype) / 255
    return interpolate(x, size=(height, width), mode=method)


def _along_arcs(x: Tensor, length: int, axis: int) -> Tensor:
    """``x[1, C, h, w]`` with ``length`` pixels on an axis: between two neighbours the direction of the C channels turns, and the norm is mixed.

    Spherical interpolation (Shoemake 1985), ``(sin((1-r) w) a + sin(r w) b) / sin w`` of unit vectors with the angle w; neighbours that point
    the same way give the first of them, opposite ones the straight mixture.
    """
    there = torch.arange(x.shape[axis], dtype=torch.float32)
    place = interpolate(there[None, None, None], size=(1, length), mode="bilinear").flatten()
    after = interpolate(
        (there + 1).clamp(max=len(there) - 1)[None, None, None], size=(1, length), mode="bilinear"
    ).flatten()
    r = (place - place.floor()).reshape([length if k == axis % 4 else 1 for k in range(4)])
    a, b = x.index_select(axis, place.long()), x.index_select(axis, after.long())
    norm_a, norm_b = (torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (a, b))
    unit_a, unit_b = (torch.where(norm > 0, each / norm, 0.0) for each, norm in ((a, norm_a), (b, norm_b)))
    cosine = (unit_a * unit_b).sum(1, keepdim=True)
    angle = torch.acos(cosine)
    turned = (torch.sin((1 - r) * angle) * unit_a + torch.sin(r * angle) * unit_b) / torch.sin(angle)
    mixed = turned * ((1 - r) * norm_a + r * norm_b)
    mixed = torch.where(cosine > 1 - PARALLEL, a, mixed)
    return torch.where(cosine < PARALLEL - 1, (1 - r) * a + r * b, mixed)

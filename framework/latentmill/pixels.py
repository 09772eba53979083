"""How a picture's pixels are brought to a size, or to its bucket: as ours are to ``sampling.width`` and ``height``, or as a trainer does it.

kohya's sd-scripts and musubi-tuner scale the whole picture to whole pixels, by OpenCV's INTER_AREA where it gets smaller and by
Pillow's Lanczos where it gets larger, and cut the bucket out of that. ``area`` is INTER_AREA to the bit.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from latentmill.buckets import Fit, Sides, kohya_crop
from latentmill.plugin import RowError

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""``[H, W, 3]``; of a picture with alpha, as musubi-tuner resizes it, ``[H, W, 4]``."""

LTRB: TypeAlias = tuple[float, float, float, float]

LINES = 32
"""Lines that are averaged at a time: what they become stays in a processor's cache."""


def fitted(picture: Pixels, fit: Fit, draw: Sides | None, way: str) -> tuple[Pixels, LTRB]:
    """A picture brought to its bucket, RGB ``[h, w, 3]``, and its ``crop_ltrb``.

    That is the part of the scaled picture that was taken, in its pixels: left, top, right, bottom; kohya's own, where the
    pixels are kohya's.
    """
    if way == "ours" and not fit.as_is:
        return _ours(picture, fit, draw)
    height, width = picture.shape[:2]
    if fit.scaled != (width, height):
        smaller = fit.scaled[0] <= width and fit.scaled[1] <= height
        picture = area(picture, *fit.scaled) if smaller else _lanczos(picture, fit.scaled)
    left, top = fit.cut(draw)
    right, bottom = left + fit.bucket[0], top + fit.bucket[1]
    found = np.ascontiguousarray(picture[top:bottom, left:right, :3])
    if way == "kohya":
        return found, kohya_crop(fit.bucket, (width, height))
    return found, (float(left), float(top), float(right), float(bottom))


def _ours(picture: Pixels, fit: Fit, draw: Sides | None) -> tuple[Pixels, LTRB]:
    """The part that covers the bucket, scaled by Lanczos at once: a picture of 1 x 20000 is never scaled whole."""
    (height, width), bucket = picture.shape[:2], fit.bucket
    scale = max(bucket[0] / width, bucket[1] / height)
    shares = (0.5, 0.5) if draw is None else (draw[0] / 2**32, draw[1] / 2**32)
    left, top = (max((have - want / scale) * share, 0.0) for have, want, share in zip((width, height), bucket, shares))
    box = left, top, min(left + bucket[0] / scale, width), min(top + bucket[1] / scale, height)
    found = np.array(Image.fromarray(picture).resize(bucket, Image.Resampling.LANCZOS, box=box))
    across, down = round(left * scale, 6), round(top * scale, 6)
    return found, (across, down, across + bucket[0], down + bucket[1])


def _lanczos(picture: Pixels, size: Sides) -> Pixels:
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def area(picture: Pixels, width: int, height: int) -> Pixels:
    """``picture[H, W, C]`` with no side made larger, each pixel the mean of the area that it covers: OpenCV's ``INTER_AREA``.

    Equal to it to the bit (4.10 and 5.0, on x86-64), so sums are float32 and in its order: along lines first, from left to
    right, then from top to bottom. Where both factors are whole its sums are whole numbers, and halves are rounded
    to even; where both are 2 they are rounded up.
    """
    have_height, have_width, channels = picture.shape
    factors = 1.0 / (width / have_width), 1.0 / (height / have_height)
    across, down = (round(factor) for factor in factors)
    if all(abs(factor - whole) < sys.float_info.epsilon for factor, whole in zip(factors, (across, down))):
        sums = picture.reshape(height, down, width, across, channels).sum((1, 3), dtype=np.int32)
        halves_up = across == down == 2
        means = (sums + 2) // 4 if halves_up else np.rint(sums.astype(np.float32) * np.float32(1.0 / (across * down)))
        return np.asarray(means, np.uint8)
    lines = np.empty((have_height, width, channels), np.float32)
    for start in range(0, have_height, LINES):
        part = picture[start : start + LINES].transpose(1, 0, 2).astype(np.float32, order="C")
        lines[start : start + LINES] = _means(part, width).transpose(1, 0, 2)
    return np.rint(_means(lines, height)).astype(np.uint8)


def _means(values: npt.NDArray[np.float32], want: int) -> npt.NDArray[np.float32]:
    """The first axis of ``values`` averaged to ``want``."""
    total = np.zeros((want, *values.shape[1:]), np.float32)
    part = np.empty_like(total)
    for places, shares in zip(*_covered(len(values), want)):
        np.take(values, places, axis=0, out=part, mode="clip")
        part *= shares[:, None, None]
        total += part
    return total


@lru_cache(maxsize=64)
def _covered(have: int, want: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Which of ``have`` pixels each of ``want`` covers, and with which share: both ``[most, want]``, filled up with shares of 0.

    What is covered by less than a thousandth of a pixel is left out, as OpenCV does.
    """
    factor, found = 1.0 / (want / have), []
    for at in range(want):
        begin, end = at * factor, at * factor + factor
        whole = min(factor, have - begin)
        last = min(math.floor(end), have - 1)
        first = min(math.ceil(begin), last)
        covered: list[tuple[int, Any]] = [(place, 1.0 / whole) for place in range(first, last)]
        if first - begin > 1e-3:
            covered.insert(0, (first - 1, (first - begin) / whole))
        if end - last > 1e-3:
            covered.append((last, min(end - last, 1.0, whole) / whole))
        found.append(covered)
    most = max(map(len, found))
    places, shares = np.zeros((most, want), np.intp), np.zeros((most, want), np.float32)
    for at, covered in enumerate(found):
        for k, (place, share) in enumerate(covered):
            places[k, at], shares[k, at] = place, share
    return places, shares


def cover(picture: np.ndarray[Any, Any], width: int, height: int) -> np.ndarray[Any, Any]:
    """The middle of ``picture[H, W, 3]``, scaled to cover ``width`` x ``height``; itself if it has that size."""
    have_height, have_width = picture.shape[:2]
    if (have_width, have_height) == (width, height):
        return np.array(picture)
    # The middle is cut out first: 1 x 20000 pixels, scaled to cover a square, would be a million and more high.
    scale = max(width / have_width, height / have_height)
    cut_x, cut_y = (have_width - width / scale) / 2, (have_height - height / scale) / 2
    box = (max(cut_x, 0.0), max(cut_y, 0.0), min(have_width - cut_x, have_width), min(have_height - cut_y, have_height))
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box=box))


def crop(picture: np.ndarray[Any, Any], multiple_of: int) -> np.ndarray[Any, Any]:
    """The middle of ``picture[H, W, 3]`` with sides that are multiples. Raises RowError if it is too small for one."""
    height, width = (side - side % multiple_of for side in picture.shape[:2])
    if not width or not height:
        raise RowError(f"a picture of {picture.shape[1]}x{picture.shape[0]} pixels, and the VAE needs {multiple_of}")
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.array(picture[top : top + height, left : left + width])


def require_few(width: int, height: int, most: int, frames: int = 1) -> None:
    """Raise RowError if a row has more pixels than the job allows, ``sampling.max_pixels``."""
    if width * height * frames > most:
        size = f"{width}x{height}" if frames == 1 else f"{frames} frames of {width}x{height}"
        raise RowError(f"{size} are {width * height * frames} pixels, more than sampling.max_pixels={most} allows")

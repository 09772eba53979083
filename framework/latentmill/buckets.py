"""What a job's ``size`` says: which size each picture is brought to, by its own shape, and what is cut off.

The tables, and how a trainer chooses from them, are as in the trainers' code: kohya-ss/sd-scripts 48d368f, kohya-ss/musubi-tuner
30c658c, NVIDIA-NeMo/Automodel 36044ad. Sizes are ``(width, height)`` in pixels everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa

from latentmill.plugin import RowError
from latentmill.text import near

Sides: TypeAlias = tuple[int, int]
"""Width and height."""

SQUARE = 1024 * 1024
"""Pixels of a bucket, about, where a job says nothing."""

SDXL: Sequence[Sides] = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896)),
    *((1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640)),
    *((1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)),
)
"""The sizes that SDXL was trained on: Podell et al. 2023, arXiv:2307.01952, appendix I."""

AUTOMODEL = (
    (1, 2),
    (9, 16),
    (2, 3),
    (3, 4),
    (4, 5),
    (1, 1),
    (5, 4),
    (4, 3),
    (3, 2),
    (16, 10),
    (5, 3),
    (16, 9),
    (2, 1),
    (21, 9),
)
"""NeMo AutoModel's aspect ratios."""

STEPS = {"kohya": 64, "musubi": 16, "automodel": 64}
"""The tables that are made for an area, and what their sides are multiples of."""
NAMES = (*STEPS, "sdxl")
PIXEL_WAYS = {
    "ours": "upright as EXIF says, transparency on white, resized by Lanczos",
    "kohya": "as kohya's sd-scripts does: EXIF and alpha ignored, resized by OpenCV's INTER_AREA down and by Lanczos up",
    "musubi": "as musubi-tuner does: EXIF ignored, resized by OpenCV's INTER_AREA down and by Lanczos up, alpha dropped",
}
"""Ways to open a picture and to resize it (``latentmill.pixels``), in words."""
CROPS = ("center", "random")
KEYS = ("buckets", "area", "step", "upscale", "min_side", "max_side", "crop", "flip", "pixels")

ORIGINAL_SIZE = pa.field("original_size", pa.list_(pa.int32(), 2))
CROP_LTRB = pa.field("crop_ltrb", pa.list_(pa.float64(), 4))
BUCKET = pa.field("bucket", pa.list_(pa.int32(), 2))
SIZE_COLUMNS = (ORIGINAL_SIZE, CROP_LTRB, BUCKET)
"""What the rows of a job with ``size`` have beside others."""


@dataclass(frozen=True)
class Fit:
    """How a picture is brought to its bucket: scaled as a whole, then cut."""

    bucket: Sides
    scaled: Sides
    """What the picture is scaled to; no side is smaller than the bucket's."""
    as_is: bool = False
    """The picture is not scaled at all, only cut."""

    def cut(self, draw: Sides | None) -> Sides:
        """Pixels cut off at the left and at the top of the scaled picture: half of what is too much, or as ``draw`` says."""
        over = [have - want for have, want in zip(self.scaled, self.bucket)]
        left, top = (n // 2 for n in over) if draw is None else (n * (k + 1) >> 32 for n, k in zip(draw, over))
        return left, top


@dataclass(frozen=True)
class Size:
    """A job's ``size``, checked."""

    buckets: str | tuple[Sides, ...]
    area: tuple[int, ...]
    """Pixels of a bucket, about, of which sample k of a row has the k-th; of a table of its own one that says nothing."""
    step: int
    upscale: bool
    min_side: int
    max_side: int
    crop: str
    flip: bool
    pixels: str

    @staticmethod
    def of(given: Mapping[str, Any]) -> Size:
        """Out of a job. Raises ValueError, a line that names the key."""
        for key in given:
            if key not in KEYS:
                raise ValueError(f"there is no key size.{key}{near(str(key), KEYS)}")
        buckets = _buckets(given.get("buckets"))
        made = isinstance(buckets, str) and buckets in STEPS

        def value(key: str, default: Any) -> Any:
            found = given.get(key)
            return default if found is None else found

        shown = buckets if isinstance(buckets, str) else "a list of buckets"
        for key, theirs in (("area", made), ("step", made), ("upscale", buckets in ("kohya", "musubi"))):
            if given.get(key) is not None and not theirs and (key, given[key]) != ("upscale", True):
                raise ValueError(
                    f"size.{key} means nothing with {shown}, which says itself how large each is: leave it out"
                )
        upscale = value("upscale", True)
        for key in ("min_side", "max_side"):
            if given.get(key) is not None and (buckets != "kohya" or upscale is False):
                alone = shown if buckets != "kohya" else "upscale: false, where a picture's own shape decides"
                raise ValueError(f"size.{key} means nothing with {alone}: leave it out")
        area = value("area", SQUARE)
        step = _whole("step", value("step", STEPS.get(str(buckets), 1)))
        least, most = (_whole(key, value(key, default)) for key, default in (("min_side", 256), ("max_side", 1024)))
        size = Size(
            buckets,
            tuple(_whole("area", each) for each in (area if isinstance(area, list) and area else [area])),
            step,
            _flag("upscale", upscale),
            least - least % step,  # as kohya rounds them
            most + -most % step,
            _one_of("crop", value("crop", "center"), CROPS),
            _flag("flip", value("flip", False)),
            _one_of("pixels", value("pixels", "ours"), [*PIXEL_WAYS]),
        )
        for each in size.area:
            size._check(each)
        return size

    def about(self) -> dict[str, Any]:
        """What of it means something, as it stands in a plan."""
        about: dict[str, Any] = {
            "buckets": self.buckets if isinstance(self.buckets, str) else [*map(list, self.buckets)]
        }
        if self.buckets in STEPS:
            about |= {"area": list(self.area), "step": self.step, "upscale": self.upscale}
        if self.buckets == "kohya" and self.upscale:
            about |= {"min_side": self.min_side, "max_side": self.max_side}
        return {**about, "crop": self.crop, "flip": self.flip, "pixels": self.pixels}

    @cached_property
    def tables(self) -> list[list[Sides]]:
        """For each area the buckets that there are, in the order in which the first of the nearest is taken."""
        return [self._table(area) for area in self.area]

    def sides(self) -> Iterator[Sides]:
        """Each bucket that a picture may get, as far as that is known beforehand: with ``upscale: false`` a square of a step is one."""
        if not self.upscale:
            yield self.step, self.step
        if self.upscale or self.buckets == "musubi":
            for table in self.tables:
                yield from table

    def fit(self, width: int, height: int, sample: int = 0) -> Fit:
        """How a picture of this size is brought to its bucket, as this sample of its row. Raises RowError if it is too small for any."""
        at = sample % len(self.area)
        area, table = self.area[at], self.tables[at]
        if self.upscale or (self.buckets == "musubi" and width * height > area):
            ratio = width / height
            exact = self.buckets not in ("musubi", "automodel") and (width, height) in table
            return covering(
                (width, height) if exact else min(table, key=lambda b: abs(b[0] / b[1] - ratio)), width, height
            )
        scaled = _shrunk(width, height, area, self.step) if self.buckets == "kohya" else (width, height)
        bucket = scaled[0] - scaled[0] % self.step, scaled[1] - scaled[1] % self.step
        if not all(bucket):
            raise RowError(
                f"a picture of {width}x{height} pixels becomes {scaled[0]}x{scaled[1]}, less than size.step={self.step}"
            )
        if self.buckets == "musubi":
            return covering(bucket, width, height)
        return Fit(bucket, scaled, as_is=scaled == (width, height))

    def draw(self, seed: int) -> Sides | None:
        """Two numbers below 2^32 that say where a row of this seed is cut; None: in the middle."""
        if self.crop == "center":
            return None
        digest = hashlib.blake2b(f"crop/{seed}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def _table(self, area: int) -> list[Sides]:
        if self.buckets == "kohya":
            return _kohya(area, self.step, self.min_side, self.max_side)
        if self.buckets == "musubi":
            return _musubi(area, self.step)
        if self.buckets == "automodel":
            return _automodel(area, self.step)
        return sorted({*(SDXL if isinstance(self.buckets, str) else self.buckets)})

    def _check(self, area: int) -> None:
        """Raise ValueError for an area that the table can't be made for."""
        side = math.isqrt(area)
        if self.buckets in STEPS and side // 2 < self.step:
            raise ValueError(f"size.area={area} is too small for buckets of multiples of size.step={self.step}")
        if self.buckets == "kohya" and self.upscale and not self.min_side:
            raise ValueError(f"size.min_side must be size.step={self.step} or more: no side of a bucket is less")
        if self.buckets == "kohya" and self.upscale and not self.min_side <= side <= self.max_side:
            raise ValueError(
                f"size.area={area} is a square of {side}, which must be from size.min_side={self.min_side} to size.max_side={self.max_side}"
            )


def covering(bucket: Sides, width: int, height: int) -> Fit:
    """A picture of this size scaled until it covers the bucket, to whole pixels as the trainers round."""
    scale = max(bucket[0] / width, bucket[1] / height)
    return Fit(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))


def kohya_crop(bucket: Sides, original: Sides) -> tuple[float, float, float, float]:
    """What kohya's caches call ``crop_ltrb``: where the whole picture, scaled to lie inside the bucket, would lie in it.

    That is not what is cut: it depends on neither the crop nor the pixels that a picture is scaled to.
    """
    (width, height), ratio = bucket, original[0] / original[1]
    inside = (height * ratio, float(height)) if width / height > ratio else (float(width), width / ratio)
    left, top = (float((have - want) // 2) for have, want in zip(bucket, inside))
    return left, top, left + inside[0], top + inside[1]


# ------------------------------------------------------------------------------------------------------------ tables


def _kohya(area: int, step: int, least: int, most: int) -> list[Sides]:
    side = int(math.sqrt(area) // step) * step
    found = {(side, side)}
    for width in range(least, most + 1, step):
        height = min(most, area // width // step * step)
        if height >= least:
            found |= {(width, height), (height, width)}
    return sorted(found)


def _musubi(area: int, step: int) -> list[Sides]:
    side = int(math.sqrt(area))
    found = set()
    for width in range(side // 2 // step * step, side + step, step):
        height = area // width // step * step
        found |= {(width, height), (height, width)}
    return sorted(found)


def _automodel(area: int, step: int) -> list[Sides]:
    found = set()
    for across, up in AUTOMODEL:
        ratio = across / up
        height = round(int(math.sqrt(area / ratio)) / step) * step
        width = round(int(height * ratio) / step) * step
        while width * height > area:
            width, height = (width - step, height) if width >= height else (width, height - step)
        if width >= step and height >= step:
            found.add((width, height))
    return sorted(found, key=lambda bucket: bucket[0] / bucket[1])


def _shrunk(width: int, height: int, area: int, step: int) -> Sides:
    """What kohya scales a picture to that is not to be enlarged. Raises RowError for one that is too narrow."""
    if width * height <= area:
        return width, height

    def down(side: float) -> int:
        return int(side + 0.5) // step * step

    ratio = width / height
    across = math.sqrt(area * ratio)
    by_width, by_height = down(across), down(area / across)
    if not by_width or not by_height or not down(by_width / ratio):
        raise RowError(f"a picture of {width}x{height} pixels is narrower than size.step={step} in {area} pixels")
    if abs(by_width / down(by_width / ratio) - ratio) < abs(down(by_height * ratio) / by_height - ratio):
        return by_width, int(by_width / ratio + 0.5)
    return int(by_height * ratio + 0.5), by_height


# -------------------------------------------------------------------------------------------------------------- values


def _buckets(given: Any) -> str | tuple[Sides, ...]:
    right = f"size.buckets must be {', '.join(sorted(NAMES))} or a list as [[1024, 1024], [832, 1216]]"
    if isinstance(given, str) and given in NAMES:
        return given
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        pairs = [tuple(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else () for pair in given]
        if all(len(pair) == 2 and all(type(side) is int and side > 0 for side in pair) for pair in pairs):
            return tuple(sorted({(pair[0], pair[1]) for pair in pairs}))
    raise ValueError(f"{right}, not {given!r:.80}{near(given, NAMES) if isinstance(given, str) else ''}")


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        many = ", or a list of them" if key == "area" else ""
        raise ValueError(f"size.{key} must be a whole number of pixels from 1 on{many}, not {value!r:.80}")
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"size.{key} must be true or false, not {value!r:.80}")
    return value


def _one_of(key: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"size.{key} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r:.80}")
    return str(value)

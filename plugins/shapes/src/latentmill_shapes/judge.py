"""What a picture shows, read from its pixels alone; nothing here sees the model or the caption.

Background: the border's median colour. Things: the other colours that cover enough pixels. Shape: the drawn outline of
equal area and centre of gravity that overlaps best. Relation: from the centres of gravity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from latentmill_shapes.draw import COLOURS, SHAPES, SIDE, Floats, Pictures, Scene, distance

PURE = 65.0
"""Euclidean sRGB distance within which a pixel counts as a colour: half of that between the two nearest colours."""

SMALLEST = 40
"""Pixels that a colour must cover to be a thing (the smallest thing drawn covers about 160)."""

OVERLAP = 0.8
"""Intersection over union below which a region is no shape."""

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5


@dataclass(frozen=True)
class Seen:
    """A thing in a picture: `shape` is None where no shape fits; centre in pixels, y down."""

    colour: str
    shape: str | None
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class Judged:
    """What a picture shows. `background` is None where the border is of no known colour."""

    background: str | None
    things: tuple[Seen, ...]


def _coverage(shape: str, x: float, y: float, radius: float) -> Floats:
    covered: Floats = np.clip(0.5 - distance(shape, _AXIS[None, :] - x, _AXIS[:, None] - y, radius), 0, 1)
    return covered


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Of a shape of radius 1: area, and how far its centre of gravity lies below its centre."""
    radius = 20.0
    covered = _coverage(shape, SIDE / 2, SIDE / 2, radius)
    area = float(covered.sum())
    return area / radius**2, float((covered.sum(1) * (_AXIS - SIDE / 2)).sum()) / area / radius


def _fit(covered: Floats, area: float, x: float, y: float) -> tuple[str | None, float]:
    best, most = None, 0.0
    for shape in SHAPES:
        unit, below = _moments(shape)
        radius = (area / unit) ** 0.5
        template = _coverage(shape, x, y - below * radius, radius)
        overlap = float(np.minimum(covered, template).sum() / np.maximum(covered, template).sum())
        if overlap > most:
            best, most = shape, overlap
    return (best if most >= OVERLAP else None), most


def _next_to(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The pixels of a mask and the eight neighbours of each."""
    wide = np.pad(mask, 1)
    wide = wide[:-2] | wide[1:-1] | wide[2:]
    return wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]


def read(picture: Pictures) -> Judged:
    """What `picture`, uint8 [64, 64, 3], shows; things in order of the palette."""
    pixels = picture.astype(np.float32)
    border = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    ground = np.median(border, axis=0)
    far = np.linalg.norm(_PALETTE - ground, axis=1)
    background = _NAMES[far.argmin()] if far.min() < PURE else None
    away: npt.NDArray[np.float32] = np.linalg.norm(pixels[:, :, None, :] - _PALETTE, axis=3)
    nearest = np.where(away.min(2) < PURE, away.argmin(2), -1)
    present = [i for i, name in enumerate(_NAMES) if name != background and (nearest == i).sum() >= SMALLEST]
    things = []
    for i in present:
        # How much of each pixel the thing covers: where it lies on the line from background to the thing's own colour.
        own = np.median(pixels[nearest == i], axis=0)
        line = own - ground
        covered: Floats = np.clip((pixels - ground) @ line / (line @ line), 0, 1).astype(np.float32)
        covered[~_next_to(nearest == i) | (covered < 0.15)] = 0  # another thing's edge may lie on that line too
        area = float(covered.sum())
        x, y = float((covered.sum(0) * _AXIS).sum()) / area, float((covered.sum(1) * _AXIS).sum()) / area
        shape, overlap = _fit(covered, area, x, y)
        things.append(Seen(_NAMES[i], shape, x, y, overlap))
    return Judged(background, tuple(things))


def relation(first: Seen, second: Seen) -> str:
    """Where `first` is, seen from `second`."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return "left of" if dx < 0 else "right of"


def compare(scene: Scene, reading: Judged) -> dict[str, bool]:
    """Which of a caption's attributes a picture has right: background, colours, shapes, relation, and `all` of them."""
    wanted = {t.colour: t.shape for t in (scene.first, scene.second) if t is not None}
    seen = {t.colour: t for t in reading.things}
    right = {
        "background": reading.background == scene.background,
        "colours": set(seen) == set(wanted),
        "shapes": all(c in seen and seen[c].shape == s for c, s in wanted.items()),
        "relation": True,
    }
    if scene.second is not None:
        pair = seen.get(scene.first.colour), seen.get(scene.second.colour)
        right["relation"] = pair[0] is not None and pair[1] is not None and relation(pair[0], pair[1]) == scene.relation
    right["all"] = all(right.values())
    return right

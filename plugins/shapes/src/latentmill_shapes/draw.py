"""Captions and the pictures they describe: the model's whole world, drawn anti-aliased from signed distances.

Two forms of caption:

    a red star on a yellow background
    a red star above a blue ring on a yellow background

All of a caption's colours differ. 5% of the captions are held out (`is_held_out`) and never trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

SIDE = 64
"""Pixels a side of every picture that the model is trained on."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 215, 50),
    "purple": (180, 50, 200),
    "cyan": (60, 200, 220),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
"""Name to sRGB; no two are nearer than 130 in Euclidean distance."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RELATIONS = ("above", "below", "left of", "right of")
_MIRROR = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

Floats = npt.NDArray[np.float32]
Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one thing, or `first` `relation` `second`, on a background."""

    first: Thing
    background: str
    relation: str | None = None
    second: Thing | None = None

    @property
    def caption(self) -> str:
        if self.second is None:
            return f"{self.first} on a {self.background} background"
        return f"{self.first} {self.relation} {self.second} on a {self.background} background"

    def mirrored(self) -> Scene:
        """The same picture told from its other thing: "a red star above a blue ring", "a blue ring below a red star"."""
        if self.second is None or self.relation is None:
            return self
        return Scene(self.second, self.background, _MIRROR[self.relation], self.first)

    @property
    def canonical(self) -> Scene:
        """The telling of this picture that says "above" or "left of"."""
        return self.mirrored() if self.relation in ("below", "right of") else self


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene, in a fixed order: 336 of one thing and 48,384 of two."""
    things = [Thing(c, s) for c, s in itertools.product(COLOURS, SHAPES)]
    one = [Scene(t, b) for t in things for b in COLOURS if b != t.colour]
    two = [
        Scene(t, b, r, u)
        for t, r, u in itertools.product(things, RELATIONS, things)
        if t.colour != u.colour
        for b in COLOURS
        if b not in (t.colour, u.colour)
    ]
    return tuple(one + two)


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this scene: 5% of them, by a stable hash of the caption.

    Both tellings of one picture fall on the same side, so a held-out picture isn't trained on under its other name.
    """
    digest = hashlib.sha256(scene.canonical.caption.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < 5


@cache
def training_scenes() -> tuple[Scene, ...]:
    """The 95% that training draws from."""
    return tuple(s for s in all_scenes() if not is_held_out(s))


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    """The 5% that measure the model."""
    return tuple(s for s in all_scenes() if is_held_out(s))


def distance(shape: str, x: Floats, y: Floats, radius: Floats | float) -> Floats:
    """Signed distance in pixels from the outline of a shape about the origin (below zero inside); y points down.

    Exact near straight and round edges, a lower bound at corners: enough for an anti-aliased edge one pixel wide.
    """
    r = np.asarray(radius, dtype=np.float32)
    d: Floats
    if shape == "circle":
        d = np.hypot(x, y) - r
    elif shape == "square":
        d = np.maximum(np.abs(x), np.abs(y)) - 0.86 * r
    elif shape == "triangle":
        # Equilateral, one corner up; the centroid sits below the centre so that the bounding box is centred.
        y = y - 0.25 * r
        d = np.maximum(y - 0.55 * r, 0.8660254 * np.abs(x) - 0.5 * y - 0.55 * r)
    elif shape == "star":
        # Five points: fold into half a point's wedge, then one straight edge from tip to notch.
        angle = np.arctan2(x, -y)
        wedge = np.float32(2 * np.pi / 5)
        angle = np.abs(np.mod(angle + wedge / 2, wedge) - wedge / 2)
        length = np.hypot(x, y)
        px, py = length * np.sin(angle), length * np.cos(angle)
        tip, notch = 1.08 * r, 0.47 * r
        nx, ny = notch * np.sin(wedge / 2), notch * np.cos(wedge / 2)
        ex, ey = nx, ny - tip
        d = (px * -ey + (py - tip) * ex) / np.hypot(ex, ey)
    elif shape == "ring":
        d = np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    elif shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        d = np.minimum(np.maximum(ax - r, ay - 0.32 * r), np.maximum(ax - 0.32 * r, ay - r))
    else:
        raise ValueError(f"no such shape: {shape!r}; there are {', '.join(SHAPES)}")
    return d.astype(np.float32)


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, float, float, float]]:
    """Where each thing of a scene goes: (thing, centre x, centre y, radius) in pixels, drawn from `rng`."""
    jitter = rng.uniform(-2, 2, size=4)
    size = rng.uniform(size=2)
    if scene.second is None or scene.relation is None:
        return [(scene.first, SIDE / 2 + jitter[0], SIDE / 2 + jitter[1], 17 + 3 * size[0])]
    dx, dy = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}[scene.relation]
    return [
        (
            scene.first,
            32 + 16 * dx + jitter[0] * (1 - 0.5 * abs(dx)),
            32 + 16 * dy + jitter[1] * (1 - 0.5 * abs(dy)),
            12 + 2 * size[0],
        ),
        (
            scene.second,
            32 - 16 * dx + jitter[2] * (1 - 0.5 * abs(dx)),
            32 - 16 * dy + jitter[3] * (1 - 0.5 * abs(dy)),
            12 + 2 * size[1],
        ),
    ]


def draw(scenes: Sequence[Scene], seed: int) -> Pictures:
    """Draw one picture of each scene: uint8 [N, 64, 64, 3], sRGB. The i-th depends on its scene, `seed` and i alone."""
    axis = np.arange(SIDE, dtype=np.float32) + 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    canvas = np.empty((len(scenes), SIDE, SIDE, 3), dtype=np.float32)
    for i, scene in enumerate(scenes):
        canvas[i] = COLOURS[scene.background]
    groups: dict[tuple[int, str], list[tuple[int, Thing, float, float, float]]] = {}
    for i, scene in enumerate(scenes):
        for layer, (thing, cx, cy, radius) in enumerate(place(scene, np.random.default_rng((seed, i)))):
            groups.setdefault((layer, thing.shape), []).append((i, thing, cx, cy, radius))
    for (_, shape), members in sorted(groups.items()):
        which = np.array([m[0] for m in members])
        centre_x, centre_y, radii = (
            np.array([m[k] for m in members], dtype=np.float32)[:, None, None] for k in (2, 3, 4)
        )
        colour = np.array([COLOURS[m[1].colour] for m in members], dtype=np.float32)[:, None, None, :]
        coverage = np.clip(0.5 - distance(shape, x - centre_x, y - centre_y, radii), 0, 1)[..., None]
        canvas[which] += coverage * (colour - canvas[which])
    return np.rint(canvas).astype(np.uint8)

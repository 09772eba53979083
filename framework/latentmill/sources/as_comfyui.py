"""A picture as ComfyUI's LoadImage opens it, and its mask, or that of LoadImageMask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MASKS_OF = ("light", "image", "alpha", "red", "green", "blue")
"""Where a source's mask is: how light a file of its own is; where the picture is transparent; or a channel of a file of its own, of
which ``alpha`` counts where it is transparent."""
WAYS = ("comfy", *(f"comfy.{mask}" for mask in MASKS_OF[1:]))
"""How a picture is opened: as RGB; with the mask of LoadImage as a fourth channel; or as LoadImageMask's, three times the same."""


def as_comfyui(upright: Image.Image, way: str) -> npt.NDArray[np.uint8]:
    """``[H, W, 3]``, or ``[H, W, 4]`` in the way ``comfy.image``. RGB by ``convert``, which shows the colours behind transparent parts; of
    32 bits a 255th. Masks are 255 where they are painted over.
    """
    image = upright.point(lambda value: value * (1 / 255)) if upright.mode == "I" else upright
    _, _, mask = way.partition(".")
    if not mask:
        return np.array(image.convert("RGB"))
    if mask != "image":
        channels = image if image.mode == "RGBA" else image.convert("RGBA")
        found = np.array(channels.getchannel(mask[0].upper()))
        return np.repeat((255 - found if mask == "alpha" else found)[..., None], 3, axis=2)
    if "A" in image.getbands():
        alpha = np.array(image.getchannel("A"))
    elif image.mode == "P" and "transparency" in image.info:
        alpha = np.array(image.convert("RGBA").getchannel("A"))
    else:  # ComfyUI doesn't look at the one colour of RGB or gray that stands for transparent
        alpha = np.full(image.size[::-1], 255, np.uint8)
    return np.dstack([np.array(image.convert("RGB")), 255 - alpha])


def masks_of(told: Any) -> tuple[str, Sequence[Any]]:
    """Where a source's mask is, and what is done to it, of ``image`` or of ``[image, invert, {grow: 6, tapered: true}]``. Raises ValueError."""
    where, *changes = told if isinstance(told, (list, tuple)) and told else [told]
    if where not in MASKS_OF:
        raise ValueError(f"masks must be {', '.join(MASKS_OF)}, and may be followed by changes in a list, not {told!r}")
    for change in changes:
        by = change.get("grow") if isinstance(change, Mapping) and change.keys() <= {"grow", "tapered"} else None
        tapered = change.get("tapered", True) if by is not None else True
        if change != "invert" and not (type(by) is int and abs(by) <= GROWTHS and type(tapered) is bool):
            raise ValueError(
                f"a change of masks must be invert or {{grow: 6, tapered: true}}, of up to {GROWTHS} pixels, not {change!r}"
            )
    return where, changes


GROWTHS = 16384
"""Of a mask, in pixels, at most."""


def changed(mask: npt.NDArray[np.uint8], changes: Sequence[Any]) -> npt.NDArray[np.uint8]:
    """A mask ``[H, W, ...]`` after these: turned over, or each pixel as its lightest neighbour, ``grow`` times; of less than 0 its darkest."""
    for change in changes:
        if change == "invert":
            mask = 255 - mask
            continue
        for _ in range(abs(change["grow"])):
            before, mask = mask, _neighbours(mask, change["grow"] > 0, change.get("tapered", True))
            if np.array_equal(before, mask):
                break
    return mask


def _neighbours(mask: npt.NDArray[np.uint8], lightest: bool, tapered: bool) -> npt.NDArray[np.uint8]:
    """Of each pixel the lightest or darkest of it and its neighbours; ``tapered``: of the four beside it, and not of the eight around it."""
    of = np.maximum if lightest else np.minimum

    def along(values: npt.NDArray[np.uint8], axis: int) -> npt.NDArray[np.uint8]:
        around = np.pad(values, [(int(k == axis),) * 2 for k in range(values.ndim)], mode="edge")
        length = values.shape[axis]
        first, middle, last = (around.take(range(k, k + length), axis) for k in range(3))
        found: npt.NDArray[np.uint8] = of(of(first, middle), last)
        return found

    if not tapered:
        return along(along(mask, 0), 1)
    both: npt.NDArray[np.uint8] = of(along(mask, 0), along(mask, 1))
    return both

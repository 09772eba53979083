"""A picture as ComfyUI's LoadImage opens it, and its mask, or that of LoadImageMask."""

from __future__ import annotations

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

"""Pictures as files in memory: what sinks store, and what they read back."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentmill.plugin import RowError

if TYPE_CHECKING:  # who reads no tensors takes no torch, and no Pillow
    from torch import Tensor


EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


@dataclass(frozen=True)
class PictureFiles:
    """How pictures become files. ``quality``, 1 to 100, is that of webp and jpeg; png is without loss."""

    image_format: str = "png"
    quality: int = 90

    def __post_init__(self) -> None:
        if self.image_format not in EXTENSIONS:
            raise ValueError(f"image_format must be one of {', '.join(EXTENSIONS)}, not {self.image_format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, not {self.quality!r}")

    @property
    def extension(self) -> str:
        """Of their names, with the dot."""
        return EXTENSIONS[self.image_format]

    def encode(self, images: Tensor) -> Iterator[bytes]:
        """The files of pictures ``images[B, H, W, 3]``, uint8 RGB."""
        from PIL import Image

        for pixels in images.numpy():
            file = io.BytesIO()
            # Pillow has no quality of PNG; it ignores it.
            Image.fromarray(pixels).save(file, self.image_format.upper(), quality=self.quality)
            yield file.getvalue()


def decode(content: bytes) -> Tensor:
    """The picture ``[H, W, 3]``, uint8 RGB, in a file. Raises RowError."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # whatever Pillow comes upon in bytes that are no picture
        raise RowError(f"the picture can't be read: {' '.join(str(error).split())[:200]}") from error

"""Pictures as files in memory: what sinks store, and what they read back."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentmill.plugin import RowError

if TYPE_CHECKING:  # who reads no tensors takes no torch, and no Pillow
    import numpy as np
    import pyarrow as pa
    from torch import Tensor


EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


@dataclass(frozen=True)
class PictureFiles:
    """How pictures become files. ``quality``, 1 to 100, is that of webp and jpeg; png is without loss.

    ``text`` is what a png carries, JSON by keyword; ``{column: NAME}`` in it is the row's value.
    """

    image_format: str = "png"
    quality: int = 90
    text: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.text and self.image_format != "png":
            raise ValueError(f"picture_text is what png carries, and image_format is {self.image_format}")
        if self.image_format not in EXTENSIONS:
            raise ValueError(f"image_format must be one of {', '.join(EXTENSIONS)}, not {self.image_format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, not {self.quality!r}")

    @property
    def extension(self) -> str:
        """Of their names, with the dot."""
        return EXTENSIONS[self.image_format]

    def encode(self, images: np.ndarray[Any, Any], batch: pa.Table | None = None) -> Iterator[bytes]:
        """The files of pictures ``images[B, H, W, 3]``, uint8 RGB; ``batch``: their rows, whose values ``text`` may name.

        Raises ValueError if it names a column that isn't there.
        """
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        told = [{}] * len(images) if batch is None else [*self._texts(batch)]
        for pixels, texts in zip(images, told):
            file, about = io.BytesIO(), PngInfo()
            for key, value in texts.items():
                about.add_text(key, value)
            # Pillow has no quality of PNG; it ignores it.
            carried = {"pnginfo": about} if texts else {}
            Image.fromarray(pixels).save(file, self.image_format.upper(), quality=self.quality, **carried)
            yield file.getvalue()

    def _texts(self, batch: pa.Table) -> Iterator[dict[str, str]]:
        """What each row's picture carries."""
        if not self.text:
            yield from ({} for _ in range(len(batch)))
            return
        names = {*_columns(self.text)}
        if missing := names - {*batch.column_names}:
            raise ValueError(f"picture_text: there is no column {min(missing)}")
        for row in batch.select(sorted(names)).to_pylist() if names else [{}] * len(batch):
            yield {key: json.dumps(_filled(value, row)) for key, value in self.text.items()}


def _columns(value: Any) -> Iterator[str]:
    """The columns that a picture's text names."""
    if isinstance(value, Mapping) and [*value] == ["column"]:
        yield str(value["column"])
    else:
        for inside in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            yield from _columns(inside)


def _filled(value: Any, row: Mapping[str, Any]) -> Any:
    """A picture's text with a row's values."""
    if isinstance(value, Mapping):
        if [*value] == ["column"]:
            return row[str(value["column"])]
        return {key: _filled(inside, row) for key, inside in value.items()}
    return [_filled(inside, row) for inside in value] if isinstance(value, list) else value


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

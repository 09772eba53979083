"""How large a picture is, by its header: what a plan counts, where decoding would take as long as the job."""

from __future__ import annotations

import io
from typing import BinaryIO

from PIL import Image

from latentmill.plugin import RowError
from latentmill.sources.pictures import FORMATS, MAX_PIXELS, orientation_of, pillow


def size_of(file: BinaryIO | bytes, max_pixels: int = MAX_PIXELS, way: str = "ours") -> tuple[int, int]:
    """Width and height of the picture that ``decode`` would give; damage behind the header is not seen. Raises RowError."""
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with pillow(max_pixels), Image.open(file, formats=FORMATS) as image:
            lies = way == "ours" and image.format != "TIFF" and orientation_of(image) >= 5  # Pillow turns TIFFs itself
            return image.size[::-1] if lies else image.size
    except MemoryError:
        raise
    except Exception as error:  # broken files end in what not, in Pillow
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError(f"can't be opened: {str(error) or type(error).__name__}") from error

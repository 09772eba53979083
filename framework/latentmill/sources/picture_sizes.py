"""How large a picture is, by its header: what a plan counts, where decoding would take as long as the job."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from PIL import Image

from latentmill.plugin import RowError
from latentmill.sources.pictures import FORMATS, MAX_PIXELS, orientation_of, pillow

PNG_TAIL = 64 << 10
"""Bytes at a PNG's end in which its metadata are, if they stand behind the pixels."""
TELLS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""What such metadata begin with."""


def size_of(file: BinaryIO | bytes, max_pixels: int = MAX_PIXELS, way: str = "ours") -> tuple[int, int]:
    """Width and height of the picture that ``decode`` would give; damage behind the header is not seen. Raises RowError."""
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with pillow(max_pixels), Image.open(file, formats=FORMATS) as image:
            if way in ("kohya", "musubi") or image.format == "TIFF":  # which Pillow turns itself
                return image.size
            turned = orientation_of(image, behind=image.format != "PNG" or _tells_more(file)) >= 5
            return image.size[::-1] if turned else image.size
    except MemoryError:
        raise
    except Exception as error:  # broken files end in what not, in Pillow
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError(f"can't be opened: {str(error) or type(error).__name__}") from error


def _tells_more(file: BinaryIO) -> bool:
    """Whether a PNG may say behind its pixels how it lies. Pillow unpacks all of them to look there."""
    at = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - PNG_TAIL))
    tail = file.read()
    file.seek(at)
    return any(word in tail for word in TELLS)

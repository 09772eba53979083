"""How a picture is decoded: always to 8-bit RGB, upright, on white."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from latentmill.plugin import RowError
from latentmill.sources import open_file

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""RGB, ``[H, W, 3]``."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded, going by the contents. All else that Pillow can read stays shut: every format is a way to attack."""

MAX_PIXELS = 89_478_485
"""What a picture may have unless a job says otherwise: a quarter of a gibibyte in RGB, as Pillow warns from on."""


def read_picture(folder: Path, name: str, max_pixels: int = MAX_PIXELS, follow_links: bool = False) -> Pixels:
    """Decode the file ``name`` inside ``folder``. Raises RowError if it can't be, or would lie outside."""
    with open_file(folder, name, follow_links) as file:
        return decode(file, max_pixels)


def decode(file: BinaryIO | bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """A picture's pixels: frame 0, turned as its EXIF says, transparency laid on white, samples scaled to 8 bits.

    Raises RowError for anything that isn't a whole picture of the FORMATS, or has more than ``max_pixels``. CMYK goes
    through the picture's ICC profile if it has one; other profiles are ignored.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    if not file.read(1):
        raise RowError("the file is empty")
    file.seek(0)
    try:
        with _no_more_than(max_pixels), Image.open(file, formats=FORMATS) as image:
            layout = str(image.tile[0][3]) if image.tile else ""  # of the samples in the file; gone after load()
            image.load()  # verify() passes a truncated JPEG
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_rgb(image, layout))
    except (MemoryError, RowError):
        raise
    except UnidentifiedImageError as error:
        raise RowError(f"not a picture in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(f"more than {max_pixels} pixels (max_pixels): a decompression bomb?") from error
    except Exception as error:
        # Broken files end in SyntaxError, struct.error, IndexError and what not, in Pillow. Only an error with a number
        # comes from the storage, and may be gone at the next attempt.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError(f"can't be decoded: {str(error) or type(error).__name__}") from error


@contextmanager
def _no_more_than(max_pixels: int) -> Iterator[None]:
    """Let Pillow raise DecompressionBombWarning beyond so many pixels, and warn of nothing else."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _rgb(image: Image.Image, layout: str) -> Image.Image:
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if image.mode in ("I", "F") or tags.get(SAMPLEFORMAT, (1,))[0] not in (1, 4):  # 4: undefined, which is unsigned
        raise RowError("32-bit or signed samples, whose range nobody knows")
    if image.mode.startswith("I;16"):
        return _narrowed(image, tags)
    if "transparency" in image.info and layout in ("L;2", "L;4", "RGB;16B"):
        # Pillow compares the colour, as it is in the file, with pixels that are 8 bits by now.
        raise RowError("a transparent colour among samples of 2, 4 or 16 bits")
    if image.mode == "P":
        _require_palette(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        try:
            converted = ImageCms.profileToProfile(image, io.BytesIO(profile), _srgb(), outputMode="RGB")
        except ImageCms.PyCMSError as error:
            raise RowError(f"its colour profile is not one of CMYK: {error}") from error
        assert converted is not None
        return converted
    return image.convert("RGB")


def _narrowed(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Gray samples of 9 to 16 bits as 8: scaled, where ``convert`` would cut off what is above 255."""
    top = (1 << tags.get(BITSPERSAMPLE, (16,))[0]) - 1
    wide = np.asarray(image).astype(np.uint32)
    gray = (wide * 255 + top // 2) // top
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero, which Pillow heeds in up to 8 bits
        gray = 255 - gray
    gray[wide == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _require_palette(image: Image.Image) -> None:
    """Raise RowError if a pixel that can be seen has a number that the palette has no colour for: Pillow makes it black."""
    palette = image.palette
    colours = len(palette.palette) // len(palette.mode) if palette is not None else 0
    seen = {number for number, count in enumerate(image.histogram()) if count} - {image.info.get("transparency")}
    if max(seen, default=0) >= colours:
        raise RowError(f"a pixel of colour {max(seen)} in a palette of {colours}")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

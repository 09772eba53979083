"""How a picture is decoded: to 8-bit RGB, upright, on white, or as a trainer opens it."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    TILELENGTH,
    TILEWIDTH,
)

from latentmill.pixels import Pixels
from latentmill.plugin import RowError
from latentmill.sources.as_comfyui import WAYS, as_comfyui

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded, going by the contents. All else that Pillow can read stays shut: every format is a way to attack."""

MAX_PIXELS = 89_478_485
"""What a picture may have unless a job says otherwise: a quarter of a gibibyte in RGB, as Pillow warns from on."""


def decode(file: BinaryIO | bytes, max_pixels: int = MAX_PIXELS, way: str = "ours") -> Pixels:
    """A picture's pixels: frame 0, turned as its EXIF says, transparency laid on white, samples scaled to 8 bits.

    Raises RowError for anything that isn't a whole picture of the FORMATS, has more than ``max_pixels``, or is of a kind
    that Pillow is known to misread. CMYK goes through the picture's ICC profile if it has one; other profiles are ignored.
    In the ``way`` of kohya or musubi: not turned, and RGB by Pillow's ``convert`` (of musubi, RGBA stays so, ``[H, W, 4]``); in
    those of comfy turned, and as ``as_comfyui`` says.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    head = file.read(70)
    if not head:
        raise RowError("the file is empty")
    file.seek(0)
    tiff: Mapping[int, Any] = {}
    try:
        with pillow(max_pixels):
            if head.startswith(PNG):
                _check_png(file)
            elif head.startswith(TIFF):
                tiff = _tiff_tags(file)
                _check_tiff(tiff, max_pixels)
            with Image.open(file, formats=FORMATS) as image:
                if image.format == "BMP":
                    _check_bmp(head, image)
                elif image.format == "GIF" and image.mode == "L":
                    image.palette = None  # of a frame with a palette of grays, beside which Pillow leaves the file's
                # What is gone after load(): the samples' layout in the file, and where a GIF's frame is.
                layout, frame = (str(image.tile[0].args), image.tile[0].extents) if image.tile else ("", None)
                if image.format == "WEBP":
                    frame = _webp_frame(file)
                image.load()  # verify() passes a truncated JPEG
                if image.format == "PNG" and (image.info.get("interlace") or not any(_last_line(image))):
                    _check_png(file, lines=True)
                if way in WAYS:
                    return as_comfyui(_upright(image, image), way)
                if way != "ours":
                    plain = ("RGB", "RGBA") if way == "musubi" else ("RGB",)
                    return np.array(image if image.mode in plain else image.convert("RGB"))
                rgb = _rgb(image, layout, tiff)
                if frame is not None and image.format in ("GIF", "WEBP"):
                    rgb = _on_canvas(rgb, frame)
                return np.array(_upright(image, rgb))
    except (MemoryError, RowError):
        raise
    except UnidentifiedImageError as error:
        if tiff:
            raise RowError(_not_read(tiff)) from error
        raise RowError(f"not a picture in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except Image.DecompressionBombError as error:
        raise _too_many(max_pixels) from error
    except Exception as error:
        # Broken files end in SyntaxError, struct.error, IndexError and what not, in Pillow. Only an error with a number
        # comes from the storage, and may be gone at the next attempt.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError(f"can't be decoded: {str(error) or type(error).__name__}") from error


def _too_many(max_pixels: int) -> RowError:
    return RowError(f"more than {max_pixels} pixels (max_pixels): a decompression bomb?")


_ONE_AT_A_TIME = threading.Lock()
# For good: whoever puts filters on and takes them off again, in one of several threads, may leave the process with another's.
warnings.filterwarnings("ignore", module=r"PIL\.")


@contextmanager
def pillow(max_pixels: int) -> Iterator[None]:
    """Pillow's settings, which are its whole process's, as we need them: a bomb beyond ``max_pixels`` is an error.

    It reads every TIFF with libtiff: its own reader makes noise of planes and of 16 bits.
    """
    with _ONE_AT_A_TIME:
        before = Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF
        Image.MAX_IMAGE_PIXELS = cast(int, max_pixels / 2)  # beyond it warns, and beyond the double it refuses
        TiffImagePlugin.READ_LIBTIFF = True
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF = before


def _rgb(image: Image.Image, layout: str, tiff: Mapping[int, Any]) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _narrowed(image, tiff)
    if "transparency" in image.info and layout in ("L;2", "L;4", "RGB;16B"):
        # Pillow compares the colour, as it is in the file, with pixels that are 8 bits by now.
        raise RowError("a transparent colour among samples of 2, 4 or 16 bits")
    if image.mode == "P":
        _require_palette(image)
    if image.mode == "La":  # gray that is multiplied by its alpha, from which Pillow converts to nothing else
        image = image.convert("LA")
    if image.mode == "RGBA":
        darkest, lightest = image.getchannel("A").getextrema()
        if tiff and EXTRASAMPLES not in tiff and darkest != 255:
            raise RowError("a TIFF with a fourth sample that it doesn't say the meaning of (ExtraSamples)")
        if image.format == "BMP" and lightest == 0:
            image = image.convert("RGB")  # nobody stores a picture that can't be seen: the alpha is a filler
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


def _webp_frame(file: BinaryIO) -> tuple[int, int, int, int] | None:
    """Where the first frame of an animated WebP is on its canvas: left, upper, right and lower."""
    file.seek(12)
    while len(head := file.read(8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        if kind == b"ANMF":
            x, y, width, height = (int.from_bytes(file.read(3), "little") for _ in range(4))
            return 2 * x, 2 * y, 2 * x + width + 1, 2 * y + height + 1
        file.seek(length + length % 2, io.SEEK_CUR)
    return None


def _on_canvas(rgb: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """An animation's first frame on its canvas, which is transparent, so white, where the frame is not."""
    if frame == (0, 0, *rgb.size):
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb.crop(frame), frame)
    return white


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation. ``ImageOps.exif_transpose`` fails on EXIF that it can't write."""


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    orientation = orientation_of(image)
    return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def orientation_of(image: Image.Image, behind: bool = True) -> int:
    """What EXIF says, 1 to 8; also what stands ``behind`` a PNG's pixels, which are unpacked for that."""
    try:
        exif = image.getexif() if behind else Image.Image.getexif(image)
        found = exif.get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception as error:  # garbage where EXIF should be says nothing of the pixels
        if isinstance(error, OSError) and error.errno is not None:  # the storage's: of a PNG all is looked at
            raise
        return 1
    return found if found in TURNS else 1


def _narrowed(image: Image.Image, tiff: Mapping[int, Any]) -> Image.Image:
    """Gray samples of 9 to 16 bits as 8: scaled, where ``convert`` would cut off what is above 255."""
    top = (1 << tiff.get(BITSPERSAMPLE, (16,))[0]) - 1
    wide = np.asarray(image).astype(np.uint32)
    gray = (wide * 255 + top // 2) // top
    if tiff.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero, which Pillow heeds in up to 8 bits
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


# ------------------------------------------------------------------------------- what Pillow doesn't see, by format


def _cut_off() -> RowError:
    return RowError("can't be decoded: image file is truncated")


PNG = b"\x89PNG\r\n\x1a\n"
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""A PNG's samples a pixel, by its colour type."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""The passes of an interlaced PNG: its first column and line, and the steps from there."""


def _last_line(image: Image.Image) -> bytes:
    return image.crop((0, image.height - 1, *image.size)).tobytes()


def _check_png(file: BinaryIO, lines: bool = False) -> None:
    """Raise RowError if a checksum is wrong, which Pillow passes over at the end of the pixels.

    With ``lines`` the pixels are unpacked, and counted, too: of lines that are missing Pillow makes zeros.
    """
    file.seek(len(PNG))
    missing, inflate, broken, kind = 0, zlib.decompressobj(), "", b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise _cut_off()
        length, kind = struct.unpack(">I4s", head)
        crc = zlib.crc32(kind)
        while length:
            part = file.read(min(length, 1 << 16))
            if not part:
                raise _cut_off()
            length -= len(part)
            crc = zlib.crc32(part, crc)
            if lines and kind == b"IHDR" and len(part) == 13:
                missing = _png_bytes(part)
            while kind == b"IDAT" and part and missing > 0:
                try:
                    missing -= len(inflate.decompress(part, 1 << 18))
                except zlib.error as error:
                    missing, broken = 0, str(error)
                part = inflate.unconsumed_tail
        checksum = file.read(4)
        if len(checksum) < 4:
            raise _cut_off()
        if int.from_bytes(checksum, "big") != crc:
            raise RowError(f"can't be decoded: the checksum of its chunk {kind.decode('latin-1')!r} is wrong")
    if missing > 0 or broken:
        raise RowError(f"can't be decoded: {broken or 'it has fewer lines than it says'}")
    file.seek(0)


def _png_bytes(header: bytes) -> int:
    """Bytes that a PNG's pixels unpack to."""
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    sides = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in ADAM7 if width > x and height > y]
    return sum(
        lines * (1 + (columns * bits * SAMPLES[kind] + 7) // 8)
        for columns, lines in (sides if interlaced else [(width, height)])
    )


def _check_bmp(head: bytes, image: ImageFile.ImageFile) -> None:
    """Mend what Pillow takes black and white for: a bit a pixel. Raise RowError for what else it reads, and not right."""
    (size,) = struct.unpack_from("<I", head, 14)
    (bits,) = struct.unpack_from("<H", head, 24 if size == 12 else 28)
    tile = image.tile[0]
    if image.mode == "1" and bits == 8 and tile.codec_name == "raw" and isinstance(tile.args, tuple):
        image.tile = [tile._replace(args=("1;8", *tile.args[1:]))]
    elif (image.mode == "1" and bits > 1) or (image.mode == "L" and bits == 4):  # unpacked as 1 and 8 bits
        raise RowError(f"a BMP of {bits} bits with a palette of grays, which is not read: save it as PNG")
    if size != 12 and struct.unpack_from("<I", head, 30) == (BITFIELDS,):
        red, green, blue, alpha = struct.unpack_from("<4I", head, 54)
        alpha *= size >= 56
        if not red | green | blue or (alpha and bits == 16):
            what = f"alpha of {alpha.bit_count()} bits" if alpha else "masks without a bit"
            raise RowError(f"a BMP of {bits} bits with {what}, which is not read: save it as PNG")


BITFIELDS = 3
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # and BigTIFF
PLAIN = frozenset({1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000})
"""Compressions of TIFF: none, CCITT, LZW, JPEG, deflate, PackBits, LZMA, Zstandard."""
PREDICTS = frozenset({5, 8, 32946, 34925, 50000})
"""Those of them that know a predictor; beside others it may mean something or nothing."""
BITS: dict[int, tuple[str, Collection[int]]] = {
    0: ("gray, 0 being white", {1, 2, 4, 8, 16}),
    1: ("gray", {1, 2, 4, 8, 12, 16}),
    2: ("RGB", {8, 16}),
    3: ("palette", {1, 2, 4, 8}),
    5: ("CMYK", {8, 16}),
    6: ("YCbCr", {8}),
    8: ("Lab", {8}),
}
"""Colours of a TIFF by their number, and bits a sample that are read right (tests/outside/test_pictures.py)."""
NEW_SUBFILE_TYPE, SUBFILE_TYPE, PREDICTOR, COLOR_MAP, INK_SET, COEFFICIENTS, REFERENCE = (
    254,
    255,
    317,
    320,
    332,
    529,
    532,
)


def _tiff_tags(file: BinaryIO) -> Mapping[int, Any]:
    head = file.read(8)
    if head[2:4] in (b"+\0", b"\0+"):
        head += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    file.seek(0)
    return tags


def _check_tiff(tags: Mapping[int, Any], max_pixels: int) -> None:
    """Raise RowError for what Pillow or libtiff read, and not right."""
    colours, bits = tags.get(PHOTOMETRIC_INTERPRETATION), tags.get(BITSPERSAMPLE, (1,))
    compression, planar = tags.get(COMPRESSION, 1), tags.get(PLANAR_CONFIGURATION, 1)
    if tags.get(NEW_SUBFILE_TYPE, 0) & 5 or tags.get(SUBFILE_TYPE) == 2:
        raise RowError("the first page of the TIFF is a preview or a mask of another: is it a camera's raw file?")
    if colours is None:
        raise RowError("a TIFF that doesn't say what its samples are (PhotometricInterpretation)")
    if tags.get(TILEWIDTH, 1) * tags.get(TILELENGTH, 1) > max_pixels:
        raise _too_many(max_pixels)
    if {*tags.get(SAMPLEFORMAT, (1,))} != {1} or max(bits) >= 32:
        raise RowError("samples that are signed, or of 32 bits and more: nobody knows their range")
    known = (
        colours in BITS
        and bits[0] in BITS[colours][1]
        and len({*bits}) == 1
        and compression in PLAIN
        and (tags.get(PREDICTOR, 1) == 1 or compression in PREDICTS)
        and not (planar == 2 and colours in (0, 1, 3) and max(tags.get(EXTRASAMPLES, (0,))) > 0)
        and tags.get(INK_SET, 1) == 1
    )
    if not known:
        raise RowError(_not_read(tags))
    if colours == 3 and max(tags.get(COLOR_MAP, (0,))) < 256:
        raise RowError("a TIFF whose palette is of 8 bits, where 16 are the rule: it would come out black")
    if colours == 6 and (
        tuple(map(float, tags.get(REFERENCE, (0, 255, 128, 255, 128, 255)))) != (0, 255, 128, 255, 128, 255)
        or any(abs(a - b) > 0.001 for a, b in zip(tags.get(COEFFICIENTS, LUMA), LUMA))
    ):
        raise RowError(
            "a TIFF of YCbCr with a black, a white or coefficients of its own, which is not read: save it as RGB"
        )


LUMA = (0.299, 0.587, 0.114)


def _not_read(tags: Mapping[int, Any]) -> str:
    """That a TIFF is of a kind which is not read, and of which."""
    colours = tags.get(PHOTOMETRIC_INTERPRETATION)
    what = [BITS[colours][0] if colours in BITS else f"photometric interpretation {colours}"]
    what.append(f"{' and '.join(map(str, dict.fromkeys(tags.get(BITSPERSAMPLE, (1,)))))} bits")
    what.append(f"{tags.get(SAMPLESPERPIXEL, 1)} samples")
    names = {EXTRASAMPLES: "extra samples", COMPRESSION: "compression", PREDICTOR: "predictor", INK_SET: "ink set"}
    for tag, name in {**names, PLANAR_CONFIGURATION: "planar configuration"}.items():
        if tag in tags and tags[tag] != 1:
            what.append(f"{name} {tags[tag]}")
    return f"a TIFF of a kind that is not read ({', '.join(what)[:200]}): save it as gray or RGB of 8 bits"

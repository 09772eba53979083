"""Folders of pictures, and how a picture is decoded: always to 8-bit RGB, upright, on white."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from latentmill.plugin import Fragment, RowError, Source
from latentmill.sources import SMALL, fingerprint, locate

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""RGB, ``[H, W, 3]``."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded, going by the contents. All else that Pillow can read stays shut: every format is a way to attack."""

SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif"
    " .avif .heic .heif .jp2 .jxl .ico .icns .tga .psd .svg .exr .hdr .pbm .pgm .ppm .pnm .dds .raw .dng".split()
)
"""A file with one of these is a row, so that a picture of a kind that we don't decode is an error to see, not a gap."""

RUN = 1000
"""Pictures in a fragment."""


class Images(Source):
    """The pictures below a folder, sorted by path; ``cat.txt`` beside ``cat.png`` is its prompt.

    A picture is a file with a picture's suffix. Hidden files and all others are passed over, and links to folders are
    not followed. A fragment is a run of at most 1000 pictures, named after its first.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if the folder is missing or has no pictures."""
        folder = locate(self.path)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {self.path}")
        _entries.cache_clear()
        contents, size = True, 0
        for name in _walk(str(folder)):
            size += _size(folder / name)
            if size > SMALL:
                contents = False
                break
        pictures = _walk(str(folder))
        fragments = []
        while run := list(islice(pictures, RUN)):
            mark = fingerprint(folder, [file for name in run for file in (name, _caption(name))], contents)
            fragments.append(Fragment(_run_name(run), len(run), mark))
        if not fragments:
            raise ValueError(f"{self.path}: no pictures there")
        return fragments

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        folder = locate(self.path)
        for name in _run(str(folder), fragment)[start:stop]:
            try:
                row: dict[str, Any] = {"image": read_picture(folder, name)}
                caption = folder / _caption(name)
                if caption.is_file():
                    row["prompt"] = caption.read_bytes().decode("utf-8-sig").strip()
                yield row
            except UnicodeDecodeError:
                yield RowError(f"{_shown(_caption(name))} is not UTF-8")
            except RowError as error:
                yield RowError(f"{_shown(name)}: {error}")


def read_picture(folder: Path, name: str) -> Pixels:
    """Decode the file ``name`` inside ``folder``. Raises RowError if it can't be, or would lie outside."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise RowError("a picture's path must lead to a file below the source's folder")
    try:
        file = (folder / name).open("rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise RowError((error.strerror or str(error)).lower()) from error
    except ValueError as error:  # a NUL in the name, or what the file system can't spell
        raise RowError(f"not a file name: {error}") from error
    except OSError as error:
        if len(os.fsencode(Path(name).name)) > 255 or len(os.fsencode(name)) > 4000:
            raise RowError("the file name is too long") from error
        raise
    with file:
        return decode(file)


def decode(file: BinaryIO | bytes) -> Pixels:
    """A picture's pixels: frame 0, turned as its EXIF says, transparency laid on white, 16 bits scaled to 8.

    Raises RowError for anything that isn't a whole picture of the FORMATS, or has more pixels than
    ``PIL.Image.MAX_IMAGE_PIXELS``. CMYK goes through the picture's ICC profile if it has one.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    if not file.read(1):
        raise RowError("the file is empty")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image.load()  # verify() passes a truncated JPEG
                return np.array(_rgb(ImageOps.exif_transpose(image)))
    except (MemoryError, RowError):
        raise
    except UnidentifiedImageError as error:
        raise RowError(f"not a picture in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(f"more than {Image.MAX_IMAGE_PIXELS} pixels: a decompression bomb?") from error
    except Exception as error:
        # Broken files end in SyntaxError, struct.error, IndexError and what not, in Pillow. Only an error with a number
        # comes from the storage, and may be gone at the next attempt.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError(f"can't be decoded: {str(error) or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise RowError("32-bit samples, whose range nobody knows")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), _srgb(), outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


# A run is found again by the path of its first picture, and checked against a hash of all its names: should a file come
# or go while a job runs, row 17 must not become another picture.


def _run_name(names: Sequence[str]) -> str:
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return f"{names[0]}+{len(names)}@{digest}"


@lru_cache(maxsize=4)
def _run(folder: str, fragment: str) -> Sequence[str]:
    first, _, count = fragment.rpartition("@")[0].rpartition("+")
    *folders, name = first.split("/")
    names = list(islice(_walk(folder, [*(f"{part}/" for part in folders), name]), int(count)))
    if not names or _run_name(names) != fragment:
        raise RuntimeError(f"pictures came or went in {folder} since the job began, at {_shown(first)}")
    return names


def _walk(folder: str, first: Sequence[str] = ()) -> Iterator[str]:
    """Pictures below a folder, as relative paths in the order of their parts; from ``first`` on if that is given."""
    entries = _entries(folder)
    at = bisect_left(entries, first[0]) if first else 0
    for name in islice(entries, at, None):
        if name.endswith("/"):
            below = first[1:] if first and name == first[0] else ()
            for deeper in _walk(folder + "/" + name[:-1], below):
                yield name + deeper
        else:
            yield name


@lru_cache(maxsize=8)
def _entries(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name + "/" * entry.is_dir(follow_symlinks=False)
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir(follow_symlinks=False) or os.path.splitext(entry.name)[1].lower() in SUFFIXES)
        )


def _caption(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()

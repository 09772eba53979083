"""Folders of pictures, and how a picture is decoded: always to 8-bit RGB, upright, on white."""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from latentmill.plugin import Fragment, RowError, Source
from latentmill.sources import are_small, changed, fingerprint, locate, open_file, shown
from latentmill.sources.text import MARKS

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""RGB, ``[H, W, 3]``."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded, going by the contents. All else that Pillow can read stays shut: every format is a way to attack."""

SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif"
    " .avif .heic .heif .jp2 .jxl .ico .icns .tga .psd .svg .exr .hdr .pbm .pgm .ppm .pnm .dds .raw .dng".split()
)
"""A file with one of these is a row, so that a picture of a kind that we don't decode is an error to see, not a gap."""

MAX_PIXELS = 89_478_485
"""What a picture may have unless a job says otherwise: a quarter of a gibibyte in RGB, as Pillow warns from on."""

CAPTIONS = (".txt", ".caption")
"""Suffixes, in small letters or others, of a file with a picture's prompt, the first that is there."""

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

RUN = 1000
"""Pictures in a fragment."""

DEPTH = 100
"""Folders in folders that are walked into."""


class Images(Source):
    """The pictures below a folder, sorted by path; ``cat.txt``, or else ``cat.caption``, beside ``cat.png`` is its prompt.

    A picture is a file with a picture's suffix. Hidden files and all others are passed over. Links to folders, and links
    to files outside the folder, are followed only with ``follow_links``, since a folder that came from elsewhere may hold
    links to what is nobody's business. With ``id_column: path`` a row's id is its path below the folder. A fragment is a
    run of at most 1000 pictures, named after its first.
    """

    def __init__(
        self, path: str, max_pixels: int = MAX_PIXELS, follow_links: bool = False, id_column: str | None = None
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, not {max_pixels}")
        if id_column not in (None, "path"):
            raise ValueError(f"id_column must be path, the only one that pictures have, not {id_column!r}")
        self.path, self.max_pixels, self.follow_links, self.id_column = path, max_pixels, follow_links, id_column
        self._seen = _Seen()

    def fragments(self) -> list[Fragment]:
        """Raises ValueError if the folder is missing, has no pictures, or folders in folders without end."""
        folder = locate(self.path)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {self.path}")
        _listing.cache_clear()
        contents = are_small(_size(folder / name) for name in _walk(str(folder), self.follow_links))
        self.fingerprinted = ("path",) if contents else ()
        self._seen = _Seen()
        pictures = _walk(str(folder), self.follow_links, seen=self._seen)
        fragments = []
        while run := list(islice(pictures, RUN)):
            mark = fingerprint(folder, self._files(run), contents)
            fragments.append(Fragment(_run_name(run), len(run), mark))
        if not fragments:
            raise ValueError(f"{self.path}: no pictures there")
        return fragments

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        folder = locate(self.path)
        for name in _run(str(folder), self.follow_links, fragment)[start:stop]:
            at = name
            try:
                row: dict[str, Any] = {"image": read_picture(folder, name, self.max_pixels, self.follow_links)}
                if caption := self._caption(name):
                    at = caption
                    row["prompt"] = self._prompt(folder, caption)
                if self.id_column is not None:
                    row["id"] = shown(name)
                yield row
            except RowError as error:
                yield RowError(f"{shown(at)}: {error}")

    def changed(self, fragment: Fragment) -> bool:
        _listing.cache_clear()
        _run.cache_clear()
        folder = locate(self.path)
        try:
            names = _run(str(folder), self.follow_links, fragment.name)
        except PicturesCameOrWent:
            return True
        return changed(folder, self._files(names), fragment.fingerprint)

    def ids(self, fragment: Fragment) -> Iterator[str]:
        return map(shown, _run(str(locate(self.path)), self.follow_links, fragment.name))

    def notices(self) -> list[str]:
        lines = []
        if links := self._seen.links:
            many = (
                f"{links[0]} is a link to a folder"
                if len(links) == 1
                else f"{len(links)} links to folders, {links[0]} first"
            )
            lines.append(f"source images: {many}, passed over: source.follow_links=true walks into it")
        if tables := self._seen.tables:
            more = f" and {len(tables) - 1} more" if tables[1:] else ""
            path = shown(f"{self.path.rstrip('/')}/{tables[0]}")
            columns = "source.columns={image: file_name, prompt: text}"
            lines.append(
                f"source images: {tables[0]}{more} is not read: source=prompts source.path={path} '{columns}' reads it"
            )
        return lines

    def _files(self, names: Sequence[str]) -> list[str]:
        """The pictures, each with its caption, or where one would be."""
        return [file for name in names for file in (name, self._caption(name) or _text(name))]

    def _caption(self, name: str) -> str | None:
        """The file with a picture's prompt, if there is one."""
        folder, _, file = name.rpartition("/")
        found = _listing(str(locate(self.path) / folder), self.follow_links).captions.get(file)
        return found and os.path.join(folder, found)

    def reads_from(self, folder: str) -> bool:
        return Path(folder).resolve().is_relative_to(locate(self.path).resolve())

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        folder = locate(self.path)
        for name in _run(str(folder), self.follow_links, fragment.name):
            caption = self._caption(name)
            try:
                yield (self._prompt(folder, caption) if caption else None), None
            except RowError:
                yield None, None

    def _prompt(self, folder: Path, name: str) -> str:
        with open_file(folder, name, self.follow_links) as file:
            content = file.read()
        encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
        try:
            return content.decode(encoding).removeprefix("\ufeff").strip()
        except UnicodeDecodeError as error:
            raise RowError(f"not {encoding.upper()}, at byte {error.start}") from error


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


class PicturesCameOrWent(RuntimeError):
    """A run of pictures is not what it was."""


# A run is found again by the path of its first picture, and checked against a hash of all its names: should a file come
# or go while a job runs, row 17 must not become another picture.


def _run_name(names: Sequence[str]) -> str:
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return f"{names[0]}+{len(names)}@{digest}"


@lru_cache(maxsize=4)
def _run(folder: str, follow_links: bool, fragment: str) -> Sequence[str]:
    first, _, count = fragment.rpartition("@")[0].rpartition("+")
    *folders, name = first.split("/")
    names = list(islice(_walk(folder, follow_links, [*(f"{part}/" for part in folders), name]), int(count)))
    if not names or _run_name(names) != fragment:
        raise PicturesCameOrWent(f"pictures came or went in {folder} since the job began, at {shown(first)}")
    return names


@dataclass
class _Seen:
    """What a walk passed over, and people may miss: links to folders, and tables of captions."""

    links: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def _walk(
    folder: str,
    follow_links: bool,
    first: Sequence[str] = (),
    above: Sequence[tuple[int, int]] = (),
    seen: _Seen | None = None,
    below: str = "",
) -> Iterator[str]:
    """Pictures below a folder, as relative paths in the order of their parts; from ``first`` on if that is given.

    ``above`` are the folders that it lies in: a link that leads back to one of them is not followed.
    """
    if len(above) > DEPTH:
        raise ValueError(f"{shown(folder[:200])}...: folders in folders, more than {DEPTH} deep")
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    listing = _listing(folder, follow_links)
    if seen is not None:
        seen.links += [shown(below + name) for name in listing.links]
        seen.tables += [shown(below + name) for name in listing.tables]
    at = bisect_left(listing.names, first[0]) if first else 0
    for name in islice(listing.names, at, None):
        if name.endswith("/"):
            rest = first[1:] if first and name == first[0] else ()
            inside = folder + "/" + name[:-1]
            for deeper in _walk(inside, follow_links, rest, [*above, here], seen, below + name):
                yield name + deeper
        else:
            yield name


@dataclass(frozen=True)
class _Listing:
    """What is in a folder."""

    names: list[str]
    """Pictures, and folders with a slash behind; sorted."""
    captions: dict[str, str]
    """The file with a picture's prompt."""
    links: list[str]
    """To folders, and not to be followed."""
    tables: list[str]
    """Captions in one file, as Hugging Face datasets has them."""


@lru_cache(maxsize=8)
def _listing(folder: str, follow_links: bool) -> _Listing:
    names, links, tables = [], [], []
    texts: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            stem, suffix = os.path.splitext(name)
            if name.startswith("."):
                continue
            link = entry.is_symlink() and os.path.isdir(entry.path)
            if entry.is_dir(follow_symlinks=False) or (link and follow_links):
                names.append(name + "/")
            elif suffix.lower() in SUFFIXES:
                names.append(name)
            elif suffix.lower() in CAPTIONS:
                texts[stem] = min(texts.get(stem, name), name, key=_rank)
            elif name.lower() in TABLES:
                tables.append(name)
            elif link:
                links.append(name)
    names.sort()
    return _Listing(names, _captions(names, texts), sorted(links), sorted(tables))


def _captions(names: Sequence[str], texts: Mapping[str, str]) -> dict[str, str]:
    """Which of the ``texts``, files by their names without suffix, belongs to which picture.

    File systems and archives write one letter in several ways: a text that no picture has by its very name is that of
    the picture whose name has the same letters.
    """
    pictures = {name: os.path.splitext(name)[0] for name in names if not name.endswith("/")}
    exact = set(pictures.values())
    alike = {unicodedata.normalize("NFC", stem): text for stem, text in texts.items() if stem not in exact}
    found = {}
    for name, stem in pictures.items():
        text = texts.get(stem) or (alike.get(unicodedata.normalize("NFC", stem)) if alike else None)
        if text is not None:
            found[name] = text
    return found


def _rank(name: str) -> tuple[int, bool, str]:
    suffix = os.path.splitext(name)[1]
    return CAPTIONS.index(suffix.lower()), suffix != suffix.lower(), name


def _text(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

"""Folders of pictures."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import pyarrow as pa

from latentmill.buckets import PIXEL_WAYS
from latentmill.plugin import Fragment, RowError, Source
from latentmill.sources import files
from latentmill.sources.files import Files
from latentmill.sources.picture_sizes import size_of
from latentmill.sources.pictures import MAX_PIXELS, decode
from latentmill.sources.text import MARKS
from latentmill.text import escaped

SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif"
    " .avif .heic .heif .jp2 .jxl .ico .icns .tga .psd .svg .exr .hdr .pbm .pgm .ppm .pnm .dds .raw .dng".split()
)
"""A file with one of these is a row, so that a picture of a kind that we don't decode is an error to see, not a gap."""

CAPTIONS = (".txt", ".caption")
"""Suffixes, in small letters or others, of a file with a picture's prompt, the first that is there."""

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

FILE = pa.field("file", pa.string())
"""The column that pictures have: the path below the folder."""

RUN = 1000
"""Pictures in a fragment."""

DEPTH = 100
"""Folders in folders that are walked into."""


class Images(Source):
    """The pictures below a folder, sorted by path; ``cat.txt``, or else ``cat.caption``, beside ``cat.png`` is its prompt.

    A picture is a file with a picture's suffix. Hidden files and all others are passed over. Links to folders, and links
    to files outside the folder, are followed only with ``follow_links``, since a folder that came from elsewhere may hold
    links to what is nobody's business. With ``id_column: path`` a row's id is its path below the folder. ``file``, the same path, can
    be kept as a column. A fragment is a run of at most 1000 pictures, named after its first.
    """

    contract = 2
    pixel_ways = (*PIXEL_WAYS,)
    knows_rows = True

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
        if not self._files.is_folder():
            raise ValueError(f"there is no folder {self.path}")
        _listing.cache_clear()
        self._files.look_everywhere()
        contents = self._files.known_by_contents(_walk(self._files, self.follow_links))
        self.fingerprinted = ("path",) if contents else ()
        self._seen = _Seen()
        pictures = _walk(self._files, self.follow_links, seen=self._seen)
        fragments = []
        while run := list(islice(pictures, RUN)):
            mark = self._files.fingerprint(self._with_captions(run), contents)
            fragments.append(Fragment(_run_name(run), len(run), mark))
        if not fragments:
            raise ValueError(f"{self.path}: no pictures there")
        return fragments

    def columns(self) -> list[str]:
        return [FILE.name]

    def column_types(self, names: Sequence[str]) -> pa.Schema:
        return pa.schema([FILE] if FILE.name in names else [])

    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        names = _run(self._files, self.follow_links, fragment)[start:stop]
        self._files.ahead(file for name in names for file in (name, self._caption(name)) if file)
        for name in names:
            at = name
            try:
                with self._files.open(name, self.follow_links) as file:
                    picture = decode(file, self.max_pixels, self.pixels)
                row: dict[str, Any] = {"image": picture}
                if caption := self._caption(name):
                    at = caption
                    row["prompt"] = self._prompt(caption)
                if self.id_column is not None:
                    row["id"] = escaped(name)
                if self.kept.names:
                    row["kept"] = {FILE.name: _text_of(name)}
                yield row
            except RowError as error:
                yield RowError(f"{escaped(at)}: {error}")

    def sizes(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        names = _run(self._files, self.follow_links, fragment)[start:stop]
        self._files.ahead(names, heads=True)
        for name in names:
            try:
                with self._files.open(name, self.follow_links) as file:
                    size = size_of(file, self.max_pixels, self.pixels)
                yield {"image": size}
            except RowError as error:
                yield RowError(f"{escaped(name)}: {error}")

    def expect(self, fragment: Fragment) -> None:
        self._files.expect(fragment.fingerprint)

    def changed(self, fragment: Fragment) -> bool:
        if self._files.local is not None:  # a store is listed once, and what is read is held against that
            _listing.cache_clear()
            _run.cache_clear()
        try:
            names = _run(self._files, self.follow_links, fragment.name)
        except PicturesCameOrWent:
            return True
        return self._files.changed(self._with_captions(names), fragment.fingerprint)

    def stamp(self, fragment: Fragment) -> str:
        try:
            return self._files.stamp(self._with_captions(_run(self._files, self.follow_links, fragment.name)))
        except PicturesCameOrWent as error:
            return str(error)

    def ids(self, fragment: Fragment) -> Iterator[str]:
        return map(escaped, _run(self._files, self.follow_links, fragment.name))

    def still(self, fragment: Fragment, runs: Sequence[tuple[str, int, int]]) -> bool:
        try:
            found = [_run(self._files, self.follow_links, of)[start : start + rows] for of, start, rows in runs]
        except PicturesCameOrWent:
            return False
        return self._files.still(self._with_captions([name for names in found for name in names]), fragment.fingerprint)

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
            path = escaped(f"{self.path.rstrip('/')}/{tables[0]}")
            columns = "source.columns={image: file_name, prompt: text}"
            lines.append(
                f"source images: {tables[0]}{more} is not read: source=prompts source.path={path} '{columns}' reads it"
            )
        return lines

    @cached_property
    def _files(self) -> Files:
        return files.at(self.path)

    def _with_captions(self, names: Sequence[str]) -> list[str]:
        """The pictures, each with its caption, or where one would be."""
        return [file for name in names for file in (name, self._caption(name) or _text(name))]

    def _caption(self, name: str) -> str | None:
        """The file with a picture's prompt, if there is one."""
        folder, _, file = name.rpartition("/")
        found = _listing(self._files, folder, self.follow_links).captions.get(file)
        return found and os.path.join(folder, found)

    def reads_from(self, folder: str) -> bool:
        return self._files.below(folder) is not None

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        captions = [self._caption(name) for name in _run(self._files, self.follow_links, fragment.name)]
        self._files.ahead(caption for caption in captions if caption)
        for caption in captions:
            try:
                yield (self._prompt(caption) if caption else None), None
            except RowError:
                yield None, None

    def _prompt(self, name: str) -> str:
        with self._files.open(name, self.follow_links) as file:
            content = file.read()
        encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
        try:
            return content.decode(encoding).removeprefix("\ufeff").strip()
        except UnicodeDecodeError as error:
            raise RowError(f"not {encoding.upper()}, at byte {error.start}") from error


class PicturesCameOrWent(RuntimeError):
    """A run of pictures is not what it was."""


# A run is found again by the path of its first picture, and checked against a hash of all its names: should a file come
# or go while a job runs, row 17 must not become another picture.


def _run_name(names: Sequence[str]) -> str:
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return f"{names[0]}+{len(names)}@{digest}"


@lru_cache(maxsize=4)
def _run(files: Files, follow_links: bool, fragment: str) -> Sequence[str]:
    first, _, count = fragment.rpartition("@")[0].rpartition("+")
    *folders, name = first.split("/")
    names = list(islice(_walk(files, follow_links, [*(f"{part}/" for part in folders), name]), int(count)))
    if not names or _run_name(names) != fragment:
        raise PicturesCameOrWent(f"pictures came or went in {files.path} since the job began, at {escaped(first)}")
    return names


@dataclass
class _Seen:
    """What a walk passed over, and people may miss: links to folders, and tables of captions."""

    links: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def _walk(
    files: Files,
    follow_links: bool,
    first: Sequence[str] = (),
    above: Sequence[Hashable] = (),
    seen: _Seen | None = None,
    below: str = "",
) -> Iterator[str]:
    """Pictures below the root, in the order of their parts; from ``first`` on if that is given. ``below``, with a slash behind, is the folder to begin with.

    ``above`` are the folders that it lies in: a link that leads back to one of them is not followed.
    """
    if len(above) > DEPTH:
        raise ValueError(f"{escaped(f'{files.path}/{below}'[:200])}...: folders in folders, more than {DEPTH} deep")
    here = files.identity(below[:-1])
    if here in above:
        return
    listing = _listing(files, below[:-1], follow_links)
    if seen is not None:
        seen.links += [escaped(below + name) for name in listing.links]
        seen.tables += [escaped(below + name) for name in listing.tables]
    at = bisect_left(listing.names, first[0]) if first else 0
    for name in islice(listing.names, at, None):
        if name.endswith("/"):
            rest = first[1:] if first and name == first[0] else ()
            yield from _walk(files, follow_links, rest, [*above, here], seen, below + name)
        else:
            yield below + name


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
def _listing(files: Files, folder: str, follow_links: bool) -> _Listing:
    names, links, tables = [], [], []
    texts: dict[str, str] = {}
    for entry in files.entries(folder, follow_links):
        name = entry.name
        stem, suffix = os.path.splitext(name)
        if entry.is_folder:
            names.append(name + "/")
        elif suffix.lower() in SUFFIXES:
            names.append(name)
        elif suffix.lower() in CAPTIONS:
            texts[stem] = min(texts.get(stem, name), name, key=_rank)
        elif name.lower() in TABLES:
            tables.append(name)
        elif entry.is_link:
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


def _text_of(name: str) -> str:
    """A file's name as it is; with escapes, if its bytes are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return escaped(name)
    return name


def _text(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"

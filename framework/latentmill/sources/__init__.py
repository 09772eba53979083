"""Where rows come from: files of prompts, folders of pictures, latents of our own. Here: how their files are found.

A ``path`` is a file, a folder or a glob, relative to the working directory, or ``pkg://package/file`` for data that an
installed package brings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill import digests
from latentmill.digests import NO_FILE
from latentmill.plugin import RowError
from latentmill.text import escaped, first_line

logger = logging.getLogger("latentmill")

MAX_DIGESTED_BYTES = 4 << 30
"""Bytes up to which a source is fingerprinted by its contents; beyond, by sizes and times of modification."""


def locate(path: str) -> Path:
    """The local path that ``path`` stands for. Raises ValueError if it is empty or names a package that isn't there."""
    if not path.strip():
        raise ValueError("source.path is empty: name a file, a folder or a glob (. is the working directory)")
    if not path.startswith("pkg://"):
        return Path(os.path.expanduser(path))  # ~name that nobody is called is a file's name
    package, _, inside = path.removeprefix("pkg://").partition("/")
    loaded = package.rpartition(".")[0] in sys.modules
    top, *below = [package] if loaded else package.split(".")
    try:
        spec = importlib.util.find_spec(
            top
        )  # imports the parents, and no more: a job says what to read, never what to run
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: there is no package {package}") from error
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: there is no package {package}")
    folder = Path(next(iter(spec.submodule_search_locations)), *below)
    if not folder.is_dir():
        raise ValueError(f"{path}: the package {package} is not installed as plain files")
    if ".." in Path(inside).parts or os.path.isabs(inside):
        raise ValueError(f"{path} leads out of the package {package}")
    return folder / inside


def root(path: str) -> Path:
    """The folder that a source's names are relative to. Looks at no more than ``path`` itself."""
    at = locate(path)
    if at.exists() or not _is_glob(str(at)):
        return at if at.is_dir() else at.parent
    fixed = at
    while _is_glob(str(fixed)):
        fixed = fixed.parent
    return fixed


def suffix(name: str) -> str:
    """The ending of a file's name that says what it is, as ``.csv`` or ``.csv.gz``."""
    stem, last = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + last if last in (".gz", ".zst") else last


def find(path: str, suffixes: Collection[str]) -> list[str]:
    """Files that ``path`` means, relative to its root, sorted. Raises ValueError if there are none.

    Of a folder, the files right in it with one of the ``suffixes``; of a glob, all that match and have one. Hidden ones
    are passed over by both.
    """
    at, folder = locate(path), root(path)
    if at.is_file():
        found = [at]
    elif at.is_dir():
        found = [entry for entry in at.iterdir() if not entry.name.startswith(".")]
    elif _is_glob(str(at)):
        pattern = at.relative_to(folder)
        hidden = any(part.startswith(".") for part in pattern.parts)  # then they are asked for
        found = [
            match
            for match in folder.glob(str(pattern))
            if hidden or not any(part.startswith(".") for part in match.relative_to(folder).parts)
        ]
    elif "://" in path and not path.startswith("pkg://"):
        raise ValueError(f"sources are files of this machine or a shared disk, and {path} is not: copy it first")
    else:
        raise ValueError(f"there is no file or folder {path}")
    known = [file for file in found if suffix(file.name) in suffixes]
    if lost := [file.name for file in known if file.is_symlink() and not file.exists()]:
        raise ValueError(f"{path}: {escaped(min(lost))} is a link to nothing")
    names = sorted(file.relative_to(folder).as_posix() for file in known if file.is_file())
    if not names:
        raise ValueError(f"{path}: no {', '.join(s for s in suffixes if s.count('.') == 1)} file there")
    return names


def open_file(folder: Path, name: str, follow_links: bool = False) -> BinaryIO:
    """Open the plain file ``name`` below ``folder``. Raises RowError if there is none, or it would lie outside.

    With ``follow_links`` a symbolic link may lead out of the folder.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise RowError("the path must lead to a file below the source's folder")
    try:
        path = folder / name
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever, and a device may never end
            raise RowError("not a file")
        if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
            raise RowError("a link out of the source's folder, which only follow_links: true follows")
        return path.open("rb")
    except RowError:
        raise
    except ValueError as error:  # a NUL in the name, or what the file system can't spell
        raise RowError(f"not a file name: {error}") from error
    except OSError as error:
        if error.errno not in NO_FILE:  # the storage's, and may be gone at the next attempt
            raise
        raise RowError((error.strerror or str(error)).lower()) from error


def as_id(value: Any) -> str:
    """What an id column holds, text or a whole number, as text. Raises RowError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(
            "the id is null" if value is None else f"an id must be text or a whole number, not {value!r:.80}"
        )
    if not value:
        raise RowError("the id is empty")
    return value


def is_small(folder: Path, names: Iterable[str]) -> bool:
    """Whether the files are small enough, in all, to be fingerprinted by their contents. Says so if they are not."""
    return are_small((folder / name).stat().st_size for name in names)


def are_small(sizes: Iterable[int]) -> bool:
    """The same of their sizes."""
    total = 0
    for size in sizes:
        total += size
        if total > MAX_DIGESTED_BYTES:
            logger.warning(
                f"a source of more than {MAX_DIGESTED_BYTES >> 30} GiB is known by its files' names, sizes and times of modification, and not "
                "by what they hold: one that is moved, copied or touched is another source"
            )
            return False
    return True


def fingerprint(folder: Path, names: Iterable[str], contents: bool) -> str:
    """One for all the files: 32 hex digits over names and contents, or a t and as many over names, sizes and times of modification."""
    if contents:
        return digests.of_all((name, folder / name) for name in names)[:32]
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        try:
            found = (folder / name).stat()
            digest.update(b"%d %d\0" % (found.st_size, found.st_mtime_ns))
        except OSError as error:  # a broken link, say: its row will end in the error table
            digest.update(b"%d\0" % (error.errno or 0))
    return f"t{digest.hexdigest()}"


def changed(folder: Path, names: Iterable[str], before: str) -> bool:
    """Whether the files' contents have another fingerprint now, or here. Of one by times it isn't known: a copy has others."""
    return not before.startswith("t") and fingerprint(folder, names, contents=True) != before


class ParquetRows:
    """Rows of a Parquet file by number. Keeps one decoded row group, so that reading on doesn't decode it again."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if it is no Parquet file."""
        try:
            self.file = pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: {first_line(error)}") from error
        self.path = path
        self.schema: pa.Schema = self.file.schema_arrow
        self.rows: int = self.file.metadata.num_rows
        self._ends = [0]
        for group in range(self.file.num_row_groups):
            self._ends.append(self._ends[-1] + self.file.metadata.row_group(group).num_rows)
        self._kept: tuple[Any, pa.Table] | None = None

    def read(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table | list[RowError]]:
        """Rows ``start`` to ``stop`` of some columns, a piece of each row group: a table, or an error for each row."""
        for group in range(self.file.num_row_groups):
            first, last = max(start, self._ends[group]), min(stop, self._ends[group + 1])
            if first < last:
                try:
                    table = self._group(group, columns)
                except (pa.ArrowInvalid, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:  # the storage's, and may be gone soon
                        raise
                    reason = f"row group {group} of {self.path.name} is damaged: {first_line(error, 200)}"
                    yield [RowError(reason)] * (last - first)
                else:
                    yield table.slice(first - self._ends[group], last - first)

    def require_ids(self, column: str | None) -> None:
        """Raise ValueError if there is no such column of text or whole numbers; None asks for none."""
        if column is None:
            return
        if column not in self.schema.names:
            raise ValueError(
                f"{self.path} has no column {column} (id_column), only {', '.join(self.schema.names)[:200]}"
            )
        type = self.schema.field(column).type
        if not is_text(type) and not pa.types.is_integer(type):
            raise ValueError(f"{self.path}: column {column} is {type}, and ids are text or whole numbers")

    def ids(self, column: str) -> Iterator[str | None]:
        """The ids of all rows, in order; None for one that is null, empty or not UTF-8."""
        for group in range(self.file.num_row_groups):  # one by one: Arrow would keep more and more of all at once
            for batch in self.file.iter_batches(row_groups=[group], columns=[column]):
                for value in plain(batch.column(0)).to_pylist():
                    try:
                        yield as_id(value.decode() if isinstance(value, bytes) else value)
                    except (RowError, UnicodeDecodeError):
                        yield None

    def _group(self, group: int, columns: list[str]) -> pa.Table:
        key = group, tuple(columns)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.file.read_row_group(group, columns=columns)
        return self._kept[1]


def is_text(type: pa.DataType) -> bool:
    """Whether a column holds text, in any of Arrow's ways to."""
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Text as bytes: a string column may hold bytes that are no UTF-8, and only that row is to fail."""
    if not is_text(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary())


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")

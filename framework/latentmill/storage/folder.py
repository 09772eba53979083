"""A dataset in a folder."""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from latentmill import failpoints
from latentmill.errors import StorageError
from latentmill.storage.store import DAY, Storage

TAIL = 40
"""Letters of a file's name, at most, that the one has in which it is made: names have 255 bytes at most, and letters up to 4."""


class LocalFolder(Storage):
    """A folder of a file system with hard links."""

    def __init__(self, url: str, single_writer: bool = False) -> None:
        super().__init__(url, single_writer)
        self.root = Path(url)

    @contextmanager
    def aside(self, name: str) -> Iterator[str]:
        failpoints.reach("store")
        folder = self.root / ".tmp"
        _make(folder)
        temporary = folder / f"{uuid.uuid4().hex}-{name.rpartition('/')[2][-TAIL:]}"
        try:
            yield os.path.abspath(temporary)  # Arrow takes the relative a:b/c for a URL
        finally:
            _remove(temporary)

    def create(self, name: str, content: str | bytes) -> bool:
        if isinstance(content, bytes):
            with self.aside(name) as temporary:
                Path(temporary).write_bytes(content)
                return self.create(name, temporary)
        failpoints.reach("store")
        final = self.root / name
        _make(final.parent)
        _sync(content)
        failpoints.reach(f"{name.partition('/')[0]} synced")
        first = self._link(content, final)
        _sync(str(final.parent))  # the loser too: whoever goes on relies on what the winner may not have synced yet
        return first

    def _link(self, source: str, final: Path) -> bool:
        while True:
            try:
                os.link(source, final)
                return True
            except FileExistsError:
                if final.is_file():
                    return False
                if what := _what(final):
                    raise StorageError(f"{final} is in the way: a {what}, where a file is to be made") from None
                # Another driver has taken away just now what was there.
            except OSError as error:
                if not self.single_writer and error.errno not in _LINKLESS:
                    raise
                if not self.single_writer:
                    raise NotImplementedError(f"this file system has no hard links: {error.strerror}") from error
                break
        if final.exists():
            return False
        os.rename(source, final)
        return True

    def put(self, name: str, content: bytes) -> None:
        with self.aside(name) as temporary:
            Path(temporary).write_bytes(content)
            _make((self.root / name).parent)
            os.replace(temporary, self.root / name)

    def read(self, name: str) -> bytes:
        failpoints.reach("store")
        return (self.root / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def size(self, name: str) -> int | None:
        try:
            about = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return about.st_size if stat.S_ISREG(about.st_mode) else None

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def older(self, folder: str, seconds: float) -> list[str]:
        oldest, found = time.time() - seconds, []
        for name in self.names(folder):
            with suppress(FileNotFoundError):  # gone in between
                if (self.root / folder / name).stat().st_mtime < oldest:
                    found.append(name)
        return found

    def tags(self, folder: str) -> dict[str, str]:
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        about = entry.stat()
                        # Of change, not of modification: where a file system keeps it, no program sets it back.
                        found[entry.name] = f"{about.st_ino} {about.st_size} {about.st_ctime_ns}"
                except FileNotFoundError:  # gone in between
                    pass
        return found

    def delete(self, name: str) -> None:
        with suppress(NotADirectoryError):
            (self.root / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        _make((self.root / to).parent)
        os.replace(self.root / name, self.root / to)
        _sync(str((self.root / name).parent))

    def clear(self) -> None:
        _remove(self.root)

    @contextmanager
    def visit(self) -> Iterator[None]:
        new = [folder for folder in (self.root / ".tmp", self.root, *self.root.parents) if not folder.exists()]
        try:
            yield
        finally:
            for folder in new:
                with suppress(OSError):  # others have put something there, or it was never made
                    folder.rmdir()

    def sweep(self) -> None:
        super().sweep()
        oldest = time.time() - DAY
        aside = (self.root / ".tmp").glob(
            f"{'[0-9a-f]' * 32}-*"
        )  # an export's folder may hold other people's files, too
        for file in aside:
            with suppress(FileNotFoundError):  # another driver sweeps, too
                if file.stat().st_mtime < oldest:
                    _remove(file)


_LINKLESS = (1, 18, 31, 38, 95)
"""EPERM, EXDEV, EMLINK, ENOSYS, EOPNOTSUPP: what file systems without hard links answer."""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _what(path: Path) -> str:
    """What is there that is no file, for people; "" if nothing is, or a file by now."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return ""
    if stat.S_ISREG(mode):
        return ""
    return "folder" if path.is_dir() else "link to nothing" if stat.S_ISLNK(mode) else "special file"


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise StorageError(
                f"{folder} is in the way: a {_what(folder) or 'file'}, where a folder is to be made"
            ) from None
        _sync(str(folder.parent))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

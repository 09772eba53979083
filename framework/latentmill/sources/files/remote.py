"""Files of a store, whichever it is: what was listed is what is read, or nothing is."""

from __future__ import annotations

import hashlib
import io
import posixpath
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, BinaryIO, ClassVar

from latentmill.errors import StorageError
from latentmill.plugin import RowError
from latentmill.sources import suffix
from latentmill.sources.files.files import Files, FolderEntry
from latentmill.sources.files.globs import fixed_part, is_glob, matches
from latentmill.sources.files.ranges import RANGE, StoredFile, opened, threads
from latentmill.storage import Storage, Stored
from latentmill.storage.store import Found
from latentmill.text import one_line

PICTURE_HEAD = 64 << 10
"""Bytes of a picture in which its size is, as a rule."""
FILES_AHEAD = 32
"""Small files, at most, that are fetched before they are opened,"""
BYTES_AHEAD = 64 << 20
"""and bytes of them. A file that is larger is read by ranges."""
UNKNOWN_HEAD = BYTES_AHEAD // FILES_AHEAD
"""Bytes that are asked for of a file that no listing told the size of. The answer has it."""
LONGEST_KEY = 1024
"""Bytes that a name may have, as S3 says; it answers longer ones with an error."""
MET = 100_000
"""Files that rows name, and of which a process remembers what they were."""
AT_A_TIME = 32
"""Files that are looked at together."""


class RemoteFiles(Files):
    """A file is known by its key, which is all of its name in the store.

    What a key's file was when it was first seen, its tag and its size, is remembered: another file under that key is never read.
    """

    range: ClassVar[int] = RANGE
    """Bytes that are worth a request."""

    def __init__(self, path: str, key: str) -> None:
        super().__init__(path)
        self.key = "/".join(filter(None, key.split("/")))
        self._known: dict[str, Stored | None] = {}
        self._met: dict[str, Stored] = {}
        """The same of files that rows named, and no listing: the last of them."""
        self._folders: dict[str, Iterable[FolderEntry]] = {}
        self._begun: dict[str, tuple[Future[tuple[bytes, Stored]], int]] = {}
        """Files that are being fetched, with their bytes as far as they are known, in the order in which they will be opened."""
        self._waiting: deque[tuple[str, bool]] = deque()

    # ------------------------------------------------------------------------------------------------- what a store says

    @abstractmethod
    def url(self, key: str) -> str:
        """A key for people."""

    @abstractmethod
    def _list(self, folder: str, deep: bool) -> Iterator[tuple[str, Stored | None]]:
        """Keys below a folder: of all files, or of what is right in it, where folders have None."""

    @abstractmethod
    def _look(self, key: str) -> Stored | None:
        """A file, asked for alone; None if there is none."""

    @abstractmethod
    def _fetch(self, key: str, start: int, stop: int) -> tuple[bytes, Stored | None]:
        """Bytes of a file, and what file it was, if it might be another. Raises FileNotFoundError and StorageError."""

    @abstractmethod
    def _first(self, key: str, stop: int) -> tuple[bytes, Stored]:
        """A file's bytes up to ``stop``, or its end, and what it is, as far as that matters; it is not empty. Raises as ``_fetch``."""

    @abstractmethod
    def _another(self, path: str) -> RemoteFiles:
        """The same store, for another path."""

    def _version(self) -> str:
        """What a fingerprint begins with."""
        return "e"

    # --------------------------------------------------------------------------------------------------- which there are

    @cached_property
    def root(self) -> str:
        """The key of the folder that names are relative to."""
        if self._is_file:
            return posixpath.dirname(self.key)
        return fixed_part(self.key) if self._is_glob else self.key

    def find(self, suffixes: Collection[str]) -> list[str]:
        if self._is_file:
            names = [posixpath.basename(self.key)]
        elif self._is_glob:
            pattern = self.key.removeprefix(self.root).removeprefix("/")
            below = self._listed(self.root, deep="/" in pattern)
            names = [self._name(key) for key, stored in below if stored and matches(self._name(key), pattern)]
        elif not self.is_folder():
            raise ValueError(f"there is no file or folder {self.path}")
        else:
            names = [entry.name for entry in self.entries("") if not entry.is_folder]
        known = sorted(name for name in names if suffix(name) in suffixes)
        if not known:
            raise ValueError(f"{self.path}: no {', '.join(s for s in suffixes if s.count('.') == 1)} file there")
        return known

    def is_folder(self) -> bool:
        return not self._is_file and (self.key in self._folders or self._has_any)

    def below(self, output: str) -> str | None:
        here, there = map(_parts, (self.path, output))
        return "/".join(there[len(here) :]) if there[: len(here)] == here else None

    @cached_property
    def _is_file(self) -> bool:
        about = None if self.path.endswith("/") else self._about(self.key)
        return about is not None and (about.size > 0 or not self._has_any)  # some stores make an empty file of a folder

    @cached_property
    def _is_glob(self) -> bool:
        return is_glob(self.key) and not self.is_folder()  # whose name may have such a character, too

    @cached_property
    def _has_any(self) -> bool:
        """Whether there is a file below."""
        return next(self._list(self.key, deep=True), None) is not None

    def child(self, name: str) -> RemoteFiles | None:
        inside = self._another(f"{self.path.rstrip('/')}/{name}")
        inside._known, inside._folders = self._known, self._folders
        return inside if inside.is_folder() else None

    def look_everywhere(self) -> None:
        folders: dict[str, dict[FolderEntry, None]] = {self.root: {}}
        for key, _ in self._listed(self.root, deep=True):
            is_folder = False
            while key != self.root:
                above, name = posixpath.split(key)
                entry = FolderEntry(name, is_folder)  # a store may have a file and a folder of one name
                if entry in folders.setdefault(above, {}):
                    break
                folders[above][entry] = None
                key, is_folder = above, True
        self._folders = dict(folders)

    def entries(self, folder: str, follow_links: bool = False) -> Iterator[FolderEntry]:
        key = self._key(folder)
        if key not in self._folders:
            self._folders[key] = [
                FolderEntry(posixpath.basename(below), stored is None)
                for below, stored in self._listed(key, deep=False)
            ]
        return (entry for entry in self._folders[key] if not entry.name.startswith("."))

    def identity(self, folder: str) -> Hashable:
        return folder

    def each(self, ask: Callable[[str], Found], names: Sequence[str]) -> Iterator[Found]:
        return self.storage().each(ask, names, AT_A_TIME)

    def storage(self) -> Storage:
        return ReadOnly(self)

    def _listed(self, folder: str, deep: bool) -> Iterator[tuple[str, Stored | None]]:
        """What is below a folder. An empty object that marks a folder, as consoles and Hadoop make them, is no file."""
        found = list(self._list(folder, deep))
        folders = {folder, *(key for key, stored in found if stored is None)}
        for key, _ in found:
            while (key := posixpath.dirname(key)) not in folders:
                folders.add(key)
        for key, stored in found:
            if stored is not None:
                if not stored.size and key in folders:
                    continue
                self._known.setdefault(key, stored)
            yield key, stored

    def _about(self, key: str) -> Stored | None:
        if key not in self._known:
            if not key or posixpath.dirname(key) in self._folders:  # which would have had it
                return None
            self._known[key] = self._look(key)
        return self._known[key]

    def _key(self, name: str) -> str:
        key = posixpath.normpath(posixpath.join(self.root, name))
        return "" if key == "." else key

    def _name(self, key: str) -> str:
        return key.removeprefix(self.root).removeprefix("/")

    # ------------------------------------------------------------------------------------------------------ what they hold

    def file(self, name: str) -> StoredFile:
        key = self._key(name)
        about = self._about(key)
        if about is None:
            raise StorageError(f"{self.url(key)} is not there any more")
        return StoredFile(self.url(key), about.size, about.tag, partial(self._as_planned, key, about), self.range)

    def open(self, name: str, follow_links: bool = False, folder: str = "") -> BinaryIO:
        key = self._named(name, folder)
        try:
            content, about = self._taken(key).result()
        except FileNotFoundError as error:
            raise RowError("no such file or directory") from error
        except ValueError as error:  # a NUL in the name, or what the store can't spell
            raise RowError(f"not a file name: {one_line(error, 100)}") from error
        if key not in self._known:
            before = self._met.setdefault(key, about)
            if before != about and before.tag and about.tag:
                raise StorageError(f"{self.url(key)} was changed since it was first read: {STAY}")
            if len(self._met) > MET:
                del self._met[next(iter(self._met))]
        if len(content) == about.size:
            return io.BytesIO(content)
        return opened(partial(self._as_planned, key, about), about.size, {0: content}, self.range)

    def ahead(self, names: Iterable[str], folder: str = "", heads: bool = False) -> None:
        for future, _ in self._begun.values():
            future.cancel()
        self._begun.clear()
        self._waiting.clear()
        for name in names:
            with suppress(RowError):
                self._waiting.append((self._named(name, folder), heads))
        self._begin()

    def _named(self, name: str, folder: str) -> str:
        """The key of a file that a row names. Raises RowError."""
        if posixpath.isabs(name) or ".." in name.split("/"):
            raise RowError("the path must lead to a file below the source's folder")
        if posixpath.normpath(name) == ".":
            raise RowError("not a file")
        key = self._key(posixpath.join(folder, name))
        if len(key.encode("utf-8", "surrogateescape")) > LONGEST_KEY:
            raise RowError("file name too long")
        return key

    def _begin(self) -> None:
        held = sum(size for _, size in self._begun.values())
        while self._waiting and len(self._begun) < FILES_AHEAD and held < BYTES_AHEAD:
            key, heads = self._waiting.popleft()
            if key not in self._begun:
                about = self._known.get(key)
                size = PICTURE_HEAD if heads else about.size if about else UNKNOWN_HEAD
                self._begun[key] = threads().submit(self._brought, key, heads), size
                held += size

    def _taken(self, key: str) -> Future[tuple[bytes, Stored]]:
        if key not in self._begun:
            return threads().submit(self._brought, key, False)
        while True:
            first = next(iter(self._begun))
            future, _ = self._begun.pop(first)
            if first == key:
                self._begin()
                return future
            future.cancel()  # it was passed over

    def _brought(self, key: str, heads: bool) -> tuple[bytes, Stored]:
        """A small file, or the beginning of one. Raises FileNotFoundError, ValueError for what is no key, StorageError."""
        about = self._known.get(key)
        if about is None and posixpath.dirname(key) in self._folders:  # which would have had it
            raise FileNotFoundError(key)
        if about is None:
            try:
                return self._first(key, PICTURE_HEAD if heads else UNKNOWN_HEAD)
            except StorageError:  # of an empty file no part can be had
                with suppress(StorageError):
                    about = self._look(key)
                if about is None or about.size:
                    raise
        stop = min(about.size, PICTURE_HEAD) if heads or about.size > BYTES_AHEAD else about.size
        return (self._as_planned(key, about, 0, stop) if stop else b""), about

    def _as_planned(self, key: str, about: Stored, start: int, stop: int) -> bytes:
        try:
            content, now = self._fetch(key, start, stop)
        except FileNotFoundError as error:
            raise StorageError(f"{self.url(key)} is not there any more: {STAY}") from error
        except StorageError:
            content, now = b"", None
            with suppress(StorageError):
                now = self._look(key)
            if now in (None, about):  # else it is shorter, and has no such bytes
                raise
        if now is not None and now != about:
            raise StorageError(f"{self.url(key)} was changed since it was listed: {STAY}")
        if len(content) != stop - start:
            raise StorageError(f"{self.url(key)}: {len(content)} bytes came where {stop - start} were asked for")
        return content

    # -------------------------------------------------------------------------------------------- whether they are the same

    def known_by_contents(self, names: Iterable[str]) -> bool:
        return False

    def fingerprint(self, names: Iterable[str], contents: bool) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            key = self._key(name)
            about = self._about(key)
            said = f"{about.size} {about.tag}" if about else "-"
            digest.update(f"{key}\0{said}\0".encode("utf-8", "surrogateescape"))
        return f"{self._version()}{digest.hexdigest()}"

    def expect(self, fingerprint: str) -> None:
        pass

    def changed(self, names: Iterable[str], before: str) -> bool:
        return self.fingerprint(names, contents=False) != before

    def still(self, names: Iterable[str], before: str) -> bool:
        return self.fingerprint(names, contents=False)[-32:] == before[-32:]  # before them stands the version


STAY = "a source must stay as it was planned until the job is done"


class ReadOnly(Storage):
    """A folder of a store that a dataset is read from."""

    in_flight: ClassVar[int] = 64

    def __init__(self, files: RemoteFiles) -> None:
        super().__init__(files.url(files.root))
        self.files = files

    def open(self, name: str) -> BinaryIO:
        if self.size(name) is None:
            raise FileNotFoundError(f"{self.url.rstrip('/')}/{name} is not there")
        return self.files.file(name).open()

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def names(self, folder: str) -> list[str]:
        return [entry.name for entry in self.files.entries(folder) if not entry.is_folder]

    def size(self, name: str) -> int | None:
        about = self.files._about(self.files._key(name))
        return about.size if about else None

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise StorageError(f"{self.url} is read, and not written")

    aside = create = put = delete = move = sweep = _refused


def _parts(url: str) -> list[str]:
    """The kind of store, the bucket, and the folders below."""
    return list(filter(None, url.split("/")))

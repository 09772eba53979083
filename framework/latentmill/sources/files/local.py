"""Files of this machine, or of a disk that many share."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import sys
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from latentmill import digests, storage
from latentmill.digests import NO_FILE
from latentmill.plugin import RowError
from latentmill.sources import suffix
from latentmill.sources.files.files import Files, FolderEntry
from latentmill.sources.files.globs import is_glob
from latentmill.storage import Storage
from latentmill.text import escaped

logger = logging.getLogger("latentmill")

MAX_DIGESTED_BYTES = 4 << 30
"""Bytes up to which a source is fingerprinted by its contents; beyond, by sizes and times of modification."""


class LocalFiles(Files):
    """A file, a folder or a glob, relative to the working directory, or ``pkg://package/file`` for data that a package brings.

    A fingerprint is 32 hex digits over names and contents, or a t and as many over names, sizes and times of modification.
    """

    @property
    def local(self) -> Path:
        return locate(self.path)

    @cached_property
    def _times(self) -> dict[str, str]:
        """By fingerprint, as the files were when it was first asked whether they had changed, where contents are too much to read."""
        return {}

    @cached_property
    def root(self) -> Path:
        """The folder that names are relative to. Looks at no more than the path itself."""
        at = self.local
        if at.exists() or not is_glob(str(at)):
            return at if at.is_dir() else at.parent
        fixed = at
        while is_glob(str(fixed)):
            fixed = fixed.parent
        return fixed

    def find(self, suffixes: Collection[str]) -> list[str]:
        path, at, folder = self.path, self.local, self.root
        if at.is_file():
            found = [at]
        elif at.is_dir():
            found = [entry for entry in at.iterdir() if not entry.name.startswith(".")]
        elif is_glob(str(at)):
            pattern = at.relative_to(folder)
            hidden = any(part.startswith(".") for part in pattern.parts)  # then they are asked for
            found = [
                match
                for match in folder.glob(str(pattern))
                if hidden or not any(part.startswith(".") for part in match.relative_to(folder).parts)
            ]
        else:
            raise ValueError(f"there is no file or folder {path}")
        known = [file for file in found if suffix(file.name) in suffixes]
        if lost := [file.name for file in known if file.is_symlink() and not file.exists()]:
            raise ValueError(f"{path}: {escaped(min(lost))} is a link to nothing")
        names = sorted(file.relative_to(folder).as_posix() for file in known if file.is_file())
        if not names:
            raise ValueError(f"{path}: no {', '.join(s for s in suffixes if s.count('.') == 1)} file there")
        return names

    def is_folder(self) -> bool:
        return self.local.is_dir()

    def below(self, output: str) -> str | None:
        at, other = self.local.resolve(), Path(output).resolve()
        if "://" in output or not other.is_relative_to(at):
            return None
        return "" if other == at else other.relative_to(at).as_posix()

    def child(self, name: str) -> LocalFiles | None:
        inside = self.local / name
        return LocalFiles(str(inside)) if inside.is_dir() else None

    def look_everywhere(self) -> None:  # a folder is looked at when it is wanted
        pass

    def entries(self, folder: str, follow_links: bool = False) -> Iterator[FolderEntry]:
        with os.scandir(self._at(folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                link = entry.is_symlink() and os.path.isdir(entry.path)
                yield FolderEntry(entry.name, entry.is_dir(follow_symlinks=False) or (link and follow_links), link)

    def identity(self, folder: str) -> Hashable:
        status = os.stat(self._at(folder))
        return status.st_dev, status.st_ino

    def file(self, name: str) -> Path:
        return self.root / name

    def open(self, name: str, follow_links: bool = False, folder: str = "") -> BinaryIO:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise RowError("the path must lead to a file below the source's folder")
        below = self.root / folder
        try:
            path = below / name
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever, and a device may never end
                raise RowError("not a file")
            if not follow_links and not path.resolve().is_relative_to(below.resolve()):
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

    def ahead(self, names: Iterable[str], folder: str = "", heads: bool = False) -> None:  # the system reads ahead
        pass

    def storage(self) -> Storage:
        return storage.at(str(self.root))

    def known_by_contents(self, names: Iterable[str]) -> bool:
        total = 0
        for name in names:
            total += _size(self.root / name)
            if total > MAX_DIGESTED_BYTES:
                logger.warning(
                    f"a source of more than {MAX_DIGESTED_BYTES >> 30} GiB is known by its files' names, sizes and times of modification, and not "
                    "by what they hold: one that is moved, copied or touched is another source"
                )
                return False
        return True

    def fingerprint(self, names: Iterable[str], contents: bool) -> str:
        if contents:
            return digests.of_all((name, self.root / name) for name in names)[:32]
        return f"t{self.stamp(names)}"

    def expect(self, fingerprint: str) -> None:  # a disk has no earlier state
        pass

    def changed(self, names: Iterable[str], before: str) -> bool:
        if not before.startswith("t"):
            return self.fingerprint(names, contents=True) != before
        now = self.stamp(names)  # by times it isn't known, for a copy has others; but they must stay what they are
        return self._times.setdefault(before, now) != now

    def stamp(self, names: Iterable[str]) -> str:
        digest, root = hashlib.blake2b(digest_size=16), str(self.root)
        for name in names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            try:
                found = os.stat(os.path.join(root, name))  # many a second: a Path takes three times as long
                digest.update(b"%d %d\0" % (found.st_size, found.st_mtime_ns))
            except OSError as error:  # a broken link, say: its row will end in the error table
                digest.update(b"%d\0" % (error.errno or 0))
        return digest.hexdigest()

    def still(self, names: Iterable[str], before: str) -> bool:
        return self.fingerprint(names, not before.startswith("t")) == before

    def began_as(self, name: str, ends: Sequence[int], before: str) -> bool:
        if before.startswith("t"):
            return False
        return any(found[:32] == before for found in digests.of_beginnings(name, self.root / name, ends))

    def _at(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else str(self.root)


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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

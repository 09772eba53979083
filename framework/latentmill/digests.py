"""What files hold, as the SHA-256 of all their bytes: read once, several files at a time, and remembered.

A digest is remembered in the user's cache folder (``$XDG_CACHE_HOME/latentmill``, or ``~/.cache/latentmill``) by the file's path, size,
inode, and times of modification and change. Without such a folder files are read again in each process. A file of the Hugging
Face Hub's cache is named by its SHA-256, and isn't read.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger("latentmill")

LONG = 5.0
"""Seconds of hashing from which on people are told."""
SETTLED = 2.0
"""Seconds that a file must have been left alone: one that changes in the same tick of the file system's clock looks unchanged."""
NO_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
)
"""What the operating system says of a path that is wrong, and will be wrong at the next attempt."""
NOT_FETCHED = "not-fetched"
"""The folder of no contents: a link into its ``blobs`` stands for a file that nobody needs here, and has its digest for a name."""
_PIECE = 1 << 20
FULL = 4 << 20
"""Bytes of the file of remembered digests, some 40,000, from which on it is begun anew."""


def digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's contents, 64 hex digits. Raises OSError if it can't be read, or changes meanwhile."""
    return digests([path])[0]


def digests(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The SHA-256 of each file's contents, 64 hex digits. Raises OSError if one can't be read, or changes meanwhile."""
    wanted = [Path(path) for path in paths]
    found = {path: named for path in wanted if (named := _name_in_hub(path))}
    unread = {path: path.stat() for path in wanted if path not in found}
    for path, about in unread.items():
        if known := _memory.find(_key([(path, about)])):
            found[path] = known
    rest = sorted(unread.keys() - found.keys(), key=lambda path: -unread[path].st_size)
    work = _Work(sum(unread[path].st_size for path in rest))
    with ThreadPoolExecutor(min(8, len(rest), _cores()) or 1) as threads:
        found.update(zip(rest, threads.map(lambda path: _read(path, unread[path], work), rest)))
    return [found[path] for path in wanted]


def of_all(named: Iterable[tuple[str, Path]]) -> str:
    """One for many small files, with their names, 64 hex digits: where a path leads to no file that can be opened, the error counts.

    Raises OSError for errors of another kind, the storage's, and if a file changes meanwhile.

    Remembered as one, so that a folder of a million pictures is not a million lines to remember.
    """
    there = [(name, path, _about(path)) for name, path in named]
    key = _key(((path, about) for _, path, about in there), "".join(f"{name}\0" for name, _, _ in there))
    known = _memory.find(key)
    if known is None:
        files = [about for _, _, about in there if not isinstance(about, int)]
        work, whole, failed = _Work(sum(about.st_size for about in files)), hashlib.sha256(), False
        with ThreadPoolExecutor(_cores()) as threads:
            for (name, _, about), said in zip(there, threads.map(lambda each: _said(each[1], each[2], work), there)):
                whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + str(said).encode() + b"\0")
                failed = failed or (isinstance(said, int) and said != about)
        known = whole.hexdigest()
        if not failed:
            _memory.keep(key, known, max((max(about.st_mtime, about.st_ctime) for about in files), default=0.0))
    return known


def of_beginnings(name: str, path: Path, ends: Iterable[int]) -> Iterator[str]:
    """What ``of_all`` would say of one file, if it ended behind so many bytes, ascending."""
    whole, read = hashlib.sha256(), 0
    with path.open("rb") as file:
        for end in ends:
            while read < end and (piece := file.read(min(_PIECE, end - read))):
                whole.update(piece)
                read += len(piece)
            named = name.encode("utf-8", "surrogateescape") + b"\0" + whole.hexdigest().encode() + b"\0"
            yield hashlib.sha256(named).hexdigest()


def _about(path: Path) -> os.stat_result | int:
    """Of a plain file; the number of the error where there is none, or -1."""
    try:
        about = path.stat()
    except OSError as error:
        return _number(error)
    # Opening a pipe would wait for ever, and a device may never end.
    return about if stat.S_ISREG(about.st_mode) else -1


def _said(path: Path, about: os.stat_result | int, work: _Work) -> str | int:
    try:
        return about if isinstance(about, int) else _hash(path, about, work)
    except OSError as error:
        return _number(error)


def _number(error: OSError) -> int:
    """Of a broken link, say: its row will end in the error table."""
    if error.errno not in NO_FILE:
        raise error
    return error.errno


def _read(path: Path, about: os.stat_result, work: _Work) -> str:
    found = _hash(path, about, work)
    _memory.keep(_key([(path, about)]), found, max(about.st_mtime, about.st_ctime))
    return found


def _hash(path: Path, about: os.stat_result, work: _Work) -> str:
    whole, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE, about.st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            whole.update(piece[:size])
            work.did(size)
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (about.st_size, about.st_mtime_ns):
        raise OSError(f"{path} changed while it was read")
    return whole.hexdigest()


def _name_in_hub(path: Path) -> str | None:
    """What the Hub's cache says: ``snapshots/COMMIT/NAME`` links to ``blobs/SHA256``, as ours of models do.

    Not if the blob was written after the link: somebody wrote through it.
    """
    if not path.is_symlink():
        return None
    blob = path.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return None
    if blob.parent.parent.name == NOT_FETCHED:
        return blob.name
    return blob.name if blob.stat().st_mtime <= path.lstat().st_mtime else None


def _key(files: Iterable[tuple[Path, os.stat_result | int]], names: str = "") -> str:
    """Of the files as they are now; with ``names`` of what is made of them together."""
    key = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16)
    for path, about in files:
        key.update(os.fsencode(os.path.abspath(path)) + b"\0")
        if isinstance(about, int):
            key.update(b"%d\0" % about)
        else:
            key.update(b"%d %d %d %d\0" % (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))
    return key.hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Work:
    """So many bytes are to be hashed: says how long it takes, if it takes long. Once in a process is enough."""

    spent, told = 0.0, False

    def __init__(self, size: int) -> None:
        self.size, self.done, self.began, self.lock = size, 0, time.monotonic(), threading.Lock()
        self.before = _Work.spent

    def did(self, size: int) -> None:
        with self.lock:
            self.done += size
            seconds = time.monotonic() - self.began
            _Work.spent = self.before + seconds
            if _Work.told or seconds < 0.5:
                return
            rate = self.done / seconds
            if self.size / rate > LONG or _Work.spent > LONG:
                _Work.told = True
                logger.warning(
                    f"hashing {self.size / 1e9:.1f} GB at {rate / 1e6:.0f} MB/s takes about {self.size / rate:.0f} s; "
                    f"files are read {_memory.where()}"
                )


class _Memory:
    """Digests by key, in this process and in the user's cache folder: a line each, which many processes append."""

    def __init__(self) -> None:
        self.known: dict[str, str] | None = None
        self.lock = threading.Lock()

    def find(self, key: str) -> str | None:
        with self.lock:
            if self.known is None:
                self.known = self._load()
            return self.known.get(key)

    def keep(self, key: str, digest: str, changed: float) -> None:
        """Remember the digest of what was last changed then, unless that was just now."""
        if time.time() - changed < SETTLED:
            return
        with self.lock:
            assert self.known is not None
            self.known[key] = digest
        try:
            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab", buffering=0) as lines:
                lines.write(f"{key} {digest}\n".encode())
        except (OSError, RuntimeError):  # no home, or not ours to write in: it costs no more than the memory
            pass

    def where(self) -> str:
        """What becomes of a digest, for people."""
        try:
            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("ab").close()
        except (OSError, RuntimeError):
            return "again by every process: there is no cache folder to remember them in"
        return f"once: {file} remembers them"

    def _load(self) -> dict[str, str]:
        try:
            file = self._file()
            if file.stat().st_size > FULL:
                file.unlink()
            text = file.read_text(encoding="ascii", errors="replace")
        except (OSError, RuntimeError):
            return {}
        return dict(re.findall(r"^([0-9a-f]{32}) ([0-9a-f]{64})$", text, re.MULTILINE))

    def _file(self) -> Path:
        return cache_folder() / "digests"


def cache_folder() -> Path:
    """The user's, for what may be lost; it may not be there. Raises RuntimeError if there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latentmill"


_memory = _Memory()

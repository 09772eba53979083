"""Where a dataset lies: a folder, or a prefix of an object store. Files appear in it whole or not at all, and the first stays.

Names are relative, with slashes: ``data/00007.parquet``. A dataset rests on one promise, ``create``: of any number of
processes that create one name exactly one succeeds, and what it created stays. On a disk that is a hard link, which fails
if the name exists; on an object store a conditional put. Where neither is to be had, ``single_writer`` does without, for
people who know that nobody else writes there.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from latentmill import failpoints
from latentmill.errors import AddressError, StorageError
from latentmill.text import one_line

DAY = 86_400
"""Seconds."""


CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store that is not Amazon's)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""For each kind of object store the environment variables that say who one is."""
METADATA = re.compile(r"169\.254\.169\.254|metadata\.google")
"""Where a client that was given no credentials asks the machine for some."""


def place(output: str) -> str:
    """A URL as it is, a folder with ``~`` for the home; ``~name`` that nobody is called is a folder's name."""
    return output if "://" in output else output and str(Path(os.path.expanduser(output)))


def at(output: str, single_writer: bool = False) -> Storage:
    """The storage that ``output`` names: a path, or a URL such as ``s3://bucket/prefix``. Touches nothing yet.

    Raises AddressError if it is neither. Credentials and endpoint of an object store are taken from the environment, as its own tools do (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ...), and never from a job.
    """
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", output):
        if not re.fullmatch(r"[a-z0-9]+://[^/:]+(/[^/].*|/?)", output) or scheme[1] not in CREDENTIALS:
            places = ", ".join(f"{kind}://BUCKET/PREFIX" for kind in CREDENTIALS)
            raise AddressError(f"{output} is no place for a dataset: a folder is, or {places}")
        return Bucket(output, single_writer)
    return Folder(output, single_writer)


class Storage(ABC):
    """A dataset's files by name."""

    def __init__(self, url: str, single_writer: bool = False) -> None:
        self.url, self.single_writer = url, single_writer

    @abstractmethod
    def aside(self, name: str) -> Any:
        """A context with a local path at which to write what ``create`` is to publish.

        Or to make a folder there, for several files. It is removed at the end.
        """

    @abstractmethod
    def create(self, name: str, content: str | bytes) -> bool:
        """Publish bytes, or the local file of that path, durably, under a name that is free. False if it is taken."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Put a small file in place whole; one of that name is replaced."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a file. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in. Raises FileNotFoundError."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files right in a folder, without it; none if it is not there."""

    def tags(self, folder: str) -> dict[str, str]:
        """The same names, each with a text that is another once another file has the name; "" in a store that has none."""
        return dict.fromkeys(self.names(folder), "")

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name; one of that name is replaced."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what processes that were killed left, a day ago or longer: younger files may be in use.

        That is what was written aside, and signs of life in ``leases/``, which whoever lives makes anew every few seconds.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    def check(self) -> None:
        """Raise StorageError unless ``create`` can keep its promise here. Leaves nothing behind."""
        if self.single_writer:
            return
        probe = f".tmp/{uuid.uuid4().hex}-probe"
        try:
            self.create(probe, b"first")  # an answer that was lost on the way, and asked for again, may be wrong
            kept = not self.create(probe, b"second") and self.read(probe) == b"first"
            why = "a second create of one name succeeded"
        except NotImplementedError as error:
            kept, why = False, str(error)
        finally:
            self.delete(probe)
        if not kept:
            raise StorageError(
                f"{self.url} can't create a file only if its name is free ({why}), on which exactly-once rests; "
                "set single_writer=true if no other driver writes there"
            )


class Folder(Storage):
    """A folder of a file system with hard links."""

    def __init__(self, url: str, single_writer: bool = False) -> None:
        super().__init__(url, single_writer)
        self.root = Path(url)

    @contextmanager
    def aside(self, name: str) -> Iterator[str]:
        failpoints.reach("store")
        folder = self.root / ".tmp"
        _make(folder)
        temporary = folder / f"{uuid.uuid4().hex}-{name.rpartition('/')[2]}"
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
        try:
            os.link(source, final)
            return True
        except FileExistsError:
            if not final.is_file():
                raise StorageError(f"{final} is in the way: a {_what(final)}, where a file is to be made") from None
            return False
        except OSError as error:
            if not self.single_writer and error.errno not in _LINKLESS:
                raise
            if not self.single_writer:
                raise NotImplementedError(f"this file system has no hard links: {error.strerror}") from error
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

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def tags(self, folder: str) -> dict[str, str]:
        found = {}
        for name in self.names(folder):
            with suppress(FileNotFoundError):  # gone in between
                about = (self.root / folder / name).stat()
                found[name] = f"{about.st_ino} {about.st_size} {about.st_mtime_ns}"
        return found

    def delete(self, name: str) -> None:
        with suppress(NotADirectoryError):
            (self.root / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        _make((self.root / to).parent)
        os.replace(self.root / name, self.root / to)
        _sync(str((self.root / name).parent))

    def sweep(self) -> None:
        for file in [*(self.root / ".tmp").glob("*"), *(self.root / "leases").glob("*.alive")]:
            with suppress(FileNotFoundError):  # another driver sweeps, too
                if file.stat().st_mtime < time.time() - DAY:
                    _remove(file)


class Bucket(Storage):
    """A prefix of an object store, through obstore: S3 and what speaks its protocol, Google Cloud Storage, Azure."""

    def __init__(self, url: str, single_writer: bool = False) -> None:
        super().__init__(url, single_writer)
        try:
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise StorageError(f"{url}: an object store needs obstore: pip install 'latentmill[s3]'") from error
        self._errors = exceptions
        options: dict[str, Any] = {"client_options": {"timeout": "600s", "allow_http": True}}
        if url.startswith("s3"):
            options["config"] = {"checksum_algorithm": "sha256"}  # the store compares what it got with what was sent
        try:
            self.store: Any = from_url(url.rstrip("/"), **options)
        except Exception as error:
            raise StorageError(f"{url}: {_one_line(error)}") from error

    @contextmanager
    def aside(self, name: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
            yield str(Path(folder, name.rpartition("/")[2]))

    def create(self, name: str, content: str | bytes) -> bool:
        import obstore

        given = content if isinstance(content, bytes) else Path(content)
        failpoints.reach(f"{name.partition('/')[0]} synced")
        if self.single_writer:
            if self.exists(name):
                return False
            with self._said(name, writes=True):
                obstore.put(self.store, name, given)
            return True
        with self._said(name, writes=True):
            try:
                obstore.put(self.store, name, given, mode="create", use_multipart=False)
                return True
            except self._errors.AlreadyExistsError:
                return False
            except self._errors.NotSupportedError as error:
                raise NotImplementedError(_one_line(error)) from error

    def put(self, name: str, content: bytes) -> None:
        import obstore

        with self._said(name, writes=True):
            obstore.put(self.store, name, content)

    def read(self, name: str) -> bytes:
        import obstore

        with self._said(name):
            return bytes(obstore.get(self.store, name).bytes())

    def open(self, name: str) -> BinaryIO:
        import obstore

        with self._said(name):
            return cast(BinaryIO, io.BufferedReader(_Remote(obstore.open_reader(self.store, name)), 1 << 20))

    def exists(self, name: str) -> bool:
        import obstore

        with self._said(name):
            try:
                obstore.head(self.store, name)
                return True
            except FileNotFoundError:
                return False

    def names(self, folder: str) -> list[str]:
        import obstore

        with self._said(folder):
            found = obstore.list_with_delimiter(self.store, folder or None)["objects"]
            return [str(entry["path"]).rpartition("/")[2] for entry in found]

    def tags(self, folder: str) -> dict[str, str]:
        import obstore

        with self._said(folder):
            found = obstore.list_with_delimiter(self.store, folder or None)["objects"]
            return {
                str(entry["path"]).rpartition("/")[2]: f"{entry['e_tag']} {entry['size']} {entry['last_modified']}"
                for entry in found
            }

    def delete(self, name: str) -> None:
        import obstore

        with self._said(name), suppress(FileNotFoundError):
            obstore.delete(self.store, name)

    def move(self, name: str, to: str) -> None:
        import obstore

        with self._said(name):
            obstore.rename(self.store, name, to)

    def sweep(self) -> None:  # nothing is written aside in the store
        import obstore

        with self._said("leases"):
            for entry in obstore.list_with_delimiter(self.store, "leases")["objects"]:
                if entry["path"].endswith(".alive") and entry["last_modified"].timestamp() < time.time() - DAY:
                    self.delete(f"leases/{entry['path'].rpartition('/')[2]}")

    @contextmanager
    def _said(self, name: str, writes: bool = False) -> Iterator[None]:
        """An object store's many-lined errors, as one line of ours."""
        try:
            yield
        except (self._errors.BaseError, OSError) as error:  # for some it raises Python's own
            if isinstance(error, FileNotFoundError) and not writes:
                raise FileNotFoundError(f"{self.url.rstrip('/')}/{name} is not there") from error
            said = _one_line(error)
            if METADATA.search(said):
                variables = CREDENTIALS[self.url.partition(":")[0]]
                said = f"there are no credentials: set {variables}, here and, if they are other machines, on the nodes"
            raise StorageError(f"{self.url.rstrip('/')}/{name}: {said}") from error


class _Remote(io.RawIOBase):
    """An object of a store as a file: read by ranges, as it is asked for."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = memoryview(self.reader.read(len(buffer)))
        buffer[: len(got)] = got
        return len(got)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self.reader.tell())


_LINKLESS = (1, 18, 31, 38, 95)
"""EPERM, EXDEV, EMLINK, ENOSYS, EOPNOTSUPP: what file systems without hard links answer."""


def _one_line(error: BaseException) -> str:
    """The store's own message, or what obstore says before it goes into detail."""
    text = str(error).partition("\n\nDebug source")[0]
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    return one_line(said.group(1) if said else text, 300)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _what(path: Path) -> str:
    return "folder" if path.is_dir() else "link to nothing" if path.is_symlink() else "special file"


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            what = "file" if folder.is_file() else _what(folder)
            raise StorageError(f"{folder} is in the way: a {what}, where a folder is to be made") from None
        _sync(str(folder.parent))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

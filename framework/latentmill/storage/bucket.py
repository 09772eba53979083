"""A dataset in an object store."""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

from latentmill import failpoints
from latentmill.errors import StorageError
from latentmill.storage.store import Storage
from latentmill.text import one_line

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store that is not Amazon's)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""For each kind of object store the environment variables that say who one is."""
METADATA = re.compile(r"169\.254\.169\.254|metadata\.google")
"""Where a client that was given no credentials asks the machine for some."""


PEEKED = 64 << 10
"""Bytes that the first request for a file's beginning or end brings: footers are in them, as a rule."""
AHEAD = 1 << 20
"""Bytes that any other brings: whoever wants more than that wants all, or much."""


class Stored(NamedTuple):
    """What a store says of a file."""

    size: int
    tag: str
    """Another once the name is another file's."""


class Bucket(Storage):
    """A prefix of an object store, through obstore: S3 and what speaks its protocol, Google Cloud Storage, Azure."""

    in_flight: ClassVar[int] = 256

    def __init__(self, url: str, single_writer: bool = False, timeout: str = "600s") -> None:
        """``timeout`` is that of one request; one that reads is made again."""
        super().__init__(url, single_writer)
        try:
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise StorageError(f"{url}: an object store needs obstore: pip install 'latentmill[s3]'") from error
        self._errors = exceptions
        options: dict[str, Any] = {"client_options": {"timeout": timeout, "allow_http": True}}
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
            return cast(BinaryIO, io.BufferedReader(_Remote(obstore.open_reader(self.store, name)), AHEAD))

    def size(self, name: str) -> int | None:
        import obstore

        with self._said(name):
            try:
                return int(obstore.head(self.store, name)["size"])
            except FileNotFoundError:
                return None

    def peek(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Peeked(self, name), PEEKED))

    def names(self, folder: str) -> list[str]:
        return [name for name, _ in self._listed(folder)]

    def holds_any(self, folder: str) -> bool:
        return next(self._listed(folder), None) is not None

    def older(self, folder: str, seconds: float) -> list[str]:
        oldest = time.time() - seconds
        return [name for name, entry in self._listed(folder) if entry["last_modified"].timestamp() < oldest]

    def tags(self, folder: str) -> dict[str, str]:
        return {
            name: f"{entry['e_tag']} {entry['size']} {entry['last_modified']}" if entry["e_tag"] else ""
            for name, entry in self._listed(folder)
        }

    def _listed(self, folder: str) -> Iterator[tuple[str, Any]]:
        """What is right in a folder, page by page: there may be more of it than fits into memory."""
        import obstore

        with self._said(folder):
            if not folder:  # all else has no folders in it
                for entry in obstore.list_with_delimiter(self.store)["objects"]:
                    yield str(entry["path"]), entry
                return
            for page in obstore.list(self.store, folder, chunk_size=1000):
                for entry in page:
                    name = str(entry["path"]).removeprefix(f"{folder}/")
                    if "/" not in name:
                        yield name, entry

    # ---------------------------------------------------------------------------------- what others put here: sources

    def about(self, name: str) -> Stored | None:
        """What is said of a file; None if it is not there."""
        import obstore

        with self._said(name):
            try:
                return _stored(obstore.head(self.store, name))
            except FileNotFoundError:
                return None

    def walk(self, folder: str, deep: bool) -> Iterator[tuple[str, Stored | None]]:
        """Names below a folder, with all of their path: of all files, or of what is right in it, where folders have None."""
        import obstore

        with self._said(folder):
            if deep:
                for page in obstore.list(self.store, folder or None, chunk_size=1000):
                    for entry in page:
                        yield str(entry["path"]), _stored(entry)
                return
            found = obstore.list_with_delimiter(self.store, folder or None)
            yield from ((str(entry["path"]), _stored(entry)) for entry in found["objects"])
            yield from ((str(path).rstrip("/"), None) for path in found["common_prefixes"])

    def part(self, name: str, start: int, stop: int) -> tuple[bytes, Stored]:
        """Bytes of a file, from ``start`` to before ``stop`` or its end, and what file it was. Raises FileNotFoundError, and ValueError for
        what is no name.
        """
        import obstore

        with self._said(name):
            try:
                found = obstore.get(self.store, name, options={"range": (start, stop)})
            except self._errors.InvalidPathError as error:
                raise ValueError(_one_line(error)) from error
            return bytes(found.bytes()), _stored(found.meta)

    def delete(self, name: str) -> None:
        import obstore

        with self._said(name), suppress(FileNotFoundError):
            obstore.delete(self.store, name)

    def clear(self) -> None:
        for name, _ in list(self.walk("", deep=True)):
            self.delete(name)

    def move(self, name: str, to: str) -> None:
        import obstore

        with self._said(name):
            obstore.rename(self.store, name, to)

    @contextmanager
    def _said(self, name: str, writes: bool = False) -> Iterator[None]:
        """An object store's many-lined errors, as one line of ours."""
        try:
            yield
        except (self._errors.BaseError, OSError) as error:  # for some it raises Python's own
            if isinstance(error, FileNotFoundError) and not writes:
                raise FileNotFoundError(f"{self.url.rstrip('/')}/{name} is not there") from error
            said = _one_line(error)
            if isinstance(error, self._errors.InvalidPathError):
                said = f"{said}: a key of that kind can't be read: give it another name"
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


class _Peeked(io.RawIOBase):
    """The same, of which the first request brings the end, if that is asked for, and learns the size beside.

    It holds the file's beginning, its end, and one piece of what is between.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self.bucket, self.name = bucket, name
        self.at = 0
        self.size: int | None = None
        self.pieces: dict[str, tuple[int, bytes]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.size is not None and self.at >= self.size:
            return 0
        start, piece = self._piece()
        got = piece[self.at - start : self.at - start + len(buffer)]
        buffer[: len(got)] = got
        self.at += len(got)
        return len(got)

    def _piece(self) -> tuple[int, bytes]:
        for start, piece in self.pieces.values():
            if start <= self.at < start + len(piece):
                return start, piece
        return self._fetch(self.at)

    def _fetch(self, start: int | None) -> tuple[int, bytes]:
        """The piece from ``start`` on; None stands for the last."""
        import obstore

        wanted: Any = {"suffix": PEEKED} if start is None else (start, start + (AHEAD if start else PEEKED))
        with self.bucket._said(self.name):
            try:
                found = obstore.get(self.bucket.store, self.name, options={"range": wanted})
            except FileNotFoundError:
                raise
            except Exception:  # of an empty file no part can be had; Azure doesn't know the last
                self.size = int(obstore.head(self.bucket.store, self.name)["size"])
                if not self.size or (start is not None and start >= self.size):
                    return self.at, b""
                if start is not None:
                    raise
                return self._fetch(max(0, self.size - PEEKED))
            self.size = int(found.meta["size"])
            piece = int(found.range[0]), bytes(found.bytes())
        ends = piece[0] + len(piece[1]) == self.size
        self.pieces["beginning" if not piece[0] else "end" if ends else "between"] = piece
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self.size is None:
            self._fetch(None)
        self.at = offset + (0, self.at, self.size or 0)[whence]
        return self.at

    def tell(self) -> int:
        return self.at


def _stored(entry: Any) -> Stored:
    """The ETag, bare, as listings and answers write it in different ways; or else the second of the last change."""
    tag = (entry["e_tag"] or "").removeprefix("W/").strip('"')
    return Stored(int(entry["size"]), tag or f"@{entry['last_modified']:%Y-%m-%dT%H:%M:%S}")


def _one_line(error: BaseException) -> str:
    """The store's own message, or what obstore says before it goes into detail."""
    text = str(error).partition("\n\nDebug source")[0]
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    return one_line(said.group(1) if said else text, 300)

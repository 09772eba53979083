"""Where models lie: what a repository of the Hub, or a bucket, says that it has, and how a file comes from there."""

from __future__ import annotations

import hashlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple, TypeVar

from latentmill.digests import digest
from latentmill.errors import PluginError, StorageError
from latentmill.models.pins import ModelFile, ModelURL, Pin
from latentmill.storage import Bucket, Stored
from latentmill.storage.hub import COMMIT_HASH, ask_hub, hub_endpoint

RANGE_OF_MODEL = 8 << 20
"""Bytes of a bucket's object that one request brings."""
RANGES_AT_A_TIME = 8
MOST_FILES = 20_000
"""More than any model has: then the URL is not what was meant, a whole bucket say."""
LEFT = 3600.0
"""Seconds that nobody has written to a file of the Hub's client, from which on nobody will."""

Listed = TypeVar("Listed")

CHANGED = "was changed since the job was planned: a model must stay as it is until the job is done"


class Fetched(NamedTuple):
    """A file that has just come."""

    path: Path
    sha256: str
    md5: str = ""


class ModelPlace(ABC):
    """What a URL of a model names."""

    not_md5: ClassVar[set[str]] = set()
    """Buckets whose ETags look like an MD5 and are none, as those of objects that are encrypted with keys of one's own."""

    def __init__(self, url: ModelURL) -> None:
        self.url = url

    @abstractmethod
    def look(self) -> Pin:
        """What is there now. Raises PluginError if there is nothing, StorageError if it can't be asked."""

    @abstractmethod
    def there(self, pin: Pin, file: ModelFile, blobs: Path) -> Path | None:
        """Where a file lies on this machine already, if it does. ``blobs``: the folder of contents that no other client keeps."""

    @abstractmethod
    def fetch(self, pin: Pin, file: ModelFile, blobs: Path, aside: Path) -> Fetched:
        """Bring a file, whole, by way of ``aside`` or the client's own cache.

        Raises PluginError if there is another than was pinned, StorageError if it can't be had.
        """

    @abstractmethod
    def sweep(self, file: ModelFile) -> None:
        """Remove what fetches of a file that were killed have left, if it is of no more use."""

    @abstractmethod
    def forget(self, pin: Pin, file: ModelFile, blobs: Path) -> None:
        """Remove contents that are damaged."""

    def is_right(self, file: ModelFile, path: Path, sha256: str, md5: str = "") -> bool:
        """Whether contents of the right size are the file's, as far as what is known of it says."""
        return not file.sha256 or file.sha256 == sha256

    def _file_key(self, pin: Pin, file: ModelFile) -> str:
        return self.url.key if pin.is_file else "/".join(filter(None, [self.url.key, file.name]))

    def _nothing(self) -> PluginError:
        return PluginError(f"there is no file or folder {self.url}")

    def _pin(self, version: str, found: list[ModelFile], is_file: bool) -> Pin:
        if not found:
            raise self._nothing()
        return Pin(version, tuple(sorted(found, key=lambda file: file.name)), is_file)

    def _first(self, listing: Iterator[Listed]) -> list[Listed]:
        """What is listed, and no more of it than shows that it is too much: a bucket may be listed for hours."""
        return list(islice(listing, MOST_FILES + 1))

    def _require_few(self, listed: Sequence[Any]) -> None:
        if len(listed) > MOST_FILES:
            raise PluginError(f"{self.url} has more than {MOST_FILES:,} files: give the folder of one model")


def place_of(url: ModelURL) -> ModelPlace:
    """Raises StorageError where the client isn't installed."""
    return HubModel(url) if url.scheme == "hf" else BucketModel(url)


class HubModel(ModelPlace):
    """A repository of the Hub. Its files lie in the cache of ``huggingface_hub``, where other tools find them, too."""

    def __init__(self, url: ModelURL) -> None:
        super().__init__(url)
        try:
            import huggingface_hub
            from huggingface_hub import constants, utils  # which are no attributes until they are imported
        except ImportError as error:
            raise StorageError(f"{url}: the Hub needs huggingface_hub: pip install 'latentmill[hf]'") from error
        self.hub: Any = huggingface_hub
        self.default_cache = constants.HF_HUB_CACHE
        client: Any = utils  # whose types say of nothing that it is for others
        client.disable_progress_bars()
        self.at = f"hf://{url.place}"

    @property
    def cache(self) -> Path:
        """The Hub's cache, as the environment has it now: its client looked when it was imported."""
        home = os.environ.get("HF_HOME")
        said = os.environ.get("HF_HUB_CACHE") or (home and os.path.join(home, "hub"))
        return Path(said or self.default_cache).expanduser().absolute()

    @property
    def is_offline(self) -> bool:
        return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")

    def look(self) -> Pin:
        if self.is_offline:
            return self._look_in_cache()
        url, api = self.url, self.hub.HfApi(endpoint=hub_endpoint())
        commit = url.revision
        if not COMMIT_HASH.fullmatch(commit):
            commit = str(self._asked("", lambda: api.model_info(url.place, revision=url.revision).sha))
            self._remember(commit)
        where = {"revision": commit, "repo_type": "model"}
        if url.key:
            told = self._asked(url.key, lambda: api.get_paths_info(url.place, [url.key], **where))
            if file := next((each for each in told if each.path == url.key and hasattr(each, "blob_id")), None):
                return self._pin(commit, [_hub_file(file, url.key.rpartition("/")[2])], True)
        try:
            tree = self._asked(
                url.key,
                lambda: self._first(api.list_repo_tree(url.place, url.key or None, recursive=True, **where)),
            )
        except FileNotFoundError:
            raise self._nothing() from None
        self._require_few(tree)
        below = f"{url.key}/" if url.key else ""
        files = [_hub_file(each, each.path.removeprefix(below)) for each in tree if hasattr(each, "blob_id")]
        return self._pin(commit, files, False)

    def _remember(self, commit: str) -> None:
        """What the revision means, where the Hub's clients look for it when they are offline."""
        path = self._repository / "refs" / self.url.revision
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)

    def _look_in_cache(self) -> Pin:
        """HF_HUB_OFFLINE: what of the revision is in the cache stands for all of it."""
        try:
            told = {"revision": self.url.revision, "cache_dir": self.cache, "local_files_only": True}
            folder = Path(self.hub.snapshot_download(self.url.place, **told))
        except Exception as error:  # the cache has many ways to say that it has none
            raise StorageError(f"{self.url} is not in {self.cache}, and HF_HUB_OFFLINE is set") from error
        there = folder / self.url.key
        found = [path for path in [there, *sorted(there.rglob("*"))] if path.is_file()]
        files: list[ModelFile] = []
        for path in found:
            name = path.name if path == there else path.relative_to(there).as_posix()
            tag = Path(os.readlink(path)).name if path.is_symlink() else ""
            files.append(ModelFile(name, path.stat().st_size, tag, tag if len(tag) == 64 else ""))
        return self._pin(folder.name, files, there.is_file())

    def there(self, pin: Pin, file: ModelFile, blobs: Path) -> Path | None:
        path = self._repository / "snapshots" / pin.version / self._file_key(pin, file)
        return path if path.exists() else None

    def fetch(self, pin: Pin, file: ModelFile, blobs: Path, aside: Path) -> Fetched:
        key = self._file_key(pin, file)
        if self.is_offline:
            raise StorageError(f"{self.at}@{pin.version}/{key} is not in {self.cache}, and HF_HUB_OFFLINE is set")
        told = {"revision": pin.version, "cache_dir": self.cache, "endpoint": hub_endpoint()}
        try:
            found = Path(self._asked(key, lambda: self.hub.hf_hub_download(self.url.place, key, **told)))
        except FileNotFoundError as error:
            raise PluginError(f"{error}, and was when the job was planned") from error
        return Fetched(found, digest(found.resolve()))  # by its own path: what the Hub's cache calls it is to be shown

    def sweep(self, file: ModelFile) -> None:
        """The Hub's client begins anew, in a file of another name; it writes to one all the time that it fetches."""
        for left in (self._repository / "blobs").glob(f"{file.sha256 or file.tag}.*incomplete"):
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - LEFT:
                    left.unlink()

    def forget(self, pin: Pin, file: ModelFile, blobs: Path) -> None:
        if link := self.there(pin, file, blobs):
            link.resolve().unlink()  # it is the link's own path, where caches have no links
            link.unlink(missing_ok=True)

    def is_right(self, file: ModelFile, path: Path, sha256: str, md5: str = "") -> bool:
        if file.sha256 or not COMMIT_HASH.fullmatch(file.tag):
            return super().is_right(file, path, sha256)
        whole = hashlib.sha1(b"blob %d\0" % file.size)  # as git names it
        with path.open("rb") as content:
            while piece := content.read(1 << 20):
                whole.update(piece)
        return whole.hexdigest() == file.tag

    @property
    def _repository(self) -> Path:
        return self.cache / f"models--{self.url.place.replace('/', '--')}"

    def _asked(self, key: str, ask: Callable[[], Any]) -> Any:
        return ask_hub(self.at, self.url.revision, key, ask)


def _hub_file(told: Any, name: str) -> ModelFile:
    return ModelFile(name, int(told.size), str(told.blob_id), str(told.lfs.sha256) if told.lfs else "")


class BucketModel(ModelPlace):
    """A folder or object of a bucket. An object is pinned by its ETag and its size."""

    def __init__(self, url: ModelURL) -> None:
        super().__init__(url)
        self.bucket = Bucket(f"{url.scheme}://{url.place}", timeout="120s")

    def look(self) -> Pin:
        key = self.url.key
        below = f"{key}/" if key else ""
        listed = self._first(self.bucket.walk(key, deep=True))
        self._require_few(listed)
        folders = {key, *(str(folder) for name, _ in listed for folder in PurePosixPath(name).parents)}
        files = [
            ModelFile(name.removeprefix(below), *stored)
            for name, stored in listed  # an empty object may mark a folder, which may be empty, too
            if stored is not None and (stored.size or (name not in folders and PurePosixPath(name).suffix))
        ]
        if not files and key and (stored := self.bucket.about(key)) is not None:
            return self._pin("", [ModelFile(key.rpartition("/")[2], *stored)], True)
        return self._pin("", files, False)

    def there(self, pin: Pin, file: ModelFile, blobs: Path) -> Path | None:
        path = blobs / file.sha256
        return path if file.sha256 and path.exists() else None

    def fetch(self, pin: Pin, file: ModelFile, blobs: Path, aside: Path) -> Fetched:
        """What an earlier try has left of this very object is taken up."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        aside.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("ab") as there:
            there.truncate(there.tell() // RANGE_OF_MODEL * RANGE_OF_MODEL)
        with aside.open("r+b") as written:
            while piece := written.read(RANGE_OF_MODEL):
                sha256.update(piece)
                md5.update(piece)
            for piece in self._pieces(pin, file, written.tell()):
                written.write(piece)
                sha256.update(piece)
                md5.update(piece)
            written.flush()
            os.fsync(written.fileno())
        return Fetched(aside, sha256.hexdigest(), md5.hexdigest())

    def _pieces(self, pin: Pin, file: ModelFile, start: int) -> Iterator[bytes]:
        key, waiting = self._file_key(pin, file), deque[Future[bytes]]()
        with ThreadPoolExecutor(RANGES_AT_A_TIME) as threads:
            try:
                for at in range(start, file.size, RANGE_OF_MODEL):
                    waiting.append(threads.submit(self._piece, key, file, at, min(at + RANGE_OF_MODEL, file.size)))
                    if len(waiting) == RANGES_AT_A_TIME:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _piece(self, key: str, file: ModelFile, start: int, stop: int) -> bytes:
        at = f"{self.bucket.url}/{key}"
        try:
            content, now = self.bucket.part(key, start, stop)
        except FileNotFoundError as error:
            raise PluginError(f"{at} is not there any more, and was when the job was planned") from error
        except StorageError:
            with suppress(StorageError):
                about = self.bucket.about(key)
                if about is not None and about.size != file.size:  # it has no such bytes
                    raise PluginError(f"{at} {CHANGED}") from None
            raise
        if now != Stored(file.size, file.tag):
            raise PluginError(f"{at} {CHANGED}")
        if len(content) != stop - start:
            raise StorageError(f"{at}: {len(content)} bytes came where {stop - start} were asked for")
        return content

    def sweep(self, file: ModelFile) -> None:
        pass  # there is but what the next fetch takes up

    def forget(self, pin: Pin, file: ModelFile, blobs: Path) -> None:
        (blobs / file.sha256).unlink(missing_ok=True)

    def is_right(self, file: ModelFile, path: Path, sha256: str, md5: str = "") -> bool:
        """An ETag of 32 hex digits is an MD5, unless the bucket's objects are encrypted with keys of one's own."""
        if file.sha256 or not md5 or not re.fullmatch("[0-9a-f]{32}", file.tag):
            return super().is_right(file, path, sha256)
        return md5 == file.tag or self.url.place in self.not_md5

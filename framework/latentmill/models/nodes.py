"""The models of one machine: contents in a cache, and of each model a folder of links to them, as a plugin is given it.

In the user's cache folder, below ``models``: ``blobs`` has what came from buckets, by SHA-256; what came from the Hub lies in the Hub's own
cache. A model's folder has links alone. A link is made once the contents were compared with the pin, and contents that were written
after their link are compared again. What is being fetched lies in ``partial``. Whoever fetches a file holds a lock on it, others wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from latentmill.digests import NOT_FETCHED, cache_folder, digest
from latentmill.errors import StorageError
from latentmill.models.pins import ModelFile, ModelURL, Pin
from latentmill.models.places import Fetched, HubModel, ModelPlace, place_of
from latentmill.text import in_units, one_line

logger = logging.getLogger("latentmill")

TRIES = 3
"""Times that a file is fetched whose contents are not what they should be."""
WORTH_TELLING = 100e6
"""Bytes to be fetched from which on people are told."""
SLOW = 20e6
"""Bytes a second that a slow network brings."""


@dataclass(frozen=True)
class Lacking:
    """What this machine would fetch of a model."""

    url: str
    pin: Pin
    """All that is wanted of it."""
    bytes: int
    into: str
    """The folder of the cache."""
    free: int
    """Bytes on its disk."""


def model_cache() -> Path:
    """Raises StorageError if there is no home folder, and XDG_CACHE_HOME doesn't say another."""
    try:
        return cache_folder().absolute() / "models"
    except RuntimeError as error:
        raise StorageError("there is no home folder to fetch models into: set XDG_CACHE_HOME") from error


def lacking(models: Mapping[str, Pin]) -> list[Lacking]:
    """Of models by their URLs (``Pins.wanted``, or ``Plan.models``), what this machine lacks. Asks no store, and writes nothing.

    A URL with a secret in it, which a plan doesn't say, is passed over.
    """
    found = []
    for text, pin in models.items():
        if "${" in text:
            continue
        place = place_of(ModelURL.of(text))
        size = sum(file.size for file in pin.files if not _is_there(place, pin, file))
        disk = next(folder for folder in [_into(place), *_into(place).parents] if folder.exists())
        found.append(Lacking(text, pin, size, str(_into(place)), shutil.disk_usage(disk).free))
    return found


def seconds_to_fetch(models: Mapping[str, Pin]) -> float:
    """How long a machine may take to fetch models over a slow network."""
    return sum(pin.bytes for pin in models.values()) / SLOW


def bring(url: ModelURL, pin: Pin, shown: str, without_weights: bool = False) -> tuple[Path, Pin]:
    """The local folder with exactly the files of ``pin``, or its file, and the pin with digests that are known now.

    ``shown``: the URL without secrets. ``without_weights``: .safetensors of known digest are not fetched, and links that lead nowhere. Raises PluginError for a
    model that is not what was pinned, StorageError if it can't be had, or there is no room for it.
    """
    place, folder = place_of(url), model_cache() / _folder_name(url, pin, shown)
    later = [
        f for f in pin.files if without_weights and not pin.is_file and f.sha256 and f.name.endswith(".safetensors")
    ]
    now = [file for file in pin.files if file not in later]
    try:
        for file in later:
            _leave_out(folder / file.name, file, _key_of(place, pin, file))
        _tell(place, pin.of(file.name for file in now), folder, shown)
        known = [_bring(place, pin, file, folder) for file in now]  # in this thread, which Ctrl-C reaches
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{url} can't be fetched into {model_cache()}: {one_line(error, 300)}; XDG_CACHE_HOME says another folder"
        ) from error
    files = tuple(sorted([*later, *known], key=lambda file: file.name))
    return (folder / pin.files[0].name if pin.is_file else folder), replace(pin, files=files)


def _folder_name(url: ModelURL, pin: Pin, shown: str) -> str:
    """For people, and of these very files alone; without a dot, by which a plugin may take it for a file's."""
    said = json.dumps([str(url), pin.version, [[file.name, file.size, file.tag] for file in pin.files]])
    words = re.sub("[^A-Za-z0-9_]+", "-", shown.partition("://")[2])
    return f"{words[-80:].strip('-')}-{_key(said)}"


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _key_of(place: ModelPlace, pin: Pin, file: ModelFile) -> str:
    """By which this machine knows a file, and locks it."""
    return _key(json.dumps([str(place.url), pin.version, file.name, file.size, file.tag]))


def _leave_out(link: Path, file: ModelFile, lock: str) -> None:
    """A link that leads nowhere, unless the file has come. Whoever fetches it meanwhile puts another in its place, which stays."""
    nowhere = model_cache() / NOT_FETCHED / "blobs" / file.sha256
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(nowhere)
    except FileExistsError:
        if _is_good(link, file) or (link.is_symlink() and link.readlink() == nowhere):
            return
        with _alone(lock):
            if not _is_good(link, file):
                _link(link, nowhere)


def _bring(place: ModelPlace, pin: Pin, file: ModelFile, folder: Path) -> ModelFile:
    """See to it that a file is there, and right; returns it with its digest."""
    link, lock = folder / file.name, _key_of(place, pin, file)
    if _is_good(link, file):
        return _with_digest(file, lock, link)
    with _alone(lock):
        if _is_good(link, file):
            return _with_digest(file, lock, link)
        file = _with_digest(file, lock)
        blobs = model_cache() / "blobs"
        path = place.there(pin, file, blobs)
        if path is not None and not _is_whole(place, file, path):
            logger.warning(f"{path} is not what it was when it came: it is fetched anew")
            place.forget(pin, file, blobs)
            path = None
        if path is None:
            came = _fetched(place, pin, file, blobs, model_cache() / "partial" / lock)
            file, path = replace(file, sha256=came.sha256), came.path
            if not isinstance(place, HubModel):
                blobs.mkdir(parents=True, exist_ok=True)
                os.replace(path, blobs / came.sha256)
                path = blobs / came.sha256
                _remember(lock, came.sha256)
        _link(link, path)
        return _with_digest(file, lock, link)


def _fetched(place: ModelPlace, pin: Pin, file: ModelFile, blobs: Path, aside: Path) -> Fetched:
    """A file that has come, as it was pinned. Contents that come twice the same are right, where an ETag says otherwise: it is no MD5."""
    place.sweep(file)
    _require_room(place, file, aside)
    seen: set[str] = set()
    for _ in range(TRIES):
        came = place.fetch(pin, file, blobs, aside)
        if came.path.stat().st_size == file.size:
            if place.is_right(file, came.path, came.sha256, came.md5):
                return came
            if came.md5 and not file.sha256 and came.sha256 in seen:
                place.not_md5.add(place.url.place)
                return came
            seen.add(came.sha256)
        if came.path == aside:
            aside.unlink()
        else:
            place.forget(pin, file, blobs)
    raise StorageError(f"{place.url}: {file.name} came {TRIES} times with other contents than it should have")


def _is_good(link: Path, file: ModelFile) -> bool:
    """Whether a link is there, and the contents have been left alone since it was made."""
    try:
        made, contents = link.lstat(), link.stat()
    except OSError:
        return False
    alone = contents.st_mtime_ns <= made.st_mtime_ns and contents.st_size == file.size
    return stat.S_ISLNK(made.st_mode) and alone


def _is_whole(place: ModelPlace, file: ModelFile, path: Path) -> bool:
    """Whether contents that are there are the file's; what the Hub's cache has is called by its digest, and read if it was written to."""
    return path.stat().st_size == file.size and place.is_right(file, path, digest(path))


def _is_there(place: ModelPlace, pin: Pin, file: ModelFile) -> bool:
    path = place.there(pin, file, model_cache() / "blobs")
    return path is not None and path.stat().st_size == file.size


def _tell(place: ModelPlace, pin: Pin, folder: Path, shown: str) -> None:
    """Say what is to be fetched, if that takes a while."""
    absent = [f for f in pin.files if not _is_good(folder / f.name, f) and not _is_there(place, pin, f)]
    if (size := sum(file.size for file in absent)) > WORTH_TELLING:
        logger.warning(f"{shown}: {in_units(size)} are fetched into {_into(place)}, or waited for if another does")


def _into(place: ModelPlace) -> Path:
    return place.cache if isinstance(place, HubModel) else model_cache()


def _require_room(place: ModelPlace, file: ModelFile, aside: Path) -> None:
    """Raise StorageError if there is none for what ``aside`` lacks of a file, of which nobody else fetches any."""
    into = _into(place)
    into.mkdir(parents=True, exist_ok=True)
    free, lacks = shutil.disk_usage(into).free, file.size - (aside.stat().st_size if aside.exists() else 0)
    if lacks > free:
        raise StorageError(
            f"{place.url}: {file.name} has {in_units(lacks)}, and {in_units(free)} are free in {into}: "
            f"{'HF_HOME' if isinstance(place, HubModel) else 'XDG_CACHE_HOME'} says another folder"
        )


def _link(link: Path, path: Path) -> None:
    """A link in the place of what is there, at once."""
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.{os.getpid()}-{time.monotonic_ns()}")
    new.symlink_to(path)
    os.replace(new, link)


def _with_digest(file: ModelFile, key: str, link: Path | None = None) -> ModelFile:
    """The digest of a bucket's object as it was found when it came; of the Hub's small files nobody needs it."""
    if file.sha256:
        return file
    if link is not None and re.fullmatch("[0-9a-f]{64}", link.resolve().name):
        return replace(file, sha256=link.resolve().name)
    try:
        said = (model_cache() / "known" / key).read_text(encoding="ascii").strip()
    except OSError:
        return file
    return replace(file, sha256=said) if re.fullmatch("[0-9a-f]{64}", said) else file


def _remember(key: str, sha256: str) -> None:
    path = model_cache() / "known" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{key}.{os.getpid()}")
    new.write_text(sha256 + "\n", encoding="ascii")
    os.replace(new, path)


@contextmanager
def _alone(key: str) -> Iterator[None]:
    """While others that want the same wait. The system ends it with the process."""
    import fcntl

    path = model_cache() / "locks" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise StorageError(
                f"{path} can't be locked: set XDG_CACHE_HOME to a folder on a disk of this machine"
            ) from error
        yield

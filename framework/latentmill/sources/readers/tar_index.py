"""Where the files of a tar in a store are. That is found by going through all of it, once on each machine.

It is remembered in the user's cache folder (``$XDG_CACHE_HOME/latentmill/tars``, or below ``~/.cache``) by the tar's URL, size and tag.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentmill.digests import cache_folder
from latentmill.sources.files import StoredFile

MOST_REMEMBERED = 256 << 20
"""Bytes of all that is remembered, beyond which the oldest is forgotten."""
TAR_FORMAT = 1


def remembered(file: StoredFile, of: str, find: Callable[[], Any]) -> Any:
    """What ``find`` says ``of`` something, as JSON; it is asked if nobody has before."""
    if not file.is_tagged:  # another file may look the same
        return find()
    known = hashlib.blake2b(f"{TAR_FORMAT} {of} {file.url} {file.size} {file.tag}".encode(), digest_size=16).hexdigest()
    try:
        path = cache_folder() / "tars" / known
        content = path.read_bytes()
        if _digest(content[16:]) == content[:16]:
            os.utime(path)
            return json.loads(zlib.decompress(content[16:]))
    except (OSError, RuntimeError):  # no home, or not there yet
        pass
    found = find()
    with suppress(OSError, RuntimeError):  # it costs no more than the memory
        _keep(cache_folder() / "tars" / known, zlib.compress(json.dumps(found).encode(), 1))
    return found


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(_digest(content) + content)
    beside.replace(path)
    there = [(about.st_mtime, about.st_size, other) for other in path.parent.iterdir() for about in [other.stat()]]
    size = sum(size for _, size, _ in there)
    for _, bytes, other in sorted(there)[:-1]:
        if size <= MOST_REMEMBERED:
            return
        other.unlink(missing_ok=True)
        size -= bytes


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()

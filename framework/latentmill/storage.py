"""The folder of an output: files appear in it whole or not at all, and the first of a name stays."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(output: str, name: str) -> Iterator[str]:
    """A path in the output's ``.tmp`` to write a file at that ``publish`` is to move; what is left there is removed."""
    folder = Path(output, ".tmp")
    _make(folder)
    temporary = folder / f"{uuid.uuid4().hex}-{name}"
    try:
        yield str(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(output: str) -> None:
    """Remove what processes that were killed left in ``.tmp``, a day ago or longer: younger files may be in use."""
    for file in Path(output, ".tmp").glob("*"):
        try:
            if file.stat().st_mtime < time.time() - 86_400:
                file.unlink()
        except FileNotFoundError:  # another driver sweeps, too
            pass


def publish(temporary: str, final: str) -> bool:
    """Give a whole file its name, durably. False if the name is taken; the temporary file is gone either way.

    The name is created by a link, which fails if it exists: of any number of processes exactly one gets True. When this
    returns True, contents and name have been synced.
    """
    _make(Path(final).parent)
    _sync(temporary)
    try:
        os.link(temporary, final)
        first = True
    except FileExistsError:
        first = False
    _sync(str(Path(final).parent))  # the loser too: whoever goes on relies on what the winner may not have synced yet
    os.unlink(temporary)
    return first


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(str(folder.parent))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

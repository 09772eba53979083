"""Where processes of one machine leave word for one another."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from latentmill.storage.store import DAY


def node_folder(name: str) -> Path:
    """A folder for files of this machine, which is this user's alone, without what long ended runs have left."""
    folder = Path(tempfile.gettempdir(), f"latentmill-{os.getuid()}", name)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} is another user's, and has the name that is ours")
    folder.mkdir(exist_ok=True)
    _sweep(folder)
    return folder


def _sweep(folder: Path) -> None:
    """A run that goes on for longer does a node's work, at most, once more."""
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < time.time() - 30 * DAY:
                path.unlink()
        except FileNotFoundError:  # another has
            pass

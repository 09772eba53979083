"""What plugins want done once a node, before their workers there load: whichever worker comes first does it, and the others wait."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import tempfile
import time
from pathlib import Path

from latentmill.plugin import Plugin
from latentmill.storage.store import DAY


def set_up_once(run: str, unit: str, plugin: Plugin) -> None:
    """Let a plugin do its ``setup_node``, unless it was done on this node in this run.

    ``run`` names the run, ``unit`` the plugin in its job. Nodes may share their folder for temporary files: they have names.
    """
    if type(plugin).setup_node is Plugin.setup_node:
        return
    folder = Path(tempfile.gettempdir(), f"latentmill-{os.getuid()}", "nodes")
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} is another user's, and has the name that is ours")
    folder.mkdir(exist_ok=True)
    _sweep(folder)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{run}-{unit}-{socket.gethostname()}")
    with (folder / name).open("a+b") as done:
        fcntl.flock(done, fcntl.LOCK_EX)  # the system ends it with the process
        if os.fstat(done.fileno()).st_size:
            return
        plugin.setup_node()
        done.write(b"done\n")


def _sweep(folder: Path) -> None:
    """Remove what long ended runs have left: a run that goes on for days starts a worker on a new node, at most, once more."""
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < time.time() - 30 * DAY:
                path.unlink()
        except FileNotFoundError:  # another has
            pass

"""What plugins want done once a node, before their workers there load: whichever worker comes first does it, and the others wait."""

from __future__ import annotations

import fcntl
import os
import re
import socket

from latentmill.plugin import Plugin
from latentmill.workers.node_folder import node_folder


def set_up_once(run: str, unit: str, plugin: Plugin) -> None:
    """Let a plugin do its ``setup_node``, unless it was done on this node in this run.

    ``run`` names the run, ``unit`` the plugin in its job. Nodes may share their folder for temporary files: they have names.
    """
    if type(plugin).setup_node is Plugin.setup_node:
        return
    folder = node_folder("nodes")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{run}-{unit}-{socket.gethostname()}")
    with (folder / name).open("a+b") as done:
        fcntl.flock(done, fcntl.LOCK_EX)  # the system ends it with the process
        if os.fstat(done.fileno()).st_size:
            return
        plugin.setup_node()
        done.write(b"done\n")

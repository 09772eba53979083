"""Named places at which tests make the worst happen. Without ``LATENTMILL_FAILPOINT`` in the environment they do nothing.

``LATENTMILL_FAILPOINT=NAME:ACTION:FOLDER`` acts the first time that any process reaches ``NAME``. ``ACTION`` is ``kill`` (SIGKILL to
the process itself), ``hang``, ``pause`` (until ``FOLDER/go`` is there), ``memory`` (torch's OutOfMemoryError), or the name of an errno
(``ENOSPC``), which is raised. ``FOLDER/NAME`` is created at that moment, holds the process's number, and is why it is the only time.

=============  ==================================================================================================
planning       the plan is published, nothing has started
read … decode  a worker is about to work on a batch
writing        some of a shard's rows are in its temporary file
data synced    the file is whole and synced, and has not its name yet
published      it has its name, and nobody has been told
finishing      all shards are there, _SUCCESS is not
=============  ==================================================================================================
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

VARIABLE = "LATENTMILL_FAILPOINT"


def reach(name: str) -> None:
    """This place has been reached."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    wanted, action, folder = asked.split(":", 2)
    if wanted != name:
        return
    try:
        with Path(folder, name).open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    _act(action, Path(folder))


def _act(action: str, folder: Path) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ("hang", "pause"):
        while action == "hang" or not (folder / "go").exists():
            time.sleep(0.01)
    elif action == "memory":
        import torch

        raise torch.OutOfMemoryError("a failpoint says: out of memory")
    else:
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code), "a failpoint")

"""What happens at a failpoint of latentmill: the worst.

``LATENTMILL_FAILPOINT=NAMES:ACTION:FOLDER`` acts the first time that any process reaches a place of ``NAMES`` (with commas
between), at each of them once. ``FOLDER/NAME`` is created at that moment, holds the process's number, and is why it is the only time.

=============  ==================================================================================================
kill           SIGKILL to the process itself
SIGTERM …      that signal to the process itself
hang, pause    for ever; until ``FOLDER/go`` is there
memory         torch's OutOfMemoryError is raised
fill           ``FOLDER/output`` is filled to the last byte of its disk, with the file ``FOLDER/output/filler``
lock           nothing may be written below ``FOLDER/output`` any more
ENOSPC …       that error is raised
store EIO …    that error is what the output's store answers from now on, until ``FOLDER/broken`` is gone
=============  ==================================================================================================
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path


def reach(name: str) -> None:
    """This place has been reached."""
    wanted, action, folder = os.environ["LATENTMILL_FAILPOINT"].split(":", 2)
    if name == "store" and action.startswith("store ") and Path(folder, "broken").exists():
        _raise(action.removeprefix("store "))
    if name not in wanted.split(","):
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
    elif action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])
    elif action in ("hang", "pause"):
        while action == "hang" or not (folder / "go").exists():
            time.sleep(0.01)
    elif action == "memory":
        import torch

        raise torch.OutOfMemoryError("a failpoint says: out of memory")
    elif action == "fill":
        with (folder / "output" / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:  # full
                pass
    elif action == "lock":
        for path in (folder / "output", *(folder / "output").rglob("*")):
            if path.is_dir():
                path.chmod(0o555)
    elif action.startswith("store "):
        (folder / "broken").touch()
    else:
        _raise(action)


def _raise(name: str) -> None:
    code = getattr(errno, name)
    raise OSError(code, os.strerror(code), "a failpoint")

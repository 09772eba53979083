"""What the parts find, line by line in a file, so that it is there whatever becomes of the part that wrote it."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Notes:
    """A part's, and how long it may take."""

    def __init__(self, file: Path, part: str, until: float) -> None:
        """``until`` is of ``time.monotonic``."""
        self.file, self.part, self.until = file, part, until

    def add(self, kind: str, **line: Any) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"part": self.part, "kind": kind, **line}) + "\n")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def has(self, seconds: float, what: str) -> bool:
        """Whether there is time for so much; if not, it is noted what was left out."""
        if seconds > self.left:
            self.add(
                "left out", what=what, why=f"it would take {seconds:.0f} s, and {max(self.left, 0):.0f} s are left"
            )
            return False
        return True

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What goes wrong is noted, and what comes after goes on."""
        try:
            yield
        except Exception as error:
            where = traceback.format_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.add("failed", what=what, why=said, traceback=where)
        gc.collect()  # what stood in the traceback's frames
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def read(file: Path) -> list[dict[str, Any]]:
    """All lines so far; one that a killed process left half-written is passed over."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found

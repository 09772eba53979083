"""Versions of what the numbers come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata

NOT_THERE = "not installed"
LIBRARIES = ("latentmill", "numpy", "pillow", "scipy", "torch")
"""Whose versions change our own numbers."""


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of installed distributions, by name. What was built of one for which hardware (``+cu128``) is left out."""
    path = tuple((folder, _changed(folder)) for folder in sys.path)
    return {name: _version(name, path) for name in sorted(distributions)}


def _changed(folder: str) -> int:
    """When something came into a folder or left it, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(1024)
def _version(name: str, path: tuple[tuple[str, int], ...]) -> str:
    """What is installed on this path, as long as nothing is installed anew; each answer is a file to parse, and often asked for."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return NOT_THERE

"""Versions of what the numbers come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata

NOT_THERE = "not installed"
LIBRARIES = ("latentmill", "numpy", "pillow", "scipy", "torch")
"""Whose versions change our own numbers."""


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of installed distributions, by name. What was built of one for which hardware (``+cu128``) is left out."""
    path = tuple((folder, _changed(folder)) for folder in sys.path)
    return {name: _version(name, path) for name in sorted(distributions)}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Of each library whose version is another now, its name and both. One that was of no concern before is of none."""
    return [(name, before[name], version) for name, version in now.items() if before.get(name, version) != version]


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

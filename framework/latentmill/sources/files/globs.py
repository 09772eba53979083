"""Globs over names in a store, as ``Path.glob`` has them on a disk."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence


def is_glob(path: str) -> bool:
    """Whether a path has a character that stands for others."""
    return any(character in path for character in "*?[")


def fixed_part(pattern: str) -> str:
    """The folder that all that matches lies in, as far as the pattern says it."""
    parts = pattern.split("/")
    first = next((at for at, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
    return "/".join(parts[:first])


def matches(name: str, pattern: str) -> bool:
    """Whether a file's name, with slashes, fits a pattern. ``**`` stands for any number of folders; hidden ones must be asked for."""
    parts = pattern.split("/")
    hidden = any(part.startswith(".") for part in parts)
    if not hidden and any(part.startswith(".") for part in name.split("/")):
        return False
    return _match(name.split("/"), parts)


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match(parts[skipped:], patterns[1:]) for skipped in range(len(parts)))
    return (
        bool(parts)
        and re.match(fnmatch.translate(patterns[0]), parts[0]) is not None
        and _match(parts[1:], patterns[1:])
    )

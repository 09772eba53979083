"""Names of a file's columns, beside ours: which look like one of ours, and how they are shown to people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from latentmill.fields import FROM_SOURCE, PICTURES
from latentmill.text import escaped

LIKE = {**{field.name: field.also for field in FROM_SOURCE}, **PICTURES}
"""What other tools call the columns. Such a column is named to people, and never taken for ours."""


def bare(name: str) -> str:
    """A name without what tools write in different ways: only its letters and digits, in lower case."""
    return re.sub("[^a-z0-9]", "", name.lower())


def listed(names: Iterable[str]) -> str:
    """Names, in a line for people."""
    shown = [*names]
    return escaped(", ".join(shown[:12]))[:200] + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def alike(names: Iterable[str], ours: Iterable[str]) -> int:
    """How many of the names are, without regard to their spelling, one of ``ours`` or what other tools call a column."""
    known = {bare(name) for name in (*ours, *" ".join(LIKE.values()).split())}
    return sum(bare(name) in known for name in names)


def renaming(missing: Iterable[str], free: Sequence[str]) -> str:
    """The setting that takes columns of a file for ours; "" if no name looks like one.

    ``missing`` are our columns that the file doesn't have, ``free`` its columns that are not used.
    """
    found = {}
    for name in missing:
        for other in (name, *LIKE.get(name, "").split()):
            if match := [column for column in free if bare(column) == bare(other)]:
                found[name] = match[0]
                break
        else:
            if match := difflib.get_close_matches(bare(name), map(bare, free), n=1, cutoff=0.8):
                found[name] = next(column for column in free if bare(column) == match[0])
    columns = ", ".join(f"{name}: {escaped(column)}" for name, column in found.items())
    return f"source.columns={{{columns}}}" if found else ""

"""What shards say of themselves, in short, kept beside the dataset in ``.index/`` so that not every shard is asked each time.

The files are the truth. An entry is of one file: it holds the tag that the store had for it, and counts for as long as
the store has the same. A shard without such an entry is read; so the index may be stale, torn or gone at any time, and any
number of drivers may add to it. Its files are named by the hash of what is in them. Only ``verify`` looks whether an entry is
right, since it reads all shards anyway; what deletes a file or writes a shard's errors asks the shard.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from latentmill.errors import PlanError
from latentmill.plan import Plan
from latentmill.shards import WARNINGS_KEY, error_rows, filtered_rows, rows_not_needed, side_files
from latentmill.storage import Storage

INDEX_FOLDER = ".index"
INDEX_FORMAT = 2
"""What an entry means. Another number where one says more, or something else: older files are then not believed."""
WORTH = 1000
"""Shards from which an index pays: fewer are read in a second."""
ENTRIES_A_FILE = 50_000
"""Entries in one file."""
NOTHING_FILTERED: Mapping[str, int] = MappingProxyType({})


class Summary(NamedTuple):
    """A shard's metadata in short."""

    failed: Mapping[str, int]
    """Failed rows by the stage that they failed in."""
    warnings: Mapping[str, int]
    """Rows by what is to be known of them."""
    side_files: Sequence[str]
    """Their names in ``files/``."""
    filtered: Mapping[str, int] = NOTHING_FILTERED
    """Filtered rows by the stage that filtered them."""
    not_needed: int = 0
    """Rows at its end that are not needed."""

    @property
    def errors(self) -> int:
        """Failed rows."""
        return sum(self.failed.values())

    @property
    def not_stored(self) -> int:
        """Rows that are not in its data: failed, filtered or not needed."""
        return self.errors + sum(self.filtered.values()) + self.not_needed


CLEAN = Summary({}, {}, ())


def summary(about: Mapping[str, str]) -> Summary:
    """What a shard's metadata say in short. Raises ValueError, TypeError or KeyError if they are not as we write them."""
    failed, filtered = (Counter(str(row["stage"]) for row in of(about)) for of in (error_rows, filtered_rows))
    warnings = json.loads(about.get(WARNINGS_KEY, "{}"))
    found = Summary(failed, warnings, [side.stored_as for side in side_files(about)], filtered, rows_not_needed(about))
    return found if any(found) else CLEAN


@dataclass(frozen=True)
class Inventory:
    """What was there when somebody looked: by one listing, and one word of each shard."""

    plan: Plan
    shards: Mapping[int, Summary | PlanError]
    """What those that are there say in short, or what is wrong with one; by number, ascending."""
    foreign: list[str]
    """Names in ``data/`` that are no shard of this plan's, the hidden left out."""

    def ours(self) -> dict[int, Summary]:
        """The shards. Raises PlanError if one can't be read or is another plan's."""
        ours = {}
        for shard, found in self.shards.items():
            if isinstance(found, PlanError):
                raise found
            ours[shard] = found
        return ours

    @cached_property
    def readable(self) -> dict[int, Summary]:
        """Those that can be read and are this plan's. Of the others a run and verify tell."""
        return {shard: found for shard, found in self.shards.items() if not isinstance(found, PlanError)}

    def rows(self) -> dict[int, int]:
        """How many rows are stored in each of them: those that are ok."""
        return {shard: len(self.plan.shard_rows(shard)) - found.not_stored for shard, found in self.readable.items()}

    def failed_in(self) -> Counter[str]:
        """Failed rows by the stage that they failed in."""
        return _sum(found.failed for found in self.readable.values())

    def filtered_in(self) -> Counter[str]:
        """Filtered rows by the stage that filtered them."""
        return _sum(found.filtered for found in self.readable.values())

    def not_needed(self) -> int:
        """Rows that are not needed, since enough were accepted before them."""
        return sum(found.not_needed for found in self.readable.values())

    def out_of_step(self) -> list[int]:
        """Of a job that ends with so many accepted rows: shards that go beyond that, or end before it, once all shards are there.

        One may, of which a driver did not know how many rows others had accepted before it, and any after one that was made anew.
        """
        wanted, before, found = self.plan.accept_rows, 0, list[int]()
        if wanted is None:
            return found
        for shard, stored in self.rows().items():
            not_needed = self.readable[shard].not_needed
            left = max(0, wanted - before)
            if stored > left or (not left and not_needed < len(self.plan.shard_rows(shard))):
                found.append(shard)
            elif not_needed and stored < left:
                return [*found, shard]  # how many it will have, nobody knows
            before += min(stored, left)
        return found

    def warnings(self) -> dict[str, int]:
        """Rows by what is to be known of them, the most frequent first."""
        return dict(_sum(found.warnings for found in self.readable.values()).most_common())


class Index:
    """The index of a plan's dataset."""

    def __init__(self, store: Storage, plan: str) -> None:
        """``plan``: its hash."""
        self.store, self.plan = store, plan
        self.names: set[str] = set()
        """Of the files that were read, or written."""
        self._equal: dict[Any, Any] = {}
        """One of each count: there are many shards, and few differ."""

    def load(self, tags: Mapping[int, str]) -> Iterator[tuple[int, Summary]]:
        """What is known of these shards, if they are still those of which it was known. Reads what it has not read yet.

        Of one shard there may be several entries, and not all the same. An index that can't be read is none.
        """
        names: list[str] = []
        with suppress(OSError):
            names += (name for name in self.store.names(INDEX_FOLDER) if name not in self.names)
        for entries in self.store.each(self._entries, names):
            with suppress(ValueError, TypeError, LookupError, AttributeError):  # what is no entry ends its file
                for entry in entries:
                    if entry[1] and tags.get(entry[0]) == entry[1]:
                        yield entry[0], self._one(*entry[2:]) if len(entry) > 2 else CLEAN
        self.names |= {*names}

    def _entries(self, name: str) -> Sequence[Sequence[Any]]:
        """What is in a file; nothing if that is not as we write it, of another plan, gone, or not to be read."""
        with suppress(OSError, ValueError, TypeError, LookupError):
            content = self.store.read(f"{INDEX_FOLDER}/{name}")
            found = json.loads(content) if name == _name(content) else {}
            if (found["format"], found["plan"]) == (INDEX_FORMAT, self.plan):
                return list(found["shards"])
        return []

    def _one(
        self,
        failed: Mapping[str, int],
        warnings: Mapping[str, int],
        side_files: Sequence[str],
        filtered: Mapping[str, int] = NOTHING_FILTERED,
        not_needed: int = 0,
    ) -> Summary:
        """Entries say ``filtered`` and ``not_needed`` only where they say something."""
        counts = [self._equal.setdefault((*part.items(),), part) for part in (failed, warnings, filtered)]
        return Summary(counts[0], counts[1], side_files, counts[2], not_needed)

    def save(self, entries: Iterable[tuple[int, str, Summary]]) -> None:
        """Add what is known of shards, each with its file's tag."""
        found = [[shard, tag, *_entry(about)] for shard, tag, about in entries if tag]
        for start in range(0, len(found), ENTRIES_A_FILE):
            some = {"format": INDEX_FORMAT, "plan": self.plan, "shards": found[start : start + ENTRIES_A_FILE]}
            content = json.dumps(some, separators=(",", ":")).encode()
            name = _name(content)
            self.store.put(f"{INDEX_FOLDER}/{name}", content)
            self.names.add(name)

    def replace(self, entries: Sequence[tuple[int, str, Summary]]) -> None:
        """Save all that is known anew, if it lies in many pieces, and delete them. What others add meanwhile stays."""
        pieces = {*self.names}
        if len(pieces) > 2 * (1 + len(entries) // ENTRIES_A_FILE):
            self.names = set()
            self.save(entries)
            for name in pieces - self.names:
                self.store.delete(f"{INDEX_FOLDER}/{name}")

    def forget(self) -> None:
        """Delete the index: it says what the shards don't."""
        for name in self.store.names(INDEX_FOLDER):
            self.store.delete(f"{INDEX_FOLDER}/{name}")


def _entry(about: Summary) -> Sequence[Any]:
    """What an entry holds of a summary: no more than there is to say."""
    if about is CLEAN:
        return ()
    return about if about.not_needed else about[: 4 if about.filtered else 3]


def _name(content: bytes) -> str:
    return f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.json"


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        if count:
            total.update(count)
    return total

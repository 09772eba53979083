"""What an export has written, in ``.latentmill/`` of its folder: so that the same command passes over what is there and right.

A file appears whole, under its name, or not at all. When all files of a shard are there, the shard's *mark* names them with their sizes: the next
command looks at those, and reads the shard again only if one is missing or of another size. Files that no mark names, of an
export that was killed, are compared with what would be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from latentmill.errors import ExportError, StorageError
from latentmill.storage import Storage

LEDGER = ".latentmill"
CLAIMED = "claimed"
"""The state of a mark whose files may not all be there."""
_PIECE = 1 << 20


@dataclass(frozen=True)
class ShardMark:
    """A shard whose files are all there."""

    state: str
    """Which rows of the shard were ok: it may be made again, with others."""
    files: Mapping[str, int]
    """Bytes by name."""
    notes: list[Any]
    """What the format's ``finish`` is to know of each row."""
    dropped: Sequence[str] = ()
    """Names of files that were its own and are no more. Another shard may have such a file by now."""


@dataclass(frozen=True)
class Ledger:
    """What of one format is there."""

    store: Storage
    format: str
    below: str
    """Where its files are: "" or a folder with a slash behind."""

    @property
    def folder(self) -> str:
        """The path or URL of the folder of its files, absolute, with a slash behind."""
        url = self.store.url if "://" in self.store.url else os.path.abspath(self.store.url)
        return f"{url.rstrip('/')}/{self.below}"

    def begin(self, about: Mapping[str, Any], came: Sequence[str] = ()) -> None:
        """Say what is exported, and by which generations it has grown since it was begun.

        Raises ExportError if the folder has been begun with another dataset or otherwise, or has one that has grown otherwise, or further.
        """
        texts = [self._first(about), *(_text({"generation": hash}) for hash in came)]
        at, names = self.store.url.rstrip("/"), [self._generation_name(number) for number in range(len(texts) + 1)]
        for name, text in zip(names, texts):
            if not self.store.create(name, text):
                self._require(name, text)
        if self.store.exists(names[-1]):
            raise ExportError(
                f"{at}/{names[-1]} is of an export to {self.format} of the dataset when it had grown further: choose another folder"
            )

    def require_free(self, about: Mapping[str, Any]) -> None:
        """Raise ExportError if the folder has been begun with another dataset or otherwise. Writes nothing."""
        name = self._generation_name(0)
        if self.store.exists(name):
            self._require(name, self._first(about))

    def _first(self, about: Mapping[str, Any]) -> bytes:
        return _text({"format": self.format, "files": self.below, **about})

    def _require(self, name: str, text: bytes) -> None:
        if self.store.read(name) != text:
            first = name == self._generation_name(0)
            which = (
                "another dataset, other --names, or beside other formats"
                if first
                else "a dataset that has grown otherwise"
            )
            at = f"{self.store.url.rstrip('/')}/{name}"
            raise ExportError(f"{at} is of another export to {self.format} ({which}): choose another folder")

    def mark(self, key: str) -> ShardMark | None:
        """What has been written of a shard, or for the whole export; None if that is not known."""
        try:
            return ShardMark(**json.loads(self.store.read(self._mark_name(key))))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # not as we write it: made anew
            return None

    def is_right(self, mark: ShardMark, state: str, at_once: int) -> bool:
        """Whether all that a mark names is there still, in that size, of a shard in this state. So many shards are asked for at once."""
        if mark.state != state:
            return False
        names, many = [self.below + name for name in mark.files], max(1, self.store.in_flight // at_once)
        return [*self.store.each(self.store.size, names, many)] == [*mark.files.values()]

    def claim(self, key: str, names: Iterable[str], before: ShardMark | None) -> ShardMark | None:
        """Note which files are about to be made that aren't there: after a kill they are ours, though no mark is whole yet."""
        fresh = [name for name in names if not self.store.exists(self.below + name)]
        if not fresh:
            return before
        known = before or ShardMark("", {}, [])
        mark = replace(known, state=CLAIMED, files={**known.files, **dict.fromkeys(fresh, -1)})
        self._put(key, mark)
        return mark

    def settle(self, name: str, content: bytes | Path, ours: ShardMark | None) -> bool:
        """See that a file is there with this content; False if it was. Raises StorageError if another is, and ``ours`` doesn't name it."""
        name, what = self.below + name, str(content) if isinstance(content, Path) else content
        if self.store.create(name, what):
            return True
        if self._is(name, content):
            return False
        if ours is None or name.removeprefix(self.below) not in ours.files:
            raise StorageError(
                f"{self.store.url.rstrip('/')}/{name} is there, and is not what {self.format} would write: "
                "move it away, or choose another folder"
            )
        self.store.delete(name)
        return self.store.create(name, what)

    def close(self, key: str, mark: ShardMark, before: ShardMark | None) -> ShardMark:
        """All files of a mark are there. Those that were there ``before`` and are no more are dropped, and deleted by ``sweep``."""
        were = {*before.files, *before.dropped} if before else set[str]()
        mark = replace(mark, dropped=sorted(were - mark.files.keys()))
        self._put(key, mark)
        return mark

    def sweep(self, dropping: Mapping[str, ShardMark], keys: Iterable[str]) -> None:
        """Delete what marks have dropped, but for files that a mark of these keys names, of all that there are."""
        dropped = {name for mark in dropping.values() for name in mark.dropped}
        for mark in self.store.each(self.mark, keys if dropped else ()):
            dropped -= mark.files.keys() if mark else set()
        for name in sorted(dropped):
            self.store.delete(self.below + name)
        for key, mark in dropping.items():
            self._put(key, replace(mark, dropped=()))

    def _put(self, key: str, mark: ShardMark) -> None:
        text = json.dumps({**vars(mark), "files": dict(sorted(mark.files.items()))}, ensure_ascii=False)
        self.store.put(self._mark_name(key), text.encode())

    def _generation_name(self, number: int) -> str:
        return f"{LEDGER}/{self.format}-{number}.json" if number else f"{LEDGER}/{self.format}.json"

    def _mark_name(self, key: str) -> str:
        return f"{LEDGER}/{self.format}/{key}.json"

    def _is(self, name: str, content: bytes | Path) -> bool:
        if isinstance(content, bytes):
            return self.store.size(name) == len(content) and self.store.read(name) == content
        if self.store.size(name) != content.stat().st_size:
            return False
        with self.store.open(name) as there, content.open("rb") as wanted:
            return _same(there, wanted)


def _text(said: Mapping[str, Any]) -> bytes:
    return (json.dumps(said, indent=1) + "\n").encode()


def _same(there: BinaryIO, wanted: BinaryIO) -> bool:
    while piece := wanted.read(_PIECE):
        if there.read(len(piece)) != piece:
            return False
    return True

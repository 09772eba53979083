"""Rows that stand in the job itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from latentmill.fields import PICTURES
from latentmill.plugin import Fragment, RowError
from latentmill.sources.pictures import MAX_PIXELS
from latentmill.sources.prompts import Prompts
from latentmill.sources.readers.reader import FileReader
from latentmill.sources.readers.settings import ReaderSettings
from latentmill.text import near

NAME = "rows"
"""Of the one fragment."""


class RowsInJob(Prompts):
    """``rows: [{prompt: a cat, seed: 7}, {prompt: a dog, image: dog.png}]``: fields of ours by name, and pictures below the folder ``path``.

    What a row doesn't say is the job's. ``max_pixels``, ``follow_links``, ``id_column``, ``opened`` and ``masks`` are as in the source ``prompts``.
    """

    contract = 2

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        path: str = ".",
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
        id_column: str | None = None,
        opened: str = "ours",
        masks: Any = "light",
    ) -> None:
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise ValueError("rows must be a list of rows, as in [{prompt: a cat, seed: 7}]")
        super().__init__(path, max_pixels, follow_links, id_column, opened=opened, masks=masks)
        self.rows, self.needs_prompt = [dict(row) for row in rows], False

    def columns(self) -> list[str]:
        return self._settings.unused(dict.fromkeys(name for row in self.rows for name in row))

    def column_types(self, names: Sequence[str]) -> pa.Schema:
        found = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in self.rows]).schema
        return pa.schema(
            [field for field in found if field.name in names and any(field.name in row for row in self.rows)]
        )

    def fragments(self) -> list[Fragment]:
        """Raises ValueError for what is no field of a row."""
        known = {*self._settings.known, *self.kept.names, self.id_column}
        for name in (name for row in self.rows for name in row if name not in known):
            raise ValueError(f"rows: a row has no field {name}{near(name, [n for n in known if n is not None])}")
        return [Fragment(NAME, len(self.rows), self._fingerprint())]

    def expect(self, fragment: Fragment) -> None:
        if fragment.fingerprint:
            super().expect(fragment)

    def changed(self, fragment: Fragment) -> bool:
        return bool(fragment.fingerprint) and self._files.changed(self._pictures(), fragment.fingerprint)

    def stamp(self, fragment: Fragment) -> str:
        return self._files.stamp(self._pictures())

    def still(self, fragment: Fragment, runs: Sequence[tuple[str, int, int]]) -> bool | None:
        return None

    def reads_from(self, folder: str) -> bool:
        return False

    def _pictures(self) -> list[str]:
        """The files that rows name."""
        return [row[name] for row in self.rows for name in PICTURES if isinstance(row.get(name), str)]

    def _fingerprint(self) -> str:
        """Of the pictures; the rows themselves are in the plan, as the job's are. Nothing where one isn't there: its row will say so."""
        with suppress(OSError, ValueError):
            if names := self._pictures():
                return self._files.fingerprint(names, self._files.known_by_contents(names))
        return ""

    def _opened(self, name: str) -> FileReader:
        return _RowsReader(self.rows, self._settings)


class _RowsReader(FileReader):
    """The rows, as a file of them would be read."""

    says_seeds = True

    def __init__(self, rows: Sequence[Mapping[str, Any]], settings: ReaderSettings) -> None:
        self.rows, self.settings = rows, settings
        self.pictures = any(name in row for row in rows for name in PICTURES)

    def count(self) -> int:
        return len(self.rows)

    def columns(self) -> Sequence[str]:
        return [*dict.fromkeys(name for row in self.rows for name in row)]

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        return iter(())

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        for row in self.rows[start:stop]:
            found = {name: value for name, value in row.items() if name in self.settings.known}
            if self.settings.kept:
                found["kept"] = {name: row.get(name) for name in self.settings.kept}
            if self.settings.id_column is not None:
                found["id"] = None if row.get(self.settings.id_column) is None else str(row[self.settings.id_column])
            yield found

    def notices(self) -> Iterator[str]:
        return iter(())

    def close(self) -> None:
        pass

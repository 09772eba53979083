"""What the settings of a source of files say of all its files: which column is which, and how text is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from latentmill.fields import FROM_SOURCE, PICTURES
from latentmill.plugin import RowField, Source
from latentmill.sources.files import SourceFile
from latentmill.sources.readers.names import alike, listed, renaming

COLUMNS: Mapping[str, RowField | None] = {
    **{field.name: field for field in FROM_SOURCE if field.name != "warning"},
    **dict.fromkeys(PICTURES),
}
"""The columns that mean something. Pictures are paths below the file's folder; in Parquet they may be bytes as well."""


@dataclass(frozen=True)
class ReaderSettings:
    """What the source's settings say of all its files."""

    given: Mapping[str, str]
    """``source.columns``: our names of columns, and the files' names of them."""
    id_column: str | None
    encoding: str | None
    known: Mapping[str, RowField | None]
    """Our columns, and those of the job's plugins. Pictures have no field."""
    source: Source
    needs_prompt: bool = True
    """Whether a table must have prompts, or pictures."""

    @property
    def kept(self) -> list[str]:
        """The columns that travel as they are."""
        return list(self.source.kept.names)

    @cached_property
    def column_of(self) -> dict[str, str]:
        """Our name of each column, and the files' name of it."""
        taken = set(self.given.values())
        return {name: self.given.get(name, name) for name in self.known if name in self.given or name not in taken}

    @cached_property
    def pictures(self) -> set[str]:
        """The files' names of our columns of pictures."""
        return {column for name, column in self.column_of.items() if name in PICTURES}

    def require(self, path: SourceFile, names: Sequence[str], rows: str = "") -> None:
        """Raise ValueError if a table with columns of these names can't be used. ``rows`` says which rows have been seen."""
        where = f"{path} has no column"
        there = f"{rows}, only {listed(names)}" if any(names) else f"{rows}, none"
        if lost := [name for name in self.given.values() if name not in names]:
            raise ValueError(f"{where} {lost[0]} (source.columns){there}")
        if self.needs_prompt and not {self.column_of.get("prompt"), self.column_of.get("image")} & {*names}:
            like = self._renaming(names)
            hint = f"; write {like}" if like else ""
            if not like and path.name.lower().endswith((".csv", ".tsv")):
                hint = "; its first line must name the columns"
            raise ValueError(f"{where} prompt or image{there}{hint}")
        if twice := [name for name in (*self.column_of.values(), *self.kept) if names.count(name) > 1]:
            raise ValueError(f"{path}: there are two columns {twice[0]}")

    def unused(self, names: Iterable[str]) -> list[str]:
        """Those of a file's columns that are neither ours nor kept."""
        used = {*self.column_of.values(), *self.kept, self.id_column, ""}
        return [name for name in names if name not in used]

    def recognized(self, names: Iterable[str]) -> int:
        """How many of the names are a column of ours, or what other tools call one."""
        return alike(names, (*self.known, *self.given.values(), self.id_column or "prompt"))

    def notices(self, names: Sequence[str], rows: str = "") -> Iterator[str]:
        """What people should know about a table with columns of these names."""
        if unused := self.unused(names):
            like = self._renaming(names)
            yield f"columns not used{rows}: {listed(unused)}" + (f" (did you mean {like}?)" if like else "")

    def _renaming(self, names: Sequence[str]) -> str:
        missing = [name for name in self.known if self.column_of.get(name, name) not in names]
        return renaming(missing, self.unused(names))

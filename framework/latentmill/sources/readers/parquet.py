"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa

from latentmill.fields import PICTURES, python_type
from latentmill.plugin import RowError, RowField
from latentmill.sources import as_id, is_text, plain
from latentmill.sources.files import SourceFile
from latentmill.sources.kept import require_once, rows_kept
from latentmill.sources.readers.parquet_rows import ParquetRows
from latentmill.sources.readers.reader import FileReader
from latentmill.sources.readers.settings import ReaderSettings
from latentmill.sources.text import strict


class ParquetReader(FileReader):
    """A Parquet file. Damage costs the rows of its row group."""

    def __init__(self, path: SourceFile, settings: ReaderSettings) -> None:
        self.path, self.file, self.settings = path, ParquetRows(path), settings
        names = self.file.schema.names
        self.pictures = not settings.pictures.isdisjoint(names)
        settings.require(path, names)
        if settings.id_column is not None and names.count(settings.id_column) > 1:
            raise ValueError(f"{path}: there are two columns {settings.id_column}")
        self.ours = {name: column for name, column in settings.column_of.items() if column in names}
        types = {name: self.file.schema.field(column).type for name, column in self.ours.items()}
        for name, type in types.items():
            if not pa.types.is_null(type) and not _fits(settings.known[name], type):
                raise ValueError(f"{path}: column {self.ours[name]} is {type}, which it can't be")
        if "prompt" in types and pa.types.is_null(types["prompt"]):
            raise ValueError(f"{path}: column {self.ours['prompt']} holds nulls and nothing else")
        self.file.require_ids(settings.id_column)
        self.says_seeds = "seed" in types and all(is_text(types[name]) for name in PICTURES if name in types)

    def count(self) -> int:
        return self.file.rows

    def columns(self) -> Sequence[str]:
        return list(self.file.schema.names)

    def types(self, names: Sequence[str]) -> Iterator[tuple[str, pa.DataType]]:
        require_once(self.path, self.file.schema.names, names)
        return ((name, self.file.schema.field(name).type) for name in names if name in self.file.schema.names)

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        kept = [name for name in self.settings.kept if name in self.file.schema.names]
        ours = [*self.ours.values(), *([self.settings.id_column] if self.settings.id_column else [])]
        for piece in self.file.read(start, stop, list(dict.fromkeys([*ours, *kept]))):
            if isinstance(piece, list):
                yield from piece
                continue
            beside = rows_kept(piece, kept) if self.settings.kept else repeat({})
            for row, more in zip(self._rows(piece.select(list(dict.fromkeys(ours)))), beside):
                yield row if isinstance(row, RowError) or not self.settings.kept else {**row, "kept": more}

    def _rows(self, table: pa.Table) -> Iterator[dict[str, Any] | RowError]:
        columns = {
            name: (plain(table.column(name)), is_text(table.schema.field(name).type)) for name in table.schema.names
        }
        for i in range(len(table)):
            values: dict[str, Any] = {}
            try:
                for name, (column, text) in columns.items():
                    value = column[i].as_py()
                    values[name] = strict(value, name) if text and value is not None else value
                row = {name: values[column] for name, column in self.ours.items()}
                yield row if self.settings.id_column is None else {**row, "id": as_id(values[self.settings.id_column])}
            except RowError as error:
                yield error

    def texts(self, stop: int) -> Iterator[dict[str, Any] | RowError]:
        ours = {name: column for name, column in self.ours.items() if name in ("prompt", "negative_prompt")}
        for piece in self.file.read(0, stop, list(dict.fromkeys(ours.values()))):
            if isinstance(piece, list):
                yield from piece
                continue
            columns = {name: plain(piece.column(column)).to_pylist() for name, column in ours.items()}
            for i in range(len(piece)):
                found = {name: value[i] for name, value in columns.items()}
                yield {name: None if text is None else text.decode("utf-8", "replace") for name, text in found.items()}

    def ids(self) -> Iterator[str | None]:
        assert self.settings.id_column is not None
        return self.file.ids(self.settings.id_column)

    def notices(self) -> Iterator[str]:
        yield from self.settings.notices(self.file.schema.names)

    def close(self) -> None:
        self.file.file.close(force=True)


def _is_binary(type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type))


def _is_picture(type: pa.DataType) -> bool:
    return bool(pa.types.is_struct(type) and {field.name for field in type} >= {"bytes", "path"})


def _fits(field: RowField | None, type: pa.DataType) -> bool:
    """Whether a column of this type may hold a field's values. Pictures have no field."""
    if field is None:
        return is_text(type) or _is_binary(type) or _is_picture(type)
    kind = python_type(field)
    if kind is str:
        return is_text(type)
    if kind is bool:
        return bool(pa.types.is_boolean(type))
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type))

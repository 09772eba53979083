"""Rows of a Parquet file by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.plugin import RowError
from latentmill.sources import as_id, is_text, plain
from latentmill.sources.files import SourceFile
from latentmill.text import first_line


class ParquetRows:
    """Rows of a Parquet file by number. Keeps one decoded row group, so that reading on doesn't decode it again."""

    def __init__(self, path: SourceFile) -> None:
        """Raises ValueError if it is no Parquet file."""
        local = isinstance(path, Path)
        self.threads = local  # of Arrow: such a one may not hold a Python file when the interpreter ends
        try:
            self.file = pq.ParquetFile(
                path if local else path.open(), page_checksum_verification=True, pre_buffer=local
            )
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: {first_line(error)}") from error
        self.path = path
        self.schema: pa.Schema = self.file.schema_arrow
        self.rows: int = self.file.metadata.num_rows
        self._ends = [0]
        for group in range(self.file.num_row_groups):
            self._ends.append(self._ends[-1] + self.file.metadata.row_group(group).num_rows)
        self._kept: tuple[Any, pa.Table] | None = None

    def read(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table | list[RowError]]:
        """Rows ``start`` to ``stop`` of some columns, a piece of each row group: a table, or an error for each row."""
        for group in range(self.file.num_row_groups):
            first, last = max(start, self._ends[group]), min(stop, self._ends[group + 1])
            if first < last:
                try:
                    table = self._group(group, columns)
                except (pa.ArrowInvalid, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:  # the storage's, and may be gone soon
                        raise
                    reason = f"row group {group} of {self.path.name} is damaged: {first_line(error, 200)}"
                    yield [RowError(reason)] * (last - first)
                else:
                    yield table.slice(first - self._ends[group], last - first)

    def require_ids(self, column: str | None) -> None:
        """Raise ValueError if there is no such column of text or whole numbers; None asks for none."""
        if column is None:
            return
        if column not in self.schema.names:
            raise ValueError(
                f"{self.path} has no column {column} (id_column), only {', '.join(self.schema.names)[:200]}"
            )
        type = self.schema.field(column).type
        if not is_text(type) and not pa.types.is_integer(type):
            raise ValueError(f"{self.path}: column {column} is {type}, and ids are text or whole numbers")

    def ids(self, column: str) -> Iterator[str | None]:
        """The ids of all rows, in order; None for one that is null, empty or not UTF-8."""
        for group in range(self.file.num_row_groups):  # one by one: Arrow would keep more and more of all at once
            for batch in self.file.iter_batches(row_groups=[group], columns=[column], use_threads=self.threads):
                for value in plain(batch.column(0)).to_pylist():
                    try:
                        yield as_id(value.decode() if isinstance(value, bytes) else value)
                    except (RowError, UnicodeDecodeError):
                        yield None

    def _group(self, group: int, columns: list[str]) -> pa.Table:
        key = group, tuple(columns)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.file.read_row_group(group, columns=columns, use_threads=self.threads)
        return self._kept[1]

"""Columns of a source's files that the job keeps: what type text has, and rows of Parquet files as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from latentmill.columns import plain_type, unified
from latentmill.sources.files import SourceFile

AT_ONCE = 10_000
"""Rows whose values are looked at together."""

WHOLE_TEXT = re.compile(r"-?(0|[1-9][0-9]{0,17})")
WRITTEN_REAL = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
BOOL = re.compile("true|false", re.IGNORECASE)


def guess_types(
    path: SourceFile,
    names: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    said: Callable[[Sequence[Any]], pa.DataType | None],
) -> dict[str, pa.DataType]:
    """The type of each of the columns ``names`` that all its values in ``rows`` have; null if it has none. Raises ValueError."""
    there = iter(rows)
    found: dict[str, pa.DataType] = {}
    while some := list(islice(there, AT_ONCE)):
        for name in names:
            values = [row[name] for row in some if row.get(name) is not None]
            if not any(name in row for row in some):
                continue
            type = said(values) if values else pa.null()
            known = found.get(name, pa.null())
            if type is not None and said is type_of_texts:
                found[name] = _of_both_texts(known, type)
            else:
                if type is None:
                    raise ValueError(
                        f"{path}: the values of column {name} have no one type: say which, as source.keep={{{name}: string}}"
                    )
                found[name] = unified([(str(path), name, known), (str(path), name, type)]).field(0).type
    return found


def type_of_texts(values: Sequence[Any]) -> pa.DataType | None:
    """What texts of a table are: whole numbers without leading zeros, numbers, bools, or text."""
    for form, type in ((WHOLE_TEXT, pa.int64()), (WRITTEN_REAL, pa.float64()), (BOOL, pa.bool_())):
        if all(form.fullmatch(text) for text in values):
            return type
    return pa.string()


def _of_both_texts(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    kinds = {a, b} - {pa.null()}
    if len(kinds) < 2:
        return next(iter(kinds), pa.null())
    return pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()


def type_of_values(values: Sequence[Any]) -> pa.DataType | None:
    """What values of JSON are; None if they have no one type."""
    try:
        return pa.infer_type(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def rows_kept(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, pa.Scalar]]:
    """Some columns of each row of a table, each value with its type."""
    columns = {}
    for name in names:
        column = table.column(name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        columns[name] = column.cast(plain_type(column.type)) if pa.types.is_dictionary(column.type) else column
    for i in range(len(table)):
        yield {name: column[i] for name, column in columns.items()}

"""Columns of a source's files that the job keeps: what type text has, and rows of Parquet files as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite
from typing import Any

import pyarrow as pa

from latentmill.columns import plain_type, unified
from latentmill.sources.files import SourceFile

AT_ONCE = 10_000
"""Rows whose values are looked at together."""

WHOLE_TEXT = re.compile(r"-?(0|[1-9][0-9]*)")
WRITTEN_REAL = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
BOOL = re.compile("true|false", re.IGNORECASE)
LONGEST_WHOLE = 19
"""Digits of the largest whole number that has a type of its own, int64."""


def types_of_values(
    path: SourceFile, names: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> dict[str, pa.DataType]:
    """The type of each of the columns ``names`` that all its values of JSON in ``rows`` have; null if it has none. Raises ValueError."""
    there = iter(rows)
    found: dict[str, pa.DataType] = {}
    while some := list(islice(there, AT_ONCE)):
        for name in names:
            values = [row[name] for row in some if row.get(name) is not None]
            if not any(name in row for row in some):
                continue
            type = _type_of_values(values) if values else pa.null()
            if type is None:
                raise ValueError(
                    f"{path}: the values of column {name} have no one type: say which, as source.keep={{{name}: string}}"
                )
            known = found.get(name, pa.null())
            found[name] = unified([(str(path), name, known), (str(path), name, type)]).field(0).type
    return found


def _type_of_values(values: Sequence[Any]) -> pa.DataType | None:
    """What values of JSON are; None if they have no one type."""
    try:
        return pa.infer_type(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def require_once(path: SourceFile, there: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError if a file has two columns of one of these names."""
    if twice := [name for name in names if [*there].count(name) > 1]:
        raise ValueError(f"{path}: there are two columns {twice[0]}")


def types_of_texts(rows: Iterable[Mapping[str, str | None]]) -> dict[str, pa.DataType]:
    """The type of each column of texts: the first of TYPES_OF_TEXT that all of them are, without a loss, or else text; null if it has none."""
    possible: dict[str, list[pa.DataType]] = {}
    said = set[str]()
    for row in rows:
        for name, text in row.items():
            left = possible.setdefault(name, [*TYPES_OF_TEXT])
            if text is not None:
                said.add(name)
                left[:] = [type for type in left if TYPES_OF_TEXT[type](text)]
    return {name: [*left, pa.string()][0] if name in said else pa.null() for name, left in possible.items()}


def _is_int64(text: str) -> bool:
    return WHOLE_TEXT.fullmatch(text) is not None and len(text) <= LONGEST_WHOLE + 1 and -(2**63) <= int(text) < 2**63


def _is_double(text: str) -> bool:
    """Whether it is a number that a double holds: a longer whole number would be another, an exponent too large infinity."""
    if not WRITTEN_REAL.fullmatch(text) or not isfinite(number := float(text)):
        return False
    return not WHOLE_TEXT.fullmatch(text) or int(number) == int(text)


TYPES_OF_TEXT: Mapping[pa.DataType, Callable[[str], bool]] = {
    pa.int64(): _is_int64,
    pa.float64(): _is_double,
    pa.bool_(): lambda text: BOOL.fullmatch(text) is not None,
}
"""What texts may be: whole numbers without leading zeros, numbers, bools."""


def rows_kept(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, pa.Scalar]]:
    """Some columns of each row of a table, each value with its type."""
    columns = {}
    for name in names:
        column = table.column(name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        plain = plain_type(column.type)
        columns[name] = column if column.type == plain else column.cast(plain)
    for i in range(len(table)):
        yield {name: column[i] for name, column in columns.items()}

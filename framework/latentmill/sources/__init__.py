"""Where rows come from: files of prompts, folders of pictures, latents of our own. ``files`` says where those may lie.

Here: what the readers of all of them say of names, ids and text.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from latentmill.plugin import RowError


def suffix(name: str) -> str:
    """The ending of a file's name that says what it is, as ``.csv`` or ``.csv.gz``."""
    stem, last = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + last if last in (".gz", ".zst") else last


def as_id(value: Any) -> str:
    """What an id column holds, text or a whole number, as text. Raises RowError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(
            "the id is null" if value is None else f"an id must be text or a whole number, not {value!r:.80}"
        )
    if not value:
        raise RowError("the id is empty")
    return value


def is_text(type: pa.DataType) -> bool:
    """Whether a column holds text, in any of Arrow's ways to."""
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Text as bytes: a string column may hold bytes that are no UTF-8, and only that row is to fail."""
    if not is_text(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary())

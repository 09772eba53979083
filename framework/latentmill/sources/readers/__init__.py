"""Readers of files of rows, one class for each kind of file. ``READERS`` says which class reads a file, by its suffix.

To add a kind of file, write its class in a module of its own here, and give it a line in ``READERS``. If it is text that
is read line by line or row by row, it is a ``TextReader``; else it is a ``FileReader``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latentmill.sources.files import SourceFile
from latentmill.sources.readers.csv import CSVReader, TSVReader
from latentmill.sources.readers.json import json_reader
from latentmill.sources.readers.lines import LinesReader
from latentmill.sources.readers.parquet import ParquetReader
from latentmill.sources.readers.reader import FileReader
from latentmill.sources.readers.settings import ReaderSettings
from latentmill.sources.readers.tar import TarReader

_TEXT: Mapping[str, Callable[[SourceFile, ReaderSettings], FileReader]] = {
    ".txt": LinesReader,
    ".csv": CSVReader,
    ".tsv": TSVReader,
    ".json": json_reader,
    ".jsonl": json_reader,
    ".ndjson": json_reader,
}

READERS: Mapping[str, Callable[[SourceFile, ReaderSettings], FileReader]] = {
    **{suffix + packed: reader for packed in ("", ".gz", ".zst") for suffix, reader in _TEXT.items()},
    ".parquet": ParquetReader,
    ".tar": TarReader,
}
"""What opens a file, by the suffix of its name. Files of text may be compressed."""

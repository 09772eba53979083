"""Plain text: a line is a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from latentmill.sources.readers.names import bare
from latentmill.sources.readers.text_reader import TextReader, is_json
from latentmill.sources.text import Lines, loose, strict
from latentmill.text import escaped


class LinesReader(TextReader):
    """A text file. A line is a prompt, without the white space around it."""

    first = b""

    def begin(self, lines: Lines) -> None:
        if self.settings.id_column is not None:
            raise ValueError(f"{self.path}: lines of text have no columns, and id_column is {self.settings.id_column}")
        if self.settings.given:
            raise ValueError(f"{self.path}: lines of text have no columns, and source.columns names some")
        self.first = next(self.items(lines), b"")
        lines.unread([self.first] if self.first else [])

    def parse(self, item: bytes) -> dict[str, Any]:
        return {"prompt": strict(item, "the line").strip().removeprefix("\ufeff").strip()}

    def notices(self) -> Iterator[str]:
        yield from super().notices()
        first = loose(self.first).strip()
        if first.startswith("{") and is_json(first):
            yield "lines of JSON are taken for prompts: let its name end in .jsonl"
        elif first and {bare(name) for name in re.split("[,;\t]", first)} <= {
            bare(name) for name in self.settings.known
        }:
            yield f"the first line, {escaped(first)}, is taken for a prompt: if it is a table's header, let its name end in .csv or .tsv"

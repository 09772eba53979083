"""A folder of pictures with captions: what every trainer reads that makes its own cache."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from latentmill.exports.formats import ExportFormat, ExportRow, jsonable


def _path(row: ExportRow) -> str:
    return f"{row.name}.png"


def _files(row: ExportRow) -> Mapping[str, bytes]:
    """PNG whatever the dataset holds: pixels are stored once with loss at most."""
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(row.tensors["image"].numpy()).save(picture, "PNG")
    found = {_path(row): picture.getvalue()}
    return found | {f"{row.name}.txt": row.prompt.encode()} if row.prompt else found  # trainers stop at an empty one


def _note(row: ExportRow) -> Any:
    said = {"file_name": _path(row), "text": row.prompt}
    more = {}
    for name, value in row.columns.items():
        own = name
        while own in said or (own != name and own in row.columns):
            own = f"source_{own}"
        if name != "prompt":
            more[own] = jsonable(value)
    return {**more, **said}


def _finish(notes: Iterable[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    yield "metadata.jsonl", (json.dumps(note, ensure_ascii=False) + "\n" for note in notes)


PICTURE_FOLDER = ExportFormat(
    name="folder",
    reader="Hugging Face datasets' imagefolder; sd-scripts, musubi-tuner, SimpleTuner and others by the .txt",
    layout="STEM.png, STEM.txt with the prompt if it has one, and metadata.jsonl with file_name, text and the other columns (a kept column text is source_text)",
    checked="datasets: pictures, prompts, columns",
    needs=("image",),
    names="used",
    files=_files,
    path=_path,
    note=_note,
    finish=_finish,
)

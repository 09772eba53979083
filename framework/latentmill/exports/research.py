"""Research trainers that draw their latents from mean and standard deviation: EDM2, REPA, PixArt. Both raw, in one ``.npy``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from latentmill.exports.formats import ExportFormat, ExportRow, json_list, npy

RESOLUTIONS = (256, 512, 1024, 2048)
"""PixArt-Sigma's, which are in the names of its folders."""


def _moments(row: ExportRow) -> bytes:
    """Mean, then standard deviation, float32 ``[2 * C, h, w]``."""
    import numpy as np

    return npy(np.concatenate([row.raw(), row.raw("latents_std")]))


def _edm2_path(row: ExportRow) -> str:
    number = f"{row.number:08d}"
    return f"{number[:-3]}/img-mean-std-{number}.npy"


def _edm2_note(row: ExportRow) -> Any:
    return [_edm2_path(row), row.columns.get("label")]


def _edm2_finish(notes: Iterator[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    """``labels`` of all rows, or null if one has none: so the trainer has it."""
    labels = list(notes)
    if any(label is None for _, label in labels):
        yield "dataset.json", ['{"labels": null}\n']
    else:
        yield "dataset.json", json_list(map(json.dumps, labels), '{"labels": [', "]}\n")


def _repa_path(row: ExportRow) -> str:
    return f"vae-sd/{_edm2_path(row)}"


def _repa_finish(notes: Iterator[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    for name, text in _edm2_finish(notes, folder):
        yield f"vae-sd/{name}", text


def _pixart_path(row: ExportRow) -> str:
    """Of ``a/b/c.png`` it is ``a/b_c.npy``, in the folder of the resolution that the picture's area is nearest to."""
    side = math.sqrt(math.prod(row.bucket))
    resolution = min(RESOLUTIONS, key=lambda of: abs(math.log(side / of)))
    return f"img_sdxl_vae_features_{resolution}resolution_ms_new/{'_'.join(row.name.rsplit('/', 1))}.npy"


def _pixart_note(row: ExportRow) -> Any:
    width, height = row.original_size
    return {
        "path": row.picture,
        "ratio": height / width,
        "height": height,
        "width": width,
        "prompt": row.prompt,
    }


def _pixart_finish(notes: Iterator[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    items = (json.dumps(note, ensure_ascii=False) for note in notes)
    yield "data_info.json", json_list(items, "[", "]\n")


EDM2 = ExportFormat(
    name="edm2",
    reader="EDM2's training/dataset.py at 4bf8162",
    layout="NNNNN/img-mean-std-NNNNNNNN.npy, mean and std, raw, float32; dataset.json",
    checked="a reader after its loader: names, labels, numbers",
    families=("sd",),
    needs=("latents", "latents_std"),
    files=lambda row: {_edm2_path(row): _moments(row)},
    path=_edm2_path,
    note=_edm2_note,
    finish=_edm2_finish,
)
REPA = replace(
    EDM2,
    name="repa",
    reader="REPA's dataset.py at 67f7145",
    layout="vae-sd/ as edm2; images/ is to be yours, in the same order",
    checked="the same",
    needs=("latents", "latents_std", "label"),
    files=lambda row: {_repa_path(row): _moments(row)},
    path=_repa_path,
    finish=_repa_finish,
)
PIXART = ExportFormat(
    name="pixart",
    reader="PixArt-Sigma's InternalDataMSSigma at 1ce521a",
    layout="img_sdxl_vae_features_Nresolution_ms_new/DIR_STEM.npy, mean and std, raw, float32; data_info.json",
    checked="a reader after its loader: the list, names, numbers",
    families=("sdxl",),
    needs=("latents", "latents_std"),
    names="needed",
    files=lambda row: {_pixart_path(row): _moments(row)},
    path=_pixart_path,
    note=_pixart_note,
    finish=_pixart_finish,
)

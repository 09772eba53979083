"""Research trainers that draw their latents from mean and standard deviation: EDM2, REPA, PixArt. Both raw, in one ``.npy``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from latentmill.errors import ExportError, RowError
from latentmill.exports.formats import ExportFormat, ExportRow, json_list, npy
from latentmill.fields import real, whole

RESOLUTIONS = (256, 512, 1024, 2048)
"""PixArt-Sigma's, which are in the names of its folders."""
MADE_NPY = (".png", ".jpg", ".webp", ".jpeg", ".JPEG", ".JPG")
"""Those that it makes ``.npy`` of, in turn; at older commits the first three alone."""


def _moments(row: ExportRow) -> bytes:
    """Mean, then standard deviation, float32 ``[2 * C, h, w]``."""
    import numpy as np

    return npy(np.concatenate([row.raw(), row.raw("latents_std")]))


def _edm2_path(row: ExportRow) -> str:
    number = f"{row.number:08d}"
    return f"{number[:-3]}/img-mean-std-{number}.npy"


def _edm2_note(row: ExportRow) -> Any:
    return [_edm2_path(row), _label(row)]


def _label(row: ExportRow) -> Any:
    """The number of the row's class, or a vector of numbers, as the trainer makes an array of them. Raises ExportError."""
    label = row.columns.get("label")
    try:
        if isinstance(label, list):
            return [real("label", number) for number in label]
        return None if label is None else whole("label", label)
    except RowError as error:
        raise ExportError(f"row {row.row_id}: {error}; the trainer reads numbers of classes") from error


def _edm2_finish(notes: Iterable[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    """``labels`` of all rows, or null if none has one: so the trainer has it. Raises ExportError if they are not alike."""
    first: dict[str, str] = {}
    for path, label in notes:
        first.setdefault(
            "none" if label is None else f"{len(label)} numbers" if isinstance(label, list) else "a number", path
        )
    if len(first) > 1:
        (one, path), (other, at) = [*first.items()][:2]
        raise ExportError(f"the label of {path} is {one}, and of {at} {other}: give all rows one of a kind, or none")
    if "none" in first:
        yield "dataset.json", ['{"labels": null}\n']
    else:
        yield "dataset.json", json_list(map(json.dumps, notes), '{"labels": [', "]}\n")


def _repa_note(row: ExportRow) -> Any:
    if row.columns.get("label") is None:
        raise ExportError(f"row {row.row_id} has no label: give it one, repa needs one of each row")
    return _edm2_note(row)


def _repa_path(row: ExportRow) -> str:
    return f"vae-sd/{_edm2_path(row)}"


def _repa_finish(notes: Iterable[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    for name, text in _edm2_finish(notes, folder):
        yield f"vae-sd/{name}", text


def _pixart_listed(row: ExportRow) -> str:
    """The picture as the list has it: with one of the suffixes that the trainer, at any commit, makes ``.npy`` of."""
    suffix = os.path.splitext(row.picture)[1]
    return row.name + (suffix if suffix in MADE_NPY[:3] else MADE_NPY[0])


def _pixart_resolution(row: ExportRow) -> int:
    """The one that the area is nearest to."""
    side = math.sqrt(math.prod(row.bucket))
    return min(RESOLUTIONS, key=lambda of: abs(math.log(side / of)))


def _pixart_path(row: ExportRow) -> str:
    """Of ``a/b/c.png`` it is ``a/b_c.npy``, as the trainer makes it of what is listed: each suffix within counts, too."""
    name = "_".join(_pixart_listed(row).rsplit("/", 1))
    for suffix in MADE_NPY:
        name = name.replace(suffix, ".npy")
    return f"img_sdxl_vae_features_{_pixart_resolution(row)}resolution_ms_new/{name}"


def _pixart_note(row: ExportRow) -> Any:
    """The sides are those of the latents: the trainer makes batches of rows whose ratios are nearest to one of its own."""
    width, height = row.bucket
    about = {"path": _pixart_listed(row), "ratio": height / width, "height": height, "width": width}
    return [_pixart_resolution(row), {**about, "prompt": row.prompt}]


def _pixart_finish(notes: Iterable[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    """A list for each resolution, since a trainer of one looks for all that is listed in the folder of that."""
    resolutions = sorted({resolution for resolution, _ in notes})

    def items(of: int) -> Iterator[str]:
        return (json.dumps(item, ensure_ascii=False) for resolution, item in notes if resolution == of)

    for each in resolutions or RESOLUTIONS[:1]:
        yield f"data_info_{each}.json" if resolutions[1:] else "data_info.json", json_list(items(each), "[", "]\n")


EDM2 = ExportFormat(
    name="edm2",
    reader="EDM2's training/dataset.py at 4bf8162",
    layout="NNNNN/img-mean-std-NNNNNNNN.npy, mean and std, raw, float32; dataset.json",
    checked="a reader after its loader: names, labels, numbers",
    families=("sd",),
    needs=("latents", "latents_std"),
    one_size=True,
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
    note=_repa_note,
    finish=_repa_finish,
)
PIXART = ExportFormat(
    name="pixart",
    reader="PixArt-Sigma's InternalDataMSSigma at 1ce521a",
    layout="img_sdxl_vae_features_Nresolution_ms_new/DIR_STEM.npy, mean and std, raw, float32; data_info.json, or of several "
    "resolutions data_info_N.json",
    checked="a reader after its loader: the list, names, numbers",
    families=("sdxl",),
    needs=("latents", "latents_std"),
    names="needed",
    files=lambda row: {_pixart_path(row): _moments(row)},
    path=_pixart_path,
    note=_pixart_note,
    finish=_pixart_finish,
)

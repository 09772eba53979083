"""Megatron Energon: tars of WebDataset's kind, with latents as tensors of torch."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentmill.exports.formats import ExportFormat, ExportRow, jsonable, pt


class EnergonShard:
    """``ROW_ID.pth`` and ``ROW_ID.json`` of each row."""

    def __init__(self, shard: int, folder: Path) -> None:
        self.path = folder / f"shard_{shard:06d}.tar"
        self.notes: list[Any] = []
        self.tar = tarfile.open(self.path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # open until it is closed

    def add(self, row: ExportRow) -> None:
        about = {name: jsonable(value) for name, value in row.columns.items()}
        self._add(f"{row.row_id}.pth", pt(row.tensors["latents"]))
        self._add(f"{row.row_id}.json", json.dumps(about, ensure_ascii=False).encode())

    def close(self) -> Mapping[str, Path]:
        self.tar.close()
        return {self.path.name: self.path}

    def _add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)  # of 1970, by nobody
        info.size = len(content)
        self.tar.addfile(info, io.BytesIO(content))


ENERGON = ExportFormat(
    name="energon",
    reader="Megatron Energon, once its `energon prepare` has been run; DFM's task encoders at 7cb7634 want encoded text, too",
    layout="shard_NNNNNN.tar: ROW_ID.pth, a tensor [C, h, w], scaled, as stored; ROW_ID.json, all other columns",
    checked="webdataset, and torch.load(weights_only=True): keys, columns, numbers; by hand with megatron-energon 7.4.1",
    shard=EnergonShard,
)

"""MosaicML's Streaming: one MDS file a shard, and their index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from latentmill.errors import RunError
from latentmill.exports.formats import ExportFormat, ExportRow

MDS_COLUMNS = {
    "caption": "str",
    "height": "int",
    "id": "str",
    "latents": "bytes",
    "latents_shape": "json",
    "width": "int",
}
"""In the order in which a sample has them: by name."""
MDS_HEADER = {
    "column_encodings": [*MDS_COLUMNS.values()],
    "column_names": [*MDS_COLUMNS],
    "column_sizes": [8 if encoding == "int" else None for encoding in MDS_COLUMNS.values()],
    "compression": None,
    "format": "mds",
    "hashes": [],
    "size_limit": None,
    "version": 2,
}


class MDSShard:
    """Numbers are uint32, little-endian: how many samples; where each begins, and the last one ends; MDS_HEADER; then the samples.

    A sample is the sizes of those of its columns that have no fixed one, and then all columns.
    """

    def __init__(self, shard: int, folder: Path) -> None:
        self.name = f"shard.{shard:05d}.mds"
        self.folder, self.sizes = folder, list[int]()
        self.notes: list[Any] = []
        self.samples: BinaryIO = (folder / "samples").open("wb")

    def add(self, row: ExportRow) -> None:
        import numpy as np

        latents = row.half().numpy()
        width, height = row.bucket
        values: dict[str, Any] = {"caption": row.prompt, "id": row.row_id, "width": width, "height": height}
        values |= {"latents": latents.tobytes(), "latents_shape": list(latents.shape)}
        data = [_encoded(encoding, values[name]) for name, encoding in MDS_COLUMNS.items()]
        sizes = [len(each) for each, encoding in zip(data, MDS_COLUMNS.values()) if encoding != "int"]
        self.sizes.append(self.samples.write(b"".join([np.array(sizes, "<u4").tobytes(), *data])))

    def close(self) -> Mapping[str, Path]:
        import numpy as np

        self.samples.close()
        if not self.sizes:
            return {}
        header = json.dumps(MDS_HEADER, sort_keys=True).encode()
        places = np.array([0, *self.sizes], np.int64).cumsum() + 4 * (2 + len(self.sizes)) + len(header)
        if places[-1] >= 1 << 32:
            raise RunError(f"mds: {self.name} would be of 4 GiB or more, which MDS can't be: make fewer rows_per_shard")
        path = self.folder / self.name
        with path.open("wb") as file, (self.folder / "samples").open("rb") as samples:
            file.write(np.array([len(self.sizes), *places], "<u4").tobytes() + header)
            shutil.copyfileobj(samples, file)
        about = {"basename": self.name, "bytes": int(places[-1]), "hashes": {}}
        self.notes = [{**MDS_HEADER, "raw_data": about, "samples": len(self.sizes), "zip_data": None}]
        return {self.name: path}


def _encoded(encoding: str, value: Any) -> bytes:
    if encoding == "int":
        return int(value).to_bytes(8, "little", signed=True)
    return value if isinstance(value, bytes) else (value if encoding == "str" else json.dumps(value)).encode()


def _finish(notes: Iterable[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    yield "index.json", [json.dumps({"shards": list(notes), "version": 2}, sort_keys=True)]


MDS = ExportFormat(
    name="mds",
    reader="MosaicML's StreamingDataset",
    layout="shard.NNNNN.mds: id, caption, width, height, latents (scaled, float16, as bytes), latents_shape; index.json",
    checked="a reader after its own: columns, numbers, index; by hand with mosaicml-streaming 0.13.0",
    shard=MDSShard,
    finish=_finish,
)

"""FastVideo's Parquet, of pictures as clips of one frame, without text encodings yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentmill.exports.formats import ExportFormat, ExportRow

GROUP_ROWS = 64
"""In a row group."""


class FastVideoShard:
    """The schema t2v. Its reader takes all tensors for float32, whatever ``dtype`` says; an empty text embedding is none."""

    def __init__(self, shard: int, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def tensor(name: str) -> list[Any]:
            types = ("bytes", pa.binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string())
            return [(f"{name}_{of}", type) for of, type in types]

        texts = [(name, pa.string()) for name in ("file_name", "caption", "media_type")]
        numbers = [(name, pa.int64()) for name in ("width", "height", "num_frames")]
        times = [(name, pa.float64()) for name in ("duration_sec", "fps")]
        columns = [("id", pa.string()), *tensor("vae_latent"), *tensor("text_embedding"), *texts, *numbers, *times]
        self.path = folder / f"{shard:05d}.parquet"
        self.notes: list[Any] = []
        self.rows: list[dict[str, Any]] = []
        self.schema = pa.schema(columns)
        self.file = pq.ParquetWriter(self.path, self.schema)

    def add(self, row: ExportRow) -> None:
        latents = row.raw()[:, None]
        width, height = row.bucket
        about = {"id": row.row_id, "file_name": row.picture, "caption": row.prompt, "media_type": "image"}
        stored = {"vae_latent_bytes": latents.tobytes(), "vae_latent_shape": list(latents.shape)}
        text = {"text_embedding_bytes": b"", "text_embedding_shape": [], "text_embedding_dtype": "float32"}
        size = {"width": width, "height": height, "num_frames": 1, "duration_sec": 0.0, "fps": 0.0}
        self.rows.append({**about, **stored, "vae_latent_dtype": "float32", **text, **size})
        if len(self.rows) == GROUP_ROWS:
            self._write()

    def close(self) -> Mapping[str, Path]:
        self._write()
        self.file.close()
        return {f"combined_parquet_dataset/{self.path.name}": self.path}

    def _write(self) -> None:
        import pyarrow as pa

        if self.rows:
            self.file.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []


FASTVIDEO = ExportFormat(
    name="fastvideo",
    reader="FastVideo's dataset/utils.py at 2f3d407, schema t2v",
    layout="combined_parquet_dataset/NNNNN.parquet: vae_latent_{bytes, shape, dtype} [C, 1, h, w], raw, float32; the text embedding is empty",
    checked="a reader after its loader: columns, numbers",
    families=("wan",),
    shard=FastVideoShard,
)

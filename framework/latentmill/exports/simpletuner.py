"""SimpleTuner's cache of latents."""

from __future__ import annotations

from hashlib import sha256

from latentmill.exports.formats import ExportFormat, ExportRow, pt


def _path(row: ExportRow) -> str:
    """Of the picture's name, without folder and suffix, the hash; the folders are the pictures'."""
    folder, slash, stem = row.name.rpartition("/")
    return f"{folder}{slash}{sha256(stem.encode()).hexdigest()}.pt"


SIMPLETUNER = ExportFormat(
    name="simpletuner",
    reader="SimpleTuner's caching/vae.py at bc8e6ab, with hash_filenames",
    layout="DIR/SHA256(STEM).pt: a tensor [C, h, w], scaled, as stored",
    checked="torch.load(weights_only=True): names, types, numbers",
    families=("sd", "sdxl", "sd3", "flux"),
    names="needed",
    apart=True,
    files=lambda row: {_path(row): pt(row.tensors["latents"])},
    path=_path,
)

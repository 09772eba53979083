"""musubi-tuner: a safetensors file for each picture, all in one folder."""

from __future__ import annotations

from collections.abc import Callable

from latentmill.exports.formats import ExportFormat, ExportRow, safetensors_file


def _path_of(short: str) -> Callable[[ExportRow], str]:
    def path(row: ExportRow) -> str:
        """It knows pictures by their names alone, whatever folder they are in."""
        width, height = row.original_size
        return f"{row.name.rpartition('/')[2]}_{width:04d}x{height:04d}_{short}.safetensors"

    return path


def _content(row: ExportRow, architecture: str, scaled: bool, frames: bool) -> bytes:
    """``frames``: with an axis of one frame, ``[C, 1, h, w]``; where the trainer's latents have none, the key says 1 all the same."""
    import torch

    latents = row.tensors["latents"] if scaled else torch.from_numpy(row.raw())
    key = f"latents_1x{latents.shape[-2]}x{latents.shape[-1]}_{str(latents.dtype).removeprefix('torch.')}"
    width, height = row.original_size
    about = {"architecture": architecture, "width": str(width), "height": str(height), "format_version": "1.0.1"}
    return safetensors_file({key: latents[:, None] if frames else latents}, about)


def _format(
    model: str, short: str, architecture: str, family: str, scaled: bool = True, frames: bool = True
) -> ExportFormat:
    path = _path_of(short)
    return ExportFormat(
        name=f"musubi-{model}",
        reader="musubi-tuner at 30c658c",
        layout=f"STEM_WWWWxHHHH_{short}.safetensors: latents_1xhxw_DTYPE [C{', 1' * frames}, h, w], "
        f"{'scaled, as stored' if scaled else 'raw, float32'}",
        checked="safetensors, and what its loader makes of names and keys: metadata, types, numbers",
        families=(family,),
        names="needed",
        apart=True,
        sized=True,
        files=lambda row: {path(row): _content(row, architecture, scaled, frames)},
        path=path,
    )


# Not FLUX Kontext (fk): its trainer needs the latents of a control picture, too, and a dataset of ours has one picture a row.
MUSUBI = (
    _format("qwen-image", "qi", "qwen_image", "wan"),
    _format("krea2", "kr2", "krea2", "wan"),
    _format("wan", "wan", "wan", "wan"),
    _format("z-image", "zi", "z_image", "flux", scaled=False, frames=False),
)

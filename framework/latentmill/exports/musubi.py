"""musubi-tuner: a safetensors file for each picture, all in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from latentmill.exports.formats import ExportFormat, ExportRow, safetensors_file
from latentmill.exports.texts import TEXT_FAMILIES

if TYPE_CHECKING:  # to list formats takes none of them
    from torch import Tensor


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


def _text_format(model: str, short: str, architecture: str, family: str, keys: Mapping[str, str]) -> ExportFormat:
    """``keys``: what the trainer calls the encodings, with the dtype behind, and ours."""

    def path(row: ExportRow) -> str:
        return f"{row.name.rpartition('/')[2]}_{short}_te.safetensors"

    def files(row: ExportRow) -> Mapping[str, bytes]:
        found: dict[str, Tensor] = {}
        for key, column in keys.items():
            tensor = row.embeds if column == "prompt:embeds" else row.tensors[column]
            found[f"{key}_{str(tensor.dtype).removeprefix('torch.')}"] = tensor
        about = {"architecture": architecture, "caption1": row.prompt, "format_version": "1.0.1"}
        return {path(row): safetensors_file(found, about)}

    shapes = TEXT_FAMILIES[family].shapes
    return ExportFormat(
        name=f"musubi-{model}-text",
        reader="musubi-tuner at 30c658c",
        layout=f"STEM_{short}_te.safetensors: {', '.join(f'{key}_DTYPE' for key in keys)}, as stored"
        f"{', of as many tokens as the prompt has' if 'length' in shapes else ''}",
        checked="safetensors, and what its loader makes of names and keys: metadata, types, numbers",
        needs=("prompt:embeds",),
        takes=tuple(f"prompt:{name}" for name in shapes if name != "embeds"),
        texts=(TEXT_FAMILIES[family],),
        beside=f"musubi-{model}",
        names="needed",
        apart=True,
        files=files,
        path=path,
    )


MUSUBI_TEXTS = (
    _text_format("qwen-image", "qi", "qwen_image", "qwen-image", {"varlen_vl_embed": "prompt:embeds"}),
    _text_format("z-image", "zi", "z_image", "z-image", {"varlen_llm_embed": "prompt:embeds"}),
    _text_format(
        "flux-kontext",
        "fk",
        "flux_kontext",
        "flux",
        {"t5_vec": "prompt:embeds", "clip_l_pooler": "prompt:pooled"},
    ),
)

"""sd-scripts: a ``.npz`` beside each picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from latentmill.buckets import kohya_crop
from latentmill.exports.formats import ExportFormat, ExportRow
from latentmill.exports.texts import TEXT_FAMILIES

if TYPE_CHECKING:  # to list formats takes none of them
    import numpy.typing as npt
    from torch import Tensor


def _path_of(suffix: str) -> Callable[[ExportRow], str]:
    def path(row: ExportRow) -> str:
        width, height = row.original_size
        return f"{row.name}_{width:04d}x{height:04d}{suffix}"

    return path


def _npz(row: ExportRow, scaled: bool, plain: bool) -> bytes:
    """Keys with the latents' height and width behind, so that one file holds several; ``plain``: and without.

    Of Stable Diffusion 1, 2 and XL the trainer of the table reads keys without; later ones, with, first.
    """
    import numpy as np

    of = row.scaled if scaled else row.raw
    latents = of()
    found = {"latents": latents, "original_size": np.array(row.original_size, np.int64)}
    found["crop_ltrb"] = np.array(kohya_crop(row.bucket, row.original_size), np.float64)
    if "latents_flipped" in row.tensors:
        found["latents_flipped"] = of("latents_flipped")
    size = f"_{latents.shape[-2]}x{latents.shape[-1]}"
    arrays: dict[str, Any] = found if plain else {}
    arrays |= {name + size: value for name, value in found.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _format(model: str, family: str, scaled: bool = False, plain: bool = False) -> ExportFormat:
    path = _path_of(f"_{model}.npz")
    return ExportFormat(
        name=f"kohya-{model}",
        reader="sd-scripts at 48d368f",
        layout=f"DIR/STEM_WWWWxHHHH_{model}.npz, {'scaled' if scaled else 'raw'}, float32: latents, original_size, crop_ltrb, "
        f"latents_flipped; keys with _hxw{' and without' if plain else ''}",
        checked="a reader after its loader: names, keys, types, numbers",
        families=(family,),
        takes=("latents_flipped",),
        names="needed",
        apart=True,
        sized=True,
        files=lambda row: {path(row): _npz(row, scaled, plain)},
        path=path,
    )


def _text_path(row: ExportRow) -> str:
    return f"{row.name}_te_outputs.npz"


def _text(row: ExportRow) -> Mapping[str, bytes]:
    """``embeds`` is what the two text encoders made, one behind the other; numpy has no bfloat16."""
    import numpy as np
    import torch

    def array(tensor: Tensor) -> npt.NDArray[Any]:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    first, second = row.embeds.split([768, 1280], dim=-1)
    pooled, buffer = array(row.tensors["prompt:pooled"]), io.BytesIO()
    np.savez(buffer, hidden_state1=array(first), hidden_state2=array(second), pool2=pooled)
    return {_text_path(row): buffer.getvalue()}


KOHYA_TEXT = ExportFormat(
    name="kohya-sdxl-text",
    reader="sd-scripts at 48d368f, without max_token_length and weighted_captions",
    layout="DIR/STEM_te_outputs.npz: hidden_state1 [77, 768], hidden_state2 [77, 1280], pool2 [1280], as stored, bfloat16 as float32",
    checked="a reader after its loader: names, keys, types, numbers",
    needs=("prompt:embeds",),
    takes=("prompt:pooled",),
    texts=(TEXT_FAMILIES["sdxl"],),
    beside="kohya-sdxl",
    names="needed",
    apart=True,
    files=_text,
    path=_text_path,
)

KOHYA = (
    _format("sd", "sd", plain=True),
    _format("sdxl", "sdxl", plain=True),
    _format("sd3", "sd3"),
    _format("flux", "flux", scaled=True),
    _format("lumina", "flux", scaled=True),
)

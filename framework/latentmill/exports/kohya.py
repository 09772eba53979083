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


def _sdxl_text(row: ExportRow) -> dict[str, Any]:
    first, second = row.embeds.split([768, 1280], dim=-1)
    return {"hidden_state1": first, "hidden_state2": second, "pool2": row.tensors["prompt:pooled"]}


def _sd3_text(row: ExportRow) -> dict[str, Any]:
    """The pipeline has CLIP's two, filled up with zeros, before T5's."""
    clip, t5 = row.embeds.split([77, 256])
    arrays = {"lg_out": clip[:, :2048], "lg_pooled": row.tensors["prompt:pooled"], "t5_out": t5}
    return arrays | _masks(clip_l_attn_mask=77, clip_g_attn_mask=77, t5_attn_mask=256)


def _flux_text(row: ExportRow) -> dict[str, Any]:
    import numpy as np

    t5 = row.embeds
    arrays = {"l_pooled": row.tensors["prompt:pooled"], "t5_out": t5, "txt_ids": np.zeros((len(t5), 3), np.float32)}
    return arrays | _masks(t5_attn_mask=len(t5))


def _lumina_text(row: ExportRow) -> dict[str, Any]:
    """The trainer loads token ids, and nothing reads them then."""
    import numpy as np

    mask = row.tensors["prompt:mask"].long()
    return {"hidden_state": row.embeds.float(), "attention_mask": mask, "input_ids": np.zeros(len(mask), np.int64)}


def _masks(**tokens: int) -> dict[str, Any]:
    """Masks of encodings that were made without, as our pipelines make them: with ``apply_*`` False the trainer takes them for valid only
    where it was told to apply none, and then drops the masks.
    """
    import numpy as np

    apply = {"apply_t5_attn_mask": False, **({"apply_lg_attn_mask": False} if "clip_l_attn_mask" in tokens else {})}
    return {**{name: np.ones(count, np.int64) for name, count in tokens.items()}, **apply}


def _text_format(
    model: str, family: str, suffix: str, layout: str, arrays: Callable[[ExportRow], dict[str, Any]], only: str
) -> ExportFormat:
    """``only``: with which of its settings the trainer reads it."""

    def path(row: ExportRow) -> str:
        return f"{row.name}_{suffix}.npz"

    def files(row: ExportRow) -> Mapping[str, bytes]:
        import numpy as np

        buffer = io.BytesIO()
        found: dict[str, Any] = {name: _array(value) for name, value in arrays(row).items()}
        np.savez(buffer, **found)
        return {path(row): buffer.getvalue()}

    return ExportFormat(
        name=f"kohya-{model}-text",
        reader=f"sd-scripts at 48d368f, {only}",
        layout=f"DIR/STEM_{suffix}.npz: {layout}",
        checked="a reader after its loader: names, keys, types, numbers",
        needs=("prompt:embeds",),
        takes=tuple(f"prompt:{name}" for name in TEXT_FAMILIES[family].shapes if name != "embeds"),
        texts=(TEXT_FAMILIES[family],),
        beside=f"kohya-{model}",
        names="needed",
        apart=True,
        files=files,
        path=path,
    )


def _array(value: Any) -> npt.NDArray[Any]:
    """A tensor or array as numpy has it, which has no bfloat16."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


KOHYA_TEXTS = (
    _text_format(
        "sdxl",
        "sdxl",
        "te_outputs",
        "hidden_state1 [77, 768], hidden_state2 [77, 1280], pool2 [1280], as stored, bfloat16 as float32",
        _sdxl_text,
        "without max_token_length and weighted_captions",
    ),
    _text_format(
        "sd3",
        "sd3",
        "sd3_te",
        "lg_out [77, 2048], lg_pooled [2048], t5_out [256, 4096], as stored, bfloat16 as float32; masks of ones, which are not applied",
        _sd3_text,
        "without apply_lg_attn_mask and apply_t5_attn_mask",
    ),
    _text_format(
        "flux",
        "flux",
        "flux_te",
        "l_pooled [768], t5_out [512, 4096], as stored, bfloat16 as float32; txt_ids of zeros; a mask of ones, which is not applied",
        _flux_text,
        "without apply_t5_attn_mask",
    ),
    _text_format(
        "lumina",
        "lumina-2",
        "lumina_te",
        "hidden_state [256, 2304], float32; attention_mask [256]; input_ids of zeros, which training doesn't read",
        _lumina_text,
        "with the system_prompt of the job's pipeline",
    ),
)

KOHYA = (
    _format("sd", "sd", plain=True),
    _format("sdxl", "sdxl", plain=True),
    _format("sd3", "sd3"),
    _format("flux", "flux", scaled=True),
    _format("lumina", "flux", scaled=True),
)

"""NeMo AutoModel's cache of pictures and what text encoders made of their prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from latentmill.exports.formats import TEXTS, ExportFormat, ExportRow, json_list, pt
from latentmill.exports.texts import TEXT_FAMILIES

ITEMS = 10_000
"""In a file of the list."""
TEXT_OF = {"flux": TEXT_FAMILIES["flux"], "wan": TEXT_FAMILIES["qwen-image"]}
"""By the VAE's family, whose encodings of prompts belong to its latents."""


def _path(row: ExportRow) -> str:
    width, height = row.bucket
    return f"{width}x{height}/{row.row_id}.pt"


def _about(row: ExportRow) -> dict[str, Any]:
    width, height = row.bucket
    return {
        "image_path": row.picture,
        "bucket_resolution": [width, height],
        "original_resolution": list(row.original_size),
        "prompt": row.prompt,
        "bucket_id": f"{width}x{height}",
        "aspect_ratio": width / height,
    }


def _files(row: ExportRow) -> Mapping[str, bytes]:
    about = {"crop_offset": list(row.crop_offset), **_about(row)}
    return {_path(row): pt({"latent": row.half(), **_text(row), **about})}


def _text(row: ExportRow) -> Mapping[str, Any]:
    """With the axis of a batch of one, and bfloat16 whatever is stored, as the trainer's own preprocessing has it."""
    import torch

    if row.text is None or row.family is None or row.text is not TEXT_OF.get(row.family.name):
        return {}
    found = {"prompt_embeds": row.embeds}
    if "prompt:pooled" in row.tensors:
        found["pooled_prompt_embeds"] = row.tensors["prompt:pooled"]
    return {name: tensor[None].to(torch.bfloat16) for name, tensor in found.items()}


def _note(row: ExportRow) -> Any:
    return {"cache_file": _path(row), **_about(row)}


def _finish(notes: Iterable[Any], folder: str) -> Iterable[tuple[str, Iterable[str]]]:
    """The reader takes files only below the folder that it is given, by paths that are absolute or of where it is started."""
    shards, items, left = list[str](), 0, iter(notes)
    while some := list(islice(left, ITEMS)):
        shards.append(f"metadata_shard_{len(shards):04d}.json")
        items += len(some)
        lines = (json.dumps({**note, "cache_file": folder + note["cache_file"]}, ensure_ascii=False) for note in some)
        yield shards[-1], json_list(lines, "[", "]\n")
    about = {"processor": "latentmill", "total_items": items, "num_shards": len(shards), "shard_size": ITEMS}
    yield "metadata.json", [json.dumps({**about, "shards": shards}, indent=1) + "\n"]


AUTOMODEL_CACHE = ExportFormat(
    name="automodel",
    reader="NeMo AutoModel's TextToImageDataset at 36044ad",
    layout="WxH/ROW_ID.pt: latent [C, h, w], scaled, float16, and what is known of the row; of FLUX.1 and Qwen-Image, with encodings "
    "stored, prompt_embeds [1, tokens, width] and pooled_prompt_embeds [1, 768], bfloat16; metadata.json, metadata_shard_NNNN.json",
    checked="torch.load(weights_only=True), and a reader after its loader: lists, types, numbers",
    families=("flux", "wan"),
    takes=TEXTS,
    texts=(*TEXT_OF.values(),),
    crops=True,
    files=_files,
    path=_path,
    note=_note,
    finish=_finish,
)

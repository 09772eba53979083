"""SimpleTuner's caches of latents and of text."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import md5, sha256

from latentmill.exports.formats import ExportFormat, ExportRow, pt
from latentmill.exports.texts import TEXT_FAMILIES


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


def _text_path(row: ExportRow) -> str:
    """Of the caption the hash, and the model's family."""
    return f"{md5(row.prompt.encode(), usedforsecurity=False).hexdigest()}-sdxl.pt"


def _text(row: ExportRow) -> Mapping[str, bytes]:
    """The embeds are a batch of one, and the pooled ones are not."""
    return {
        _text_path(row): pt({"prompt_embeds": row.embeds[None], "pooled_prompt_embeds": row.tensors["prompt:pooled"]})
    }


SIMPLETUNER_TEXT = ExportFormat(
    name="simpletuner-sdxl-text",
    reader="SimpleTuner's caching/text_embeds.py at bc8e6ab",
    layout="MD5(PROMPT)-sdxl.pt, one a prompt: prompt_embeds [1, 77, 2048], pooled_prompt_embeds [1280], as stored",
    checked="torch.load(weights_only=True): names, types, numbers",
    needs=("prompt:embeds",),
    takes=("prompt:pooled",),
    texts=(TEXT_FAMILIES["sdxl"],),
    of_prompts=True,
    files=_text,
    path=_text_path,
)

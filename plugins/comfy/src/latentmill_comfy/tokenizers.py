"""CLIP's and T5's tokenizers, which no model file holds: in a folder, beside ComfyUI's models, or in the Hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentmill_diffusers.loading import require_words

HUB = {
    "clip": ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),
    "t5": ("google/t5-v1_1-xxl", "3db67ab1af984cf10548a73467f0e5bca2aaaeb2"),
}
"""Where ComfyUI's are from."""
BESIDE_MODELS = {"clip": "comfy/sd1_tokenizer", "t5": "comfy/text_encoders/t5_tokenizer"}
"""Where an installed ComfyUI has them, from the folder that its models are in."""
CLASSES = {"clip": ("CLIPTokenizer",), "t5": ("T5Tokenizer",)}
SMALL = (".json", ".txt", ".model")


def find(kind: str, folder: str | None, models: Path) -> Path:
    """The folder of a tokenizer, ``clip`` or ``t5``. Nothing is downloaded. Raises ValueError."""
    if folder is not None:
        root = Path(folder).expanduser()
        inside = [root, *sorted(path for path in root.glob("*/") if path.is_dir()), *sorted(root.glob("*/*/"))]
        for path in inside:
            if _is(kind, path):
                return path
        raise ValueError(f"text_encoder.tokenizers: {root} has no tokenizer of {kind.upper()}'s in it")
    beside = models.parent / BESIDE_MODELS[kind]
    if _is(kind, beside):
        return beside
    name, revision = HUB[kind]
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[f"*{s}" for s in SMALL])
        )
    except Exception as error:  # the cache has many ways to say that it hasn't it
        raise ValueError(
            f"there is no tokenizer of {kind.upper()}'s: neither {beside}, nor {name} at {revision} in the Hub's cache. "
            f"Give text_encoder.tokenizers, a folder with it, or `hf download {name} --revision {revision} --include '*.json' '*.txt' '*.model'`"
        ) from error


def files(folder: Path) -> list[Path]:
    """What a tokenizer is made of."""
    return sorted(path for path in folder.iterdir() if path.suffix in SMALL and "model.safetensors" not in path.name)


def load(folder: Path, kind: str) -> Any:
    """The tokenizer itself."""
    from transformers import CLIPTokenizer, T5Tokenizer

    tokenizer = (CLIPTokenizer if kind == "clip" else T5Tokenizer).from_pretrained(folder)
    require_words(tokenizer, folder)
    return tokenizer


def _is(kind: str, folder: Path) -> bool:
    about = folder / "tokenizer_config.json"
    if not about.is_file():
        return False
    try:
        named = json.loads(about.read_text(encoding="utf-8")).get("tokenizer_class", "")
    except (OSError, ValueError, AttributeError):
        return False
    return str(named).removesuffix("Fast") in CLASSES[kind]

"""The small files of a model's folder: its index, and the configs of its parts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_INDEX = "model_index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file. Raises ValueError, naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def completed(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of diffusers, with the class's defaults for what an old one leaves out."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **config}


def downscale_of(config: dict[str, Any]) -> int:
    """Pixels of the picture per latent pixel, on each side, by a VAE's config."""
    if "temperal_downsample" in config:
        return int(2 ** len(config["temperal_downsample"]) * (config.get("patch_size") or 1))
    for name in ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels"):
        if name in config:
            return int(2 ** (len(config[name]) - 1))
    raise ValueError(f"{config.get('_class_name')} is no autoencoder of pictures")


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """A part's config, in a model's folder. Raises ValueError if there is none."""
    for name in ("config.json", "scheduler_config.json"):
        if (folder / part / name).is_file():
            return read_json(folder / part / name)
    raise ValueError(f"{folder / part} holds no config.json: the download is not complete, or it is another folder")

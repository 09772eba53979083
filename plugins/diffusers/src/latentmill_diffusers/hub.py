"""The local folder of a model, and how one comes from the Hugging Face Hub.

The framework fetches what a URL names (``hf://``, ``s3://`` and the like); here is said which files of it. ``org/name`` is fetched here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from latentmill.plugin import WeightsPath
from latentmill_diffusers.configs import MODEL_INDEX, read_json

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that no job asks for."""
WEIGHED = ("text_encoder", "unet", "transformer", "vae")
"""How the names of parts begin that have weights: others may have such."""
SMALL = (".json", ".txt", ".model", ".jinja")
"""How the names of configs, tokenizers and templates of prompts end."""


def weights_of(*parts: str) -> WeightsPath:
    """Marks the setting ``path`` of a plugin that reads the weights of parts whose names begin so; "" stands for all."""
    return WeightsPath(files=_read_by(parts), loads_late=True)


def _read_by(parts: tuple[str, ...]) -> Callable[[Sequence[str]], list[str]]:
    def wanted(names: Sequence[str]) -> list[str]:
        """Small files, and the weights of the parts; where there is no index, the folder is a part's own."""
        found = [PurePosixPath(name) for name in names]
        weights = [path for path in found if path.suffix == ".safetensors" and ".non_ema" not in path.name]
        if MODEL_INDEX in names:
            weights = [path for path in weights if len(path.parts) > 1 and path.parts[0].startswith(parts)]
            weights = [path for path in weights if path.parts[0] not in UNUSED]
        whole = {path.parent for path in weights if ".fp16" not in path.name}
        kept = [path for path in weights if ".fp16" not in path.name or path.parent not in whole]
        return [str(path) for path in found if path.suffix in SMALL] + [str(path) for path in kept]

    return wanted


def locate(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model, downloaded first, with or without weights, where ``path`` is ``org/name``. Raises ValueError."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ValueError(f"there is no folder {path}, and it is no org/name of the Hugging Face Hub either")
    if revision is None:
        raise ValueError(
            f"there is no folder {path}; for the Hub's model of that name give model.revision too, a commit, so that it stays the same"
        )
    return _from_hub(path, revision, weights)


@cache
def _from_hub(repository: str, revision: str, weights: bool) -> Path:
    try:
        return _snapshot(repository, revision, weights, local_files_only=True)
    except Exception:  # not here yet: the cache has many ways to say so
        pass
    try:
        return _snapshot(repository, revision, weights, local_files_only=False)
    except Exception as error:  # the network's, the Hub's
        raise ValueError(
            f"{repository} at {revision} is not in the local cache and can't be downloaded ({type(error).__name__}): "
            f"`hf download {repository} --revision {revision}` where there is a network, or give a folder as model.path"
        ) from error


def _snapshot(repository: str, revision: str, weights: bool, local_files_only: bool) -> Path:
    """The folder, with small files and, if asked for, the weights of the parts: beside them many a repository has the same again.

    That is in one file, in other formats, or in halves; halves are taken where there is nothing else.
    """
    from huggingface_hub import constants, snapshot_download

    wanted: dict[str, Any] = {"repo_id": repository, "revision": revision, "local_files_only": local_files_only}
    folder = Path(snapshot_download(**wanted, allow_patterns=[f"*{suffix}" for suffix in SMALL]))
    if not weights:
        return folder
    index = read_json(folder / MODEL_INDEX) if (folder / MODEL_INDEX).is_file() else {}
    parts = [n for n, value in index.items() if isinstance(value, list) and None not in value and n not in UNUSED]
    needed = [f"{name}/*.safetensors" for name in parts] or ["*.safetensors"]
    snapshot_download(**wanted, allow_patterns=needed, ignore_patterns=["*.fp16*", "*.non_ema*"])
    if local_files_only or constants.HF_HUB_OFFLINE:
        _require_complete(folder, [p for p in needed if p.startswith((*WEIGHED, "*"))])
    halves = [pattern.replace("*.", "*.fp16*") for pattern in needed if not any(folder.glob(pattern))]
    if halves:
        snapshot_download(**wanted, allow_patterns=halves)
    return folder


def _require_complete(folder: Path, needed: list[str]) -> None:
    """Raise ValueError unless the folder of a cache has what a model needs: others put single parts of models there."""
    if not any((folder / name).is_file() for name in (MODEL_INDEX, "config.json")):
        raise ValueError(f"{folder} has no {MODEL_INDEX}")
    for pattern in needed:
        if not any(folder.glob(pattern)):
            raise ValueError(f"{folder} has no {pattern}")
        for index in folder.glob(f"{pattern}.index.json"):
            for name in set(read_json(index)["weight_map"].values()):
                if not (index.parent / name).is_file():
                    raise ValueError(f"{index.parent} has no {name}")

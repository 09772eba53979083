"""Where files lie in ComfyUI's models folder, by the kind and the name that a workflow says."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from latentmill.text import near

SUBFOLDERS = {
    "checkpoints": ("checkpoints",),
    "unet": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoders": ("text_encoders", "clip"),
    "loras": ("loras",),
    "embeddings": ("embeddings",),
    "upscale_models": ("upscale_models",),
}
"""The folders of each kind, the newer name first."""


def find(models: str, kind: str, name: str) -> Path:
    """The file ``name`` of a kind below ``models``; subfolders in it may be parted as on Windows. Or ``name`` itself, if it is a whole path.

    Raises ValueError, saying what was looked for and what is nearest, if there is none.
    """
    plain = Path(name.replace("\\", "/")).expanduser()
    if plain.is_absolute():
        with suppress(OSError):
            if plain.is_file():
                return plain
        raise ValueError(f"there is no file {name}")
    if not models:
        raise ValueError(f"{name} lies in ComfyUI's models folder: give model.models, or the file's whole path")
    roots = [Path(models).expanduser() / folder for folder in SUBFOLDERS[kind]]
    if not any(root.is_dir() for root in roots):
        raise ValueError(
            f"{models} holds no folder {' or '.join(SUBFOLDERS[kind])}: ComfyUI's models folder is expected"
        )
    if ".." in plain.parts:
        raise ValueError(f"{name} leads out of ComfyUI's folder of {kind}")
    with suppress(OSError):  # a name that is too long for a file
        for root in roots:
            if (root / plain).is_file():
                return root / plain
    there = sorted(str(path.relative_to(root)) for root in roots for path in root.rglob("*") if path.is_file())
    raise ValueError(f"{models} holds no {SUBFOLDERS[kind][0]}/{name}{near(name, there)}")

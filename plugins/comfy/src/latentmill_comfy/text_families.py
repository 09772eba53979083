"""What ComfyUI makes of the text encoders of each family: which layer, which padding, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from latentmill_comfy.tokens import Filling, TokenChunk

CLIP_L, CLIP_G, WIDEST = 768, 1280, 4096
"""Channels of the text encoders that Stable Diffusion 3 was trained with: what is missing is zeros of this many."""
CHUNK_TOKENS = 77

EncodedParts = Mapping[str, "tuple[Tensor, Tensor]"]
"""Of each text encoder that was asked: hidden states ``[L, width]`` and pooled ``[P]``."""


@dataclass(frozen=True)
class Encoder:
    """How one text encoder is read."""

    filling: Filling
    layer: int | None = None
    """None: the last."""
    norm: bool = True
    """Whether a layer other than the last goes through the final norm."""
    projects: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    encoders: Mapping[str, Encoder]
    join: Callable[[EncodedParts], tuple[Tensor, Tensor | None]]
    longest: int
    """Tokens that a text may come to, unless the job says."""
    some: bool = False
    """Whether some of the text encoders are enough."""
    scores: tuple[float, float] | None = None
    """What the network is told of a picture's beauty: of the prompt's, and of the negative prompt's."""

    def shortest(self, parts: Sequence[str]) -> int:
        """Tokens that a text comes to at least, with these text encoders."""
        clips = CHUNK_TOKENS if any(part.startswith("clip") for part in parts) and self.join is not flux else 0
        return clips + (self.encoders["t5xxl"].filling.least if "t5xxl" in parts else 0) or CHUNK_TOKENS


def first(part: str, pooled: bool) -> Callable[[EncodedParts], tuple[Tensor, Tensor | None]]:
    """One text encoder's alone."""
    return lambda encoded: (encoded[part][0], encoded[part][1] if pooled else None)


def sdxl(encoded: EncodedParts) -> tuple[Tensor, Tensor | None]:
    """Both side by side, as far as both go."""
    return _beside(encoded["clip_l"][0], encoded["clip_g"][0]), encoded["clip_g"][1]


def sd3(encoded: EncodedParts) -> tuple[Tensor, Tensor | None]:
    """CLIPs side by side, filled up to T5's width, then T5; zeros for what is missing."""
    some = next(iter(encoded.values()))[0] if encoded else torch.zeros(0)
    parts: list[Tensor] = []
    pooled = [some.new_zeros(CLIP_L), some.new_zeros(CLIP_G)]
    clip_l, clip_g = encoded.get("clip_l"), encoded.get("clip_g")
    if clip_l is not None:
        pooled[0] = clip_l[1]
    if clip_g is not None:
        pooled[1] = clip_g[1]
    clips: Tensor | None = None
    if clip_l is not None and clip_g is not None:
        clips = _beside(clip_l[0], clip_g[0])
    elif clip_l is not None:
        clips = clip_l[0]
    elif clip_g is not None:
        clips = pad(clip_g[0], (CLIP_L, 0))
    if clips is not None:
        widest = encoded["t5xxl"][0].shape[1] if "t5xxl" in encoded else WIDEST
        parts.append(pad(clips, (0, widest - clips.shape[1])))
    if "t5xxl" in encoded:
        parts.append(encoded["t5xxl"][0])
    return torch.cat(parts) if parts else some.new_zeros(CHUNK_TOKENS, WIDEST), torch.cat(pooled)


def flux(encoded: EncodedParts) -> tuple[Tensor, Tensor | None]:
    """T5's, with CLIP's pooled."""
    return encoded["t5xxl"][0], encoded["clip_l"][1]


def _beside(a: Tensor, b: Tensor) -> Tensor:
    length = min(len(a), len(b))
    return torch.cat([a[:length], b[:length]], 1)


WITH_ENDS, WITH_ZEROS = Filling(True, None), Filling(True, 0)
PENULTIMATE_L = Encoder(WITH_ENDS, layer=-2, norm=False)
PENULTIMATE_G = Encoder(WITH_ZEROS, layer=-2, norm=False, projects=True)


def _t5(least: int) -> Encoder:
    return Encoder(Filling(False, 0, least, full=False))


FAMILIES: dict[str, Family] = {
    "sd1": Family({"clip_l": Encoder(WITH_ENDS)}, first("clip_l", pooled=False), 3 * CHUNK_TOKENS),
    "sd2": Family({"clip_h": Encoder(WITH_ZEROS, layer=-2)}, first("clip_h", pooled=False), 3 * CHUNK_TOKENS),
    "sdxl": Family({"clip_l": PENULTIMATE_L, "clip_g": PENULTIMATE_G}, sdxl, 3 * CHUNK_TOKENS),
    "refiner": Family({"clip_g": PENULTIMATE_G}, first("clip_g", pooled=True), 3 * CHUNK_TOKENS, scores=(6.0, 2.5)),
    "sd3": Family(
        {"clip_l": PENULTIMATE_L, "clip_g": PENULTIMATE_G, "t5xxl": _t5(77)}, sd3, 2 * CHUNK_TOKENS + 256, some=True
    ),
    "flux": Family({"clip_l": Encoder(WITH_ENDS), "t5xxl": _t5(256)}, flux, 512),
}


def even(chunks: dict[str, list[TokenChunk]], empty: Callable[[str], list[TokenChunk]]) -> None:
    """Bring CLIPs to equally many chunks, with those of an empty prompt behind."""
    clips = [part for part in ("clip_l", "clip_g") if part in chunks]
    most = max((len(chunks[part]) for part in clips), default=0)
    for part in clips:
        while len(chunks[part]) < most:
            chunks[part] += empty(part)


def of_files(kind: str, parts: Sequence[str]) -> str:
    """The family that ComfyUI's loaders make of text encoders' files and their ``type``. Raises ValueError."""
    there = frozenset(parts)
    if kind == "sd3" or len(parts) == 3:
        return "sd3"
    if len(parts) == 1:
        alone = {"clip_l": "sd1", "clip_h": "sd2", "clip_g": "refiner"}.get(parts[0])
        if alone is not None:
            return alone
    elif kind == "flux" and there == {"clip_l", "t5xxl"}:
        return "flux"
    elif kind in ("", "sdxl", "stable_diffusion") and there == {"clip_l", "clip_g"}:
        return "sdxl"
    raise ValueError(
        f"text_encoder.files: {' and '.join(parts)} of type {kind or 'none'} are no model that is known here"
    )

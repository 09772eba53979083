"""Noise that hangs on the row alone: the same numbers in any batch, on any worker, in any order, after any resume.

Philox, a counter-based generator (Salmon et al. 2011), keyed by a hash of the row's seed and of what the noise is for.
Drawn on the CPU, so that it is the same whatever the model runs on.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PASSED_AT_ONCE = 1 << 20
"""Numbers that are drawn at once, where they are only passed over; a multiple of 16."""


def start(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that a row starts from: unit normal, float32, of ``shape``."""
    return _draw(b"start", seed, b"", shape)


def start_of_diffusers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that diffusers starts from with ``torch.Generator("cpu").manual_seed(seed)`` and a batch of one, float32."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[0]


def start_of_comfy(seed: int, shape: tuple[int, ...], index: int = 0) -> Tensor:
    """The noise that ComfyUI starts picture ``index`` of a batch from: a part of one draw for all of them, float32.

    What is drawn behind it changes none of it, as long as a picture's numbers are a multiple of 16. Else the last 16 of a whole draw
    are drawn otherwise: then it is that of the batch's last picture.
    """
    generator, size = torch.Generator("cpu").manual_seed(seed), math.prod(shape)
    # Sixteen numbers are drawn together, so what comes before goes in pieces of them: of a large batch it is more than memory holds.
    before = max(min(index * size, (index + 1) * size - 16), 0) // 16 * 16
    for gone in range(0, before, PASSED_AT_ONCE):
        torch.randn(min(PASSED_AT_ONCE, before - gone), generator=generator)
    return torch.randn((index + 1) * size - before, generator=generator)[-size:].reshape(shape)


def each_of_comfy(seed: int, shape: tuple[int, ...], index: int = 0) -> Tensor:
    """The same where ComfyUI is told which of a batch a picture is: those before it are draws of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(index):
        torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


def between(seed: int, t: float, s: float, shape: tuple[int, ...]) -> Tensor:
    """The noise of a row's step from time ``t`` to time ``s``: unit normal, float32, of ``shape``."""
    return _draw(b"between", seed, struct.pack("<dd", t, s), shape)


def between_all(
    seeds: Sequence[int], t: Sequence[float], s: Sequence[float], shape: Sequence[int], pinned: bool = False
) -> Tensor:
    """``between`` of B rows, ``[B, ...]``, drawn where they are to lie; in pinned memory, for a copy that nobody waits for."""
    drawn = torch.empty((len(seeds), *shape), dtype=torch.float32, pin_memory=pinned)
    for place, seed, a, b in zip(drawn.numpy(), seeds, t, s, strict=True):
        _generator(b"between", seed, struct.pack("<dd", a, b)).standard_normal(dtype=np.float32, out=place)
    return drawn


def _draw(purpose: bytes, seed: int, when: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(_generator(purpose, seed, when).standard_normal(shape, dtype=np.float32))


def _generator(purpose: bytes, seed: int, when: bytes) -> np.random.Generator:
    digest = hashlib.blake2b(when, digest_size=16, key=struct.pack("<Q", seed), person=purpose).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

"""Latents decoded, and pictures made larger, in tiles, as ComfyUI's nodes do it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def decoded_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Tensor, size: int, overlap: int, downscale: int
) -> Tensor:
    """The mean of three: in tiles of ``size / 2 x 2 size``, ``2 size x size / 2`` and ``size x size`` latent pixels, which ``overlap``.

    ``latents[B, C, h, w]`` to pictures ``[B, 3, H, W]``. Where tiles overlap, each counts less towards its edge.
    """
    shapes = ((2 * size, size // 2), (size // 2, 2 * size), (size, size))
    made = []
    for one in latents.split(1):
        first, second, third = (in_tiles(decode, one, shape, overlap, downscale) for shape in shapes)
        made.append((first + second + third) / 3.0)
    return torch.cat(made)


def in_tiles(
    enlarge: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, int], overlap: int, scale: int
) -> Tensor:
    """What ``enlarge`` makes of ``x[1, C, h, w]``: ``[1, 3, h * scale, w * scale]``, float32, a tile of ``shape`` (height, width) at a time.

    Tiles overlap by ``overlap``, in pixels of x, and count less there towards their edge.
    """
    sides = x.shape[-2:]
    if sides[0] <= shape[0] and sides[1] <= shape[1]:
        return enlarge(x).float()
    total = x.new_zeros(1, 3, *(n * scale for n in sides), dtype=torch.float32)
    weight = torch.zeros_like(total)
    places = [range(0, n - overlap, tile - overlap) if n > tile else [0] for n, tile in zip(sides, shape)]
    for corner in itertools.product(*places):
        at = [max(0, min(n - overlap, place)) for n, place in zip(sides, corner)]
        ends = [min(n, place + tile) for n, place, tile in zip(sides, at, shape)]
        picture = enlarge(x[..., at[0] : ends[0], at[1] : ends[1]].contiguous()).float()
        mask = torch.ones_like(picture)
        feather = overlap * scale
        for axis in (2, 3):
            if feather < mask.shape[axis]:
                # ComfyUI's weights are 1/n, 2/n, ..., 1 towards the inside, at both ends.
                ramp = ((torch.arange(feather, device=mask.device) + 1) / feather).reshape(
                    -1, *(1 for _ in range(3 - axis))
                )
                mask.narrow(axis, 0, feather).mul_(ramp)
                mask.narrow(axis, mask.shape[axis] - feather, feather).mul_(ramp.flip(0))
        lines, columns = (slice(p * scale, e * scale) for p, e in zip(at, ends))
        total[:, :, lines, columns] += picture * mask
        weight[:, :, lines, columns] += mask
    return total / weight

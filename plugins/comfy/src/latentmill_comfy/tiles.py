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
    lines, columns = (_spans(side, tile, overlap) for side, tile in zip(x.shape[-2:], shape))
    if len(lines) == len(columns) == 1:
        return enlarge(x).float()
    picture = x.new_zeros(1, 3, *(side * scale for side in x.shape[-2:]), dtype=torch.float32)
    shares = torch.zeros_like(picture[0, 0])
    for line, column in itertools.product(lines, columns):
        piece = enlarge(x[..., slice(*line), slice(*column)].contiguous()).float()
        share = torch.outer(*(_share(n, overlap * scale, piece.device) for n in piece.shape[-2:]))
        at = tuple(slice(begin * scale, end * scale) for begin, end in (line, column))
        picture[:, :, *at] += piece * share
        shares[at] += share
    return picture / shares


def _spans(side: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """From where to where tiles go along a side; the last is what is left."""
    if side <= tile:
        return [(0, side)]
    return [(begin, min(side, begin + tile)) for begin in range(0, side - overlap, tile - overlap)]


def _share(length: int, edge: int, device: torch.device) -> Tensor:
    """How much each pixel along a tile counts: 1/edge, 2/edge, ..., 1 from either end; all of it, if there is no inside."""
    if edge >= length:
        return torch.ones(length, device=device)
    rising = ((torch.arange(length, device=device) + 1) / max(1, edge)).clamp(max=1.0)
    return rising * rising.flip(0)

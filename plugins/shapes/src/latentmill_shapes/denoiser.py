"""The denoiser: a convolutional UNet that predicts v = alpha * noise - sigma * x0.

v is that of Salimans & Ho 2022 (arXiv:2202.00512). Text reaches the network three ways: `pooled` scales and shifts
every block (FiLM), the tokens come in by cross-attention, and `pooled` also paints a canvas, a small map of features
that says what goes where. The canvas turns "which colour belongs to which shape, and where" into a regression that is
learnt in minutes; cross-attention alone needs many times that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill_shapes.text import drawn

CANVAS = 8
"""Cells a side of the canvas: one for each 2x2 latents of a 64x64 picture. Other sizes stretch it."""


class Canvas(nn.Module):
    """pooled [B, P] to a map of features [B, channels, 8, 8]: an MLP of what is said and of where the cell lies."""

    def __init__(self, pooled: int, width: int, channels: int) -> None:
        super().__init__()
        self.where = nn.Parameter(drawn(CANVAS * CANVAS, width))
        self.what = nn.Linear(pooled, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, channels)

    def forward(self, pooled: Tensor) -> Tensor:
        h = F.silu(self.what(pooled)[:, None, :] + self.where)
        h = self.out(F.silu(self.hidden(h)))
        canvas: Tensor = h.transpose(1, 2).unflatten(2, (CANVAS, CANVAS))
        return canvas


class ConvolutionBlock(nn.Module):
    """A residual block: [B, C, h, w] to the same.

    Between its two convolutions, what is said everywhere, `globally` [B, E], and what is said of each cell, `canvas`
    [B, K, h, w], scale and shift the features.
    """

    def __init__(self, channels: int, embedding: int, canvas: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.film = nn.Linear(embedding, 2 * channels)
        self.film_canvas = nn.Conv2d(canvas, 2 * channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]  # these have one

    def forward(self, x: Tensor, globally: Tensor, canvas: Tensor) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = (self.film(globally)[:, :, None, None] + self.film_canvas(canvas)).chunk(2, dim=1)
        out: Tensor = x + self.conv2(F.silu(h * (1 + scale) + shift))
        return out


class Attention(nn.Module):
    """Attention of the cells of x [B, C, h, w] to `context` [B, T, D], or to each other where that is None."""

    def __init__(self, channels: int, context: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(context, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        cells = self.norm(x).flatten(2).transpose(1, 2)
        q = self.query(cells)
        k, v = self.key_value(cells if context is None else context).chunk(2, dim=2)
        q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.out(h).transpose(1, 2).unflatten(2, (height, width))
        return out


class UNet(nn.Module):
    """Noisy latents [B, 4, h, w], log(alpha / sigma) [B] and encoded text to v, shaped like the latents.

    h and w must be divisible by 4.
    """

    def __init__(
        self,
        channels: int = 4,
        width: int = 128,
        low: int = 144,
        text: int = 64,
        pooled: int = 192,
        embedding: int = 192,
        canvas: int = 32,
    ) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer(
            "frequencies",
            torch.exp(
                torch.linspace(math.log(0.25), math.log(16.0), 32, device="cpu")
            ),  # in no file, where all else may come from
            persistent=False,
        )
        self.time = nn.Sequential(nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.pooled = nn.Linear(pooled, embedding)
        self.canvas = Canvas(pooled, 256, canvas)
        self.enter = nn.Conv2d(4 * channels + canvas, width, 3, padding=1)
        self.high_in = nn.ModuleList(ConvolutionBlock(width, embedding, canvas) for _ in range(2))
        self.down = nn.Conv2d(width, low, 3, stride=2, padding=1)
        self.low1 = ConvolutionBlock(low, embedding, canvas)
        self.low_attention = Attention(low, low)
        self.low2 = ConvolutionBlock(low, embedding, canvas)
        self.up = nn.Conv2d(low, 4 * width, 1)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.text_attention = Attention(width, text)
        self.high_out = nn.ModuleList(ConvolutionBlock(width, embedding, canvas) for _ in range(3))
        self.norm = nn.GroupNorm(8, width)
        self.leave = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]  # these have one

    def forward(self, x: Tensor, log_ratio: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        angles = log_ratio[:, None] * self.frequencies
        globally = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.pooled(pooled))
        x = F.pixel_unshuffle(x, 2)
        canvas = self.canvas(pooled)
        if canvas.shape[2:] != x.shape[2:]:
            canvas = F.interpolate(canvas, size=x.shape[2:], mode="bilinear", align_corners=False)
        canvas = canvas.contiguous(memory_format=torch.channels_last)
        coarse = F.avg_pool2d(canvas, 2)

        h = self.enter(torch.cat([x, canvas], dim=1))
        for block in self.high_in:
            h = block(h, globally, canvas)
        skip = h
        h = self.low1(self.down(h), globally, coarse)
        h = self.low2(self.low_attention(h), globally, coarse)
        h = F.pixel_shuffle(self.up(h), 2)
        h = self.text_attention(self.merge(torch.cat([h, skip], dim=1)), embeds)
        for block in self.high_out:
            h = block(h, globally, canvas)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)

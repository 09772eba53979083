"""Stable Diffusion's noise path: variance preserving, betas "scaled_linear" from 0.00085 to 0.012 over 1000 steps."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1000


def alpha_bars() -> Tensor:
    """alpha^2 after each of the 1000 steps, float64 [1000] (alpha bar of Ho et al. 2020, arXiv:2006.11239, eq. 4)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, dim=0)

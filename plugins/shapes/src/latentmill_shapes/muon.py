"""Muon with AdamW for what is no matrix: the optimiser of the training script."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """About U V^T for a matrix g = U S V^T [m, n], by Muon's quintic Newton-Schulz iteration (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Jordan et al. 2024).

    A convolution's kernel [o, i, h, w] counts as a matrix [o, i*h*w].
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: nothing is evaluated twice
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(m, group["momentum"])
                matrix = orthogonalise(update.reshape(len(update), -1))
                scale = 0.2 * max(matrix.shape) ** 0.5  # AdamW's update size (Liu et al. 2025, arXiv:2502.16982)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(matrix.reshape(p.shape), alpha=-group["lr"] * scale)

"""Grids: at which times a row is computed, from noise to clean.

=========  ==========================================================================================================
trailing   equal steps from t = 1 down (diffusers' ``timestep_spacing: trailing``; Lin et al. 2024, arXiv:2305.08891)
leading    equal steps that end at the first timestep (``leading``, Stable Diffusion's own; ``offset`` is its
           ``steps_offset``, 1)
linspace   equal steps from t = 1 to the first timestep, both included (``linspace``)
karras     Karras et al. 2022 (arXiv:2206.00364), eq. 5: equal steps of sigma^(1/rho), with sigma in units of alpha;
           on a flow path sigma is t itself, as in diffusers. ``rho`` 7, ``sigma_min``, ``sigma_max``
=========  ==========================================================================================================

All end with one more step, to t = 0. On a path of discrete timesteps, trailing and leading round to those. The spacings are
those of diffusers' DDIMScheduler and EulerDiscreteScheduler; its multistep solvers space leading and linspace otherwise.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from latentmill.plugin import NoisePath
from latentmill.schedulers.paths import VP, Flow

Grid: TypeAlias = "str | Mapping[str, Any]"
"""A name, or ``{name: ..., setting: ...}``."""

FIRST = 1e-3
"""The time of the first of 1000 timesteps."""


def times(grid: Grid, path: NoisePath, steps: int, strength: float = 1.0) -> Tensor:
    """The times of a row: float64, descending, ``[n + 1]`` for n steps; the last is 0.0.

    ``strength`` below 1 keeps the last ``steps * strength`` of the steps, as diffusers' image-to-image pipelines do, and at
    least one. Strength 0 is no step at all: ``[0.0]``. Raises ValueError for more steps than the path has timesteps.
    """
    name, settings = resolve(grid)
    if isinstance(path, VP) and steps > path.steps:
        raise ValueError(f"{steps} steps are more than the {path.steps} timesteps of the noise path")
    spaced = GRIDS[name](path, steps, **settings)
    # diffusers rounds down in Stable Diffusion's pipelines, and up in those of flow models.
    share = steps * strength
    kept = steps - int(max(steps - share, 0)) if isinstance(path, Flow) else int(share)
    kept = max(1, min(kept, steps)) if strength > 0 else 0
    return torch.cat([spaced[steps - kept :], torch.zeros(1, dtype=torch.float64)])


def resolve(grid: Grid) -> tuple[str, dict[str, Any]]:
    """A grid's name and settings. Raises ValueError, with the nearest right one, for names that there are not."""
    settings = {} if isinstance(grid, str) else dict(grid)
    name = grid if isinstance(grid, str) else str(settings.pop("name", None))
    if name not in GRIDS:
        raise ValueError(f"there is no grid {name!r}{_near(name, GRIDS)}; there are {', '.join(GRIDS)}")
    known = _SETTINGS[name]
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f"grid {name} has no setting {key!r}{_near(key, known)}; it has {', '.join(known) or 'none'}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"grid {name}: {key} must be a number from 0 on, not {value!r}")
    return name, settings


def _trailing(path: NoisePath, steps: int) -> Tensor:
    if isinstance(path, VP):  # numpy's arange, since diffusers rounds what that makes of ties
        return torch.from_numpy(np.arange(path.steps, 0, -path.steps / steps)[:steps]).round() / path.steps
    return 1.0 - torch.arange(steps, dtype=torch.float64) / steps


def _leading(path: NoisePath, steps: int, offset: float = 1) -> Tensor:
    if isinstance(path, VP):
        ratio = max(path.steps // steps, 1)
        offset = min(offset, path.steps - 1 - (steps - 1) * ratio)  # all steps of the path leave no room for one
        return (torch.arange(steps, dtype=torch.float64).flip(0) * ratio + offset + 1) / path.steps
    return torch.arange(steps, dtype=torch.float64).flip(0) / steps + FIRST


def _linspace(path: NoisePath, steps: int) -> Tensor:
    first = 1.0 / path.steps if isinstance(path, VP) else FIRST
    return torch.linspace(1.0, first, steps, dtype=torch.float64)


def _karras(
    path: NoisePath, steps: int, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    def sigma(t: float) -> float:
        alpha, noise = path.scale(torch.tensor(t, dtype=torch.float64))
        return float(noise if isinstance(path, Flow) else noise / alpha)

    low = sigma(FIRST) if sigma_min is None else sigma_min
    high = sigma(1.0) if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"grid karras needs 0 < sigma_min < sigma_max, and has {low:g} and {high:g} on this path")
    ramp = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return sigmas if isinstance(path, Flow) else path.time(sigmas)


GRIDS: dict[str, Callable[..., Tensor]] = {
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _linspace,
    "karras": _karras,
}
_SETTINGS = {"trailing": (), "leading": ("offset",), "linspace": (), "karras": ("rho", "sigma_min", "sigma_max")}


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

"""Grids: at which times a row is computed, from noise to clean.

==================  =================================================================================================
trailing            equal steps from t = 1 down (diffusers' ``timestep_spacing: trailing``; Lin et al. 2024,
                    arXiv:2305.08891)
leading             equal steps that end at the first timestep (``leading``, Stable Diffusion's own; ``offset`` is its
                    ``steps_offset``, 1); ddim_uniform is another name
linspace            equal steps from t = 1 to the first timestep, both included (``linspace``); normal is another name
sgm_uniform         equal steps from t = 1 to the first timestep, which is left out
simple              every so manieth of the schedule's timesteps
karras              equal steps of sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5); ``rho`` 7
exponential         equal steps of log(sigma)
kl_optimal          equal steps of arctan(sigma) (Sabour et al. 2024, arXiv:2404.14507, appendix)
beta                quantiles of the Beta distribution (Lee et al. 2024, arXiv:2407.12173); ``alpha``, ``beta`` 0.6
linear_quadratic    small equal steps, then growing ones (Polyak et al. 2024, arXiv:2410.13720, sec. 3.4.2);
                    ``threshold`` 0.025
align_your_steps    the optimised times of Sabour et al. 2024 (arXiv:2404.14507); ``model`` sd, sdxl or svd
times               the list ``times`` itself, descending, for rows of just so many steps
model               what the denoiser says (``Denoiser.times``), which follows its authors' config
==================  =================================================================================================

Sigma in the lower half of the table is in units of alpha, from ``sigma_min`` to ``sigma_max``; on a flow path it is t
itself, as in diffusers. All end with one more step, to t = 0; with ``end: sigma_min`` the last step leads to the grid's
last time instead. On a flow path ``shift`` moves times towards noise (Esser et al. 2024, arXiv:2403.03206, eq. 23):
``shift * t / (1 + (shift - 1) * t)``; ``shift: dynamic`` makes it follow the latent's size, as Flux does.

On a schedule of discrete timesteps, trailing and leading round to those. The spacings are those of diffusers' DDIMScheduler and
EulerDiscreteScheduler; its multistep solvers space leading and linspace otherwise.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from latentmill.plugin import NoiseSchedule
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving

Grid: TypeAlias = "str | Mapping[str, Any]"
"""A name, or ``{name: ..., setting: ...}``."""

FIRST = 1e-3
"""The time of the first of 1000 timesteps."""


Times: TypeAlias = Callable[[int, Sequence[int]], Tensor]
"""The times ``[steps + 1]`` for a number of steps and a latent's shape."""


def times(
    grid: Grid,
    schedule: NoiseSchedule,
    steps: int,
    strength: float = 1.0,
    shape: Sequence[int] = (1, 64, 64),
    model: Times | None = None,
) -> Tensor:
    """The times of a row: float64, descending, ``[n + 1]`` for n steps.

    ``strength`` below 1 keeps the last ``steps * strength`` of the steps, as diffusers' image-to-image pipelines do, and at
    least one. Strength 0 is no step at all: ``[0.0]``. ``shape`` is the latent's, for ``shift: dynamic``; ``model`` is what grid
    model asks. Raises ValueError for settings that make no sense together, and for more steps than the schedule has timesteps.
    """
    name, settings = resolve(grid)
    if isinstance(schedule, VariancePreserving) and steps > schedule.steps:
        raise ValueError(f"{steps} steps are more than the {schedule.steps} timesteps of the noise schedule")
    if name == "model":
        if model is None:
            raise ValueError("grid model is what a denoiser says, and there is none")
        spaced = model(steps, shape)
    else:
        spaced = _spaced(name, settings, schedule, steps, shape)
    if len(spaced) != steps + 1:
        raise ValueError(f"grid {name} has {len(spaced) - 1} steps, and {steps} were asked for")
    if not bool((spaced.diff() < 0).all() and spaced[0] <= 1 and spaced[-1] >= 0):
        raise ValueError(f"grid {name}: times must descend from 1 at most to 0 at least: {spaced.tolist()}"[:200])
    return spaced[steps - kept(schedule, steps, strength) :]


def kept(schedule: NoiseSchedule, steps: int, strength: float) -> int:
    """How many of a row's steps are left with ``strength``: 0 only if that is 0."""
    # diffusers rounds down in Stable Diffusion's pipelines, and up in those of flow models.
    share = steps * strength
    found = steps - int(max(steps - share, 0)) if isinstance(schedule, RectifiedFlow) else int(share)
    return max(1, min(found, steps)) if strength > 0 else 0


def _spaced(name: str, settings: dict[str, Any], schedule: NoiseSchedule, steps: int, shape: Sequence[int]) -> Tensor:
    end, shift = settings.pop("end", "zero"), settings.pop("shift", 1.0)
    spaced = GRIDS[name](schedule, steps + (end == "sigma_min"), **settings)
    if shift != 1.0:
        spaced = _shifted(schedule, spaced, shift, shape)
    return torch.cat([spaced, torch.zeros(1, dtype=torch.float64)]) if end == "zero" else spaced


def resolve(grid: Grid) -> tuple[str, dict[str, Any]]:
    """A grid's name and settings. Raises ValueError, with the nearest right one, for names that there are not."""
    settings = {} if isinstance(grid, str) else dict(grid)
    name = grid if isinstance(grid, str) else str(settings.pop("name", "times" if "times" in settings else None))
    there = [*GRIDS, "model"]
    if name not in there:
        raise ValueError(f"there is no grid {name!r}{_near(name, there)}; there are {', '.join(there)}")
    known = {} if name == "model" else {**SETTINGS.get(name, {}), **COMMON}
    for key, value in settings.items():
        if key not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"grid {name} has no setting {key!r}{_near(key, known)}; it has {has}")
        choices, number = known[key], not isinstance(value, bool) and isinstance(value, (int, float))
        if isinstance(value, list) or value in choices or (float in choices and number and 0 <= value < math.inf):
            continue
        wanted = [*(f"{choice}" for choice in choices if choice is not float)]
        wanted += ["a number from 0 on"] * (float in choices)
        raise ValueError(f"grid {name}: {key} must be {' or '.join(wanted)}, not {value!r}")
    return name, settings


def _trailing(schedule: NoiseSchedule, steps: int) -> Tensor:
    if isinstance(schedule, VariancePreserving):  # numpy's arange, since diffusers rounds what that makes of ties
        return torch.from_numpy(np.arange(schedule.steps, 0, -schedule.steps / steps)[:steps]).round() / schedule.steps
    return 1.0 - torch.arange(steps, dtype=torch.float64) / steps


def _leading(schedule: NoiseSchedule, steps: int, offset: float = 1) -> Tensor:
    if isinstance(schedule, VariancePreserving):
        ratio = max(schedule.steps // steps, 1)
        offset = min(
            offset, schedule.steps - 1 - (steps - 1) * ratio
        )  # all steps of the schedule leave no room for one
        return (torch.arange(steps, dtype=torch.float64).flip(0) * ratio + offset + 1) / schedule.steps
    return torch.arange(steps, dtype=torch.float64).flip(0) / steps + FIRST


def _linspace(schedule: NoiseSchedule, steps: int) -> Tensor:
    return torch.linspace(1.0, _first(schedule), steps, dtype=torch.float64)


def _sgm_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    return torch.linspace(1.0, _first(schedule), steps + 1, dtype=torch.float64)[:-1]


def _simple(schedule: NoiseSchedule, steps: int) -> Tensor:
    count = schedule.steps if isinstance(schedule, VariancePreserving) else 1000
    return torch.tensor([count - int(i * count / steps) for i in range(steps)], dtype=torch.float64) / count


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0, **ends: float) -> Tensor:
    low, high = _ends(schedule, "karras", **ends)
    ramp = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    return _at(schedule, (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def _exponential(schedule: NoiseSchedule, steps: int, **ends: float) -> Tensor:
    low, high = _ends(schedule, "exponential", **ends)
    return _at(schedule, torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp())


def _kl_optimal(schedule: NoiseSchedule, steps: int, **ends: float) -> Tensor:
    low, high = _ends(schedule, "kl_optimal", **ends)
    return _at(schedule, torch.linspace(math.atan(high), math.atan(low), steps, dtype=torch.float64).tan())


def _beta(schedule: NoiseSchedule, steps: int, alpha: float = 0.6, beta: float = 0.6, **ends: float) -> Tensor:
    from scipy.stats import beta as distribution  # it takes a second to import, and few want it

    low, high = _ends(schedule, "beta", **ends)
    quantiles = distribution.ppf(1 - np.linspace(0, 1, steps), alpha, beta)
    return _at(schedule, low + torch.from_numpy(quantiles) * (high - low))


def _linear_quadratic(schedule: NoiseSchedule, steps: int, threshold: float = 0.025, **ends: float) -> Tensor:
    _, high = _ends(schedule, "linear_quadratic", **ends)
    linear = max(steps // 2, 1)
    quadratic = max(steps - linear, 1)
    rest = linear - threshold * steps
    i = torch.arange(steps, dtype=torch.float64)
    curved = rest / (linear * quadratic**2) * (i**2 + linear**2) + (threshold / linear - 2 * rest / quadratic**2) * i
    return _at(schedule, high * (1 - torch.where(i < linear, i * threshold / linear, curved)))


def _align_your_steps(schedule: NoiseSchedule, steps: int, model: str = "sd") -> Tensor:
    if isinstance(schedule, RectifiedFlow):
        raise ValueError("grid align_your_steps was optimised for models on paths of betas, and not for flow paths")
    table = np.log(ALIGNED[model])
    between = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table)
    return _at(schedule, torch.from_numpy(np.exp(between[:-1])))


def _own(schedule: NoiseSchedule, steps: int, times: list[float]) -> Tensor:
    return torch.tensor([float(t) for t in times], dtype=torch.float64)


ALIGNED = {
    "sd": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}
"""Sigmas for ten steps; for another number they are interpolated in the logarithm, as the authors do."""

GRIDS: dict[str, Callable[..., Tensor]] = {
    "trailing": _trailing,
    "leading": _leading,
    "ddim_uniform": _leading,
    "linspace": _linspace,
    "normal": _linspace,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "karras": _karras,
    "exponential": _exponential,
    "kl_optimal": _kl_optimal,
    "beta": _beta,
    "linear_quadratic": _linear_quadratic,
    "align_your_steps": _align_your_steps,
    "times": _own,
}
COMMON: dict[str, tuple[Any, ...]] = {"end": ("zero", "sigma_min"), "shift": (float, "dynamic")}
"""Settings of every grid, and what they may be."""
_ENDS: dict[str, tuple[Any, ...]] = {"sigma_min": (float,), "sigma_max": (float,)}
SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "leading": {"offset": (float,)},
    "ddim_uniform": {"offset": (float,)},
    "karras": {"rho": (float,), **_ENDS},
    "exponential": _ENDS,
    "kl_optimal": _ENDS,
    "beta": {"alpha": (float,), "beta": (float,), **_ENDS},
    "linear_quadratic": {"threshold": (float,), **_ENDS},
    "align_your_steps": {"model": tuple(ALIGNED)},
    "times": {"times": ("a list",)},
}


def _first(schedule: NoiseSchedule) -> float:
    """The time of the first timestep."""
    return 1.0 / schedule.steps if isinstance(schedule, VariancePreserving) else FIRST


def _ends(
    schedule: NoiseSchedule, name: str, sigma_min: float | None = None, sigma_max: float | None = None
) -> tuple[float, float]:
    def sigma(t: float) -> float:
        alpha, noise = schedule.scale(torch.tensor(t, dtype=torch.float64))
        return float(noise if isinstance(schedule, RectifiedFlow) else noise / alpha)

    low = sigma(_first(schedule)) if sigma_min is None else sigma_min
    high = sigma(1.0) if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"grid {name} needs 0 < sigma_min < sigma_max, and has {low:g} and {high:g} on this schedule")
    return low, high


def _at(schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """The times of sigmas: sigma is in units of alpha, and on a flow path the time itself."""
    return sigmas if isinstance(schedule, RectifiedFlow) else schedule.time(sigmas)


def _shifted(schedule: NoiseSchedule, t: Tensor, shift: float | str, shape: Sequence[int]) -> Tensor:
    if not isinstance(schedule, RectifiedFlow):
        raise ValueError("grid: shift is for flow paths; a schedule of betas has its shift in the betas")
    if shift == "dynamic":  # Flux: mu grows with the number of tokens, from 0.5 at 256 to 1.15 at 4096
        tokens = math.prod(shape[-2:]) / 4
        shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    return float(shift) * t / (1 + (float(shift) - 1) * t)


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

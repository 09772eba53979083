"""Grids: at which times a row is computed, from noise to clean.

==================  =================================================================================================
trailing            equal steps from t = 1 down (diffusers' ``timestep_spacing: trailing``; Lin et al. 2024,
                    arXiv:2305.08891)
leading             equal steps that end at the first timestep (``leading``, Stable Diffusion's own; ``offset`` is its
                    ``steps_offset``, 1); ddim_uniform is another name
linspace            equal steps from t = 1 to the first timestep, both included (``linspace``); normal is another name
sgm_uniform         equal steps from t = 1 to the first timestep, which is left out
simple              every so manieth of the noise schedule's timesteps
karras              equal steps of sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5); ``rho`` 7
exponential         equal steps of log(sigma)
kl_optimal          equal steps of arctan(sigma) (Sabour et al. 2024, arXiv:2404.14507, appendix)
beta                quantiles of the Beta distribution (Lee et al. 2024, arXiv:2407.12173); ``alpha``, ``beta`` 0.6
linear_quadratic    small equal steps, then growing ones (Polyak et al. 2024, arXiv:2410.13720, sec. 3.4.2);
                    ``threshold`` 0.025
align_your_steps    the optimised times of Sabour et al. 2024 (arXiv:2404.14507); ``model`` sd, sdxl or svd
comfy               ComfyUI's, by its names, with its ways to count (``comfy_grid``)
times               the list ``times`` itself, descending, for rows of just so many steps
model               what the denoiser says (``Denoiser.times``), which follows its authors' config
==================  =================================================================================================

Sigma in the lower half of the table is in units of alpha, from ``sigma_min`` to ``sigma_max``; on the noise schedule of a
flow model it is t itself, as in diffusers. All end with one more step, to t = 0; with ``end: sigma_min`` the last step leads to the grid's
last time instead. On the noise schedule of a flow model ``shift`` moves times towards noise (Esser et al. 2024, arXiv:2403.03206, eq. 23):
``shift * t / (1 + (shift - 1) * t)``; ``shift: dynamic`` makes it follow the latent's size, as Flux does.

On a schedule of discrete timesteps, trailing and leading round to those. The spacings are those of diffusers' DDIMScheduler and
EulerDiscreteScheduler; its multistep solvers space leading and linspace otherwise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from latentmill import registry
from latentmill.plugin import Grid, NoiseSchedule, Start
from latentmill.schedulers.noise_schedules import shifted
from latentmill.text import near

Choice: TypeAlias = "str | Mapping[str, Any]"
"""What a job says: a name, or ``{name: ..., setting: ...}``."""
MODEL = "model"
"""The grid that is no plugin: what the denoiser says."""
FIRST = 1e-3
"""The time of the first of 1000 timesteps."""
ENDS = ("zero", "sigma_min")

Times: TypeAlias = Callable[[int, Sequence[int]], Tensor]
"""The times ``[steps + 1]`` for a number of steps and a latent's shape."""


@dataclass(frozen=True)
class Chosen:
    """A grid with the settings that all have."""

    name: str
    grid: Grid | None
    """None: what the denoiser says."""
    end: str = "zero"
    shift: float | str = 1.0

    def times(self, noise_schedule: NoiseSchedule, steps: int, shape: Sequence[int]) -> Tensor:
        """The times ``[steps + 1]`` of latents of ``shape``."""
        assert self.grid is not None
        count = steps + (self.end == "sigma_min")
        with registry.asking(self.grid):
            spaced = self.grid.times(noise_schedule, count)
        if not isinstance(spaced, Tensor) or spaced.dtype != torch.float64 or spaced.ndim != 1:
            raise ValueError(
                f"{registry.called(self.grid)}: times returned no float64 tensor [{count}]: {spaced!r:.80}"
            )
        if self.shift != 1.0:
            spaced = shifted(spaced, _shift(noise_schedule, self.shift, shape))
        return torch.cat([spaced, torch.zeros(1, dtype=torch.float64)]) if self.end == "zero" else spaced

    def start(self, noise_schedule: NoiseSchedule, steps: int, strength: float, shape: Sequence[int]) -> Start | None:
        """How a row begins whose grid says all of it; None: with the last of ``times``."""
        if self.grid is None or type(self.grid).start is Grid.start:
            return None
        with registry.asking(self.grid):
            own = self.grid.start(noise_schedule, steps, strength, shape)
        if own is None:
            return None
        if self.end != "zero" or self.shift != 1.0:
            raise ValueError(
                f"grid {self.name} says itself where a row ends, and what is shifted: end and shift are not for it"
            )
        if not isinstance(own.times, Tensor) or own.times.dtype != torch.float64 or own.times.ndim != 1:
            raise ValueError(f"{registry.called(self.grid)}: start gives no float64 times [n + 1]: {own.times!r:.80}")
        _require_descent(self.name, own.times)
        return own


def choose(choice: Choice) -> Chosen:
    """The grid that a job chooses. Raises ValueError, with the nearest right one, for names and settings that there are not."""
    settings = {} if isinstance(choice, str) else dict(choice)
    name = choice if isinstance(choice, str) else str(settings.pop("name", "times" if "times" in settings else None))
    there = [*dict.fromkeys([entry.name for entry in registry.entries("grid")]), MODEL]
    if name not in there and ":" not in name:
        raise ValueError(f"there is no grid {name!r}{near(name, there)}; there are {', '.join(there)}")
    if name == MODEL:
        if settings:
            raise ValueError(f"grid {name} has no setting {next(iter(settings))!r}; it has none")
        return Chosen(name, None)
    end, shift = settings.pop("end", "zero"), settings.pop("shift", 1.0)
    if end not in ENDS:
        raise ValueError(f"grid {name}: end must be {' or '.join(ENDS)}, not {end!r}")
    if shift != "dynamic":
        shift = _number("shift", shift, f"grid {name}: ", "dynamic or ")
    return Chosen(name, registry.build("grid", {"name": name, **settings}), end, shift)


def libraries(choice: Choice) -> set[str]:
    """Distributions whose versions change the times, beside latentmill."""
    grid = choose(choice).grid
    if grid is None:
        return set()
    name = choice if isinstance(choice, str) else str(choice.get("name", "times"))
    return {registry.find("grid", name).distribution, *grid.libraries} - {"latentmill"}


def times(
    choice: Choice | Chosen,
    noise_schedule: NoiseSchedule,
    steps: int,
    strength: float = 1.0,
    shape: Sequence[int] = (1, 64, 64),
    model: Times | None = None,
) -> Tensor:
    """The times of a row: float64, descending, ``[n + 1]`` for n steps.

    ``strength`` below 1 keeps the last ``steps * strength`` of the steps, as diffusers' image-to-image pipelines do, and at
    least one. Strength 0 is no step at all: ``[0.0]``. ``shape`` is the latent's, for ``shift: dynamic``; ``model`` is what grid
    model asks. Raises ValueError for settings that make no sense together, and for more steps than there are timesteps.
    """
    chosen = choice if isinstance(choice, Chosen) else choose(choice)
    if (own := chosen.start(noise_schedule, steps, strength, shape)) is not None:
        return own.times
    if noise_schedule.timesteps is not None and steps > noise_schedule.timesteps:
        raise ValueError(f"{steps} steps are more than the {noise_schedule.timesteps} timesteps of the noise schedule")
    if chosen.grid is not None:
        spaced = chosen.times(noise_schedule, steps, shape)
    elif model is not None:
        spaced = model(steps, shape)
    else:
        raise ValueError("grid model is what a denoiser says, and there is none")
    if len(spaced) != steps + 1:
        raise ValueError(f"grid {chosen.name} has {len(spaced) - 1} steps, and {steps} were asked for")
    _require_descent(chosen.name, spaced)
    return spaced[steps - kept(noise_schedule, steps, strength) :]


def _require_descent(name: str, times: Tensor) -> None:
    if not bool(len(times) and (times.diff() < 0).all() and times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"grid {name}: times must descend from 1 at most to 0 at least: {times.tolist()}"[:200])


def kept(noise_schedule: NoiseSchedule, steps: int, strength: float) -> int:
    """How many of a row's steps are left with ``strength``: 0 only if that is 0."""
    share = steps * strength
    found = steps - int(max(steps - share, 0)) if noise_schedule.strength_rounds_up else int(share)
    return max(1, min(found, steps)) if strength > 0 else 0


class Trailing(Grid):
    """Equal steps from t = 1 down."""

    contract = 2

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        count = noise_schedule.timesteps
        if count is not None:  # numpy's arange, since diffusers rounds what that makes of ties
            return torch.from_numpy(np.arange(count, 0, -count / steps)[:steps]).round() / count
        return 1.0 - torch.arange(steps, dtype=torch.float64) / steps


class Leading(Grid):
    """Equal steps that end at the first timestep."""

    contract = 2

    def __init__(self, offset: float = 1) -> None:
        self.offset = _number("offset", offset)

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        count = noise_schedule.timesteps
        if count is not None:
            ratio = max(count // steps, 1)
            offset = min(
                self.offset, count - 1 - (steps - 1) * ratio
            )  # as many steps as timesteps leave no room for one
            return (torch.arange(steps, dtype=torch.float64).flip(0) * ratio + offset + 1) / count
        return torch.arange(steps, dtype=torch.float64).flip(0) / steps + FIRST


class Linspace(Grid):
    """Equal steps from t = 1 to the first timestep, both included."""

    contract = 2

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        return torch.linspace(1.0, first(noise_schedule), steps, dtype=torch.float64)


class SGMUniform(Grid):
    """Equal steps from t = 1 to the first timestep, which is left out."""

    contract = 2

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        return torch.linspace(1.0, first(noise_schedule), steps + 1, dtype=torch.float64)[:-1]


class Simple(Grid):
    """Every so manieth of the timesteps."""

    contract = 2

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        count = noise_schedule.timesteps or 1000
        return torch.tensor([count - int(i * count / steps) for i in range(steps)], dtype=torch.float64) / count


class OverSigmas(Grid):
    """A grid that spaces sigmas, from ``sigma_max`` down to ``sigma_min``: those of t = 1 and of the first timestep, if not given."""

    contract = 2

    def __init__(self, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        self.sigma_min = None if sigma_min is None else _number("sigma_min", sigma_min)
        self.sigma_max = None if sigma_max is None else _number("sigma_max", sigma_max)

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        low = sigma_of(noise_schedule, first(noise_schedule)) if self.sigma_min is None else self.sigma_min
        high = sigma_of(noise_schedule, 1.0) if self.sigma_max is None else self.sigma_max
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"0 < sigma_min < sigma_max is needed, and on this noise schedule they are {low:g} and {high:g}"
            )
        return times_of(noise_schedule, self.sigmas(low, high, steps))

    @abstractmethod
    def sigmas(self, low: float, high: float, steps: int) -> Tensor:
        """Float64, ``[steps]``, descending from ``high`` to ``low``."""


class Karras(OverSigmas):
    """Equal steps of sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        super().__init__(sigma_min, sigma_max)
        self.rho = _number("rho", rho)

    def sigmas(self, low: float, high: float, steps: int) -> Tensor:
        rho, ramp = self.rho, torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
        spaced: Tensor = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        return spaced


class Exponential(OverSigmas):
    """Equal steps of log(sigma)."""

    def sigmas(self, low: float, high: float, steps: int) -> Tensor:
        return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()


class KLOptimal(OverSigmas):
    """Equal steps of arctan(sigma) (Sabour et al. 2024, arXiv:2404.14507, appendix)."""

    def sigmas(self, low: float, high: float, steps: int) -> Tensor:
        return torch.linspace(math.atan(high), math.atan(low), steps, dtype=torch.float64).tan()


class Beta(OverSigmas):
    """Quantiles of the Beta distribution (Lee et al. 2024, arXiv:2407.12173)."""

    def __init__(
        self, alpha: float = 0.6, beta: float = 0.6, sigma_min: float | None = None, sigma_max: float | None = None
    ) -> None:
        super().__init__(sigma_min, sigma_max)
        self.alpha, self.beta = _number("alpha", alpha), _number("beta", beta)

    def sigmas(self, low: float, high: float, steps: int) -> Tensor:
        from scipy.stats import beta as distribution  # it takes a second to import, and few want it

        quantiles = distribution.ppf(1 - np.linspace(0, 1, steps), self.alpha, self.beta)
        return low + torch.from_numpy(quantiles) * (high - low)


class LinearQuadratic(OverSigmas):
    """Small equal steps, then growing ones (Polyak et al. 2024, arXiv:2410.13720, sec. 3.4.2)."""

    def __init__(
        self, threshold: float = 0.025, sigma_min: float | None = None, sigma_max: float | None = None
    ) -> None:
        super().__init__(sigma_min, sigma_max)
        self.threshold = _number("threshold", threshold)

    def sigmas(self, low: float, high: float, steps: int) -> Tensor:
        threshold, linear = self.threshold, max(steps // 2, 1)
        quadratic = max(steps - linear, 1)
        rest = linear - threshold * steps
        i = torch.arange(steps, dtype=torch.float64)
        curved = (
            rest / (linear * quadratic**2) * (i**2 + linear**2) + (threshold / linear - 2 * rest / quadratic**2) * i
        )
        return high * (1 - torch.where(i < linear, i * threshold / linear, curved))


class AlignYourSteps(Grid):
    """The optimised times of Sabour et al. 2024 (arXiv:2404.14507)."""

    contract = 2

    def __init__(self, model: str = "sd") -> None:
        if model not in ALIGNED:
            raise ValueError(f"model must be {' or '.join(ALIGNED)}, not {model!r}")
        self.model = model

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        if noise_schedule.sigma_is_time:
            raise ValueError("it was optimised for models trained on betas, and not for flow models")
        table = np.log(ALIGNED[self.model])
        between = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table)
        return times_of(noise_schedule, torch.from_numpy(np.exp(between[:-1])))


class Own(Grid):
    """The times of the job's own list."""

    contract = 2

    def __init__(self, times: Sequence[float]) -> None:
        if not isinstance(times, Sequence) or isinstance(times, str):
            raise ValueError(f"times must be a list, not {times!r}")
        self.list = [float(t) for t in times]

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        return torch.tensor(self.list, dtype=torch.float64)


ALIGNED = {
    "sd": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}
"""Sigmas for ten steps; for another number they are interpolated in the logarithm, as the authors do."""


def first(noise_schedule: NoiseSchedule) -> float:
    """The time of the first timestep."""
    return FIRST if noise_schedule.timesteps is None else 1.0 / noise_schedule.timesteps


def sigma_of(noise_schedule: NoiseSchedule, t: float) -> float:
    """The sigma at time t, as grids over sigmas count it: in units of alpha, or the time itself."""
    if noise_schedule.sigma_is_time:
        return t
    alpha, sigma = noise_schedule.scale(torch.tensor(t, dtype=torch.float64))
    return float(sigma / alpha)


def times_of(noise_schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """The times of such sigmas: the inverse of ``sigma_of``."""
    return sigmas if noise_schedule.sigma_is_time else noise_schedule.time(sigmas)


def _shift(noise_schedule: NoiseSchedule, shift: float | str, shape: Sequence[int]) -> float:
    if not noise_schedule.shiftable:
        raise ValueError("grid: shift is for flow models; a noise schedule of betas has its shift in the betas")
    if shift == "dynamic":  # Flux: mu grows with the number of tokens, from 0.5 at 256 to 1.15 at 4096
        tokens = math.prod(shape[-2:]) / 4
        return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    return float(shift)


def _number(name: str, value: Any, who: str = "", other: str = "") -> float:
    """``value``. Raises ValueError unless it is a number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{who}{name} must be {other}a number from 0 on, not {value!r}")
    return value

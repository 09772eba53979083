"""ComfyUI's sigmas, with what its nodes do to them: counts other than the steps', denoise, a part of the steps, a dropped sigma.

==================  =================================================================================================
normal              equal steps of the timestep, from the highest to the lowest
sgm_uniform         the same with one step more, the last of which is left out
simple              every so manieth sigma of the model's table
ddim_uniform        every n-th sigma from the second on, so that there may be more than ``steps``
beta                quantiles of the Beta distribution, in places of the table; those that fall together are one:
                    ``alpha``, ``beta`` 0.6
karras              ``rho`` 7; this and the next two: ``sigma_min``, ``sigma_max``, or else the model's
exponential
polyexponential     ``rho`` 1
kl_optimal          of the model's sigmas
linear_quadratic    of the model's highest sigma
laplace             ``mu`` 0, ``beta`` 0.5; it does not end at 0
vp                  ``beta_d`` 19.9, ``beta_min`` 0.1, ``eps_s`` 0.001
sd_turbo            the first of ten timesteps
align_your_steps    ``model`` SD1, SDXL or SVD
==================  =================================================================================================

The papers are those of ``grids``; laplace is of Hang and Gu 2024 (arXiv:2407.03297), vp of Song et al. 2021 (arXiv:2011.13456).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentmill.plugin import Grid, NoiseSchedule, Start
from latentmill.schedulers.comfy_sampling import ModelSampling, sampling_of
from latentmill.schedulers.grids import LinearQuadratic, sigma_of, times_of
from latentmill.text import near, plural

FULL_STRENGTH = 0.9999
"""A strength above it is full."""
OPTIMISED = {
    "SD1": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
        0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "SDXL": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
        0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "SVD": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip
"""Sabour et al. 2024 (arXiv:2404.14507): sigmas for ten steps, to more digits than in ``grids``."""


class ComfyGrid(Grid):
    """ComfyUI's sigmas of a row, all of them, by the names of its schedulers.

    ``start_at_step``, ``end_at_step`` and ``leftover_noise`` are those of its advanced sampler. ``exact_steps`` leaves no more than
    ``steps`` of them, as its scheduler node does and its samplers don't; ``drop_penultimate`` is what those do for some solvers, and
    ``below_one`` and ``last_sigma`` what some solvers do themselves: begin a little below pure noise on a flow model, and end there.
    ``between`` is what is left of the sigmas where a solver lays its own from the first to the last above 0: ``evaluations``, those of
    DPM-Solver-fast, one for each step; ``ends``, these two.
    """

    contract = 2

    def __init__(
        self,
        scheduler: str = "normal",
        start_at_step: int = 0,
        end_at_step: int | None = None,
        leftover_noise: bool = False,
        exact_steps: bool = False,
        drop_penultimate: bool = False,
        below_one: bool = False,
        last_sigma: float = 0.0,
        between: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        mu: float | None = None,
        beta_d: float | None = None,
        beta_min: float | None = None,
        eps_s: float | None = None,
        model: str | None = None,
    ) -> None:
        if scheduler not in COMFY_SCHEDULERS:
            raise ValueError(
                f"there is no scheduler {scheduler!r}{near(scheduler, COMFY_SCHEDULERS)}; there are {', '.join(COMFY_SCHEDULERS)}"
            )
        said = {
            "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho, "alpha": alpha, "beta": beta, "mu": mu,
            "beta_d": beta_d, "beta_min": beta_min, "eps_s": eps_s, "model": model,
        }  # fmt: skip
        self.settings = {name: value for name, value in said.items() if value is not None}
        self.sigmas, known = COMFY_SCHEDULERS[scheduler]
        for name in self.settings:
            if name not in known:
                raise ValueError(f"scheduler {scheduler} has no setting {name}; it has {', '.join(known) or 'none'}")
        for name, value in ((name, value) for name, value in self.settings.items() if name in POSITIVE):
            if isinstance(value, str) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if model is not None and model not in OPTIMISED:
            raise ValueError(f"model must be {' or '.join(OPTIMISED)}, not {model!r}")
        if start_at_step < 0 or (end_at_step is not None and end_at_step < 0) or not 0.0 <= last_sigma < 1.0:
            raise ValueError("start_at_step and end_at_step must be 0 or more, and last_sigma from 0 to less than 1")
        if between not in (None, "evaluations", "ends"):
            raise ValueError(f"between must be evaluations or ends, not {between!r}")
        self.between = between
        self.scheduler, self.start_at_step, self.end_at_step = scheduler, start_at_step, end_at_step
        self.leftover_noise, self.exact_steps, self.drop_penultimate = leftover_noise, exact_steps, drop_penultimate
        self.below_one, self.last_sigma = below_one, float(last_sigma)

    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        """Those of a whole row."""
        return self.start(noise_schedule, steps, 1.0, ()).times[:-1]

    def start(self, noise_schedule: NoiseSchedule, steps: int, strength: float, shape: Sequence[int]) -> Start:
        sampling = sampling_of(noise_schedule)
        sigmas = self.part(self.row(sampling, steps, strength))
        if len(sigmas) < 2:
            # A sampler's own end adds no noise.
            alone = float(sigmas[0]) if len(sigmas) and self.end_at_step is None else 0.0
            return Start(torch.zeros(1, dtype=torch.float64), {}, 1.0, alone, alone)
        first = float(sigmas[0])
        sigmas = sigmas.clone()
        if self.below_one and noise_schedule.sigma_is_time and first >= 1:
            sigmas[0] = sampling.percent(1e-4)
        if self.last_sigma and sigmas[-1] == 0:
            sigmas[-1] = self.last_sigma
        clean = self.between is not None and sigmas[-1] == 0
        if self.between is not None:
            sigmas = _between(sigmas, self.between)
        times = _times(noise_schedule, sigmas.double())
        alpha, sigma = _scale(noise_schedule, float(_times(noise_schedule, torch.tensor([first]).double())[0]))
        top = float(sampling.sigma_max)
        if not noise_schedule.sigma_is_time and (first > top or math.isclose(first, top, rel_tol=1e-5)):
            sigma = math.hypot(alpha, sigma)  # what pure noise has, had it been made of clean latents
        last, _ = _scale(noise_schedule, float(times[-1]))
        leaves = 1.0 if clean and noise_schedule.sigma_is_time else last  # ComfyUI takes it for clean, noise and all
        return Start(times, {}, alpha, sigma, sigma, leaves=leaves)

    def row(self, sampling: ModelSampling, steps: int, strength: float = 1.0) -> Tensor:
        """The sigmas of all steps, float32; none if there are no steps."""
        if self.scheduler in ("sd_turbo", "align_your_steps"):
            return self.sigmas(sampling, steps, {**self.settings, "strength": strength})
        total = steps if strength > FULL_STRENGTH else int(steps / strength) if strength > 0 else 0
        if not total:
            return torch.empty(0)
        sigmas = self.sigmas(sampling, total + self.drop_penultimate, self.settings)
        if self.drop_penultimate:
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        return sigmas[-(steps + 1) :] if self.exact_steps or strength <= FULL_STRENGTH else sigmas

    def part(self, sigmas: Tensor) -> Tensor:
        """The sigmas of the steps that are made; none if they are all behind."""
        if self.end_at_step is not None and self.end_at_step < len(sigmas) - 1:
            sigmas = sigmas[: self.end_at_step + 1].clone()
            if not self.leftover_noise:
                sigmas[-1] = 0
        return sigmas[self.start_at_step :]


def _between(sigmas: Tensor, laid: str) -> Tensor:
    """Those of each evaluation, or the ``ends`` alone. Raises ValueError if there is no way between them."""
    steps, low = len(sigmas) - 1, sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]
    ends = torch.stack([sigmas[0], low])
    if low >= sigmas[0]:
        raise ValueError(
            f"this sampler moves nothing of {plural(steps, 'step')}, since it ends at the last sigma above 0: 2 or more"
        )
    if laid == "ends":
        return ends
    stages = [3] * (steps // 3 - (steps % 3 == 0)) + [[2, 1], [1], [2]][steps % 3]
    shares = [(k + r / count) / len(stages) for k, count in enumerate(stages) for r in range(count)]
    first, last = ends.double().log()
    return torch.exp(first + torch.tensor([*shares, 1.0], dtype=torch.float64) * (last - first))


def _times(noise_schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """The times of ComfyUI's sigmas. Raises ValueError for what is no way from noise to clean."""
    if not bool((sigmas.diff() < 0).all() and (sigmas >= 0).all()):
        raise ValueError(f"ComfyUI's sigmas don't fall, and so are no steps: {sigmas.tolist()}"[:200])
    top = sigma_of(noise_schedule, 1.0)
    if float(sigmas[0]) > top * (1 + 1e-5):
        raise ValueError(f"sigma {float(sigmas[0]):g} is above {top:g}, where the noise schedule of this model ends")
    return times_of(noise_schedule, sigmas).clamp(max=1.0)


def _scale(noise_schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    alpha, sigma = noise_schedule.scale(torch.tensor(t, dtype=torch.float64))
    return float(alpha), float(sigma)


# -------------------------------------------------------------------------------------------------- sigmas, by name

NodeSettings = Mapping[str, Any]


def _with_end(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


def _normal(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    begin, end = sampling.timestep(sampling.sigma_max), sampling.timestep(sampling.sigma_min)
    if math.isclose(float(sampling.sigma(end)), 0.0, abs_tol=1e-5):  # the table ends clean
        return sampling.sigma(torch.linspace(float(begin), float(end), steps + 1))
    return _with_end(sampling.sigma(torch.linspace(float(begin), float(end), steps)))


def _sgm_uniform(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    begin, end = sampling.timestep(sampling.sigma_max), sampling.timestep(sampling.sigma_min)
    return _with_end(sampling.sigma(torch.linspace(float(begin), float(end), steps + 1)[:-1]))


def _simple(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    stride = len(sampling.sigmas) / steps
    return _with_end(sampling.sigmas[[-1 - int(x * stride) for x in range(steps)]])


def _ddim_uniform(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    clean = math.isclose(float(sampling.sigmas[1]), 0.0, abs_tol=1e-5)
    stride = max(len(sampling.sigmas) // (steps + clean), 1)
    found = sampling.sigmas[1::stride].flip(0)
    return found if clean else _with_end(found)


def _beta(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    from scipy.stats import beta as distribution  # it takes a second to import, and few want it

    quantiles = 1 - np.linspace(0, 1, steps, endpoint=False)
    places = distribution.ppf(quantiles, settings.get("alpha", 0.6), settings.get("beta", 0.6))
    rounded = np.rint(places * (len(sampling.sigmas) - 1)).astype(int).tolist()
    return _with_end(sampling.sigmas[[k for i, k in enumerate(rounded) if i == 0 or k != rounded[i - 1]]])


def _ends(sampling: ModelSampling, settings: NodeSettings) -> tuple[float, float]:
    low, high = (settings.get(name, float(getattr(sampling, name))) for name in ("sigma_min", "sigma_max"))
    return float(low), float(high)


def _karras(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    (low, high), rho = _ends(sampling, settings), settings.get("rho", 7.0)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return _with_end((first + torch.linspace(0, 1, steps) * (last - first)) ** rho)


def _exponential(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    low, high = _ends(sampling, settings)
    return _with_end(torch.linspace(math.log(high), math.log(low), steps).exp())


def _polyexponential(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    low, high = map(math.log, _ends(sampling, settings))
    return _with_end((torch.linspace(1, 0, steps) ** settings.get("rho", 1.0) * (high - low) + low).exp())


def _kl_optimal(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    low, high = map(math.atan, _ends(sampling, settings))
    share = torch.arange(steps).float() / (steps - 1)
    return _with_end((share * low + (1 - share) * high).tan())


def _linear_quadratic(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    return _with_end(LinearQuadratic().sigmas(0.0, float(sampling.sigma_max), steps))


def _laplace(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    low, high = _ends(sampling, settings)
    off = 0.5 - torch.linspace(0, 1, steps)
    spread = settings.get("beta", 0.5) * off.sign() * torch.log(1 - 2 * off.abs() + 1e-5)
    return torch.exp(settings.get("mu", 0.0) - spread).clamp(low, high)


def _vp(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    t = torch.linspace(1, settings.get("eps_s", 1e-3), steps)
    grown = settings.get("beta_d", 19.9) * t**2 / 2 + settings.get("beta_min", 0.1) * t
    return _with_end(torch.expm1(grown).sqrt())


def _sd_turbo(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    left = torch.arange(999, 0, -100)[10 - int(10 * settings["strength"]) :]
    return _with_end(sampling.sigma(left[:steps]))


def _align_your_steps(sampling: ModelSampling, steps: int, settings: NodeSettings) -> Tensor:
    strength, table = settings["strength"], OPTIMISED[settings.get("model", "SD1")]
    made = steps if strength >= 1 else round(steps * strength)
    if strength <= 0:
        return torch.empty(0)
    found = np.array(table)
    if steps + 1 != len(table):
        logs = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), np.log(table[::-1]))
        found = np.exp(logs)[::-1]
    return torch.from_numpy(np.append(found[-(made + 1) : -1], 0.0)).float()


BETWEEN = ("sigma_min", "sigma_max")
POSITIVE = (*BETWEEN, "rho", "alpha", "beta")
"""Settings that make no sigmas if they are 0."""
COMFY_SCHEDULERS: Mapping[str, tuple[Callable[[ModelSampling, int, NodeSettings], Tensor], tuple[str, ...]]] = {
    "simple": (_simple, ()),
    "sgm_uniform": (_sgm_uniform, ()),
    "karras": (_karras, (*BETWEEN, "rho")),
    "exponential": (_exponential, BETWEEN),
    "ddim_uniform": (_ddim_uniform, ()),
    "beta": (_beta, ("alpha", "beta")),
    "normal": (_normal, ()),
    "linear_quadratic": (_linear_quadratic, ()),
    "kl_optimal": (_kl_optimal, ()),
    "polyexponential": (_polyexponential, (*BETWEEN, "rho")),
    "laplace": (_laplace, (*BETWEEN, "mu", "beta")),
    "vp": (_vp, ("beta_d", "beta_min", "eps_s")),
    "sd_turbo": (_sd_turbo, ()),
    "align_your_steps": (_align_your_steps, ("model",)),
}
"""By name: the sigmas, and the settings that there are. The first nine are what its samplers offer, the others nodes alone."""

"""What a model's ``scheduler_config.json`` says of noise schedule, prediction and grid, each in our terms.

All numbers are those of the class itself: its alphas, and the sigmas or timesteps that its ``set_timesteps`` makes.
"""

from __future__ import annotations

import copy
import inspect
import json
import traceback
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from latentmill.plugin import NoiseSchedule, Prediction
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving
from latentmill.text import one_line
from latentmill_diffusers.families import FAMILIES
from latentmill_diffusers.folder import Folder

PART = "scheduler"
NEAR = 1e-4
"""Of a timestep: what float32 makes of a whole one is taken for it."""
FLOWS = ("FlowMatch", "FlowMap", "LTX")
"""How the names of schedulers begin that know no path but the flow."""
IN_SIGMA = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
"""Schedulers of diffusers that keep ``x / alpha``, and begin with the noise that their spacing says."""
WHOLE_TIMESTEPS = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEIS", "SASolver", "UniPC")
"""Schedulers of diffusers that tell the network whole timesteps only: rounded, and on a flow path rounded down."""
BY_SIGMA = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings with which a grid is one of sigmas, and its timesteps follow."""
UNKNOWN = {
    "scale_factors": "they change the latents' size on the way",
    "solver_p": "it is a scheduler, which no config can hold",
    "tau_func": "it is a function, which no config can hold",
}
"""Settings that can't be followed, and why."""
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
    "flow_prediction": "flow",
}


def scheduler_of(folder: Folder) -> Any:
    """A new scheduler of diffusers, as the model's config says and its pipeline mends it.

    Raises ValueError if there is none of its name, or it doesn't take the config.
    """
    return copied(shared_scheduler_of(folder))


def copied(scheduler: Any) -> Any:
    """A copy of a scheduler, whose config nobody can change. ``deepcopy`` takes ten times as long for a tensor as ``clone``."""
    config = scheduler._internal_dict
    tensors = {id(value): value.clone() for value in vars(scheduler).values() if isinstance(value, Tensor)}
    return copy.deepcopy(scheduler, {id(config): config, **tensors})


@cache
def parameters_of(function: Any) -> frozenset[str]:
    """The names of what a function takes."""
    return frozenset(inspect.signature(function).parameters)


def shared_scheduler_of(folder: Folder) -> Any:
    """The same, one for all who only read it. Raises what ``scheduler_of`` does."""
    return _made(folder)[0]


def mended(folder: Folder) -> list[str]:
    """What the pipeline of a model changes in its scheduler's config: see ``mend``."""
    return _made(folder)[1]


def _made(folder: Folder) -> tuple[Any, list[str]]:
    import diffusers

    found = folder.class_of(PART)
    if found is None or not hasattr(diffusers, found[1]):
        raise ValueError(f"{folder / PART}: the installed diffusers has no scheduler {found[1] if found else 'there'}")
    try:
        return _of_config(found[1], json.dumps(folder.config(PART), sort_keys=True), folder.pipeline)
    except ValueError as error:
        raise ValueError(f"{folder / PART}: {error}") from error


@lru_cache(maxsize=64)
def _of_config(name: str, config: str, pipeline: str) -> tuple[Any, list[str]]:
    """A scheduler, which nobody may change, for it is made once: some take a second; and what was mended."""
    import diffusers

    require_known(name, json.loads(config))
    try:
        scheduler = getattr(diffusers, name).from_config(json.loads(config))
    except Exception as error:  # whatever a class has against its settings
        raise ValueError(f"{name}: {said(error)}") from error
    return scheduler, mend(pipeline, scheduler)


def mend(pipeline: str, scheduler: Any) -> list[str]:
    """Change a scheduler's config as the pipeline's class does when it is built; what was changed, as ``steps_offset: 1, not 0``.

    Old models lack settings that their pipelines set right. Of pipelines that are none of our families nothing is known.
    """
    import diffusers

    if pipeline not in FAMILIES:
        return []
    cls, before = getattr(diffusers, pipeline), dict(scheduler.config)
    known = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {
        name: None for name, each in known.items() if name != "self" and each.default is each.empty
    }
    if "requires_safety_checker" in known:  # else it would say that there is none
        given["requires_safety_checker"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says is what we return
        cls(**{**given, "scheduler": scheduler})
    after = scheduler.config
    return [f"{key}: {value}, not {before.get(key)}" for key, value in after.items() if value != before.get(key)]


def require_known(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of a class that can't be followed."""
    for key, why in UNKNOWN.items():
        if settings.get(key):
            raise ValueError(f"{name}: {key} can't be followed: {why}")
    variance = settings.get("variance_type")
    if variance in ("learned", "learned_range") and name.startswith(("DDPM", "UnCLIP")):
        raise ValueError(
            f"{name}: variance_type: {variance} can't be followed: what a network learns of it is not handed on"
        )


def changed(scheduler: Any, **settings: Any) -> Any:
    """A new scheduler of the same class and settings, but for these. Raises what the class raises."""
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return type(scheduler).from_config(config, **settings)


def said(error: Exception) -> str:
    """What an error of a library says, in a line; the line of its code that failed, if it says nothing."""
    return one_line(error) or str(traceback.extract_tb(error.__traceback__)[-1].line)


def is_flow(scheduler: Any) -> bool:
    """Whether it is of a flow path."""
    return bool(scheduler.config.get("use_flow_sigmas")) or type(scheduler).__name__.startswith(FLOWS)


class ModelBetas(VariancePreserving):
    """The variance-preserving path of a scheduler of diffusers: its own ``alphas_cumprod``, and what it interpolates.

    Timestep k of N is at time ``(k + 1) / N``. In between, sigma / alpha is linear, or its logarithm is. ``told`` is what the
    network is told of a timestep: it, the nearest ``whole`` one, or ``log(sigma / alpha) / 4`` (``continuous``).
    """

    def __init__(self, bars: Tensor, logarithmic: bool = False, told: str = "") -> None:
        self.timesteps, self.logarithmic, self.told = len(bars), logarithmic, told
        bars = torch.cat([torch.ones(1, dtype=torch.float64), bars.double().cpu()])
        self.ratios = ((1 - bars) / bars).sqrt()
        """Sigma / alpha at times 0, 1 / N, ... 1; the last may be infinite."""
        self.infinite = bool(self.ratios.isinf().any())

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.double().cpu().clamp(0.0, 1.0) * self.timesteps
        below = place.floor().long().clamp(max=self.timesteps - 1)
        low, high, share = self.ratios[below], self.ratios[below + 1], place - below
        ratio = torch.lerp(low, high, share)
        if self.logarithmic:  # but from 0
            ratio = torch.where((below > 0) & (share > 0), torch.lerp(low.log(), high.log(), share).exp(), ratio)
        if self.infinite:  # to which alpha itself is linear
            last = torch.sqrt((1 + low**2) / (1 - share) ** 2 - 1)
            ratio = torch.where(high.isinf(), last, ratio)
        log_alpha_bar = -torch.log1p(ratio**2).to(t.device)
        return torch.exp(0.5 * log_alpha_bar), torch.sqrt(-torch.expm1(log_alpha_bar))

    def time(self, ratio: Tensor) -> Tensor:
        wanted = ratio.double()
        above = torch.searchsorted(self.ratios, wanted.contiguous()).clamp(1, self.timesteps)
        low, high = self.ratios[above - 1], self.ratios[above]
        share = (wanted - low) / (high - low)
        if self.logarithmic:
            share = torch.where(above > 1, (wanted / low).log() / (high / low).log(), share)
        last = 1 - torch.sqrt((1 + low**2) / (1 + wanted**2))
        return ((above - 1 + torch.where(high.isinf(), last, share)) / self.timesteps).clamp(0.0, 1.0)

    def timestep(self, t: Tensor) -> Tensor:
        if self.told == "continuous":
            alpha, sigma = self.scale(t)
            return (sigma / alpha).log() / 4
        timestep = super().timestep(t)
        return timestep.round() if self.told == "whole" else timestep


class ModelFlow(RectifiedFlow):
    """The flow path, told as so many timesteps: as they are, or those that are ``whole``, rounded down."""

    def __init__(self, count: int, whole: bool) -> None:
        self.count, self.whole = count, whole

    def timestep(self, t: Tensor) -> Tensor:
        timestep = self.count * t
        return (timestep + NEAR).floor() if self.whole else timestep


def noise_schedule_of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule. Raises ValueError for one that is neither of betas nor a flow."""
    name, config = type(scheduler).__name__, scheduler.config
    if not is_flow(scheduler) and config.get("prediction_type") == "flow_prediction":
        raise ValueError(
            f"{name}: prediction_type: flow_prediction is of a flow path, and without use_flow_sigmas: true there is none"
        )
    whole = name.startswith(WHOLE_TIMESTEPS)
    if is_flow(scheduler):
        return ModelFlow(config.num_train_timesteps, whole)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has a noise schedule that is neither of betas nor a flow")
    # Where sigmas come first their timesteps are interpolated in the logarithm, and so are those between two steps.
    logarithmic = name == "DPMSolverSDEScheduler" or any(config.get(key) for key in BY_SIGMA)
    continuous = config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction"
    return ModelBetas(scheduler.alphas_cumprod, logarithmic, "continuous" if continuous else "whole" if whole else "")


def prediction_of(scheduler: Any) -> Prediction:
    """What the network predicts. Raises ValueError for a name that we don't know."""
    own = type(scheduler).__name__.startswith(FLOWS)
    name = "flow_prediction" if own else scheduler.config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise ValueError(f"prediction_type {name!r}: expected {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def starts_with_unit_variance(scheduler: Any) -> bool:
    """Whether the pipelines begin with noise of variance 1, and not sigma squared, at the first time."""
    if type(scheduler).__name__.startswith(IN_SIGMA):
        return scheduler.config.get("timestep_spacing") not in ("linspace", "trailing")
    return True


def set_timesteps(scheduler: Any, steps: int, told: Mapping[str, Any]) -> None:
    """Make a scheduler's grid, as the pipelines do. ``told`` is what one gives it besides the number of steps, where it takes that.

    Raises ValueError, in one line, if it can't be made.
    """
    known = parameters_of(type(scheduler).set_timesteps)
    given = {name: value for name, value in told.items() if name in known}
    if scheduler.config.get("use_flow_sigmas"):
        given.pop("sigmas", None)
    if "sigmas" not in given:
        given["num_inference_steps"] = steps
    try:
        scheduler.set_timesteps(**given)
    except Exception as error:  # numpy's, torch's, diffusers' own
        raise ValueError(f"{type(scheduler).__name__} has no grid of {steps} steps: {said(error)}") from error


def times_of(scheduler: Any, schedule: NoiseSchedule, steps: int, told: Mapping[str, Any]) -> Tensor:
    """The times of ``set_timesteps``, float64, of those of one moment the first: its sigmas where it has such, its timesteps elsewhere."""
    set_timesteps(scheduler, steps, told)
    sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
    if schedule.timesteps is None:
        assert sigmas is not None, "flows have sigmas"
        # A single step stretched to end at shift_terminal is 0/0.
        return _no_moment_twice(sigmas.double().nan_to_num(nan=1.0)).clamp(max=1.0)
    if sigmas is not None:
        times = schedule.time(sigmas.double())
    else:
        # The second of PNDM's timesteps stands there twice.
        at = torch.as_tensor(scheduler.timesteps).double()
        clean = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0
        times = torch.cat([(at + 1) / schedule.timesteps, torch.tensor([0.0 if clean else 1 / schedule.timesteps])])
    whole = (times * schedule.timesteps).round()
    near_whole = (times * schedule.timesteps - whole).abs() < NEAR
    return _no_moment_twice(torch.where(near_whole, whole / schedule.timesteps, times))


def _no_moment_twice(times: Tensor) -> Tensor:
    found: Tensor = times.unique_consecutive()
    return found

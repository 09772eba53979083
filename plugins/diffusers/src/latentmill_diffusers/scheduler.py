"""``scheduler=model``: what the model's own ``scheduler_config.json`` says, all of it.

Where one of our solvers is the same as the class it is taken: its rows begin at any time, and go on with latents that another
model left half-way. Everywhere else the class itself is traced (see ``traced``), on the grid that it makes. Which of the two it is
is measured: settings decide it, and those of a newer diffusers, too.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from latentmill.plugin import Field, NoiseSchedule, Prediction, Scheduler, Start, State
from latentmill.schedulers.dpmpp import DPMpp2M, DPMppSDE
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.heun import DPM2, DPM2Ancestral, Heun
from latentmill.schedulers.multistep import LMS, PNDM
from latentmill.schedulers.unipc import UniPC
from latentmill_diffusers import trace, traced
from latentmill_diffusers.families import FAMILIES
from latentmill_diffusers.folder import LOCATION, Folder
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.schedule import (
    changed,
    copied,
    mended,
    noise_schedule_of,
    parameters_of,
    prediction_of,
    said,
    set_timesteps,
    shared_scheduler_of,
    starts_with_unit_variance,
    times_of,
)

SOLVERS: dict[str, tuple[str, type[Scheduler]]] = {
    "DDIMScheduler": ("euler", Euler),
    "DDPMScheduler": ("euler_ancestral", EulerAncestral),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", DPMpp2M),
    "DPMSolverSDEScheduler": ("dpmpp_sde", DPMppSDE),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", EulerAncestral),
    "EulerDiscreteScheduler": ("euler", Euler),
    "FlowMatchEulerDiscreteScheduler": ("euler", Euler),
    "HeunDiscreteScheduler": ("heun", Heun),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_ancestral", DPM2Ancestral),
    "KDPM2DiscreteScheduler": ("dpm2", DPM2),
    "LMSDiscreteScheduler": ("lms", LMS),
    "PNDMScheduler": ("pndm", PNDM),
    "UniPCMultistepScheduler": ("unipc", UniPC),
}
"""Our solver, by its name and class, that may be the same as a class of diffusers, if its settings let it."""
SAME = 1e-6
"""Relative difference of latents up to which our solver is the same: what diffusers' float32 sigmas make of float64."""
TRIED = (5, 25)
"""Numbers of steps that are compared: some classes lower their order at the end of fewer than 15."""


def solver_of(folder: Folder) -> str:
    """Our solver that is the same as a model's scheduler, by its name; "" where there is none, and the class itself is traced.

    Raises ValueError, in the class's words, for settings that it can't have.
    """
    return _solver_of(shared_scheduler_of(folder), folder.pipeline)


@lru_cache(maxsize=64)
def _solver_of(scheduler: Any, pipeline: str) -> str:
    """Of a scheduler that nobody changes: a job asks several times, and it takes tenths of a second."""
    name = type(scheduler).__name__
    if name not in SOLVERS:
        return ""
    label, solver = SOLVERS[name]
    schedule = FAMILIES[pipeline].schedule if pipeline in FAMILIES else lambda config, steps, shape: {}
    if name == "PNDMScheduler":  # its formula is of epsilon, and it mixes the v of several times
        scheduler = changed(scheduler, prediction_type="epsilon")
    for steps in TRIED:
        told = schedule(scheduler.config, steps, traced.REFERENCE_SHAPE)
        try:
            wanted = _itself(copied(scheduler), steps, told)
        except ValueError:
            raise
        except Exception as error:  # whatever the class has against its settings
            raise ValueError(f"{name}: {said(error)}") from error
        found = _by(solver(), copied(scheduler), steps, told)
        if found is None or not float((found - wanted).norm()) <= SAME * float(wanted.norm()):
            return ""
    return label


PIXELS = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(1, 3, 2, 2)


def _network(x: Tensor, timestep: Tensor) -> Tensor:
    """What stands for a network: smooth, and not linear in latents and timestep."""
    return 0.6 * x + torch.tanh(0.5 * x.roll(1, 1) + PIXELS * torch.cos(timestep.double() / 300))


def _noise(timestep: Tensor) -> Tensor:
    """What stands for the noise that is drawn at a timestep."""
    return torch.sin(7 * PIXELS + timestep.double() / 1000)


class _Drawn(TorchFunctionMode):
    """Who draws noise gets what stands for it."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in trace.DRAWS:
            return self.noise.to(kwargs.get("dtype") or torch.float64)
        return func(*args, **kwargs)


def _itself(scheduler: Any, steps: int, told: Mapping[str, Any]) -> Tensor:
    """The final latents of a scheduler of diffusers."""
    set_timesteps(scheduler, steps, told)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    given = {"eta": 0.0} if "eta" in parameters_of(type(scheduler).step) else {}
    if _is_brownian(scheduler):  # of its tree we have no counterpart: without noise the rest is the same or not
        scheduler.noise_sampler = lambda sigma, after: torch.zeros_like(PIXELS)
    x = _noise(torch.tensor(-1.0)) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for k, t in enumerate(scheduler.timesteps):
        taken = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        with _Drawn(_noise(t)):
            x = trace.call_step(scheduler, scheduler.timesteps, k, _network(taken, t), x, given)
    return x


def _by(solver: Scheduler, scheduler: Any, steps: int, told: Mapping[str, Any]) -> Tensor | None:
    """The final latents of our solver on the grid of a scheduler of diffusers; None if that isn't one of as many steps."""
    schedule = noise_schedule_of(scheduler)
    times = times_of(scheduler, schedule, steps, told)
    if len(times) != steps + 1 or not bool((times.diff() < 0).all()):
        return None
    field = _Model(schedule, prediction_of(scheduler), not _is_brownian(scheduler))
    scale = 1.0 if starts_with_unit_variance(scheduler) else float(schedule.scale(times[0])[1])
    x = scale * _noise(torch.tensor(-1.0))
    state = solver.init(field, x, times[:1])
    for t, s in zip(times[:, None], times[1:, None]):
        x, state = solver.step(field, x, t, s, state)
    return x


def _is_brownian(scheduler: Any) -> bool:
    return "noise_sampler_seed" in scheduler.config


class _Model(Field):
    def __init__(self, schedule: NoiseSchedule, prediction: Prediction, noisy: bool) -> None:
        self.noise_schedule, self.prediction, self.noisy = schedule, prediction, noisy
        self.scales: dict[float, tuple[Tensor, Tensor]] = {}

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A step asks for its own again and again."""
        if (at := float(t)) not in self.scales:
            alpha, sigma = self.noise_schedule.scale(t)
            self.scales[at] = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
        return self.scales[at]

    def time(self, ratio: Tensor) -> Tensor:
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        answer, (alpha, sigma) = _network(x, self.noise_schedule.timestep(t)), self.scale(t)
        of_x, of_answer = {
            "sample": (0.0 * sigma, 0.0 * sigma + 1),
            "epsilon": (1 / alpha, -sigma / alpha),
            "v": (alpha, -sigma),
            "flow": (0.0 * sigma + 1, -sigma),
        }[self.prediction]
        return of_x * x + of_answer * answer

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        return self.noisy * _noise(self.noise_schedule.timestep(t))


@cache
def _built(solver: str, name: str, settings: str) -> Scheduler:
    if solver:
        return SOLVERS[name][1]()
    cls: type[traced.Traced] = getattr(traced, name)
    return cls.of(settings)


class ModelScheduler(Scheduler):
    """The scheduler that the model at ``path`` names, with the settings of its config, as its pipeline has them.

    Raises ValueError, saying what to take instead, if it can't be followed.
    """

    contract = 2
    libraries = ("diffusers",)
    fingerprinted = LOCATION

    def __init__(
        self,
        path: Annotated[str, weights_of()] = "",
        revision: str | None = None,
        config: Annotated[str | None, weights_of()] = None,
    ) -> None:
        folder = Folder(path, revision, config)
        try:
            scheduler = shared_scheduler_of(folder)
            cls = type(scheduler)
            self.name, self.settings = cls.__name__, ""
            noise_schedule_of(scheduler)
            self.solver = solver_of(folder)
            """Our solver; "" if the class itself is traced."""
            if not self.solver:
                self.settings = self._settings(cls, folder)
            inner = self._inner
        except ValueError as error:
            raise ValueError(
                f"{error} ({folder / 'scheduler'}): take another, as scheduler=dpmpp_2m, or model=pipeline, which runs the model "
                "by its own"
            ) from error
        # Of a class elsewhere; here the model's files say them.
        self.order, self.evaluations, self.stochastic = inner.order, inner.evaluations, inner.stochastic  # type: ignore[misc]
        self.mended = mended(folder)

    def _settings(self, cls: Any, folder: Folder) -> str:
        """Those of the traced class."""
        if self.name not in traced.TRACED:
            why = traced.NOT_TRACED.get(self.name, "it is none that is known here")
            raise ValueError(f"{self.name}: {why}")
        more: dict[str, Any] = {}
        if self.name == "PNDMScheduler":
            more = {"prediction_type": "epsilon"}
        elif "eta" in inspect.signature(cls.step).parameters:
            more = {"eta": 0.0}  # the pipelines' default, whatever the class's
        return trace.settings_of(folder, more)

    def fingerprint(self) -> str:
        # All that it takes from the model; the rest is the denoiser's.
        return f"{self.solver or self.name} {hashlib.blake2b(self.settings.encode(), digest_size=8).hexdigest()}"

    def notices(self) -> Sequence[str]:
        """What the model's pipeline changes in its scheduler's config."""
        return [f"scheduler model: {said} in {self.name}, as the model's pipeline has it" for said in self.mended]

    def start(self, noise_schedule: NoiseSchedule, steps: int, kept: int, shape: Sequence[int]) -> Start | None:
        if not self.solver and self.name == "PNDMScheduler" and kept < steps:
            raise ValueError(
                "PNDMScheduler with skip_prk_steps: false begins with its Runge-Kutta steps, and can't begin in the middle, "
                "from a picture: scheduler=pndm can"
            )
        start = self._inner.start(noise_schedule, steps, kept, shape)
        return None if start is None else replace(start, grid="model")

    @property
    def on_cpu(self) -> Collection[str]:  # type: ignore[override]
        return self._inner.on_cpu

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        return self._inner.init(field, x, t)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        return self._inner.step(field, x, t, s, state)

    @property
    def _inner(self) -> Scheduler:
        return _built(self.solver, self.name, self.settings)

"""What a model's ``scheduler_config.json`` says: noise path, prediction, grid and solver, each in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from latentmill.plugin import Field, NoisePath, Prediction, Scheduler, State
from latentmill.schedulers.consistency import LCM, TCD
from latentmill.schedulers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMppSDE
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.heun import DPM2, DPM2Ancestral, Heun
from latentmill.schedulers.multistep import DEIS, LMS, PNDM
from latentmill.schedulers.paths import VP, Flow
from latentmill.schedulers.unipc import UniPC
from latentmill_diffusers.folder import LOCATION, Folder
from latentmill_diffusers.traced import TRACED

PART = "scheduler"
NEAR = 1e-3
"""Of a timestep: what float32 makes of a whole one is taken for it."""
IN_SIGMA = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
"""Schedulers of diffusers that keep ``x / alpha``, and begin with the noise that their spacing says."""
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
    "flow_prediction": "flow",
}


def scheduler_of(folder: Folder) -> Any:
    """A new scheduler of diffusers, as the model's config says. Raises ValueError if there is none of its name."""
    import diffusers

    found = folder.class_of(PART)
    cls = getattr(diffusers, found[1], None) if found else None
    if cls is None:
        raise ValueError(f"{folder / PART}: the installed diffusers has no scheduler {found[1] if found else 'there'}")
    return cls.from_config(folder.config(PART))


def is_flow(scheduler: Any) -> bool:
    """Whether it is of a flow path."""
    config = scheduler.config
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow) or type(scheduler).__name__.startswith("FlowMatch")


def path_of(scheduler: Any) -> NoisePath:
    """The noise path. Raises ValueError for betas that are listed one by one."""
    if is_flow(scheduler):
        return Flow()
    config = scheduler.config
    if config.get("trained_betas") is not None or "beta_schedule" not in config:
        raise ValueError(f"{type(scheduler).__name__}: only paths of a beta_schedule, and flow paths, are known here")
    return VP(
        betas=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        steps=config.num_train_timesteps,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
    )


def prediction_of(scheduler: Any) -> Prediction:
    """What the network predicts. Raises ValueError for a name that we don't know."""
    name = "flow_prediction" if is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise ValueError(f"prediction_type {name!r}: expected {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def starts_with_unit_variance(scheduler: Any) -> bool:
    """Whether the pipelines begin with noise of variance 1, and not sigma squared, at the first time."""
    if type(scheduler).__name__.startswith(IN_SIGMA):
        return scheduler.config.get("timestep_spacing") not in ("linspace", "trailing")
    return True


def times_of(scheduler: Any, path: NoisePath, steps: int, told: dict[str, Any]) -> Tensor:
    """The times of ``set_timesteps``, float64 ``[steps + 1]``: its sigmas where it has such, its timesteps elsewhere.

    ``told`` is what a pipeline gives it besides the number of steps: ``sigmas`` and ``mu``, where it takes them.
    """
    import inspect

    known = inspect.signature(scheduler.set_timesteps).parameters
    told = {name: value for name, value in told.items() if name in known}
    if "sigmas" in told and scheduler.config.get("use_flow_sigmas"):
        del told["sigmas"]
    scheduler.set_timesteps(**{"num_inference_steps": steps, **told})
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(path, Flow):
        # A single step stretched to end at shift_terminal is 0/0.
        return sigmas.double().nan_to_num(nan=1.0).unique_consecutive().clamp(max=1.0)
    assert isinstance(path, VP)
    if sigmas is not None and type(scheduler).__name__ not in ("DDPMScheduler", "PNDMScheduler"):
        times = path.time(sigmas.double().unique_consecutive())
    else:
        # The second of PNDM's timesteps stands there twice.
        at = torch.as_tensor(scheduler.timesteps).double().unique_consecutive()
        clean = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0
        times = torch.cat([(at + 1) / path.steps, torch.tensor([0.0 if clean else 1 / path.steps])])
    whole = (times * path.steps).round()
    return torch.where((times * path.steps - whole).abs() < NEAR, whole / path.steps, times)


def told_of(scheduler: Any, timestep: Tensor) -> Tensor:
    """What the network is told of a timestep: some schedulers of diffusers know whole ones only."""
    if not type(scheduler).__name__.startswith(("DPMSolverMultistep", "DEIS", "SASolver", "UniPC")):
        return timestep
    return (timestep + NEAR).floor() if is_flow(scheduler) else timestep.round()


OURS = {
    "DPMSolverMultistepScheduler": {"solver_order": 2, "solver_type": "midpoint", "euler_at_final": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {"predict_x0": True, "disable_corrector": []},
}
"""Settings with which our solver is the same as the class: of others it would make other pictures."""


def solver_of(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our solver, by its name in SOLVERS, and its settings, for diffusers' scheduler of that class and whole config. Raises ValueError."""
    other = [f"{key}: {config[key]}" for key, value in OURS.get(name, {}).items() if config.get(key, value) != value]
    if config.get("thresholding") or (config.get("clip_sample") and name.startswith(("DDIM", "DDPM", "LCM", "TCD"))):
        other.append("estimates that are clipped")
    solver = NAMES.get(name, "")
    settings: dict[str, Any] = {}
    if name == "DPMSolverMultistepScheduler":
        algorithm = config.get("algorithm_type", "dpmsolver++")
        solver = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}.get(algorithm, "")
    elif name in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
        settings["max_order"] = config.get("solver_order", 2)
        if name == "UniPCMultistepScheduler":
            settings["variant"] = config.get("solver_type", "bh2")
    if other or not solver:
        itself = f", or the class itself, scheduler=diffusers:{name} scheduler.path=..." if name in TRACED else ""
        told = f" with {' and '.join(other)}" if other else ""
        raise ValueError(
            f"{name}{told} has no counterpart among our solvers: choose one of those, as scheduler=dpmpp_2m{itself}"
        )
    return solver, settings


NAMES = {
    "DDIMScheduler": "euler",
    "DDPMScheduler": "euler_ancestral",
    "DEISMultistepScheduler": "deis",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "FlowMatchLCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
SOLVERS: dict[str, type[Scheduler]] = {
    "deis": DEIS,
    "dpm2": DPM2,
    "dpm2_ancestral": DPM2Ancestral,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "dpmpp_sde": DPMppSDE,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "lcm": LCM,
    "lms": LMS,
    "pndm": PNDM,
    "tcd": TCD,
    "unipc": UniPC,
}


@cache
def _built(name: str, settings: tuple[tuple[str, Any], ...]) -> Scheduler:
    return SOLVERS[name](**dict(settings))


class ModelScheduler(Scheduler):
    """Our counterpart of the scheduler that the model at ``path`` names, with the settings of its config."""

    contract = 1
    libraries = ("diffusers",)
    fingerprinted = LOCATION

    def __init__(self, path: str = "", revision: str | None = None, config: str | None = None) -> None:
        folder = Folder(path, revision, config)
        found = folder.class_of(PART)
        self.solver, settings = solver_of(found[1] if found else "None", scheduler_of(folder).config)
        self.settings = tuple(sorted(settings.items()))
        ours = _built(self.solver, self.settings)
        self.order, self.evaluations, self.stochastic = ours.order, ours.evaluations, ours.stochastic  # type: ignore[misc]

    def fingerprint(self) -> str:
        return f"{self.solver} {dict(self.settings)}"  # all that it takes from the model; the rest is the denoiser's

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        return _built(self.solver, self.settings).init(field, x, t)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        return _built(self.solver, self.settings).step(field, x, t, s, state)

"""ComfyUI's samplers, by its names, as it reckons them: of the same latents, sigmas and noise the same latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from latentmill.plugin import Field, Scheduler, State
from latentmill.schedulers import comfy_solvers as own
from latentmill.schedulers.comfy_names import SAMPLERS, named_sampler
from latentmill.schedulers.consistency import LCM
from latentmill.schedulers.dpm_solver import DPMSolverAdaptive, DPMSolverFast
from latentmill.schedulers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp2MSDEHeun, DPMpp2SAncestral, DPMppSDE
from latentmill.schedulers.er_sde import ERSDE3
from latentmill.schedulers.euler import Euler
from latentmill.schedulers.heun import DPM2, Heun, HeunPP2
from latentmill.schedulers.multistep import IPNDM, LMS, Adams, GradientEstimation, RESMultistep
from latentmill.schedulers.seeds import SEEDS2, SEEDS3
from latentmill.schedulers.unipc import OF_TIMES
from latentmill.text import near

Solvers: TypeAlias = Callable[[float], Scheduler]
"""A solver of an ``eta``."""

# What each name is: of the data's own noise schedule, or of a path of alpha 1 and sigma t where that is a flow model's.
_OF_SIGMA: Mapping[str, Solvers] = {
    "euler": lambda eta: Euler(),
    "ddim": lambda eta: Euler(),
    "heun": lambda eta: Heun(),
    "heunpp2": lambda eta: HeunPP2(),
    "dpm_2": lambda eta: DPM2(),
    "lms": lambda eta: LMS(),
    "dpm_fast": lambda eta: DPMSolverFast(),
    "dpm_adaptive": lambda eta: DPMSolverAdaptive(),
    "dpmpp_2s_ancestral_cfg_pp": own.CFGpp2SAncestral,
    "dpmpp_2m": lambda eta: DPMpp2M(),
    "dpmpp_2m_cfg_pp": lambda eta: own.CFGpp2M(),
    "ddpm": lambda eta: Euler(1.0),
    "ipndm": lambda eta: IPNDM(),
    "ipndm_v": lambda eta: own.UnequalIPNDM(),
    "deis": lambda eta: own.DEISInTime(),
    "res_multistep": lambda eta: RESMultistep(),
    "res_multistep_cfg_pp": lambda eta: own.RESAncestral(0.0, cfg_pp=True),
    "res_multistep_ancestral": own.RESAncestral,
    "res_multistep_ancestral_cfg_pp": lambda eta: own.RESAncestral(eta, cfg_pp=True),
    "gradient_estimation": lambda eta: GradientEstimation(),
    "gradient_estimation_cfg_pp": lambda eta: own.CFGppGradient(),
    "uni_pc": lambda eta: own.LastStepsUniPC(3, "bh1"),
    "uni_pc_bh2": lambda eta: own.LastStepsUniPC(3, "bh2"),
}
_OF_DATA: Mapping[str, Solvers] = {
    "euler_cfg_pp": lambda eta: own.CFGpp(),
    "euler_ancestral_cfg_pp": own.CFGpp,
    "euler_ancestral": Euler,
    "dpm_2_ancestral": DPM2,
    "dpmpp_2s_ancestral": DPMpp2SAncestral,
    "dpmpp_sde": DPMppSDE,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "dpmpp_2m_sde_heun": DPMpp2MSDEHeun,
    "dpmpp_3m_sde": own.HalvedDPMpp3MSDE,
    "lcm": lambda eta: LCM(),
    "er_sde": lambda eta: ERSDE3(),
    "seeds_2": SEEDS2,
    "seeds_3": SEEDS3,
    "sa_solver": own.MiddleSASolver,
    "sa_solver_pece": own.MiddleSASolverPECE,
}
_OF_FLOWS: Mapping[str, Solvers] = {
    "euler_ancestral": lambda eta: own.FlowAncestral("none", eta),
    "dpm_2_ancestral": lambda eta: own.FlowAncestral("sigma", eta),
    "dpmpp_2s_ancestral": lambda eta: own.FlowAncestral("ratio", eta),
}
"""Those that are others on a flow model."""
_LAST = ("sa_solver_pece",)
"""Those whose last estimate of a step, and not the first, is what a row is at sigma 0."""


class ComfySampler(Scheduler):
    """ComfyUI's sampler ``sampler``, as it reckons it; ``eta`` and ``s_noise`` of those that draw noise.

    Where sigma is 0 a row is the estimate, whatever the solver. Grid ``comfy`` has to be told what else the sampler does
    (``comfy_names``).
    """

    contract = 2
    on_cpu = (*OF_TIMES, *Adams.on_cpu, *DPMSolverFast.on_cpu)

    def __init__(
        self, sampler: str = "euler", eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint"
    ) -> None:
        if sampler.removesuffix("_gpu") not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}{near(sampler, SAMPLERS)}")
        known = named_sampler(sampler)
        given = {"eta": eta != 1.0, "s_noise": s_noise != 1.0, "solver_type": solver_type != "midpoint"}
        for name in (name for name, said in given.items() if said and name not in known.settings):
            raise ValueError(f"sampler {sampler} has no {name}; it has {', '.join(known.settings) or 'no settings'}")
        if solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type must be midpoint or heun, not {solver_type!r}")
        for key, value, most in (("eta", eta, 2 if sampler.startswith("sa_") else 1), ("s_noise", s_noise, 100)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"sampler {sampler}: {key} must be a number from 0 to {most}, not {value!r}")
        self.sampler, self.eta, self.s_noise = sampler.removesuffix("_gpu"), float(eta), float(s_noise)
        if solver_type == "heun":
            self.sampler = "dpmpp_2m_sde_heun"
        solver = _solver(self.sampler, self.eta, False)
        vars(self).update(evaluations=solver.evaluations, order=solver.order, looks_ahead=solver.looks_ahead)
        vars(self).update(guides_all="cfg_pp" in self.sampler)
        vars(self).update(stochastic=solver.stochastic or self.sampler == "ddpm" or "ancestral" in self.sampler)

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        solver, seen = self._of(field)
        return solver.init(seen, x, t)

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        solver, seen = self._of(field)
        moved, state = solver.step(seen, x, t, s, state)
        _, sigma_s = field.scale(s)
        return torch.where(sigma_s > 0, moved, seen.cleans[-1 if self.sampler in _LAST else 0]), state

    def _of(self, field: Field) -> tuple[Scheduler, ComfyField]:
        flow = field.noise_schedule.sigma_is_time
        solver = _solver(self.sampler, self.eta, flow)
        return solver, ComfyField(field, self.s_noise, straight=flow and self.sampler in _OF_SIGMA)


@cache
def _solver(sampler: str, eta: float, flow: bool) -> Scheduler:
    own_of = _OF_FLOWS if flow and sampler in _OF_FLOWS else _OF_SIGMA if sampler in _OF_SIGMA else _OF_DATA
    return own_of[sampler](eta)


class ComfyField(Field):
    """A field as ComfyUI's solvers see it: noise times ``s_noise`` and, where ``straight``, a flow model's as if alpha were 1."""

    def __init__(self, field: Field, s_noise: float, straight: bool) -> None:
        self.field, self.s_noise, self.straight = field, s_noise, straight
        self.noise_schedule = field.noise_schedule
        self.cleans: list[Tensor] = []
        """The first estimate of this step, and the newest."""

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.field.scale(t)
        return (torch.ones_like(alpha) if self.straight else alpha), sigma

    def numbers(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.field.numbers(t)
        return (torch.ones_like(alpha) if self.straight else alpha), sigma

    def expect(self, *times: Tensor) -> None:
        self.field.expect(*times)

    def send(self, *numbers: Tensor) -> Sequence[Tensor]:
        return self.field.send(*numbers)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio.flatten().cpu() if self.straight else self.field.time(ratio)

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        clean = self.field.clean(x, t)
        self.cleans[1:] = [clean]
        return clean

    def guided(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        clean, other = self.field.guided(x, t)
        self.cleans[1:] = [clean]
        return clean, other

    def following(self, s: Tensor) -> Tensor:
        return self.field.following(s)

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        drawn = self.field.noise(t, s)
        return drawn if self.s_noise == 1.0 else self.s_noise * drawn

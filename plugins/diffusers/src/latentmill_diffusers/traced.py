"""diffusers' own schedulers as ours, each under its own name: what ``trace`` reads off them moves rows of a mixed batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from latentmill.plugin import Field, NoiseSchedule, Scheduler, Start, State
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.trace import BETAS, Table, grid_arguments, make, prediction_by, settings_of, trace

TRACED: dict[str, tuple[int, int, bool]] = {
    "CogVideoXDDIMScheduler": (1, 1, False),
    "CogVideoXDPMScheduler": (1, 1, True),
    "DDIMParallelScheduler": (1, 1, False),
    "DDIMScheduler": (1, 1, False),
    "DDPMParallelScheduler": (1, 1, True),
    "DDPMScheduler": (1, 1, True),
    "DDPMWuerstchenScheduler": (1, 1, True),
    "DEISMultistepScheduler": (2, 1, False),
    "DPMSolverMultistepScheduler": (2, 1, False),
    "DPMSolverSinglestepScheduler": (2, 1, False),
    "EDMDPMSolverMultistepScheduler": (2, 1, False),
    "EDMEulerScheduler": (1, 1, False),
    "EulerAncestralDiscreteScheduler": (1, 1, True),
    "EulerDiscreteScheduler": (1, 1, False),
    "FlowMapEulerDiscreteScheduler": (1, 1, False),
    "FlowMatchEulerDiscreteScheduler": (1, 1, False),
    "FlowMatchHeunDiscreteScheduler": (2, 2, False),
    "FlowMatchLCMScheduler": (1, 1, True),
    "HeunDiscreteScheduler": (2, 2, False),
    "KDPM2AncestralDiscreteScheduler": (2, 2, True),
    "KDPM2DiscreteScheduler": (2, 1, False),
    "LCMScheduler": (1, 1, True),
    "LMSDiscreteScheduler": (4, 1, False),
    "LTXEulerAncestralRFScheduler": (1, 1, True),
    "PNDMScheduler": (4, 1, False),
    "SASolverScheduler": (2, 1, True),
    "TCDScheduler": (1, 1, True),
    "UnCLIPScheduler": (1, 1, True),
    "UniPCMultistepScheduler": (2, 1, False),
}
"""Order, evaluations in a step, and whether noise is drawn, with a class's default settings."""

TOKENS = "it moves tokens and no latents"
BROWNIAN = "its noise is a Brownian tree of torchsde, and no noise of single steps; dpmpp_sde is the same solver"
NOT_TRACED: dict[str, str] = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CMStochasticIterativeScheduler": "it is of consistency models of pixels",
    "CosineDPMSolverMultistepScheduler": "it is of models of sound, with the noise of torchsde's Brownian tree",
    "DDIMInverseScheduler": "it goes from clean to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from clean to noise",
    "DPMSolverSDEScheduler": BROWNIAN,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "HeliosDMDScheduler": "its stages change the latents' size on the way; of one model of video",
    "HeliosScheduler": "its stages change the latents' size on the way; of one model of video",
    "IPNDMScheduler": "it is of models of sound, on a path of its own; ipndm is the same solver",
    "KarrasVeScheduler": "it is of models of pixels, and takes sigmas and two samples a step; deprecated",
    "MiniMaxH3Scheduler": "its timesteps count from 0, noise, to 1; of one model of video and sound",
    "PiflowScheduler": "its network answers a whole policy of several predictions; of one model of video",
    "RFD4ProteinaScheduler": "it is of models of proteins",
    "RePaintScheduler": "it goes back and forth, and takes a picture and a mask each step",
    "SCMScheduler": "it is of Sana Sprint alone, which the pipeline tier runs",
    "ScoreSdeVeScheduler": "it is of models of pixels, and a predictor and a corrector that are called apart; deprecated",
    "VQDiffusionScheduler": TOKENS,
}
"""Why the others of diffusers' schedulers are none of ours."""
Scale: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""alpha and sigma at times: a path's or a field's."""
_BETAS: WeakKeyDictionary[Field, dict[int, bytes]] = WeakKeyDictionary()
REFERENCE, REFERENCE_SHAPE = 20, (4, 64, 64)
"""Steps of the run that says how much a scheduler remembers at most, and the shape of its latents."""


class Traced(Scheduler):
    """A scheduler of diffusers, on the grid that it makes itself.

    Settings are those of the class in diffusers; ``path`` (and ``revision``) is a model's folder whose scheduler's settings
    are taken where none is given, as ``from_config`` does. A parameter of ``step`` (``eta``, say) is a setting, too, and
    ``sigmas: trailing`` gives ``set_timesteps`` the sigmas 1 to 1/n, as the pipelines of FLUX and its like do. ``clip_sample``
    is false unless it or a path is given: latents have no range. With neither ``path`` nor settings of betas, they are those of the denoiser's noise schedule; otherwise the two have
    to be the same.
    """

    contract = 2
    on_cpu = ("at",)
    fingerprinted = ("path", "revision")
    diffusers_class: ClassVar[str]

    def __init__(self, path: Annotated[str, weights_of()] = "", revision: str | None = None, **settings: Any) -> None:
        self._set(settings_of(Folder(path, revision) if path else None, settings))

    @classmethod
    def of(cls, settings: str) -> Traced:
        """With all that ``settings_of`` says."""
        scheduler = cls.__new__(cls)
        scheduler._set(settings)
        return scheduler

    def _set(self, settings: str) -> None:
        self.settings, told = settings, json.loads(settings)
        made = make(self.diffusers_class, self.settings)
        config = made.scheduler.config
        self.mended = made.mended
        own = told["config"] or BETAS & set(told) or "trained_betas" not in config
        self.steps = 0 if own else config["num_train_timesteps"]
        self.prediction = prediction_by(self.diffusers_class, config)
        grid = grid_arguments(self.diffusers_class, self.settings, REFERENCE, REFERENCE_SHAPE)
        self.memory = trace(self.diffusers_class, self.settings, REFERENCE, 0, grid, b"").memory

    def fingerprint(self) -> str:
        import diffusers

        config = json.loads(self.settings)["config"]
        text = json.dumps(config, sort_keys=True).encode()
        of_model = f" {hashlib.blake2b(text, digest_size=8).hexdigest()}" if config else ""
        return f"diffusers {diffusers.__version__}{of_model}"

    def notices(self) -> Sequence[str]:
        """What the model's pipeline changes in its scheduler's config."""
        return [f"scheduler {self.diffusers_class}: {said}, as the model's pipeline has it" for said in self.mended]

    def start(self, noise_schedule: NoiseSchedule, steps: int, kept: int, shape: Sequence[int]) -> Start:
        table = self._table(self._betas(noise_schedule.scale), steps, steps - kept, shape)
        times = _times(noise_schedule, table.timesteps, table.mixed)
        wanted = ours = torch.stack(noise_schedule.scale(times), 1)
        theirs = table.mixed
        if table.own is not None:
            theirs, count = table.own, len(table.own)
            ours = torch.stack(noise_schedule.scale(torch.arange(1, count + 1, dtype=torch.float64) / count), 1)
        if not bool((theirs.isnan() | torch.isclose(theirs, ours, rtol=0.01, atol=0.01)).all()):
            raise ValueError(
                f"{self.diffusers_class} has another noise schedule than the denoiser: give scheduler.path, the model's folder, "
                "or beta_schedule, beta_start and beta_end as it was trained"
            )
        alpha, sigma = wanted[0] if bool(table.mixed[0].isnan().any()) else table.mixed[0]
        state = {"at": torch.tensor([steps, steps - kept, 0])}
        if self.memory:
            state["memory"] = torch.zeros(self.memory, *shape)
        times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        return Start(times, state, float(alpha), float(sigma), table.scale if kept == steps else float(sigma))

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        raise ValueError(f"{self.diffusers_class} has a grid of its own: its rows begin as `start` says")

    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        dtype, memory = x.dtype, list(state["memory"].unbind(1)) if self.memory else []
        betas = self._betas_of(field)
        runs = [(self._table(betas, steps, begin, x.shape[1:]), group) for steps, begin, group in state["at"].tolist()]
        calls = range(max(table.calls[group + 1] - table.calls[group] for table, group in runs))
        near = [torch.stack([table.call(group, k, self.memory) for table, group in runs]) for k in calls]
        for weights, there in zip(near, field.send(*near)):
            count = weights.any(0).tolist()  # which vectors have a weight, for any row, in each sum
            noise = field.noise(t, s) if any(row[2] for row in count) else None
            output = _output(self.prediction, x, field.clean(x, t), *field.scale(t))
            vectors = [x, output, noise, None, *memory]
            moved, to_limit, *kept = zip(there.unbind(1), count)
            if limit := runs[0][0].limit:
                vectors[3] = limit(_sum(*to_limit, vectors))
            x, *memory = (_sum(*row, vectors) for row in (moved, *kept))
        after = {"at": state["at"] + torch.tensor([0, 0, 1])}
        if self.memory:
            after["memory"] = torch.stack(memory, 1).to(dtype)
        return x.to(dtype), after

    def _betas(self, scale: Scale) -> bytes:
        return _betas(scale, self.steps) if self.steps else b""

    def _betas_of(self, field: Field) -> bytes:
        """Those of a field's noise schedule, which no step changes."""
        known = _BETAS.setdefault(field, {})
        if self.steps not in known:
            known[self.steps] = self._betas(field.numbers)
        return known[self.steps]

    def _table(self, betas: bytes, steps: int, begin: int, shape: Sequence[int]) -> Table:
        told = grid_arguments(self.diffusers_class, self.settings, steps, tuple(shape))
        table = trace(self.diffusers_class, self.settings, steps, begin, told, betas)
        if table.memory > self.memory:
            raise ValueError(
                f"{self.diffusers_class} remembers more in {steps} steps than in {REFERENCE}: it isn't traced"
            )
        return table


def _betas(scale: Scale, steps: int) -> bytes:
    """The betas of a noise schedule of so many timesteps, as float64; none for one that isn't variance preserving."""
    alpha, sigma = (value.flatten() for value in scale(torch.arange(1, steps + 1, dtype=torch.float64) / steps))
    bars = torch.cat([torch.ones_like(alpha[:1]), alpha**2])
    preserves = torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
    return (1 - bars[1:] / bars[:-1]).cpu().numpy().tobytes() if preserves else b""


def _times(schedule: NoiseSchedule, timesteps: Tensor, mixed: Tensor) -> Tensor:
    """The times at which networks are told these timesteps; of a schedule whose timesteps aren't linear in t, by sigma / alpha."""
    first, last = schedule.timestep(torch.tensor([0.0, 1.0], dtype=torch.float64))
    times: Tensor = (timesteps - first) / (last - first)
    if not bool(first.isfinite()) or not torch.allclose(schedule.timestep(times), timesteps):
        times = schedule.time(mixed[:, 1] / mixed[:, 0])
    return times.clamp(max=1.0)


def _output(prediction: str, x: Tensor, clean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network that predicts ``prediction`` has answered where the clean latents are ``clean``."""
    if prediction == "sample":
        return clean
    noise = (x - alpha * clean) / sigma
    if prediction == "epsilon":
        return noise
    return alpha * noise - sigma * clean if prediction == "v" else noise - clean


def _sum(weights: Tensor, count: Sequence[bool], vectors: Sequence[Any]) -> Tensor:
    """Of ``weights[B, V]`` and V latents ``[B, ...]``, or None, of those that ``count``. One after another, so that a row's bits don't hang on its company."""
    total = torch.zeros_like(vectors[0], dtype=torch.float64)
    for weight, counts, vector in zip(weights.unbind(1), count, vectors):
        if vector is not None and counts:
            total = total + weight.reshape(-1, *(1 for _ in vector.shape[1:])) * vector
    return total


for _name, (_order, _evaluations, _stochastic) in TRACED.items():
    globals()[_name] = type(
        _name,
        (Traced,),
        {
            "__doc__": f"``{_name}`` of diffusers.",
            "__module__": __name__,
            "contract": 2,
            "diffusers_class": _name,
            "order": _order,
            "evaluations": _evaluations,
            "stochastic": _stochastic,
        },
    )

"""diffusers' own schedulers, read off as numbers, so that rows of any steps, strengths and seeds share a batch.

What ``step`` of most of diffusers' schedulers computes is linear in the latents, the network's outputs and the noise, with
weights that hang on the timesteps alone. So the real class is run once for each number of steps, on vectors of a basis in
place of latents; what comes out is its weights. Its memory (earlier outputs, a corrected sample) is whatever tensors of the
latents' shape it keeps: before each call they are made vectors of the basis, too, and so a call is a matrix that takes
(sample, output, noise, memory) to (sample, memory). What no later call reads is left out.

Clipping and thresholding aren't linear, but all else of their steps is: what they take is noted as a sum of the others, and what
they give is one more vector of the basis. So a call is two sums, and between them the scheduler's own limit on each row.

A row's state is its place, ``at[B, 3]``: steps, first call and next group, and its ``memory[B, H, ...]``. Calls at one timestep
belong together, a *group*, and are one step of ours: Heun's, for one, evaluates twice at each timestep but the first.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from latentmill.text import near
from latentmill_diffusers.families import FAMILIES, shift
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.schedule import (
    FLOWS,
    PREDICTIONS,
    changed,
    copied,
    is_flow,
    mend,
    parameters_of,
    require_known,
    said,
    set_timesteps,
)

BETAS = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "snr_shift_scale", "rescale_betas_zero_snr"}
"""Settings that say what the noise schedule is."""
Limit: TypeAlias = Callable[[Tensor], Tensor]
"""What clipping or thresholding makes of latents, row by row."""
UNIT = 1024.0
"""What latents are multiplied with to see whether a scheduler is linear: a power of two, so that nothing is rounded."""

DRAWS = frozenset({torch.randn, torch.randn_like})
WATCHED = DRAWS | {torch.clamp, Tensor.clamp}


@dataclass(frozen=True)
class Table:
    """What a scheduler does in a run: n calls in G groups. Samples are in the scale of what the network is given."""

    timesteps: Tensor
    """``[G]``, float64."""
    mixed: Tensor
    """``[G, 2]``: alpha and sigma that the scheduler takes the sample for; NaN if it doesn't say."""
    own: Tensor | None
    """``[N, 2]``: alpha and sigma of the scheduler's own noise schedule at its N timesteps; None if it doesn't say."""
    calls: list[int]
    """``[G + 1]``: group g is the calls from ``calls[g]`` to ``calls[g + 1]``."""
    weights: Tensor
    """``[n, 2 + H, 4 + H]``: (sample, output, noise, limited, memory) to (sample, what is limited, memory)."""
    limit: Limit | None
    """Clips or thresholds latents ``[B, ...]``, each row by itself; None if the scheduler does neither."""
    scale: float
    """Standard deviation of the noise that a run from nothing else begins with."""

    @property
    def memory(self) -> int:
        """H: how many latents are remembered."""
        return self.weights.shape[1] - 2

    def call(self, group: int, k: int, memory: int) -> Tensor:
        """The weights ``[2 + memory, 4 + memory]`` of a group's k-th call; of one that it doesn't have, no change."""
        at = self.calls[group] + k
        if at >= self.calls[group + 1]:
            same = torch.eye(4 + memory, dtype=torch.float64)
            same[3] = 0
            return same[[0, 3, *range(4, 4 + memory)]]
        return pad(self.weights[at], (0, memory - self.memory, 0, memory - self.memory))


@lru_cache(maxsize=1024)
def trace(name: str, settings: str, steps: int, begin: int, told: str, betas: bytes) -> Table:
    """The table of a class's last ``steps - begin`` of ``steps`` steps; ``told`` is what its grid is told besides."""
    made = make(name, settings, betas)
    scheduler, in_step = copied(made.scheduler), made.in_step
    set_timesteps(scheduler, steps, json.loads(told))
    begin *= getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[begin:]
    if name == "DDPMWuerstchenScheduler":
        timesteps = timesteps[:-1]  # the last is clean, and its pipelines leave it out, too
    try:
        mixed = _mix(scheduler, timesteps)
    except Exception as error:  # of a grid that a class has made wrong
        raise ValueError(f"{name} can't add noise on its grid of {steps} steps: {said(error)}") from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    scales, calls, limit = _calls(scheduler, timesteps, in_step)
    near_by = 1e-5 * float(timesteps.abs().max())  # KDPM2Ancestral's two of a step differ by rounding
    ends = [0]
    for k in range(1, len(calls)):
        if abs(float(timesteps[k] - timesteps[ends[-1]])) > near_by:
            ends.append(k)
    first = timesteps[ends].double()
    if not bool((first.diff() < 0).all()):
        raise ValueError(f"{name} has timesteps that don't descend in {steps} steps{_named(scheduler)}")
    scale = torch.tensor(scales, dtype=torch.float64)
    weights = _packed(calls, scale)
    for start, stop in zip(ends, [*ends[1:], len(calls)]):
        if int(weights[start:stop, :, 2].any(1).sum()) > 1:
            raise ValueError(f"{name} adds noise twice at one timestep: it isn't traced")
    noise = float(getattr(scheduler, "init_noise_sigma", 1.0)) * scales[0]
    own = None
    if hasattr(scheduler, "alphas_cumprod") and not is_flow(scheduler):
        own = torch.stack([scheduler.alphas_cumprod, 1 - scheduler.alphas_cumprod], 1).double().sqrt()
    return Table(first, mixed[ends] * scale[ends, None], own, [*ends, len(calls)], weights, limit, noise)


def settings_of(folder: Folder | None, settings: Mapping[str, Any]) -> str:
    """The settings of a model's scheduler, and others that go before them, as JSON."""
    taken = {"config": folder.config("scheduler"), "pipeline": folder.pipeline} if folder else {}
    return json.dumps({"config": {}, "pipeline": "", **taken, **settings}, sort_keys=True)


@lru_cache(maxsize=1024)
def grid_arguments(name: str, settings: str, steps: int, shape: tuple[int, ...]) -> str:
    """What the grid of ``steps`` is told besides their number, for latents of ``shape``, as JSON."""
    made, told = make(name, settings), {}
    if pipeline := json.loads(settings)["pipeline"]:
        told = FAMILIES[pipeline].schedule(made.scheduler.config, steps, shape) if pipeline in FAMILIES else {}
    elif made.scheduler.config.get("use_dynamic_shifting"):  # patches of 2x2, as of FLUX and its like
        told = {"mu": shift(made.scheduler.config, math.prod(shape[-2:]) / 4)}
    if made.trailing:
        told = {**told, "sigmas": np.linspace(1, 1 / steps, steps)}
    return json.dumps({key: np.asarray(value).tolist() for key, value in told.items()})


@dataclass(frozen=True)
class Made:
    """A scheduler of diffusers, and what of its settings is told elsewhere."""

    scheduler: Any
    in_step: dict[str, Any]
    """Settings of its ``step``."""
    trailing: bool
    """Whether its grid is that of trailing sigmas."""
    mended: list[str]
    """What the model's pipeline changes in its config."""


@lru_cache(maxsize=64)
def make(name: str, settings: str, betas: bytes = b"") -> Made:
    """A scheduler, to be copied before it is used. Raises ValueError for settings that it can't have."""
    import diffusers

    cls = getattr(diffusers, name)
    options = json.loads(settings)
    config, pipeline = options.pop("config"), options.pop("pipeline")
    known, in_step, in_grid = (
        set(inspect.signature(function).parameters) for function in (cls.__init__, cls.step, cls.set_timesteps)
    )
    for_step = {key: options.pop(key) for key in list(options) if key in in_step - known}
    trailing = "sigmas" in in_grid and options.pop("sigmas", None) == "trailing"
    require_known(name, {**{key: value for key, value in config.items() if key in known}, **options})
    for key in options:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}{near(key, known)}")
    if betas:
        options |= {"trained_betas": np.frombuffer(betas).tolist()}
        options |= {"snr_shift_scale": 1.0} if "snr_shift_scale" in known else {}
    if "clip_sample" in known and not config:
        options = {"clip_sample": False, **options}
    try:
        if not config:
            return Made(cls(**options), for_step, trailing, [])
        scheduler = cls.from_config(config)
        mended = mend(pipeline, scheduler)
        if options:  # which go before what the pipeline has changed
            scheduler = changed(scheduler, **options)
        return Made(scheduler, for_step, trailing, mended)
    except Exception as error:  # whatever a class has against its settings
        raise ValueError(f"{name}: {said(error)}") from error


def _named(scheduler: Any) -> str:
    """A scheduler's settings that are neither its defaults nor of its noise schedule."""
    known = inspect.signature(type(scheduler).__init__).parameters
    config = {key: value for key, value in scheduler.config.items() if key in known and key not in BETAS}
    told = [f"{key}: {value}" for key, value in config.items() if value != known[key].default]
    return f" with {', '.join(told)}" if told else ""


def prediction_by(name: str, config: Any) -> str:
    """What the network of a scheduler of this class and config predicts: epsilon, v, sample or flow."""
    if name.startswith(FLOWS):
        return "flow"
    if name.startswith("EDM"):
        return "sample"  # what preconditioning makes of the output: see _calls
    return PREDICTIONS[config.get("prediction_type", "epsilon")]


def _mix(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Alpha and sigma ``[n, 2]`` of the sample at each timestep, float64."""
    one = torch.ones(len(timesteps), 1, 1, 1, dtype=torch.float64)
    wrong = type(scheduler).__name__ == "SASolverScheduler" and scheduler.config.use_flow_sigmas  # it forgets the flow
    if hasattr(scheduler, "add_noise") and not wrong:
        alpha = scheduler.add_noise(one, 0 * one, timesteps)
        sigma = scheduler.add_noise(0 * one, one, timesteps)
    elif hasattr(scheduler, "scale_noise"):
        # Each asks a copy, since FlowMatchHeun's keeps the first timestep that it was asked for.
        each = list(zip(timesteps[:, None], one[:1].expand(len(timesteps), 1, 1, 1, 1)))
        alpha = torch.cat([copied(scheduler).scale_noise(x, t, 0 * x) for t, x in each])
        sigma = torch.cat([copied(scheduler).scale_noise(0 * x, t, x) for t, x in each])
    else:
        alpha = sigma = torch.nan * one
    mixed = torch.stack([alpha.flatten(), sigma.flatten()], 1).double()
    if getattr(scheduler, "order", 1) > 1:  # between two steps, KDPM2's gives the sigma of another timestep
        mixed[torch.arange(len(mixed)) % scheduler.order > 0] = torch.nan
    return mixed


def _calls(
    scheduler: Any, timesteps: Tensor, in_step: dict[str, Any]
) -> tuple[list[float], list[Tensor], Limit | None]:
    """The scale of what the network is given, and the weights of (sample, output, noise, limited, memory), call by call.

    Two rows are run, one UNIT times the other: of a scheduler that isn't linear they come apart.
    """
    scales, calls, limit = [], [], None
    units = torch.tensor([1.0, UNIT], dtype=torch.float64).reshape(2, 1, 1, 1)
    for k, timestep in enumerate(timesteps):
        slots = list(_slots(scheduler))
        sample, output, *vectors = units * torch.eye(5 + len(slots), dtype=torch.float64)[:, None, None, None, :]
        noises, limited, memory = vectors[:2], vectors[2], vectors[3:]
        for (place, key), vector in zip(slots, memory):
            place[key] = vector
        given = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        if hasattr(scheduler, "precondition_outputs"):  # ours is told what that makes of an output
            sigma = scheduler.sigmas[k - len(timesteps) - 1]
            skip, out = (scheduler.precondition_outputs(*pair, sigma) for pair in ((1.0, 0.0), (0.0, 1.0)))
            given, output = sample, (output - skip * sample) / out
        with _Watch(scheduler, noises, limited) as watch:
            try:
                moved = call_step(scheduler, timesteps, k, output, sample, in_step)
            except Exception as error:  # whatever a class has against its settings
                raise ValueError(f"{type(scheduler).__name__}: {said(error)}") from error
        kept = [place[key] for place, key in _slots(scheduler)]
        after, other = (torch.stack([moved, watch.to_limit, *kept]).double() / units).flatten(2).unbind(1)
        if not bool(after.isfinite().all()):
            raise ValueError(f"{type(scheduler).__name__} is not finite in {len(timesteps)} steps{_named(scheduler)}")
        if not torch.equal(after, other):
            raise ValueError(
                f"{type(scheduler).__name__} isn't linear in the latents{_named(scheduler)}, and so can't move rows of a mixed "
                "batch: choose other settings, or run the model's pipeline as it is (model=pipeline)"
            )
        if bool(after[:, 2].any() and after[:, 3].any()):
            raise ValueError(f"{type(scheduler).__name__} adds noise twice in a step: it isn't traced")
        after[:, 2] += after[:, 3]
        scales.append(float(given.flatten()[0]))
        calls.append(after[:, [0, 1, 2, *range(4, 5 + len(slots))]])
        limit = limit or watch.limit
    return scales, calls, limit


def call_step(
    scheduler: Any, timesteps: Tensor, k: int, output: Tensor, sample: Tensor, given: Mapping[str, Any]
) -> Tensor:
    """One call of ``step``, as the pipelines call it."""
    t = timesteps[k]
    parameters = parameters_of(type(scheduler).step)
    if "old_pred_original_sample" in parameters:
        before = timesteps[k - 1] if k else None
        old = vars(scheduler).get("old_pred_original_sample")
        moved: Tensor
        moved, scheduler.old_pred_original_sample = scheduler.step(
            output, old, t, before, sample, **given, return_dict=False
        )
        return moved
    if type(scheduler).__name__ == "DDPMWuerstchenScheduler":
        t = t[None]
    if "prev_timestep" in parameters:
        given = {**given, "prev_timestep": timesteps[k + 1] if k + 1 < len(timesteps) else None}
    moved = scheduler.step(output, t, sample, **given, return_dict=False)[0]
    return moved


def _slots(scheduler: Any) -> Iterator[tuple[Any, Any]]:
    """Where a scheduler keeps what is shaped as latents: ``(list or dict, key)``."""
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            yield from ((value, i) for i, each in enumerate(value) if isinstance(each, Tensor) and each.ndim == 4)
        elif isinstance(value, Tensor) and value.ndim == 4:
            yield vars(scheduler), name


class _Watch(TorchFunctionMode):
    """Gives ``noises``, one after another, to whoever draws in this thread, and ``limited`` for the latents that are limited."""

    def __init__(self, scheduler: Any, noises: Sequence[Tensor], limited: Tensor) -> None:
        self.scheduler, self.noises, self.limited = scheduler, iter(noises), limited
        self.to_limit = torch.zeros_like(limited)
        self.limit: Limit | None = None

    def __enter__(self) -> _Watch:
        if self.scheduler.config.get("thresholding"):
            self.scheduler._threshold_sample = partial(
                self._limited, partial(type(self.scheduler)._threshold_sample, self.scheduler)
            )
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's, which mypy does not see behind super()
        return self

    def __exit__(self, *raised: Any) -> None:
        vars(self.scheduler).pop("_threshold_sample", None)
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # as above

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in WATCHED:  # as all but a few are
            return func(*args, **kwargs)
        if func in DRAWS:
            return next(self.noises).to(kwargs.get("dtype") or torch.float64)
        if args[0].shape == self.limited.shape:
            low, high = args[1:]
            return self._limited(lambda x: x.clamp(low, high), args[0])
        return func(*args, **kwargs)

    def _limited(self, limit: Limit, sample: Tensor) -> Tensor:
        if self.limit is not None:
            raise ValueError("it limits latents twice in a step: it isn't traced")
        self.limit, self.to_limit = limit, sample
        return self.limited


def _packed(calls: list[Tensor], scale: Tensor) -> Tensor:
    """The calls' weights ``[n, 2 + H, 4 + H]``, with what no later call reads left out, in the network's scale."""
    read: list[int] = []
    out: list[Tensor] = []
    for k in reversed(range(len(calls))):
        weights = calls[k][[0, 1, *(2 + i for i in read)]]
        read = [i for i in range(weights.shape[1] - 4) if bool(weights[:, 4 + i].any())]
        weights = weights[:, [0, 1, 2, 3, *(4 + i for i in read)]]
        weights[:, 0] /= scale[k]
        weights[0] *= scale[k + 1] if k + 1 < len(calls) else 1.0
        out.append(weights)
    most = max(max(w.shape[0] - 2, w.shape[1] - 4) for w in out)
    return torch.stack([pad(w, (0, most - w.shape[1] + 4, 0, most - w.shape[0] + 2)) for w in reversed(out)])

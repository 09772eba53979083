"""Whether a setting is followed, in both tiers, or refused by name, or has no effect in the class itself.

``scheduler=model`` and ``scheduler=diffusers:NAME`` against the class itself, called as the pipelines call it, in float64: the same
network, the same noise.
"""

import copy
import importlib
import inspect
import json
import math
import os
import re
from functools import cache
from types import SimpleNamespace

import diffusers
import pytest
import torch
from answers import bits
from scheduler_settings import OF_THE_PATH, PATH, REFUSED, WITHOUT_EFFECT, base, cases, folder_of, is_flow

from latentmill import registry
from latentmill.plugin import Field, NoiseSchedule
from latentmill.schedulers import grids
from latentmill.schedulers.noise_schedules import VarianceExploding
from latentmill.stages.guidance import to_clean
from latentmill_diffusers import traced

STEPS = (5, 10, traced.REFERENCE)
"""Few, where some classes lower their order at the end; and as many as are traced to see what is remembered, not traced anew."""
ALL = os.environ.get("FAULTS") == "all"
"""Else a setting is tried in 10 steps and in one of the other numbers, which the settings of a class have by turns."""
MORE = traced.REFERENCE + 5
"""More than that, once a class: what it does there is traced for itself."""
SHAPE = (3, 4, 4)


class Network:
    """A fixed, smooth, non-linear function of latents ``[B, ...]`` and timesteps ``[B]``."""

    def __init__(self):
        self.weight, self.bias = weights()

    def __call__(self, x, timestep):
        swing = torch.cos(timestep.double() / 300).reshape(-1, 1, 1, 1)
        return 0.6 * x + torch.tanh((self.weight @ x.flatten(2)).view_as(x) + self.bias * swing)


@cache
def parameters_of(function):
    return inspect.signature(function).parameters


@cache
def weights():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, generator=generator).double() / 2, torch.randn(3, 1, 1, generator=generator).double()


def noise_of(timestep):
    """The noise that is drawn at a timestep."""
    return drawn_by(round(31.4159 * timestep) + 1000).clone()


@cache
def drawn_by(seed):
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()


class Drawn(Field):
    """Ours: the network behind what a scheduler may ask."""

    def __init__(self, denoiser, noisy):
        self.noise_schedule, self.prediction, self.network, self.noisy = (
            denoiser.noise_schedule,
            denoiser.prediction,
            Network(),
            noisy,
        )
        self.scales = {}

    def scale(self, t):
        """A step asks for its own again and again."""
        if (key := bits(t)) not in self.scales:
            self.scales[key] = tuple(v.reshape(-1, 1, 1, 1) for v in self.noise_schedule.scale(t))
        return self.scales[key]

    def time(self, ratio):
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x, t):
        return to_clean(self.prediction, self.network(x, self.noise_schedule.timestep(t)), x, *self.scale(t))

    def noise(self, t, s):
        return self.noisy * noise_of(float(self.noise_schedule.timestep(t)))


def ours(scheduler, denoiser, steps):
    """The final latents, as the denoise stage makes them, but in float64."""
    start, schedule = scheduler.start(denoiser.noise_schedule, steps, steps, SHAPE), denoiser.noise_schedule
    field = Drawn(denoiser, getattr(scheduler, "name", "") != "DPMSolverSDEScheduler")
    if start is None:
        times = grids.times("model", schedule, steps, shape=SHAPE, model=denoiser.times)
        x = float(denoiser.start_scale(times[0])) * noise_of(-1)
        state = scheduler.init(field, x, times[:1])
    else:
        times, x = start.times, start.scale * noise_of(-1)
        state = {key: value[None] for key, value in start.state.items()}
    for t, s in zip(times[:, None], times[1:, None]):
        state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
        x, state = scheduler.step(field, x, t, s, state)
    return x


def theirs(scheduler, steps, monkeypatch, eta):
    """The final latents of the class itself, called as pipelines call it."""
    module, drawn = importlib.import_module(type(scheduler).__module__), {}
    for where, function in ((module, "randn_tensor"), (torch, "randn_like")):
        if hasattr(where, function):
            monkeypatch.setattr(where, function, lambda *a, **k: drawn["noise"].to(k.get("dtype") or torch.float64))
    in_step, in_grid = map(parameters_of, (type(scheduler).step, type(scheduler).set_timesteps))
    more = {"eta": 0.0} if eta and "eta" in in_step else {}
    mu = {}
    if scheduler.config.get("use_dynamic_shifting") and "mu" in in_grid:
        config, tokens = scheduler.config, SHAPE[1] * SHAPE[2] // 4
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.16 if eta else 1.15)
        mu = {"mu": least + (tokens - low) * (most - least) / (high - low)}
    scheduler.set_timesteps(steps, **mu)
    if type(scheduler).__name__ == "DPMSolverSDEScheduler":  # without noise, which is that of a Brownian tree
        scheduler.noise_sampler = lambda sigma, after: torch.zeros(1, *SHAPE)
    timesteps = scheduler.timesteps
    timesteps = timesteps[:-1] if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else timesteps
    x, network, old = noise_of(-1) * float(getattr(scheduler, "init_noise_sigma", 1.0)), Network(), None
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for k, t in enumerate(timesteps):
        drawn["noise"], following = noise_of(float(t)), timesteps[k + 1] if k + 1 < len(timesteps) else None
        at = torch.as_tensor(t).double().reshape(1)
        if hasattr(
            scheduler, "precondition_outputs"
        ):  # the network answers the clean latents behind the preconditioning
            sigma = scheduler.sigmas[k].double()
            skip, out = (scheduler.precondition_outputs(*pair, sigma) for pair in ((1.0, 0.0), (0.0, 1.0)))
            answer = (network(x, at) - skip * x) / out
            scheduler.is_scale_input_called = True
        else:
            answer = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, at)
        if "old_pred_original_sample" in in_step:
            back = timesteps[k - 1] if k else None
            x, old = scheduler.step(answer, old, t, back, x, **more, return_dict=False)
            continue
        more |= {"prev_timestep": following} if "prev_timestep" in in_step else {}
        t = t[None] if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else t
        x = scheduler.step(answer, t, x, **more, return_dict=False)[0]
    return x


class Wuerstchen(NoiseSchedule):
    """The path of Stable Cascade: cosines of a time that the network is told as it is."""

    def __init__(self, settings):
        self.scaler, self.s = settings.get("scaler", 1.0), settings.get("s", 0.008)

    def scale(self, t):
        t = 1 - (1 - t) ** self.scaler
        bar = ((t + self.s) / (1 + self.s) * torch.pi / 2).cos() ** 2 / math.cos(
            self.s / (1 + self.s) * math.pi / 2
        ) ** 2
        return bar.clamp(0.0001, 0.9999).sqrt(), (1 - bar.clamp(0.0001, 0.9999)).sqrt()

    def time(self, ratio):
        raise AssertionError("its timesteps are times")

    def timestep(self, t):
        return t


OF_OTHER_PATHS = {
    "DDPMWuerstchenScheduler": lambda settings: SimpleNamespace(
        noise_schedule=Wuerstchen(settings), prediction="epsilon"
    ),
    "EDMDPMSolverMultistepScheduler": lambda settings: SimpleNamespace(
        noise_schedule=VarianceExploding(), prediction="sample"
    ),
    "EDMEulerScheduler": lambda settings: SimpleNamespace(noise_schedule=VarianceExploding(), prediction="sample"),
}
"""Denoisers of paths that no model of ours has, and that scheduler=model refuses."""


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


class Class:
    """What a class itself makes, each of its settings once."""

    def __init__(self, name):
        self.name, self.new, self.made = name, {}, {}

    def __call__(self, settings, steps, as_pipelines):
        """The final latents, or None where it fails or is not finite."""
        told = "eta" in parameters_of(getattr(diffusers, self.name).step)
        key = json.dumps(settings, sort_keys=True), steps, as_pipelines and (told or "use_dynamic_shifting" in settings)
        if key not in self.made:
            with pytest.MonkeyPatch.context() as patch:
                try:
                    if key[0] not in self.new:
                        self.new[key[0]] = getattr(diffusers, self.name)(**settings)
                    made = theirs(copy.deepcopy(self.new[key[0]]), steps, patch, as_pipelines)
                    self.made[key] = made if bool(made.isfinite().all()) else None
                except Exception:  # its own, of any kind
                    self.made[key] = None
        return self.made[key]


class Wrong:
    """The largest relative difference of our latents, over the numbers of steps; the same settings once."""

    def __init__(self):
        self.known = {}

    def __call__(self, tier, settings, scheduler, denoiser, wanted):
        key = tier, json.dumps(settings, sort_keys=True), *wanted
        if key not in self.known:
            self.known[key] = max(error(ours(scheduler, denoiser, steps), each) for steps, each in wanted.items())
        return self.known[key]


@torch.inference_mode()
def problems_of(name, model, tmp_path):
    """What is wrong with a class's settings in both tiers, a line each."""
    itself, wrong, problems = Class(name), Wrong(), []
    for number, (key, settings) in enumerate(cases(name)):
        told = f"{name} {key} " + str(
            {k: v for k, v in settings.items() if base(name).get(k) != v and k != "trained_betas"}
        )
        folder = folder_of(tmp_path, model, name, settings)
        some = STEPS if ALL else (10, STEPS[number % 2 * 2])
        counts = (*STEPS, MORE) if settings == base(name) else (10,) if key in OF_THE_PATH else some
        wanted = {steps: itself(settings, steps, True) for steps in counts}
        if key not in WITHOUT_EFFECT.get(name, "").split() and wanted[10] is not None and (name, key) not in REFUSED:
            without = {k: v for k, v in settings.items() if k != key} | {
                k: v for k, v in base(name).items() if k == key
            }
            default = itself(without, 10, True)
            same = ("UniPCMultistepScheduler", "solver_type")  # it takes heun, which it doesn't know, for its default
            if (
                default is not None
                and (name, key) != same
                and settings != base(name)
                and not error(wanted[10], default) > 1e-9
            ):
                problems.append(f"{told}: it has no effect")
        found = itself(settings, 10, False)
        failed = None in wanted.values() or found is None
        why = REFUSED.get((name, key)) or (name if failed else None)
        if settings.get("prediction_type") == "flow_prediction" and not is_flow(name, settings):
            why = f"{name}: .*[pP]rediction[_ ]type"
        if (name, key) == ("PNDMScheduler", "prediction_type"):  # its formula is of epsilon: see the tests below
            continue
        refusals = []
        try:
            denoiser = OF_OTHER_PATHS[name](settings) if name in OF_OTHER_PATHS else None
            if denoiser is None:
                denoiser = registry.build("denoiser", {"name": "diffusers", "path": folder})
                assert denoiser.noise_schedule and denoiser.prediction  # a job asks for them first
            scheduler = registry.build("scheduler", {"name": "model", "path": folder})
            off = 0.0 if failed else wrong("model", settings, scheduler, denoiser, wanted)
            if off > 1e-6 or why or name in OF_OTHER_PATHS:
                problems.append(f"{told}: model differs by {off:.1e}; expected: {why or 'the same'}")
            traces = scheduler.start(denoiser.noise_schedule, 10, 10, SHAPE) is not None and name != "TCDScheduler"
        except ValueError as refusal:
            refusals.append((PATH if name in OF_OTHER_PATHS and not why else why, str(refusal)))
            traces = False
        if name in traced.TRACED and not traces:  # else it is that class with these settings already
            try:
                scheduler = registry.build("scheduler", {"name": f"diffusers:{name}", **settings})
                off = 0.0 if failed else wrong("diffusers", settings, scheduler, denoiser, {10: found})
                if off > 1e-6 or (why and "flow" not in str(settings)):
                    problems.append(f"{told}: diffusers:{name} differs by {off:.1e}; expected: {why or 'the same'}")
            except ValueError as refusal:
                refusals.append((why, str(refusal)))
        for expected, text in refusals:
            if not expected or not re.search(expected, text) or "\n" in text:
                problems.append(f"{told}: {text}")
    return problems

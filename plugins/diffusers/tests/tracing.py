"""How a class of diffusers is called as its pipelines call it, and ours beside it: the same network, the same noise, in float64.

The network is small, fixed and not linear. diffusers keeps sigmas in float32, and rounds samples to it in some classes: that is
what a tolerance of 1e-6 is for.
"""

import copy
import importlib
import inspect
import json
import math
from functools import cache

import diffusers
import torch

from latentmill.plugin import Field, NoiseSchedule
from latentmill.schedulers.noise_schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from latentmill.stages.guidance import to_clean
from latentmill_diffusers import traced

SHAPE = (3, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


class Network:
    """A fixed, smooth, non-linear function of latents ``[B, ...]`` and timesteps ``[B]``."""

    def __init__(self):
        self.weight, self.bias = weights()

    def __call__(self, x, timestep):
        # One row after another, so that a row's bits are the same in any company.
        mixed = torch.stack([(self.weight @ row.flatten(1)).view_as(row) for row in x])
        swing = torch.tensor([math.cos(t / 300) for t in timestep.tolist()]).double().reshape(-1, 1, 1, 1)
        return 0.6 * x + torch.tanh(mixed + self.bias * swing)


@cache
def weights():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, generator=generator).double() / 2, torch.randn(3, 1, 1, generator=generator).double()


def noise_of(seed, timestep):
    """The noise that a row draws at a timestep."""
    return drawn_by(round(1e4 * timestep) + 10_000_019 * seed).clone()


@cache
def drawn_by(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()


class NetworkField(Field):
    """Ours: the same network behind what a scheduler may ask."""

    def __init__(self, schedule, prediction, seeds):
        self.noise_schedule, self.prediction, self.seeds, self.network = schedule, prediction, seeds, Network()

    def scale(self, t):
        return tuple(v.reshape(-1, 1, 1, 1) for v in self.noise_schedule.scale(t))

    def time(self, ratio):
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x, t):
        return to_clean(self.prediction, self.network(x, self.noise_schedule.timestep(t)), x, *self.scale(t))

    def noise(self, t, s):
        return torch.stack(
            [noise_of(seed, at) for seed, at in zip(self.seeds, self.noise_schedule.timestep(t).tolist())]
        )


class Tabled(NoiseSchedule):
    """The path of a diffusers scheduler's own alphas: of CogVideoX, and of UnCLIP's cosines."""

    def __init__(self, bars):
        self.log = torch.cat([torch.zeros(1, dtype=torch.float64), bars.double().log()])

    def scale(self, t):
        place = t * 1000
        below = place.floor().long().clamp(0, 999)
        log = torch.lerp(self.log[below], self.log[below + 1], place - below)
        return (0.5 * log).exp(), torch.sqrt(-torch.expm1(log))

    def time(self, ratio):
        raise AssertionError("its timesteps are linear in t")

    def timestep(self, t):
        return 1000 * t - 1


class Wuerstchen(NoiseSchedule):
    """The path of Stable Cascade: cosines of a time that the network is told as it is."""

    def scale(self, t):
        bar = ((t + 0.008) / 1.008 * torch.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        bar = bar.clamp(0.0001, 0.9999)
        return bar.sqrt(), (1 - bar).sqrt()

    def time(self, ratio):
        raise AssertionError("its timesteps are times")

    def timestep(self, t):
        return t


def parameters(name):
    return inspect.signature(getattr(diffusers, name).__init__).parameters


def setting(name, prediction):
    """``(settings, noise schedule, our prediction)`` with which a class is tried."""
    known = parameters(name)
    settings = {key: value for key, value in SD.items() if key in known and name != "UnCLIPScheduler"}
    settings |= {"clip_sample": False} if "clip_sample" in known else {}
    if name.startswith(("FlowMatch", "FlowMap", "LTX")):
        return settings, RectifiedFlow(), "flow"
    if name.startswith("EDM"):
        return {}, VarianceExploding(), "sample"
    if name == "DDPMWuerstchenScheduler":
        return {}, Wuerstchen(), "epsilon"
    settings |= {"prediction_type": prediction}
    if prediction == "flow_prediction":
        return settings | {"use_flow_sigmas": True}, RectifiedFlow(), "flow"
    if name.startswith(("CogVideoX", "UnCLIP")):
        return settings, Tabled(getattr(diffusers, name)(**settings).alphas_cumprod), PREDICTIONS[prediction]
    return settings, VariancePreserving(), PREDICTIONS[prediction]


@cache
def made(name, settings):
    return getattr(diffusers, name)(**json.loads(settings))


def directly(monkeypatch, name, steps, kept, settings, seed, trailing=False, in_step=None, prediction=None):
    """The final latents of the class itself, called as the pipelines call it."""
    cls = getattr(diffusers, name)
    scheduler = copy.deepcopy(made(name, json.dumps(settings)))
    drawn = {}
    module = importlib.import_module(cls.__module__)
    for where, function in ((module, "randn_tensor"), (torch, "randn_like")):
        if hasattr(module, "randn_tensor") or where is torch:
            monkeypatch.setattr(where, function, lambda *a, **k: drawn["noise"].to(k.get("dtype") or torch.float64))
    if trailing:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist(), **trailing)
    else:
        scheduler.set_timesteps(steps)
    begin = (steps - kept) * getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[begin:]
    if name == "DDPMWuerstchenScheduler":
        timesteps = timesteps[:-1]
    noise = noise_of(seed, 0)[None]
    if begin:
        first, zero = timesteps[:1], torch.zeros_like(noise)
        noiser = copy.deepcopy(scheduler)
        x = (
            noiser.add_noise(zero, noise, first)
            if hasattr(noiser, "add_noise")
            else noiser.scale_noise(zero, first, noise)
        )
    else:
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    network, old = Network(), None
    for k, t in enumerate(timesteps):
        drawn["noise"] = noise_of(seed, float(t))[None]
        at = torch.tensor([float(t)], dtype=torch.float64)
        if name.startswith("EDM"):  # the network is one that answers the clean latents behind the preconditioning
            sigma = scheduler.sigmas[begin + k].double()
            skip, out = (scheduler.precondition_outputs(*pair, sigma) for pair in ((1.0, 0.0), (0.0, 1.0)))
            answer = (network(x, at) - skip * x) / out
        else:
            answer = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, at)
        if name == "CogVideoXDPMScheduler":
            x, old = scheduler.step(answer, old, t, timesteps[k - 1] if k else None, x, return_dict=False)
        elif name == "UnCLIPScheduler":
            following = timesteps[k + 1] if k + 1 < len(timesteps) else None
            x = scheduler.step(answer, t, x, prev_timestep=following).prev_sample
        else:
            t = t[None] if name == "DDPMWuerstchenScheduler" else t
            x = scheduler.step(answer, t, x, **(in_step or {})).prev_sample
    return x[0]


def run(scheduler, schedule, prediction, rows):
    """Latents of rows ``(seed, steps, kept)`` that go together, each at its own place, until the last has arrived."""
    begun = [scheduler.start(schedule, steps, kept, SHAPE) for _, steps, kept in rows]
    x = [start.scale * noise_of(seed, 0) for start, (seed, _, _) in zip(begun, rows)]
    states = [dict(start.state) for start in begun]
    at = [0] * len(rows)
    while going := [i for i, start in enumerate(begun) if at[i] < len(start.times) - 1]:
        t, s = (torch.stack([begun[i].times[at[i] + ahead] for i in going]) for ahead in (0, 1))
        state = {key: torch.stack([states[i][key] for i in going]) for key in states[0]}
        state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
        field = NetworkField(schedule, prediction, [rows[i][0] for i in going])
        moved, state = scheduler.step(field, torch.stack([x[i] for i in going]), t, s, state)
        for k, i in enumerate(going):
            x[i], states[i], at[i] = moved[k], {key: value[k] for key, value in state.items()}, at[i] + 1
    return x


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@cache
def predictions(name):
    """The prediction types that a class has, by its own word: the first step with another raises."""
    if "prediction_type" not in parameters(name) or name.startswith("EDM"):
        return ["epsilon"]
    found = []
    for prediction in PREDICTIONS:
        try:
            settings, _, _ = setting(name, prediction)
            getattr(traced, name)(**settings)
        except ValueError:
            continue
        found.append(prediction)
    return found

"""Nodes that denoise, and what they are made of: each sampler becomes a denoise stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from latentmill.comfy.inputs import Inputs
from latentmill.comfy.links import (
    Cond,
    Guider,
    Latent,
    Model,
    Noise,
    Sampled,
    Sampler,
    Setting,
    Sigmas,
)
from latentmill.schedulers.comfy_names import SAMPLERS

SCHEDULERS = ("simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal").split()
TO_THE_END = 10_000
"""The ``end_at_step`` that stands for no end."""
NO_SEED = Setting(0)


def ksampler(given: Inputs) -> Sequence[Any]:
    """A stage denoise, with scheduler and grid `comfy`."""
    sigmas = Sigmas(given.node, _scheduler(given), given.whole("steps"), given.real("denoise"), by_sampler=True)
    sampler = _sampler(given)
    noise = Noise(given.node, _seed(given, "seed"), True)
    return (Sampled(given.node, given.take("latent_image", Latent), _guider(given), sampler, sigmas, noise),)


def ksampler_advanced(given: Inputs) -> Sequence[Any]:
    """The same for some of the steps; with leftover noise the next one goes on from there."""
    grid, start, end = _scheduler(given), given.fixed("start_at_step", int), given.fixed("end_at_step", int)
    if start:
        grid["start_at_step"] = start
    if end < TO_THE_END:
        grid["end_at_step"] = end
    if given.one_of("return_with_leftover_noise", ("disable", "enable")) == "enable":
        grid["leftover_noise"] = True
    sigmas = Sigmas(given.node, grid, given.whole("steps"), Setting(1.0), by_sampler=True)
    sampler = _sampler(given)
    added = given.one_of("add_noise", ("enable", "disable")) == "enable"
    noise = Noise(given.node, _seed(given, "noise_seed"), added)
    return (Sampled(given.node, given.take("latent_image", Latent), _guider(given), sampler, sigmas, noise),)


def sampler_custom(given: Inputs) -> Sequence[Any]:
    """The same of a sampler and sigmas that come over links."""
    noise = Noise(given.node, _seed(given, "noise_seed"), given.fixed("add_noise", bool))
    parts = given.take("sampler", Sampler), given.take("sigmas", Sigmas)
    return (Sampled(given.node, given.take("latent_image", Latent), _guider(given), *parts, noise),)


def sampler_custom_advanced(given: Inputs) -> Sequence[Any]:
    """The same with noise and guider apart."""
    parts = given.take("guider", Guider), given.take("sampler", Sampler), given.take("sigmas", Sigmas)
    return (Sampled(given.node, given.take("latent_image", Latent), *parts, given.take("noise", Noise)),)


def basic_guider(given: Inputs) -> Sequence[Any]:
    """`guidance_scale` 1: no negative prompt."""
    return (Guider(given.node, given.take("model", Model), given.take("conditioning", Cond), None, Setting(1.0)),)


def cfg_guider(given: Inputs) -> Sequence[Any]:
    """`guidance_scale`, and both prompts."""
    return (_guider(given),)


def random_noise(given: Inputs) -> Sequence[Any]:
    """`seed`."""
    return (Noise(given.node, _seed(given, "noise_seed"), True),)


def no_noise(given: Inputs) -> Sequence[Any]:
    """`first_noise: none`."""
    return (Noise(given.node, NO_SEED, False),)


def sampler_select(given: Inputs) -> Sequence[Any]:
    """The sampler of scheduler `comfy`."""
    return (_sampler(given),)


SAMPLER_NODES = {
    "SamplerEulerAncestral": "euler_ancestral",
    "SamplerEulerAncestralCFGPP": "euler_ancestral_cfg_pp",
    "SamplerLMS": "lms",
    "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_ancestral",
    "SamplerDPMPP_SDE": "dpmpp_sde",
    "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde",
    "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde",
}
"""Nodes that are one sampler, by its name."""
OPTIONS: Mapping[str, float | int | str] = {"eta": 1.0, "s_noise": 1.0, "r": 0.5, "order": 4, "solver_type": "midpoint"}
"""What such nodes have, and what it is where none says more."""


def sampler_node(given: Inputs) -> Sequence[Any]:
    """The same with its options."""
    name = SAMPLER_NODES[given.node.type]
    given.one_of("noise_device", ("gpu", "cpu"), "cpu")
    settings = {key: given.fixed(key, type(usual)) for key, usual in OPTIONS.items() if key in given.node.inputs}
    settings = {key: value for key, value in settings.items() if value != OPTIONS[key]}
    if unknown := [key for key in settings if key not in SAMPLERS[name].settings]:
        raise given.refuse(f"{unknown[0]} {settings[unknown[0]]} is not supported, only {OPTIONS[unknown[0]]}")
    return (Sampler(given.node, name, settings),)


def basic_scheduler(given: Inputs) -> Sequence[Any]:
    """The scheduler of grid `comfy`."""
    settings, model = {**_scheduler(given), "exact_steps": True}, given.take("model", Model)
    return (Sigmas(given.node, settings, given.whole("steps"), given.real("denoise"), model),)


SIGMA_NODES = {
    "KarrasScheduler": ("karras", ("sigma_max", "sigma_min", "rho")),
    "ExponentialScheduler": ("exponential", ("sigma_max", "sigma_min")),
    "PolyexponentialScheduler": ("polyexponential", ("sigma_max", "sigma_min", "rho")),
    "LaplaceScheduler": ("laplace", ("sigma_max", "sigma_min", "mu", "beta")),
    "VPScheduler": ("vp", ("beta_d", "beta_min", "eps_s")),
    "BetaSamplingScheduler": ("beta", ("alpha", "beta")),
    "SDTurboScheduler": ("sd_turbo", ()),
    "AlignYourStepsScheduler": ("align_your_steps", ()),
}
"""Nodes that are one scheduler, with numbers of their own."""


def sigma_node(given: Inputs) -> Sequence[Any]:
    """The same with its numbers."""
    name, numbers = SIGMA_NODES[given.node.type]
    model = given.may_take("model", Model)
    settings = {"scheduler": name, **{key: given.fixed(key, float) for key in numbers}}
    if name == "align_your_steps":
        settings["model"] = given.one_of("model_type", ("SD1", "SDXL", "SVD"))
    denoise = given.real("denoise") if "denoise" in given.node.inputs else Setting(1.0)
    return (Sigmas(given.node, settings, given.whole("steps"), denoise, model),)


def split_sigmas(given: Inputs) -> Sequence[Any]:
    """The steps of two stages denoise."""
    sigmas, step = given.take("sigmas", Sigmas), given.fixed("step", int)
    if sigmas.settings.keys() & {"start_at_step", "end_at_step"}:
        raise given.refuse("what was split once is not split again")
    high = {**sigmas.settings, "end_at_step": step, "leftover_noise": True}
    return replace(sigmas, settings=high), replace(sigmas, settings={**sigmas.settings, "start_at_step": step})


def _seed(given: Inputs, name: str) -> Setting:
    """-1 is drawn for each row, as some nodes of seeds have it."""
    seed = given.whole(name)
    if not -1 <= seed.value < 1 << 64:
        raise given.refuse(f"{name} must be from 0 to {(1 << 64) - 1}, not {seed.value}")
    return seed


def _scheduler(given: Inputs) -> dict[str, Any]:
    return {"scheduler": given.one_of("scheduler", SCHEDULERS)}


def _sampler(given: Inputs) -> Sampler:
    name = given.one_of("sampler_name", [*SAMPLERS, *(f"{name}_gpu" for name in SAMPLERS)])
    return Sampler(given.node, name.removesuffix("_gpu"), {})


def _guider(given: Inputs) -> Guider:
    """The model, its two conditionings and cfg, as five nodes take them alike."""
    parts = given.take("model", Model), given.take("positive", Cond), given.take("negative", Cond)
    return Guider(given.node, *parts, given.real("cfg"))

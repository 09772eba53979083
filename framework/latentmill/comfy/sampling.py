"""Nodes that denoise, and what they are made of: each sampler becomes a denoise stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentmill import registry
from latentmill.comfy.flowing import (
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
from latentmill.comfy.reading import Inputs
from latentmill.text import near

SCHEDULERS = ("simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal").split()
TO_THE_END = 10_000
"""The ``end_at_step`` that stands for no end."""
NO_SEED = Setting(0)


def ksampler(given: Inputs) -> Sequence[Any]:
    """KSampler."""
    sigmas = Sigmas(given.node, _scheduler(given), given.whole("steps"), given.real("denoise"))
    sampler = _sampler(given)
    noise = Noise(given.node, given.whole("seed"), True)
    return (Sampled(given.node, given.take("latent_image", Latent), _guider(given), sampler, sigmas, noise),)


def ksampler_advanced(given: Inputs) -> Sequence[Any]:
    """KSamplerAdvanced."""
    grid, start, end = _scheduler(given), given.fixed("start_at_step", int), given.fixed("end_at_step", int)
    if start:
        grid["start_at_step"] = start
    if end < TO_THE_END:
        grid["end_at_step"] = end
    if given.one_of("return_with_leftover_noise", ("disable", "enable")) == "enable":
        grid["leftover_noise"] = True
    sigmas = Sigmas(given.node, grid, given.whole("steps"), Setting(1.0))
    sampler = _sampler(given)
    added = given.one_of("add_noise", ("enable", "disable")) == "enable"
    noise = Noise(given.node, given.whole("noise_seed"), added)
    return (Sampled(given.node, given.take("latent_image", Latent), _guider(given), sampler, sigmas, noise),)


def sampler_custom(given: Inputs) -> Sequence[Any]:
    """SamplerCustom."""
    noise = Noise(given.node, given.whole("noise_seed"), given.fixed("add_noise", bool))
    parts = given.take("sampler", Sampler), given.take("sigmas", Sigmas)
    return (Sampled(given.node, given.take("latent_image", Latent), _guider(given), *parts, noise),)


def sampler_custom_advanced(given: Inputs) -> Sequence[Any]:
    """SamplerCustomAdvanced."""
    parts = given.take("guider", Guider), given.take("sampler", Sampler), given.take("sigmas", Sigmas)
    return (Sampled(given.node, given.take("latent_image", Latent), *parts, given.take("noise", Noise)),)


def basic_guider(given: Inputs) -> Sequence[Any]:
    """BasicGuider."""
    return (Guider(given.node, given.take("model", Model), given.take("conditioning", Cond), None, Setting(1.0)),)


def cfg_guider(given: Inputs) -> Sequence[Any]:
    """CFGGuider."""
    return (_guider(given),)


def random_noise(given: Inputs) -> Sequence[Any]:
    """RandomNoise."""
    return (Noise(given.node, given.whole("noise_seed"), True),)


def no_noise(given: Inputs) -> Sequence[Any]:
    """DisableNoise."""
    return (Noise(given.node, NO_SEED, False),)


def sampler_select(given: Inputs) -> Sequence[Any]:
    """KSamplerSelect."""
    return (_sampler(given),)


SAMPLER_NODES: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "SamplerEulerAncestral": ("euler_ancestral", {"eta": 1.0, "s_noise": 1.0}),
    "SamplerEulerAncestralCFGPP": ("euler_ancestral_cfg_pp", {"eta": 1.0, "s_noise": 1.0}),
    "SamplerLMS": ("lms", {"order": 4}),
    "SamplerDPMPP_2S_Ancestral": ("dpmpp_2s_ancestral", {"eta": 1.0, "s_noise": 1.0}),
    "SamplerDPMPP_SDE": ("dpmpp_sde", {"eta": 1.0, "s_noise": 1.0, "r": 0.5}),
    "SamplerDPMPP_2M_SDE": ("dpmpp_2m_sde", {"eta": 1.0, "s_noise": 1.0}),
    "SamplerDPMPP_3M_SDE": ("dpmpp_3m_sde", {"eta": 1.0, "s_noise": 1.0}),
}
"""Nodes that are one sampler: its name, and its options with their defaults."""


def sampler_node(given: Inputs) -> Sequence[Any]:
    """SamplerEulerAncestral, SamplerEulerAncestralCFGPP and their like."""
    name, defaults = SAMPLER_NODES[given.node.type]
    options = {key: given.fixed(key, type(default)) for key, default in defaults.items()}
    options = {key: value for key, value in options.items() if value != defaults[key]}
    if "solver_type" in given.node.inputs and given.one_of("solver_type", ("midpoint", "heun")) == "heun":
        name = f"{name}_heun"
    if "noise_device" in given.node.inputs and given.one_of("noise_device", ("gpu", "cpu")) == "gpu":
        name = f"{name}_gpu"
    return (Sampler(given.node, Setting(name), options),)


def basic_scheduler(given: Inputs) -> Sequence[Any]:
    """BasicScheduler."""
    given.take("model", Model)
    return (Sigmas(given.node, _scheduler(given), given.whole("steps"), given.real("denoise")),)


SIGMA_NODES = {
    "KarrasScheduler": ("karras", ("sigma_max", "sigma_min", "rho")),
    "ExponentialScheduler": ("exponential", ("sigma_max", "sigma_min")),
    "BetaSamplingScheduler": ("beta", ("alpha", "beta")),
}
"""Nodes that are one scheduler with numbers of its own."""


def sigma_node(given: Inputs) -> Sequence[Any]:
    """KarrasScheduler, ExponentialScheduler, BetaSamplingScheduler."""
    name, numbers = SIGMA_NODES[given.node.type]
    if "model" in given.node.inputs:
        given.take("model", Model)
    settings = {"scheduler": name, **{key: given.fixed(key, float) for key in numbers}}
    return (Sigmas(given.node, settings, given.whole("steps"), Setting(1.0)),)


def _scheduler(given: Inputs) -> dict[str, Any]:
    return {"scheduler": given.one_of("scheduler", SCHEDULERS)}


def _sampler(given: Inputs) -> Sampler:
    found = Sampler(given.node, given.text("sampler_name"), {})
    if found.name.value not in (known := {entry.name for entry in registry.entries("scheduler")}):
        raise given.refuse(
            f"sampler_name {found.name.value!r:.60} is not supported{near(str(found.name.value), known)}"
        )
    return found


def _guider(given: Inputs) -> Guider:
    """The model, its two conditionings and cfg, as five nodes take them alike."""
    parts = given.take("model", Model), given.take("positive", Cond), given.take("negative", Cond)
    return Guider(given.node, *parts, given.real("cfg"))

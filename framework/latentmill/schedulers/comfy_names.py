"""ComfyUI's samplers by its names: what each is here. No torch, so that a workflow can be read without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NamedSampler:
    """A sampler of ComfyUI's list."""

    grid: Mapping[str, Any] = field(default_factory=dict)
    """Settings that its own code asks of grid ``comfy``, wherever its sigmas are from."""
    of_steps: Mapping[str, Any] = field(default_factory=dict)
    """Those that are asked by nodes that have steps and a scheduler, and not sigmas: KSampler and KSamplerAdvanced."""
    settings: tuple[str, ...] = ()
    """Of those of scheduler ``comfy``, which it has."""


_BELOW, _DROPPED = {"below_one": True}, {"drop_penultimate": True}
_PLAIN = NamedSampler()
_NOISY = NamedSampler(settings=("eta", "s_noise"))
_SDE = NamedSampler(_BELOW, settings=("eta", "s_noise"))
_UNIPC = NamedSampler({"last_sigma": 0.001}, _DROPPED)

SAMPLERS: Mapping[str, NamedSampler] = {
    "euler": _PLAIN,
    "euler_cfg_pp": _PLAIN,
    "euler_ancestral": _NOISY,
    "euler_ancestral_cfg_pp": _NOISY,
    "heun": _PLAIN,
    "heunpp2": _PLAIN,
    "dpm_2": NamedSampler(of_steps=_DROPPED),
    "dpm_2_ancestral": NamedSampler(of_steps=_DROPPED, settings=("eta", "s_noise")),
    "lms": _PLAIN,
    "dpm_fast": NamedSampler({"between": "evaluations"}),
    "dpm_adaptive": NamedSampler({"between": "ends"}),
    "dpmpp_2s_ancestral": _NOISY,
    "dpmpp_2s_ancestral_cfg_pp": _NOISY,
    "dpmpp_sde": _SDE,
    "dpmpp_2m": _PLAIN,
    "dpmpp_2m_cfg_pp": _PLAIN,
    "dpmpp_2m_sde": NamedSampler(_BELOW, settings=("eta", "s_noise", "solver_type")),
    "dpmpp_2m_sde_heun": _SDE,
    "dpmpp_3m_sde": _SDE,
    "ddpm": _PLAIN,
    "lcm": _PLAIN,
    "ipndm": _PLAIN,
    "ipndm_v": _PLAIN,
    "deis": _PLAIN,
    "res_multistep": _PLAIN,
    "res_multistep_cfg_pp": _PLAIN,
    "res_multistep_ancestral": _NOISY,
    "res_multistep_ancestral_cfg_pp": _NOISY,
    "gradient_estimation": _PLAIN,
    "gradient_estimation_cfg_pp": _PLAIN,
    "er_sde": NamedSampler(_BELOW, settings=("s_noise",)),
    "seeds_2": _SDE,
    "seeds_3": _SDE,
    "sa_solver": _SDE,
    "sa_solver_pece": _SDE,
    "ddim": _PLAIN,
    "uni_pc": _UNIPC,
    "uni_pc_bh2": _UNIPC,
}
"""By name. One that ends in ``_gpu`` is the same without that."""


def named_sampler(name: str) -> NamedSampler:
    """A sampler by ComfyUI's name. Raises KeyError."""
    return SAMPLERS[name.removesuffix("_gpu")]

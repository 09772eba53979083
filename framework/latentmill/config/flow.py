"""The job's ``flow``: names of stages, or objects with settings. What an object says is put under ``stages.NAME``.

``{name: brightness, as: too_dark, least: 0.1}`` is the plugin ``brightness`` as the stage ``too_dark``. So one plugin can stand
twice, and a plugin can fill a stage that has workers already: ``{name: pipeline_encode, as: encode}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latentmill.config.schema import StageKeys
from latentmill.errors import JobError


def names(flow: Any) -> list[str]:
    """The stages' names in the job, of a flow as it was written; none, if it is no list."""
    return [name_of(item) for item in flow] if isinstance(flow, list) else []


def name_of(item: Any) -> str:
    """A stage's name in the job."""
    return str(item.get("as", item.get("name")) if isinstance(item, Mapping) else item)


def spread(config: DictConfig, flow: Any) -> bool:
    """Put what the flow's objects say under ``stages``, where it stands for what is not said there, and leave their names.

    ``flow``: the config's, as plain values. Whether there is such an object. Raises JobError for one without a name.
    """
    if not isinstance(flow, list) or not any(isinstance(item, Mapping) for item in flow):
        return False
    for item in flow:
        if isinstance(item, Mapping):
            if not isinstance(item.get("name"), str):
                raise JobError(f"flow: {dict(item)} has no name: {{name: a plugin, as: the stage's name}} is expected")
            at = f"stages.{name_of(item)}"
            if OmegaConf.select(config, at) is None:
                OmegaConf.update(config, at, StageKeys(), force_add=True)
            if OmegaConf.select(config, f"{at}.name") is None:
                OmegaConf.update(config, f"{at}.name", item["name"], force_add=True)
            there = OmegaConf.select(config, f"{at}.settings") or {}
            for key, value in item.items():
                if key not in ("name", "as") and key not in there:
                    OmegaConf.update(config, f"{at}.settings.{key}", value, force_add=True)
    OmegaConf.update(config, "flow", names(flow))
    return True

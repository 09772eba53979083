"""Where a job is submitted to: ``--to NAME`` and ``target.key=value``, composed as a job is, and kept apart from it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints, is_typeddict

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentmill import registry, values
from latentmill.config.compose import composed
from latentmill.config.load import is_file
from latentmill.config.messages import explained
from latentmill.errors import JobError
from latentmill.text import without_secrets

PREFIX = "target."


def load_target(name: str, overrides: Sequence[str], job: str) -> dict[str, Any]:
    """The settings of the target ``name``, its launcher's ``name`` among them; environment variables stay ``${oc.env:...}``.

    ``overrides`` are ``target.key=value``. Its config is ``target/NAME.yaml`` beside the job's file, then ours, then a plugin's. Raises JobError.
    """
    path = Path(os.path.abspath(os.path.expanduser(job))) if is_file(job) else registry.package_of(job)
    if not re.fullmatch(r"[\w.:-]+", name):
        raise JobError(f"--to {name}: the name of a target is expected, as in --to slurm")
    try:
        config = composed(path, None, [f"+target={name}"])[0].target
        OmegaConf.set_struct(config, False)
        hints = registry.hints("launcher", str(config.get("name")))
        for override in overrides:
            _assign(config, override, hints)
        _settle(config, hints)
    except JobError:
        raise
    except Exception as error:  # Hydra's, OmegaConf's, YAML's, the file system's: a file may hold anything
        raise JobError(f"--to {name}: {explained(error)}") from error
    settings = OmegaConf.to_container(config)
    assert isinstance(settings, dict)
    if not isinstance(settings.get("name"), str):
        raise JobError(f"--to {name}: name must be the name of a launcher, not {settings.get('name')!r}")
    return {str(key): value for key, value in settings.items()}


def settled(target: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with environment variables looked up: what a launcher is built with. Raises JobError."""
    try:
        found = OmegaConf.to_container(OmegaConf.create({"target": dict(target)}), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise JobError(without_secrets(f"target: {explained(error)}", str(target))) from None
    assert isinstance(found, dict)
    return dict(found["target"])


def _assign(config: DictConfig, override: str, hints: Mapping[str, Any]) -> None:
    key, equals, text = override.removeprefix(PREFIX).partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
        raise JobError(f"{override!r} is no setting of a target: {PREFIX}key=value is expected")
    if "_target_" in key:
        raise JobError(f"{override!r}: _target_ is refused; plugins are chosen by name")
    try:
        value = values.read(text, _hint(key.split("."), hints)) if values.ambiguous(text) else text
    except ValueError as error:
        raise JobError(f"{PREFIX}{key}: {error}") from error
    OmegaConf.update(config, key, value, merge=not isinstance(value, list), force_add=True)


def _settle(config: Any, hints: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
    """Give scalars that were kept as they were written the type that their settings have."""
    raw = OmegaConf.to_container(config)
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        here = (*path, str(key))
        if isinstance(value, (dict, list)):
            _settle(config[key], hints, here)
        elif (text := values.kept(value)) is not None:
            wanted = values.is_text(_hint(here, hints))
            config[key] = text if wanted else values.as_yaml(text)


def _hint(path: Sequence[str], hints: Mapping[str, Any]) -> Any:
    hint = str if path[0] == "name" else hints.get(path[0], Any)
    for key in path[1:]:
        hint = get_type_hints(hint).get(key, Any) if is_typeddict(hint) else values.inside(hint)
    return hint

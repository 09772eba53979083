"""A job by its name or its file: composed by Hydra, checked whole before anything starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentmill import comfy, registry, values
from latentmill.config.check import checked
from latentmill.config.compose import THE_FILE, composed
from latentmill.config.flow import spread
from latentmill.config.messages import explained
from latentmill.config.overrides import assign, named, parse, settle
from latentmill.config.schema import Job, Schema
from latentmill.errors import JobError, PluginError
from latentmill.text import without_secrets


def load_job(job: str, overrides: Sequence[str] = ()) -> Job:
    """The job of that name, of that YAML file, or of a workflow of ComfyUI, with ``key=value`` overrides. Raises JobError or PluginError."""
    name = Path(job).stem if is_file(job) else job
    place: Path | str
    held: dict[str, Any] | None = None
    if is_file(job):
        path = Path(os.path.abspath(os.path.expanduser(job)))  # a link is a job of its own name
        if not path.is_file():
            raise JobError(f"there is no job file {job}; shipped jobs are chosen by name: {', '.join(registry.jobs())}")
        if comfy.is_workflow(job):
            held, overrides = _workflow(path, job, overrides)
        elif path.suffix != ".yaml":
            raise JobError(f"{job}: a job file's name ends in .yaml, or in .json if it is a workflow of ComfyUI")
        elif "hydra" in _raw(path):  # its searchpath imports what it names
            raise JobError(f"{job}: hydra is refused; where config is looked for is not the job's to say")
        place, config_name = path, THE_FILE
    else:
        place, config_name = registry.package_of(job), job.rpartition(":")[2]
        name = config_name
    choices, assignments = parse(overrides)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*missing `_self_`")  # it is put last, where ours stands
            config, chosen = composed(place, config_name, choices, held)
            if more := list(named(assignments, config, chosen)):
                config, _ = composed(place, config_name, [*choices, *more], held)
    except Exception as error:  # Hydra's, OmegaConf's, YAML's, the file system's: a file may hold anything
        raise JobError(f"{name}: {explained(error)}") from error
    if OmegaConf.get_type(config) is not Schema:
        raise JobError(f"{job}: its defaults must begin with job, as in: defaults: [job, model: shapes, ..., _self_]")
    try:
        for assignment in assignments:
            assign(config, assignment)
        raw = _plain(config)
        if spread(config, raw.get("flow")):
            raw = _plain(config)
        settle(config, raw)
    except (OmegaConfBaseException, RecursionError) as error:
        raise JobError(f"{name}: {explained(error)}") from error
    except JobError as error:
        raise JobError(f"{name}: {error}") from error
    text = values.to_yaml(raw)
    try:
        return checked(name, config, raw, text)
    except (OmegaConfBaseException, RecursionError) as error:
        raise JobError(without_secrets(f"{name}: {explained(error)}", text)) from None
    except (JobError, PluginError) as error:
        raise type(error)(without_secrets(str(error), text)) from None


def _workflow(path: Path, job: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The config that a workflow becomes, and the overrides that are left. Raises JobError."""
    try:
        return comfy.config_of(path, overrides)
    except JobError as error:
        raise JobError(f"{job}: {error}") from error


def _plain(config: DictConfig) -> dict[Any, Any]:
    """A config as plain values, interpolations as they are written. It takes as long as all else that is done with it."""
    found = OmegaConf.to_container(config)
    assert isinstance(found, dict)
    return found


def _raw(path: Path) -> Any:
    """What is at the top of a YAML file; nothing, if it can't be read, since Hydra then says why."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception:
        return ()


def is_file(job: str) -> bool:
    """Whether a job is meant by its file, and not by its name."""
    return job.endswith((".yaml", ".yml")) or comfy.is_workflow(job) or "/" in job

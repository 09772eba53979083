"""A job: one YAML file, composed by Hydra, checked whole before anything starts."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from latentmill import registry
from latentmill.registry import near
from latentmill.rows import LIMITS
from latentmill.schedulers import grids

logger = logging.getLogger("latentmill")


class JobError(ValueError):
    """The job is not right; one line that names the key, what is there and what was expected."""


@dataclass
class Sampling:
    """What each row is made with; a column of the source of the same name takes a value's place, row by row."""

    steps: int = MISSING
    guidance_scale: float = MISSING
    guidance_rescale: float = MISSING
    guidance_from: float = MISSING
    guidance_until: float = MISSING
    strength: float = MISSING
    width: int | None = None
    """Pixels. None: the picture's own."""
    height: int | None = None
    max_pixels: int = MISSING
    """The most that a row may be made with: width times height."""
    prompt: str = ""
    negative_prompt: str = ""
    first_noise: str = "latentmill"
    until: float = 0.0
    """Above 0: rows stop half-way, at the first of their times below it."""


@dataclass
class StageSettings:
    """A stage's pool of workers. What a worker asks for is said in Ray's words."""

    replicas: int = 1
    batch_size: int = 16
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    memory: int | None = None
    """Bytes."""
    resources: dict[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    retries: int = 1
    """How often a batch that failed is tried again as it is, before it is split to find the row."""
    timeout: float | None = None
    """Seconds in which a worker that has work must finish some of it; else it counts as hanging and is replaced."""
    settings: dict[str, Any] = field(default_factory=dict)
    """A plugin stage's own."""

    @property
    def threads(self) -> int:
        """Torch's threads in a worker: one a CPU asked for, so that workers on a machine don't fight over its cores."""
        return max(1, int(self.num_cpus))


@dataclass
class Cluster:
    """Where the workers run: ``local`` starts Ray here, ``inline`` is this process, ``ray`` joins a cluster."""

    kind: str = MISSING
    address: str | None = None


@dataclass
class Schema:
    """The keys of a job and their types. Defaults are in conf/job.yaml, for people to read."""

    output: str = MISSING
    single_writer: bool = False
    seed: int = MISSING
    samples_per_row: int = MISSING
    deterministic: bool = MISSING
    rows_per_shard: int = MISSING
    on_error: str = MISSING
    max_error_rate: float = MISSING
    flow: list[str] = MISSING
    latents_std: bool = False
    source: dict[str, Any] = MISSING
    sink: dict[str, Any] = MISSING
    model: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] | None = None
    denoiser: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stages: dict[str, StageSettings] = field(default_factory=dict)
    cluster: Cluster = field(default_factory=Cluster)


@dataclass(frozen=True)
class Job:
    """A checked job."""

    name: str
    config: str
    """YAML of everything, environment variables left as ``${oc.env:...}``: what ``--cfg job`` prints."""
    output: str
    single_writer: bool
    seed: int
    samples_per_row: int
    deterministic: bool
    rows_per_shard: int
    on_error: str
    max_error_rate: float
    flow: tuple[str, ...]
    latents_std: bool
    source: dict[str, Any]
    sink: dict[str, Any]
    model: dict[str, Any]
    """What the parts of one model share, for their configs to point at: ``vae.path: ${model.path}``."""
    vae: dict[str, Any] | None
    denoiser: dict[str, Any] | None
    text_encoder: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    sampling: Sampling
    stages: dict[str, StageSettings]
    cluster: Cluster

    def meaning(self) -> dict[str, Any]:
        """What of the config changes the dataset: no cluster, output, workers or what they ask for.

        Batch sizes and threads count only if the job is deterministic. In plugins' settings environment variables stay
        ``${oc.env:...}``: secrets are none of a dataset's business.
        """
        config: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(self.config))  # type: ignore[assignment]
        meant: dict[str, Any] = {
            "seed": self.seed,
            "samples_per_row": self.samples_per_row,
            "deterministic": self.deterministic,
            "rows_per_shard": self.rows_per_shard,
            "flow": list(self.flow),
            "sampling": vars(self.sampling),
            **({"model": config["model"]} if config["model"] else {}),
            **({"latents_std": True} if self.latents_std else {}),
            **{kind: config[kind] for kind in registry.KINDS if kind in config},
        }
        stages: dict[str, Any] = {}
        for name in self.flow:
            stage = config["stages"].get(name, {})
            kept: dict[str, Any] = {}
            if self.deterministic:  # what a matrix product gives depends on its size, and on how many threads share it
                kept = {"batch_size": self.stages[name].batch_size, "threads": self.stages[name].threads}
            if stage.get("settings"):
                kept["settings"] = stage["settings"]
            if kept:
                stages[name] = kept
        return {**meant, "stages": stages} if stages else meant


STAGES = ("read", "encode", "denoise", "decode", "write")
"""Our own stages, in the order in which they can stand in a flow."""
FIRST_NOISE = ("latentmill", "diffusers")
ON_ERROR = ("quarantine", "stop")
CLUSTERS = ("local", "inline", "ray")
SHIPPED = "latentmill.jobs"
OURS = {
    "shapes": "latentmill-shapes",
    "diffusers": "latentmill-diffusers",
    "scheduler/model": "latentmill-diffusers",
    "model/pipeline": "latentmill-diffusers",
}
"""Which of our distributions brings what a shipped job may name."""


def shipped() -> list[str]:
    """The names of the jobs that come with the package."""
    return sorted(Path(str(file)).stem for file in files(SHIPPED).iterdir() if file.name.endswith(".yaml"))


def load_job(job: str, overrides: Sequence[str] = ()) -> Job:
    """The job of that name, or of that YAML file, with ``key=value`` overrides. Raises JobError or PluginError."""
    _prepare()
    name = Path(job).stem if _is_file(job) else job
    overrides = [_override(override) for override in overrides]
    where: Any
    if _is_file(job):
        path = Path(job).expanduser().resolve()
        if not path.is_file():
            raise JobError(f"there is no job file {job}; shipped jobs are chosen by name: {', '.join(shipped())}")
        if path.suffix != ".yaml":
            raise JobError(f"{job}: a job file's name ends in .yaml")
        for hides in (path.with_name("job.yaml"), path.with_name("schema.yaml")):
            if hides.is_file():  # a file's own folder comes first
                raise JobError(f"{hides} must have another name: it hides the {hides.stem} that all jobs begin with")
        if "hydra" in _raw(path):  # its searchpath imports what it names
            raise JobError(f"{job}: hydra is refused; where config is looked for is not the job's to say")
        where, config_name = initialize_config_dir(str(path.parent), version_base="1.3"), path.stem
    else:
        if job not in shipped():
            raise JobError(
                f"there is no job {job!r}{near(job, shipped())}; there are: {', '.join(shipped())}; "
                "a file's name ends in .yaml"
            )
        where, config_name = initialize_config_module(SHIPPED, version_base="1.3"), job
    try:
        with where, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*missing `_self_`")  # it is put last, where ours stands
            config = compose(config_name, overrides=overrides)
    except Exception as error:  # Hydra's, OmegaConf's, YAML's, the file system's: a file may hold anything
        raise JobError(f"{name}: {_one_line(error)}") from error
    if OmegaConf.get_type(config) is not Schema:
        raise JobError(f"{job}: its defaults must begin with job, as in: defaults: [job, model: shapes, ..., _self_]")
    text = OmegaConf.to_yaml(config)
    try:
        return _checked(name, config, text)
    except OmegaConfBaseException as error:
        raise JobError(without_secrets(f"{name}: {_one_line(error)}", text)) from None
    except (JobError, registry.PluginError) as error:
        raise type(error)(without_secrets(str(error), text)) from None


def _override(override: str) -> str:
    """An override in Hydra's words: a plugin's setting may be given without the + that Hydra asks of a new key."""
    if not re.match(r"[~+]{0,2}[A-Za-z_][\w.@/:-]*(=|$)", override):
        raise JobError(f"{override!r} is no override: key=value is expected, as in sampling.steps=10")
    if "_target_" in override:
        raise JobError(f"{override!r}: _target_ is refused; plugins are chosen by name")
    if re.match(r"[~+]*hydra\b", override):
        raise JobError(f"{override!r}: hydra is refused; where config is looked for is not the job's to say")
    groups = "|".join((*registry.KINDS, "cluster", "model", "stages"))
    if chosen := re.fullmatch(rf"({groups})=(null|true|false|[-+.\d]*)", override):
        raise JobError(f"{override}: a name is expected; ~{chosen[1]} leaves it out")
    plugin = re.match(rf"(model|{'|'.join(registry.KINDS)})\.\w|stages\.\w+\.settings\.\w", override)
    return f"++{override}" if plugin else override


def without_secrets(text: str, config: str) -> str:
    """``text`` with the values of environment variables that ``config`` names taken out: others may read an error.

    Those of at least 8 characters, lest a number or a word be taken for a secret.
    """
    for name in re.findall(r"""oc\.env:[\s'"\\]*([A-Za-z_]\w*)""", config):
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def _raw(path: Path) -> Any:
    """What is at the top of a YAML file; nothing, if it can't be read, since Hydra then says why."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception:
        return ()


def _is_file(job: str) -> bool:
    return job.endswith((".yaml", ".yml")) or "/" in job


# ------------------------------------------------------------------------------------------------------- checks


def _checked(name: str, config: DictConfig, text: str) -> Job:
    _refuse_targets(name, OmegaConf.to_container(config))
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise JobError(f"{name}: {key} has no value; set it in the job, or as {key}=...") from error
    assert isinstance(values, dict)
    _refuse_targets(name, values)  # an interpolation may bring one in
    for key in get_type_hints(Schema):
        if key not in values:  # ~key takes it away
            raise JobError(f"{name}: {key} has no value; set it in the job, or as {key}=...")
    _unknown(values, Schema, name)  # +key=value gets past even a typed config
    flow = tuple(map(str, values["flow"]))
    for stage in (*STAGES, *flow):
        values["stages"].setdefault(stage, vars(StageSettings()))
    job = Job(
        name=name,
        config=text,
        **{
            **values,
            "flow": flow,
            "output": _place(values["output"] or ""),
            "sampling": Sampling(**values["sampling"]),
            "stages": {key: StageSettings(**stage) for key, stage in values["stages"].items()},
            "cluster": Cluster(**values["cluster"]),
        },
    )
    for wrong in _wrong(job):
        raise JobError(f"{name}: {wrong}")
    return job


def _refuse_targets(name: str, values: Any) -> None:
    for key in _keys(values):
        if key.rpartition(".")[2] == "_target_":
            raise JobError(f"{name}: {key} is refused; plugins are chosen by name")


def _place(output: str) -> str:
    return output if "://" in output else output and str(Path(output).expanduser())


def _keys(node: Any, at: str = "") -> Iterator[str]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield f"{at}.{key}" if at else str(key)
        yield from _keys(value, f"{at}.{key}" if at else str(key))


def _unknown(values: Mapping[Any, Any], schema: Any, name: str, at: str = "") -> None:
    hints = get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            raise JobError(f"{name}: there is no key {at}{key}{_near_key(f'{at}{key}')}")
        hint = hints[key]
        if is_dataclass(hint) and isinstance(value, Mapping):
            _unknown(value, hint, name, f"{at}{key}.")
        elif get_args(hint)[1:] == (StageSettings,):
            for stage, settings in value.items():
                _unknown(settings, StageSettings, name, f"{at}{key}.{stage}.")


def _wrong(job: Job) -> Iterator[str]:
    """What is wrong with the values, one line each."""
    sampling = job.sampling
    for key, value, least in [
        ("samples_per_row", job.samples_per_row, 1),
        ("rows_per_shard", job.rows_per_shard, 1),
        ("sampling.steps", sampling.steps, 1),
        ("sampling.width", sampling.width, 1),
        ("sampling.height", sampling.height, 1),
        ("sampling.max_pixels", sampling.max_pixels, 1),
    ]:
        if value is not None and value < least:
            yield f"{key} must be {least} or more, not {value}"
    for key, most in LIMITS.items():
        if (getattr(sampling, key) or 0) > most:
            yield f"sampling.{key} must be from 1 to {most}, not {getattr(sampling, key)}"
    if (pixels := (sampling.width or 0) * (sampling.height or 0)) > sampling.max_pixels:
        size = f"sampling.width={sampling.width} and sampling.height={sampling.height}"
        yield f"{size} are {pixels} pixels, more than sampling.max_pixels={sampling.max_pixels} allows"
    if (sampling.width is None) != (sampling.height is None):
        yield "sampling.width and sampling.height must be given together, or neither"
    if not math.isfinite(sampling.guidance_scale):
        yield f"sampling.guidance_scale must be a finite number, not {sampling.guidance_scale}"
    for key in ("guidance_rescale", "guidance_from", "guidance_until", "strength"):
        if not 0.0 <= getattr(sampling, key) <= 1.0:
            yield f"sampling.{key} must be from 0 to 1, not {getattr(sampling, key)}"
    if not job.output or Path(job.output).is_file():
        yield f"output must name a folder or a URL, not {job.output!r}"
    if job.on_error not in ON_ERROR:
        yield f"on_error must be {' or '.join(ON_ERROR)}, not {job.on_error!r}"
    if not 0.0 <= job.max_error_rate <= 1.0:
        yield f"max_error_rate must be from 0 to 1, not {job.max_error_rate}"
    if sampling.first_noise not in FIRST_NOISE:
        yield f"sampling.first_noise must be {' or '.join(FIRST_NOISE)}, not {sampling.first_noise!r}"
    if not 0.0 <= sampling.until < 1.0:
        yield f"sampling.until must be a time from 0 to less than 1, not {sampling.until}"
    if sampling.until and ("denoise" not in job.flow or job.flow[-2] != "denoise"):
        yield f"sampling.until leaves latents half-way, so flow must end with denoise, write, not {list(job.flow)}"
    if job.latents_std and job.flow[-2] != "encode":
        yield f"latents_std is of latents as they were encoded, so flow must end with encode, write, not {list(job.flow)}"
    yield from _wrong_flow(job.flow)
    for name, stage in job.stages.items():
        if name not in job.flow and name not in STAGES:
            yield f"stages.{name}: there is no such stage in the flow{near(name, {*job.flow, *STAGES})}"
        for key in ("replicas", "batch_size"):
            if getattr(stage, key) < 1:
                yield f"stages.{name}.{key} must be 1 or more, not {getattr(stage, key)}"
        if stage.retries < 0:
            yield f"stages.{name}.retries must be 0 or more, not {stage.retries}"
        if stage.timeout is not None and not stage.timeout > 0:
            yield f"stages.{name}.timeout must be more than 0 seconds, or null, not {stage.timeout}"
        for key in ("num_gpus", "num_cpus", "memory"):
            number = getattr(stage, key)
            if number is not None and not (math.isfinite(number) and number >= 0):
                yield f"stages.{name}.{key} must be a number from 0 on, not {number}"
        if stage.num_gpus > 1 and stage.num_gpus != int(stage.num_gpus):
            yield f"stages.{name}.num_gpus above 1 must be whole, not {stage.num_gpus}"
        if stage.settings and name in STAGES:
            yield f"stages.{name}.settings: only a plugin's stage has settings"
    if job.cluster.kind not in CLUSTERS:
        yield f"cluster.kind must be one of {', '.join(CLUSTERS)}, not {job.cluster.kind!r}"
    if job.cluster.kind == "ray" and not job.cluster.address:
        yield "cluster.address must be set for cluster=ray: an address, or auto"
    for kind in registry.KINDS:
        choice = getattr(job, kind, None)
        if choice is None:
            continue
        if not isinstance(choice.get("name"), str):
            yield f"{kind}.name must be the name of a plugin, not {choice.get('name')!r}"
        else:
            registry.find(kind, choice["name"])
    for key in job.model:
        if not re.search(rf"\bmodel\.{re.escape(key)}\b", job.config):
            used = re.findall(r"\bmodel\.(\w+)", job.config)
            yield f"there is no key model.{key}{near(key, used)}: no part of the model reads it"
    if job.scheduler is not None:
        grid = job.scheduler.get("grid", "trailing")
        if not isinstance(grid, (str, Mapping)):
            yield f"scheduler.grid must be a name, or a name with settings, not {grid!r}"
        try:
            grids.resolve(grid)
        except ValueError as error:
            yield f"scheduler.grid: {error}"


def _wrong_flow(flow: tuple[str, ...]) -> Iterator[str]:
    if len(flow) < 2 or flow[0] != "read" or flow[-1] != "write":
        yield f"flow must begin with read and end with write, not {list(flow)}"
    twice = [name for at, name in enumerate(flow) if name in flow[:at]]
    if twice:
        yield f"flow has {twice[0]} twice"
    ours = [name for name in flow if name in STAGES]
    if ours != sorted(ours, key=STAGES.index):
        yield f"flow must keep the order {', '.join(STAGES)}, not {list(flow)}"
    if "denoise" in flow and "encode" not in flow:
        yield "flow needs encode before denoise: it turns the prompts into what the denoiser reads"
    for name in flow:
        if name not in STAGES:
            registry.find("stage", name)


# ------------------------------------------------------------------------------------------------ Hydra's part


@cache
def _prepare() -> None:
    """Tell Hydra our schema, our config folder and those that plugins bring, and a config for each plugin's name."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Schema)
    Plugins.instance().register(_SearchPath)
    packages = [package for _, package in _packages()]
    for kind in registry.KINDS:
        found = registry.entries(kind)
        whole = [f"{e.distribution}:{e.name}" for e in found]
        for name in {*(e.name for e in found), *whole, *(name.removeprefix("latentmill-") for name in whole)}:
            if not any((files(package) / kind / f"{name}.yaml").is_file() for package in packages):
                grid = {"grid": "trailing"} if kind == "scheduler" else {}
                store.store(group=kind, name=name, node={"name": name, **grid})


class _SearchPath(SearchPathPlugin):
    """Where Hydra looks for what a job's defaults name, after the job's own folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for distribution, package in _packages():
            search_path.append(distribution, f"pkg://{package}")


@cache
def _packages() -> list[tuple[str, str]]:
    """Distributions and packages of config. One that can't be imported costs its user what is in it, and no more."""
    found = [("latentmill", "latentmill.conf")]
    for entry in registry.entries():
        if entry.group != registry.CONF_GROUP:
            continue
        try:
            files(entry.entry_point.value)
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises
            said = " ".join(str(error).split())
            logger.warning(f"the config of {entry} is left out: {type(error).__name__}: {said}")
        else:
            found.append((entry.distribution, entry.entry_point.value))
    return found


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's long messages, as one line that names the key and the nearest right one."""
    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, RecursionError):
        return "its defaults lead back to themselves"
    if mark := getattr(error, "problem_mark", None):
        return f"line {mark.line + 1}: {error.problem}"  # type: ignore[attr-defined]  # a yaml.MarkedYAMLError
    if isinstance(error, MissingConfigException) and (missing := _found(r"Could not (?:find|load) '([^']+)'", text)):
        group, _, wanted = missing.rpartition("/")
        there = sorted(name for name in error.options or ([] if group else ["job"]) if ":" not in name)
        what = group or "config"
        said = f"there is no {what} {wanted!r}{near(wanted.rpartition(':')[2], there)}; there are: {', '.join(there) or 'none'}"
        brings = OURS.get(missing) or OURS.get(wanted.partition(":")[0])
        return f"{said}; pip install {brings} brings it" if brings else said
    key = _found(r"Could not override '([^']+)'", text) or _found(r"full_key: (\S+)", text)
    if key:
        if re.search(r"Key '[^']*' (is )?not in", text):
            return f"there is no key {key}{_near_key(key)}"
        if reason := _found(r"(Value .*)", text) or _found(r"(.*is not .*)", text):
            return f"{key}: {reason}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    detail = next((line for line in lines[1:] if not re.match(r"(full_key|object_type|reference_type|set_)", line)), "")
    said = f"{lines[0].rstrip('.:')}: {detail}" if detail else lines[0]
    return f"{key}: {said}" if key and not re.search(rf"\b{re.escape(key)}\b", said) else said


def _near_key(key: str) -> str:
    """What was meant by a key that isn't there, if it can be told: all of it is like a right one, or its last part."""
    every = [
        *(f.name for f in fields(Schema)),
        *(f"sampling.{f.name}" for f in fields(Sampling)),
        *(f"cluster.{f.name}" for f in fields(Cluster)),
        *(f"stages.{stage}.{f.name}" for stage in STAGES for f in fields(StageSettings)),
    ]
    same = [name for name in every if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if len(same) == 1:
        return f" (did you mean {same[0]!r}?)"
    last = {name.rpartition(".")[2]: name for name in reversed(every)}
    like = difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
    return near(key, every) or (f" (did you mean {last[like[0]]!r}?)" if like else "")


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None

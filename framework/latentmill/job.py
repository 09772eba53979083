"""A job: one YAML file, composed by Hydra, checked whole before anything starts."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_type_hints

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from latentmill import registry, values
from latentmill.fields import IN_JOB, parse, python_type
from latentmill.plugin import RowError
from latentmill.registry import near
from latentmill.schedulers import grids

logger = logging.getLogger("latentmill")


class JobError(ValueError):
    """The job is not right; one line that names the key, what is there and what was expected."""


if TYPE_CHECKING:
    Sampling: TypeAlias = Any
else:
    Sampling = make_dataclass(
        "Sampling",
        [
            (key, python_type(of) | (None if of.default is None else python_type(of)), field(default=of.default))
            for key, of in IN_JOB.items()
        ],
    )
    """The keys of ``sampling`` and their types, as ``fields`` has them."""


@dataclass
class StageSettings:
    """A stage's pool of workers. What a worker asks for is said in Ray's words."""

    replicas: int = 1
    batch_size: int = 16
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    memory: Any = None
    """Bytes, as a number or in words: ``8GiB``, ``500MB``."""
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

    @property
    def bytes(self) -> int | None:
        """``memory`` as a number."""
        return None if self.memory is None else int(values.in_bytes(self.memory))


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
    sampling: dict[str, Any]
    """What each row is made with; a column of the source of the same name takes a value's place, row by row."""
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
            "sampling": self.sampling,
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
    choices, assignments = _overrides(overrides)
    where: Any
    if _is_file(job):
        path = Path(os.path.abspath(os.path.expanduser(job)))  # a link is a job of its own name
        if not path.is_file():
            raise JobError(f"there is no job file {job}; shipped jobs are chosen by name: {', '.join(shipped())}")
        if path.suffix != ".yaml":
            raise JobError(f"{job}: a job file's name ends in .yaml")
        if "hydra" in _raw(path):  # its searchpath imports what it names
            raise JobError(f"{job}: hydra is refused; where config is looked for is not the job's to say")
        where, config_name = initialize_config_dir(str(path), version_base="1.3"), THE_FILE
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
            config, chosen = _composed(config_name, choices)
            if named := list(_named(assignments, config, chosen)):
                config, _ = _composed(config_name, [*choices, *named])
    except Exception as error:  # Hydra's, OmegaConf's, YAML's, the file system's: a file may hold anything
        raise JobError(f"{name}: {_one_line(error)}") from error
    if OmegaConf.get_type(config) is not Schema:
        raise JobError(f"{job}: its defaults must begin with job, as in: defaults: [job, model: shapes, ..., _self_]")
    try:
        for assignment in assignments:
            _assign(config, assignment)
        _settle(config)
    except (OmegaConfBaseException, RecursionError) as error:
        raise JobError(f"{name}: {_one_line(error)}") from error
    except JobError as error:
        raise JobError(f"{name}: {error}") from error
    text = OmegaConf.to_yaml(config)
    try:
        return _checked(name, config, text)
    except (OmegaConfBaseException, RecursionError) as error:
        raise JobError(without_secrets(f"{name}: {_one_line(error)}", text)) from None
    except (JobError, registry.PluginError) as error:
        raise type(error)(without_secrets(str(error), text)) from None


# ------------------------------------------------------------------------------------------------- key=value


@dataclass(frozen=True)
class Assignment:
    """``key=value`` that is no choice of a config."""

    key: str
    text: str
    new: bool
    """The key may be one that isn't there yet."""


GROUPS = (*registry.KINDS, "cluster", "model", "stages")
"""Keys whose value may be the name of a config."""


def _overrides(overrides: Sequence[str]) -> tuple[list[str], list[Assignment]]:
    """What of the overrides is for Hydra, in its grammar, since it chooses or leaves out a config; and the rest."""
    choices: list[str] = []
    assignments: dict[str, Assignment] = {}
    for override in overrides:
        match = re.fullmatch(r"([~+]{0,2})([A-Za-z_][\w.@/:-]*)(?:=(.*))?", override, re.DOTALL)
        if not match or (match[3] is None and match[1] != "~"):
            raise JobError(f"{override!r} is no override: key=value is expected, as in sampling.steps=10")
        sign, key, text = match.groups()
        if "_target_" in key:
            raise JobError(f"{override!r}: _target_ is refused; plugins are chosen by name")
        if re.match(r"hydra\b", key):
            raise JobError(f"{override!r}: hydra is refused; where config is looked for is not the job's to say")
        value = (
            key in {f.name for f in fields(Schema)} - {*GROUPS} or re.search(r"[.@/:]", key) or (text or "")[:1] == "{"
        )
        if sign == "~":
            choices.append(f"~{key}" + ("" if text is None else f"={_quoted(text)}"))
        elif value and not re.search(r"[@/:]", key):
            plugin = re.match(rf"(model|{'|'.join(registry.KINDS)})\.\w|stages\.\w+\.settings(\.\w|$)", key)
            assignments.pop(key, None)  # the last one counts, in its place
            assignments[key] = Assignment(key, text, bool(sign or plugin) or text[:1] == "{")
        elif key in GROUPS and re.fullmatch(r"null|true|false|[-+.\d]*|\[.*\]", text):
            raise JobError(f"{override}: a name is expected; ~{key} leaves it out")
        else:
            choices.append(f"{sign.replace('++', '')}{key}={_quoted(text)}")
    # The type of a setting is its plugin's to say, so names are known before settings, and what refers before what is read.
    first = [a for a in assignments.values() if a.key == "flow" or a.key.endswith(".name") or "${" in a.text]
    return choices, first + [a for a in assignments.values() if a not in first]


def _quoted(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


def _composed(config_name: str, choices: Sequence[str]) -> tuple[DictConfig, Mapping[Any, Any]]:
    """The config, and which config each group is."""
    config = compose(config_name, overrides=list(choices), return_hydra_config=True)
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    OmegaConf.set_struct(config, True)
    assert isinstance(chosen, dict)
    return config, chosen


def _named(assignments: Sequence[Assignment], config: DictConfig, chosen: Mapping[Any, Any]) -> Iterator[str]:
    """``scheduler=X`` for ``scheduler.name=X``, where the settings there are those of another scheduler's config."""
    for assignment in assignments:
        kind = assignment.key.removesuffix(".name")
        if kind in registry.KINDS and kind in chosen and "${" not in assignment.text:
            there = OmegaConf.to_container(config[kind]) or {}
            if isinstance(there, dict) and there.keys() > {"name"} and there["name"] != assignment.text:
                yield f"{kind}={_quoted(assignment.text)}"


def _assign(config: DictConfig, assignment: Assignment) -> None:
    key, path = assignment.key, assignment.key.split(".")
    new = assignment.new or (path[0] == "stages" and len(path) > 2 and path[1] in (config.get("flow") or ()))
    hint: Any = str
    if values.ambiguous(assignment.text):
        hint = _hint(path, OmegaConf.to_container(config))
    try:
        value = values.read(assignment.text, hint)
    except ValueError as error:
        raise JobError(f"{key}: {error}") from error
    try:
        OmegaConf.update(config, key, value, force_add=new)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise JobError(f"there is no key {key}{_near_key(key)}") from error
    except (ValueError, AssertionError) as error:  # OmegaConf's of a key that goes into a list, or into text
        if isinstance(error, OmegaConfBaseException):
            raise
        raise JobError(f"there is no key {key}") from error


def _settle(config: DictConfig) -> None:
    """Give scalars of YAML files that were kept as they were written the type that their keys have."""
    raw = OmegaConf.to_container(config)
    for path, value in _leaves(raw):
        text = values.kept(value)
        if text is not None or isinstance(value, values.NUMBERS):
            wanted = values.is_text(_hint(path, raw))
            if text is not None or wanted:
                node: Any = config
                for key in path[:-1]:
                    node = node[key]
                node[path[-1]] = str(value) if text is None else text if wanted else values.as_yaml(text)


def _hint(path: Sequence[Any], raw: Any) -> Any:
    """The type that the schema, or a plugin's constructor, gives a key. Any: neither does, and no text is made of it."""
    hint: Any = Schema
    if path[0] in registry.KINDS and len(path) > 1:
        hint, path = _setting(path[0], raw[path[0]], path[1]), path[2:]
    elif path[0] == "stages" and len(path) > 3 and path[2] == "settings":
        hint, path = _setting("stage", {"name": path[1]}, path[3]), path[4:]
    elif path[0] == "model":
        hint = (
            str if any(_makes_text(".".join(map(str, path)), leaf, value, raw) for leaf, value in _leaves(raw)) else Any
        )
        path = ()
    for key in path:
        hint = _types(hint).get(key, Any) if isinstance(hint, type) and is_dataclass(hint) else values.inside(hint)
    return hint


@cache
def _types(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _setting(kind: str, choice: Any, key: str) -> Any:
    if key == "name":
        return str
    name = choice.get("name") if isinstance(choice, Mapping) else None
    return registry.hints(kind, str(name)).get(key, Any)


def _makes_text(key: str, leaf: Sequence[str], value: Any, raw: Any) -> bool:
    """Whether text is made of ``key`` at ``leaf``: it is part of a longer text there, or all of what takes text."""
    if leaf[0] == "model" or not isinstance(value, str) or f"${{{key}}}" not in value:
        return False
    return value != f"${{{key}}}" or values.is_text(_hint(leaf, raw))


def _leaves(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield at, node
        return
    for key, value in children:
        yield from _leaves(value, (*at, key))


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
        settled = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise JobError(f"{name}: {key} has no value; set it in the job, or as {key}=...") from error
    assert isinstance(settled, dict)
    _refuse_targets(name, settled)  # an interpolation may bring one in
    for key in get_type_hints(Schema):
        if key not in settled:  # ~key takes it away
            raise JobError(f"{name}: {key} has no value; set it in the job, or as {key}=...")
    _unknown(settled, Schema, name)  # +key=value gets past even a typed config
    if not isinstance(settled["flow"], list):
        raise JobError(f"{name}: flow must be a list of stages, not {settled['flow']!r}")
    flow = tuple(map(str, settled["flow"]))
    for stage in (*STAGES, *flow):
        settled["stages"].setdefault(stage, vars(StageSettings()))
    job = Job(
        name=name,
        config=text,
        **{
            **settled,
            "flow": flow,
            "output": place(settled["output"] or ""),
            "sampling": {**{key: of.default for key, of in IN_JOB.items()}, **settled["sampling"]},
            "stages": {key: StageSettings(**stage) for key, stage in settled["stages"].items()},
            "cluster": Cluster(**settled["cluster"]),
        },
    )
    for wrong in _wrong(job):
        raise JobError(f"{name}: {wrong}")
    return job


def _refuse_targets(name: str, values: Any) -> None:
    for key in _keys(values):
        if key.rpartition(".")[2] == "_target_":
            raise JobError(f"{name}: {key} is refused; plugins are chosen by name")


def place(output: str) -> str:
    """A URL as it is, a folder with ``~`` for the home; ``~name`` that nobody is called is a folder's name."""
    return output if "://" in output else output and str(Path(os.path.expanduser(output)))


def _keys(node: Any, at: str = "") -> Iterator[str]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield f"{at}.{key}" if at else str(key)
        yield from _keys(value, f"{at}.{key}" if at else str(key))


def _unknown(settled: Mapping[Any, Any], schema: Any, name: str, at: str = "") -> None:
    hints = get_type_hints(schema)
    for key, value in settled.items():
        if key not in hints:
            raise JobError(f"{name}: there is no key {at}{key}{_near_key(f'{at}{key}')}")
        hint = hints[key]
        if is_dataclass(hint):
            _holds_keys(value, name, f"{at}{key}")
            _unknown(value, hint, name, f"{at}{key}.")
        elif get_args(hint)[1:] == (StageSettings,):
            _holds_keys(value, name, f"{at}{key}")
            for stage, settings in value.items():
                _holds_keys(settings, name, f"{at}{key}.{stage}")
                _unknown(settings, StageSettings, name, f"{at}{key}.{stage}.")
        elif values.is_dict(hint) and value is not None:
            _holds_keys(value, name, f"{at}{key}")


def _holds_keys(value: Any, name: str, at: str) -> None:
    """What an interpolation brings in is checked by nobody else."""
    if not isinstance(value, Mapping):
        raise JobError(f"{name}: {at} must hold keys and their values, not {value!r}")


def _wrong(job: Job) -> Iterator[str]:
    """What is wrong with the values, one line each."""
    sampling = job.sampling
    for key in ("samples_per_row", "rows_per_shard"):
        if getattr(job, key) < 1:
            yield f"{key} must be 1 or more, not {getattr(job, key)}"
    for key, of in IN_JOB.items():
        if sampling[key] is not None and not (isinstance(sampling[key], str) and _not_utf8(sampling[key])):
            try:
                parse(of, sampling[key], f"sampling.{key}")
            except RowError as error:
                yield str(error)
    width, height = sampling["width"], sampling["height"]
    if (pixels := (width or 0) * (height or 0)) > sampling["max_pixels"]:
        size = f"sampling.width={width} and sampling.height={height}"
        yield f"{size} are {pixels} pixels, more than sampling.max_pixels={sampling['max_pixels']} allows"
    if (width is None) != (height is None):
        yield "sampling.width and sampling.height must be given together, or neither"
    for key, text in [("output", job.output), *((f"sampling.{k}", v) for k, v in sampling.items())]:
        if isinstance(text, str) and not text.isascii() and _not_utf8(text):
            yield f"{key} must be UTF-8, not {text!r}"
    if not job.output or "\0" in job.output or Path(job.output).is_file():
        yield f"output must name a folder or a URL, not {job.output!r}"
    if job.on_error not in ON_ERROR:
        yield f"on_error must be {' or '.join(ON_ERROR)}, not {job.on_error!r}"
    if not 0.0 <= job.max_error_rate <= 1.0:
        yield f"max_error_rate must be from 0 to 1, not {job.max_error_rate}"
    if sampling["first_noise"] not in FIRST_NOISE:
        yield f"sampling.first_noise must be {' or '.join(FIRST_NOISE)}, not {sampling['first_noise']!r}"
    if not 0.0 <= sampling["until"] < 1.0:
        yield f"sampling.until must be a time from 0 to less than 1, not {sampling['until']}"
    if sampling["until"] and ("denoise" not in job.flow or job.flow[-2] != "denoise"):
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
        for key in ("num_gpus", "num_cpus"):
            number = getattr(stage, key)
            if not (math.isfinite(number) and number >= 0):
                yield f"stages.{name}.{key} must be a number from 0 on, not {number}"
        if stage.memory is not None and not 0 <= values.in_bytes(stage.memory) < math.inf:
            yield f"stages.{name}.memory must be bytes, as 8GiB, 500MB or a number, not {stage.memory!r}"
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
            grids.choose(grid)
        except ValueError as error:
            yield f"scheduler.grid: {error}"


def _not_utf8(text: str) -> bool:
    """Whether there are bytes in it that a shell gave and UTF-8 doesn't have: no file of rows could hold them."""
    return text != text.encode(errors="ignore").decode()


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
    Plugins.instance().register(_Folder)
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
        for element in search_path.get_path():
            if element.provider == "main":
                element.path = f"{_Folder.scheme()}://{element.path.removeprefix('pkg://')}"
        for distribution, package in _packages():
            search_path.append(distribution, f"{_Folder.scheme()}://{package}")


THE_FILE = "job file"
"""What a job's own file is called among the configs of its folder, whatever its name."""


class _Folder(ConfigSource):
    """The folder of a job's file, or a package of config; its path is the file's, or the package's name.

    Unlike Hydra's own, a scalar stays as it was written until its type is known, the file may have any name, and it may
    be a link: what lies beside it is found, then what lies beside the file that it leads to.
    """

    @staticmethod
    def scheme() -> str:
        return "latentmill"

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.file = Path(self.path) if os.path.isabs(self.path) else None
        self.folders: list[Traversable]
        if self.file is not None:
            self.folders = list(dict.fromkeys([self.file.parent, self.file.resolve().parent]))
        else:
            self.folders = [files(self.path)]

    def _found(self, name: str) -> Traversable | None:
        name = name.removesuffix(".yaml")
        if self.file is not None and name == THE_FILE:
            return self.file
        if self.file is not None and name in ("job", "schema"):  # what all jobs begin with is ours
            return None
        there = (folder.joinpath(f"{name}.yaml") for folder in self.folders)
        return next((file for file in there if file.is_file()), None)

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._found(config_path)
        if file is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        text = file.read_text(encoding="utf-8")
        held = values.load_yaml(text)
        if not isinstance(held, (dict, list)):
            raise ValueError(f"{file}: keys with values are expected, as in: seed: 1")
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(held), self._get_header_dict(text))

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return any(folder.joinpath(config_path).is_dir() for folder in self.folders)

    def is_config(self, config_path: str) -> bool:
        return self._found(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found: list[str] = []
        for folder in self.folders:
            if (group := folder.joinpath(config_path)).is_dir():
                for name in (file.name for file in group.iterdir()):
                    self._list_add_result(found, f"{config_path}/{name}".lstrip("/"), name, results_filter)
        return sorted(set(found))


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


DOLLAR = "${oc.env:NAME} is an environment variable, ${KEY} another key of the job; \\${ is ${ as it stands"


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's long messages, as one line that names the key and the nearest right one."""
    text = f"{error}\n{error.__cause__ or ''}"
    for cause in (error, error.__cause__):
        if isinstance(cause, GrammarParseError):
            key, said = _found(r"full_key: (\S+)", text), "${ begins what can't be read"
            return f"{key}: {said}; {DOLLAR}" if key else f"{said}; {DOLLAR}"
    if isinstance(error, RecursionError):
        return "its defaults lead back to themselves"
    if isinstance(error, InterpolationResolutionError):
        key, said = _found(r"full_key: (\S+)", text), str(error).partition("\n")[0]
        return f"{key}: {said}; \\${{ is ${{ as it stands" if key else said
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
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
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

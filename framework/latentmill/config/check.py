"""A composed job is checked whole: what is wrong is one line that names the key, what is there and what is right."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from latentmill import registry, storage, values
from latentmill.buckets import Size
from latentmill.config.messages import near_key
from latentmill.config.schema import (
    CLUSTERS,
    DEFAULTS,
    FIRST_NOISE,
    OF_POOL,
    ON_ERROR,
    OWN_PARTS,
    PLACEMENTS,
    Cluster,
    Job,
    Sampling,
    Schema,
    StageKeys,
    StageSettings,
    plugin_fields,
    types,
    whole_choice,
)
from latentmill.errors import AddressError, JobError, PluginError, RowError
from latentmill.fields import IN_JOB, parse
from latentmill.plugin import Stage
from latentmill.text import near

ACCEPT_KEYS = {
    "attempts": "the samples of a row that are drawn at most",
    "rows": "the accepted rows that the dataset ends with",
}
EXPORT_KEYS = {
    "to": "names of formats, as in [kohya, musubi]: latentmill export --formats lists them",
    "folder": "where to, a folder or a URL",
    "names": "the column that says what the pictures are called",
}


def checked(name: str, config: DictConfig, raw: dict[Any, Any], text: str) -> Job:
    """The job that a composed config is. Raises JobError or PluginError, or what OmegaConf says of an interpolation.

    ``raw``, ``text``: the config as plain values, and as YAML.
    """
    _refuse_targets(name, raw)
    settled: Any = raw
    if "${" in text or "???" in text:
        try:
            settled = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = str(error.full_key)
            raise JobError(f"{name}: {key} has no value; set it in the job, or as {key}=...") from error
        _refuse_targets(name, settled)  # an interpolation may bring one in
    for key in types(Schema):
        if key not in settled:  # ~key takes it away
            raise JobError(f"{name}: {key} has no value; set it in the job, or as {key}=...")
    for key in settled["sampling"] if isinstance(settled["sampling"], Mapping) else ():
        if key not in IN_JOB and (own := plugin_fields(settled)) is not None and key not in own:
            raise JobError(f"{name}: there is no key sampling.{key}{near_key(f'sampling.{key}', own)}")
    _unknown(settled, Schema, name)  # +key=value gets past even a typed config
    if not isinstance(settled["flow"], list):
        raise JobError(f"{name}: flow must be a list of stages, not {settled['flow']!r}")
    flow = tuple(map(str, settled["flow"]))
    for stage in flow:
        settled["stages"].setdefault(stage, vars(StageKeys()))
    said = _with_namesakes(settled["stages"], flow)
    for stage, settings in said.items():
        whole = {kind: whole_choice(settings[kind], settled.get(kind)) for kind in OWN_PARTS if settings[kind]}
        settled["stages"][stage] = {
            **_with_resources(settings, settings["name"] or stage if stage in flow else None),
            **whole,
        }
    job = Job(
        name=name,
        config=text,
        **{
            **settled,
            "flow": flow,
            "output": storage.place(settled["output"] or ""),
            "prompt_cache": storage.place(settled["prompt_cache"]) if settled["prompt_cache"] else None,
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


def _keys(node: Any, at: str = "") -> Iterator[str]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield f"{at}.{key}" if at else str(key)
        yield from _keys(value, f"{at}.{key}" if at else str(key))


def _unknown(settled: Mapping[Any, Any], schema: Any, name: str, at: str = "") -> None:
    hints = types(schema)
    for key, value in settled.items():
        if key not in hints:
            raise JobError(f"{name}: there is no key {at}{key}{near_key(f'{at}{key}')}")
        hint = hints[key]
        if is_dataclass(hint):
            _holds_keys(value, name, f"{at}{key}")
            if hint is not Sampling:  # which plugins add keys to
                _unknown(value, hint, name, f"{at}{key}.")
        elif get_args(hint)[1:] == (StageKeys,):
            _holds_keys(value, name, f"{at}{key}")
            for stage, settings in value.items():
                _holds_keys(settings, name, f"{at}{key}.{stage}")
                _unknown(settings, StageKeys, name, f"{at}{key}.{stage}.")
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
    yield from _wrong_sampling(sampling, "sampling")
    width, height = sampling["width"], sampling["height"]
    if (pixels := (width or 0) * (height or 0)) > sampling["max_pixels"]:
        size = f"sampling.width={width} and sampling.height={height}"
        yield f"{size} are {pixels} pixels, more than sampling.max_pixels={sampling['max_pixels']} allows"
    if (width is None) != (height is None):
        yield "sampling.width and sampling.height must be given together, or neither"
    yield from _wrong_size(job)
    yield from _wrong_accept(job)
    yield from _wrong_export(job)
    for key, text in [
        ("output", job.output),
        ("prompt_cache", job.prompt_cache),
        *((f"sampling.{k}", v) for k, v in sampling.items()),
    ]:
        if isinstance(text, str) and not text.isascii() and _not_utf8(text):
            yield f"{key} must be UTF-8, not {text!r}"
    if not job.output or "\0" in job.output or Path(job.output).is_file():
        yield f"output must name a folder or a URL, not {job.output!r}"
    if job.prompt_cache is not None:
        yield from _wrong_place(job.prompt_cache, "prompt_cache", "prompts")
    if job.on_error not in ON_ERROR:
        yield f"on_error must be {' or '.join(ON_ERROR)}, not {job.on_error!r}"
    if job.placement not in PLACEMENTS:
        yield f"placement must be {', '.join(PLACEMENTS[:-1])} or {PLACEMENTS[-1]}, not {job.placement!r}"
    asked = {stage.accelerator_type for stage in job.stages.values() if stage.accelerator_type}
    if job.placement == "fused" and len(asked) > 1:
        yield f"placement=fused has one worker for stages that ask for accelerators {', '.join(sorted(asked))}"
    if job.max_bytes_in_flight is not None and not 0 < values.in_bytes(job.max_bytes_in_flight) < math.inf:
        yield f"max_bytes_in_flight must be bytes, as 8GiB, 500MB or a number, not {job.max_bytes_in_flight!r}"
    if not 0 <= values.in_seconds(job.grace) < math.inf:
        yield f"grace must be a time, as 90, 30s or 2m, not {job.grace!r}"
    if not 0.0 <= job.max_error_rate <= 1.0:
        yield f"max_error_rate must be from 0 to 1, not {job.max_error_rate}"
    yield from _wrong_flow(job)
    for name, stage in job.stages.items():
        if name not in job.flow and name not in (known := {entry.name for entry in registry.entries("stage")}):
            yield f"stages.{name}: there is no such stage in the flow{near(name, {*job.flow, *known})}"
        if stage.replicas != "auto" and not (type(stage.replicas) is int and stage.replicas >= 1):
            yield f"stages.{name}.replicas must be auto, or 1 or more, not {stage.replicas!r}"
        if stage.batch_size != "auto" and not (type(stage.batch_size) is int and stage.batch_size >= 1):
            yield f"stages.{name}.batch_size must be auto, or 1 or more, not {stage.batch_size!r}"
        if stage.retries < 0:
            yield f"stages.{name}.retries must be 0 or more, not {stage.retries}"
        if (least := stage.min_replicas) is not None and not (
            type(stage.replicas) is int and 1 <= least <= stage.replicas
        ):
            yield f"stages.{name}.min_replicas must be from 1 to a number that replicas gives, not {least} of {stage.replicas}"
        if stage.timeout is not None and not 0 < values.in_seconds(stage.timeout) < math.inf:
            yield f"stages.{name}.timeout must be more than 0 seconds, as 10m, 90s or a number, or null, not {stage.timeout!r}"
        for key in ("num_gpus", "num_cpus"):
            number = getattr(stage, key)
            if not (math.isfinite(number) and number >= 0):
                yield f"stages.{name}.{key} must be a number from 0 on, not {number}"
        if stage.memory is not None and not 0 <= values.in_bytes(stage.memory) < math.inf:
            yield f"stages.{name}.memory must be bytes, as 8GiB, 500MB or a number, not {stage.memory!r}"
        yield from _wrong_sampling(stage.sampling, f"stages.{name}.sampling")
        if stage.num_gpus > 1 and stage.num_gpus != int(stage.num_gpus):
            yield f"stages.{name}.num_gpus above 1 must be whole, not {stage.num_gpus}"
    if job.cluster.kind not in CLUSTERS:
        yield f"cluster.kind must be one of {', '.join(CLUSTERS)}, not {job.cluster.kind!r}"
    if job.cluster.wait is not None and not 0 <= values.in_seconds(job.cluster.wait) < math.inf:
        yield f"cluster.wait must be seconds, as 10m, 90s or a number, or null, not {job.cluster.wait!r}"
    if job.cluster.kind == "ray" and not job.cluster.address:
        yield "cluster.address must be set for cluster=ray: an address, or auto"
    of_job = [(kind, kind, choice) for kind in registry.KINDS if (choice := getattr(job, kind, None)) is not None]
    of_stages = [
        (f"stages.{name}.{kind}", kind, choice)
        for name in job.flow
        for kind, choice in job.stages[name].own_parts.items()
    ]
    for at, kind, choice in (*of_job, *of_stages):
        if not isinstance(choice.get("name"), str):
            yield f"{at}.name must be the name of a plugin, not {choice.get('name')!r}"
        else:
            registry.find(kind, choice["name"])
    for key in job.model:
        if not re.search(rf"\bmodel\.{re.escape(key)}\b", job.config):
            used = re.findall(r"\bmodel\.(\w+)", job.config)
            yield f"there is no key model.{key}{near(key, used)}: no part of the model reads it"
    for at, kind, choice in (*of_job, *of_stages):
        if kind == "scheduler":
            grid = choice.get("grid", "trailing")
            if not isinstance(grid, (str, Mapping)):
                yield f"{at}.grid must be a name, or a name with settings, not {grid!r}"
            from latentmill.schedulers import grids

            try:
                grids.choose(grid)
            except ValueError as error:
                yield f"{at}.grid: {error}"


def _wrong_sampling(sampling: Mapping[str, Any], at: str) -> Iterator[str]:
    for key, value in sampling.items():
        if key in IN_JOB and value is not None and not (isinstance(value, str) and _not_utf8(value)):
            try:
                parse(IN_JOB[key], value, f"{at}.{key}")
            except RowError as error:
                yield str(error)
    if (first := sampling.get("first_noise", FIRST_NOISE[0])) not in FIRST_NOISE:
        yield f"{at}.first_noise must be {' or '.join(FIRST_NOISE)}, not {first!r}"
    until = sampling.get("until", 0.0)
    if type(until) in (int, float) and not 0.0 <= until < 1.0:
        yield f"{at}.until must be a time from 0 to less than 1, not {until}"


def _wrong_size(job: Job) -> Iterator[str]:
    if job.size is None:
        return
    try:
        size = Size.of(job.size)
    except ValueError as error:
        yield str(error)
        return
    most = job.sampling["max_pixels"]
    if large := [f"{width}x{height}" for width, height in size.sides() if width * height > most]:
        yield f"size: buckets of {large[0]} pixels are larger than sampling.max_pixels={most} allows"
    if job.sampling["width"] is not None or job.sampling["height"] is not None:
        yield "size gives each picture the size of its bucket: leave sampling.width and sampling.height out"
    if job.samples_per_row % len(size.area):
        yield (
            f"size.area has {len(size.area)} areas, and sample k of a row is of the k-th: samples_per_row must be "
            f"{len(size.area)} or a multiple, not {job.samples_per_row}"
        )


def _wrong_accept(job: Job) -> Iterator[str]:
    if job.accept is None:
        return
    for key in job.accept:
        if key not in ACCEPT_KEYS:
            yield f"there is no key accept.{key}{near(key, ACCEPT_KEYS)}"
    if not any(job.accept.get(key) is not None for key in ACCEPT_KEYS):
        yield "accept must say attempts, the samples of a row that are drawn at most, or rows, how many rows are wanted, or both"
    for key, what in ACCEPT_KEYS.items():
        number = job.accept.get(key)
        if number is not None and (type(number) is not int or number < 1):
            yield f"accept.{key} must be 1 or more, {what}, not {number!r}"


def _wrong_export(job: Job) -> Iterator[str]:
    if job.export is None:
        return
    for key in job.export:
        if key not in EXPORT_KEYS:
            yield f"there is no key export.{key}{near(key, EXPORT_KEYS)}"
    to, folder, names = map(job.export.get, EXPORT_KEYS)
    if not (isinstance(to, list) and to and all(isinstance(name, str) for name in to)):
        yield f"export.to must be {EXPORT_KEYS['to']}, not {to!r}"
    if not isinstance(folder, str) or not folder or _not_utf8(folder):
        yield f"export.folder must say {EXPORT_KEYS['folder']}, not {folder!r}"
    else:
        yield from _wrong_place(folder, "export.folder", "an export")
    if names is not None and not isinstance(names, str):
        yield f"export.names must be {EXPORT_KEYS['names']}, not {names!r}"


def _wrong_place(folder: str, key: str, what: str) -> Iterator[str]:
    if "\0" in folder or Path(folder).is_file():
        yield f"{key} must name a folder or a URL, not {folder!r}"
    try:
        storage.at(folder)
    except AddressError as error:
        yield f"{key}: {str(error).replace('a dataset', what)}"


def _not_utf8(text: str) -> bool:
    """Whether there are bytes in it that a shell gave and UTF-8 doesn't have: no file of rows could hold them."""
    return text != text.encode(errors="ignore").decode()


def _wrong_flow(job: Job) -> Iterator[str]:
    """What is wrong with the names in the flow; how its stages fit together is for ``parts`` to say."""
    flow = job.flow
    if len(flow) < 2:
        yield f"flow must begin with read and end with write, not {list(flow)}"
    twice = [name for at, name in enumerate(flow) if name in flow[:at]]
    if twice:
        yield f"flow has {twice[0]} twice: give one of them a name of its own, as in {{name: {twice[0]}, as: another}}"
    for name in flow:
        registry.find("stage", job.stages[name].name or name)


def _with_namesakes(stages: Mapping[str, Mapping[str, Any]], flow: Collection[str]) -> dict[str, dict[str, Any]]:
    """The stages' settings. One that a plugin fills under another name asks for what the stage of the plugin's name does, where it says no more.

    A part of a GPU they share evenly: all of them are to fit where the one did.
    """
    found = {name: dict(settings) for name, settings in stages.items()}
    sharing = dict[str, list[str]]()
    for name in flow:
        own, plugin = stages[name], stages[name]["name"] or name
        unsaid = [key for key in OF_POOL if not own[key] and own[key] != 0]
        if own["replicas"] is not None:
            unsaid = [key for key in unsaid if key != "min_replicas"]
        if plugin in stages:
            found[name] |= {key: stages[plugin][key] for key in unsaid}
        if plugin == name or own["num_gpus"] is None:
            sharing.setdefault(plugin, []).append(name)
    for plugin, names in sharing.items():
        part = stages[plugin]["num_gpus"] if plugin in stages else None
        if len(names) > 1 and part is not None and 0 < part < 1:
            for name in names:
                found[name]["num_gpus"] = part / len(names)
    return found


def _with_resources(settings: Mapping[str, Any], plugin: str | None) -> dict[str, Any]:
    """A stage's settings with what the job doesn't say: what its plugin declares, or else DEFAULTS."""
    unsaid = [key for key in DEFAULTS if settings[key] is None]
    declared: Mapping[str, Any] = {}
    if unsaid and plugin is not None:
        with suppress(PluginError):  # parts says what is wrong with it
            cls = registry.load("stage", plugin)
            assert issubclass(cls, Stage)
            declared = cls.resources
    return {**settings, **{key: declared.get(key, DEFAULTS[key]) for key in unsaid}}

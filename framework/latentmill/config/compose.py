"""Which configs a job is made of: Hydra is told where they are, and puts them together."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentmill import registry, values
from latentmill.config.schema import Schema
from latentmill.text import one_line

logger = logging.getLogger("latentmill")

THE_FILE = "job file"
"""What a job's own file is called among the configs of its folder, whatever its name."""
NOTHING = "_dummy_empty_config_"
"""What Hydra begins with where only choices are put together."""
BEGUN = "begun job"
"""What the configs that each job begins with are called once they are one."""


def composed(
    place: Path | str, config_name: str | None, choices: Sequence[str], held: Mapping[str, Any] | None = None
) -> tuple[DictConfig, Mapping[str, Any]]:
    """A config beside a job's file or in a package of jobs, and which config each group is. Other uses of Hydra stay as they are.

    Hydra's own ``compose`` would put its config for apps that it starts around each, which takes as long as the job.
    ``held``: what stands for the file's contents, if it is written in another way than ours.
    """
    version.setbase("1.3")
    loader, configs = ConfigLoaderImpl(ConfigSearchPathImpl()), _Configs(place, held)
    try:
        if config_name and (first := configs.load_config(config_name)) and isinstance(first.config, ListConfig):
            raise ConfigCompositionException(f"primary config '{config_name}' must be a DictConfig, got ListConfig")
        overrides = OverridesParser.create().parse_overrides(list(choices))
        loader.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=False)
        found = create_defaults_list(configs, config_name, overrides, prepend_hydra=False, skip_missing=False)
        config = loader._compose_config_from_defaults_list(_begun(loader, found.defaults, configs), configs)
        OmegaConf.set_struct(config, True)
        loader._apply_overrides_to_config(found.config_overrides, config)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException from error
    return config, found.overrides.known_choices


def _begun(loader: ConfigLoaderImpl, defaults: Sequence[ResultDefault], configs: _Configs) -> list[ResultDefault]:
    """What a config is made of, where those up to ``job``, with which each job begins, are one that is put together once in a process.

    They are most of the work, for each key of each stage has a type.
    """
    first = next((at for at, default in enumerate(defaults, 1) if default.config_path == "job"), 0)
    made_of = tuple((each.config_path, each.package, configs.text(str(each.config_path))) for each in defaults[:first])
    if not first or any("${" in text for _, _, text in made_of):  # what is looked up may be another thing each time
        return list(defaults)
    kept = _kept(made_of)
    if not kept:
        kept.append(pickle.dumps(loader._compose_config_from_defaults_list(list(defaults[:first]), configs)))
    begun = pickle.loads(kept[0])
    configs.loaded[BEGUN] = ConfigResult("latentmill", BEGUN, begun, {"package": None}, is_schema_source=True)
    return [ResultDefault(config_path=BEGUN), *defaults[first:]]


@lru_cache(maxsize=16)
def _kept(made_of: tuple[tuple[str | None, ...], ...]) -> list[bytes]:
    """Where it is kept what configs of these paths, packages and texts became. To read a pickle takes a sixth of the time of a copy."""
    return []


@dataclass
class _Read(ConfigResult):
    """A config, and the text that it was read from."""

    text: str = ""


class _Configs(ConfigRepository):
    """Where Hydra looks for what a job's defaults name: the job's own folder first."""

    def __init__(self, place: Path | str, held: Mapping[str, Any] | None) -> None:
        self.sources = [
            _Folder("main", place, held),
            *(_Folder(distribution, package) for distribution, package in _packages()),
            _Made(),
        ]
        self.loaded: dict[str, ConfigResult | None] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.loaded:
            self.loaded[config_path] = found = super().load_config(config_path)
            if found is not None:
                found.is_schema_source = True  # none is chosen by a file's name
        return self.loaded[config_path]

    def text(self, config_path: str) -> str:
        """What a config was read from; "" if it was no file."""
        found = self.load_config(config_path)
        return found.text if isinstance(found, _Read) else ""


class _Folder(ConfigSource):
    """The folder of a job's file, or a package of config; its path is the file's, or the package's name.

    Unlike Hydra's own, a scalar stays as it was written until its type is known, the file may have any name, and it may
    be a link: what lies beside it is found, then what lies beside the file that it leads to.
    """

    @staticmethod
    def scheme() -> str:
        return "latentmill"

    def __init__(self, provider: str, place: Path | str, held: Mapping[str, Any] | None = None) -> None:
        super().__init__(provider, f"{self.scheme()}://{place}")
        self.file = place if isinstance(place, Path) else None
        self.held = held
        self.folders: list[Traversable]
        if self.file is not None:
            self.folders = list(dict.fromkeys([self.file.parent, self.file.resolve().parent]))
        else:
            self.folders = [files(self.path)]

    def _found(self, name: str) -> Traversable | None:
        name = name.removesuffix(".yaml")
        if self.file is not None and name == THE_FILE:
            return self.file
        if self.path != "latentmill.conf" and name in ("job", "schema"):  # what all jobs begin with is ours
            return None
        there = (folder.joinpath(f"{name}.yaml") for folder in self.folders)
        return next((file for file in there if file.is_file()), None)

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._found(config_path)
        if file is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        if file is self.file and self.held is not None:
            return ConfigResult(self.provider, self.full_path(), OmegaConf.create(dict(self.held)), {"package": None})
        text = file.read_text(encoding="utf-8")
        config = pickle.loads(_pickled(text))
        if not isinstance(config, (DictConfig, ListConfig)):
            raise ValueError(f"{file}: keys with values are expected, as in: seed: 1")
        return _Read(self.provider, self.full_path(), config, self._get_header_dict(text), text=text)

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


@lru_cache(maxsize=64)
def _pickled(text: str) -> bytes:
    """What a YAML file holds, as it is read the fastest. It is read for each job anew, for it becomes a part of the job."""
    held = values.load_yaml(text)
    return pickle.dumps(OmegaConf.create(held) if isinstance(held, (dict, list)) else held)


class _Made(ConfigSource):
    """What no folder brings: the schema, a config for each plugin's name, and one for what has none of its own."""

    def __init__(self) -> None:
        super().__init__("latentmill", f"{self.scheme()}://")

    @staticmethod
    def scheme() -> str:
        return "latentmill-made"

    def load_config(self, config_path: str) -> ConfigResult:
        kind, _, name = config_path.removesuffix(".yaml").rpartition("/")
        grid = {"grid": "trailing"} if kind == "scheduler" else {}
        held = pickle.loads(_schema()) if name == "schema" and not kind else OmegaConf.create({"name": name, **grid})
        return ConfigResult(self.provider, self.full_path(), held, {"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return _kind(config_path) in registry.KINDS

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        if not group:
            return name in ("schema", NOTHING)
        return _kind(group) in registry.KINDS and name in _names(_kind(group), tuple(sys.path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return sorted(_names(_kind(config_path), tuple(sys.path)))


@cache
def _schema() -> bytes:
    schema = OmegaConf.structured(Schema)
    OmegaConf.set_struct(schema.sampling, False)  # plugins have row fields of their own
    return pickle.dumps(schema)


def _kind(group: str) -> str:
    """The kind of plugin that a group of configs is for: its own name, but for where jobs are submitted to."""
    return "launcher" if (name := group.rstrip("/")) == "target" else name


@cache
def _names(kind: str, path: tuple[str, ...]) -> set[str]:
    """What the plugins of a kind that are installed on this path may be called: NAME or DISTRIBUTION:NAME."""
    found = registry.entries(kind)
    whole = [f"{entry.distribution}:{entry.name}" for entry in found]
    return {*(entry.name for entry in found), *whole, *(name.removeprefix("latentmill-") for name in whole)}


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
            logger.warning(f"the config of {entry} is left out: {type(error).__name__}: {one_line(error)}")
        else:
            found.append((entry.distribution, entry.entry_point.value))
    return found

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


def composed(
    place: Path | str, config_name: str | None, choices: Sequence[str], held: Mapping[str, Any] | None = None
) -> tuple[DictConfig, Mapping[str, Any]]:
    """A config beside a job's file or in a package of jobs, and which config each group is. Other uses of Hydra stay as they are.

    Hydra's own ``compose`` would put its config for apps that it starts around each, which takes as long as the job.
    ``held``: what stands for the file's contents, if it is written in another way than ours.
    """
    configs, kept = _Configs(place, held), _kept(place, config_name, tuple(choices))
    if kept and held is None and configs.say(kept[0].made_of):
        found: tuple[DictConfig, Mapping[str, Any]] = pickle.loads(kept[0].composed)
        return found
    found = _compose(configs, config_name, choices)
    # What is looked up may be another thing each time.
    looks_up = any("${" in str(said) for said in (*choices, *configs.said.values()))
    if held is None and not looks_up:
        kept[:] = [_Kept(configs.said, pickle.dumps(found))]
    return found


def _compose(
    configs: _Configs, config_name: str | None, choices: Sequence[str]
) -> tuple[DictConfig, Mapping[str, Any]]:
    version.setbase("1.3")
    loader = ConfigLoaderImpl(ConfigSearchPathImpl())
    try:
        if config_name and (first := configs.load_config(config_name)) and isinstance(first.config, ListConfig):
            raise ConfigCompositionException(f"primary config '{config_name}' must be a DictConfig, got ListConfig")
        overrides = OverridesParser.create().parse_overrides(list(choices))
        loader.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=False)
        found = create_defaults_list(configs, config_name, overrides, prepend_hydra=False, skip_missing=False)
        config = loader._compose_config_from_defaults_list(found.defaults, configs)
        OmegaConf.set_struct(config, True)
        loader._apply_overrides_to_config(found.config_overrides, config)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException from error
    return config, found.overrides.known_choices


@dataclass(frozen=True)
class _Kept:
    """A config that was composed in this process. To read a pickle takes a tenth of the time."""

    made_of: Mapping[tuple[str, str], str | bool]
    """What was said to Hydra as it composed it: as long as that is said again, it is the same."""
    composed: bytes


@lru_cache(maxsize=64)
def _kept(place: Path | str, config_name: str | None, choices: tuple[str, ...]) -> list[_Kept]:
    """Where it is kept."""
    return []


class _Configs(ConfigRepository):
    """Where Hydra looks for what a job's defaults name: the job's own folder first."""

    def __init__(self, place: Path | str, held: Mapping[str, Any] | None) -> None:
        self.sources: list[ConfigSource] = [
            _Folder("main", place, held),
            *(_Folder(distribution, package) for distribution, package in _packages()),
            _Made(),
        ]
        self.loaded: dict[str, ConfigResult | None] = {}
        self.said: dict[tuple[str, str], str | bool] = {}
        """What Hydra asked of a config or a group, and the answer."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.loaded:
            self.said["config", config_path] = self._text(config_path)
            self.loaded[config_path] = found = super().load_config(config_path)
            if found is not None:
                found.is_schema_source = True  # none is chosen by a file's name
        return self.loaded[config_path]

    def group_exists(self, config_path: str) -> bool:
        self.said["group", config_path] = there = super().group_exists(config_path)
        return there

    def say(self, before: Mapping[tuple[str, str], str | bool]) -> bool:
        """Whether these answers are given now, too."""
        ask = {"config": self._text, "group": super().group_exists}
        return all(ask[what](config_path) == said for (what, config_path), said in before.items())

    def _text(self, config_path: str) -> str | bool:
        """What a config is read from, and where that is; False if there is none."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        text = source.text(config_path) if isinstance(source, _Folder) else ""
        return source is not None and f"{source.path}\n{text}"


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
        text = self.text(config_path)
        config = pickle.loads(_pickled(text))
        if not isinstance(config, (DictConfig, ListConfig)):
            raise ValueError(f"{file}: keys with values are expected, as in: seed: 1")
        return ConfigResult(self.provider, self.full_path(), config, self._get_header_dict(text))

    def text(self, config_path: str) -> str:
        """What a config is read from; "" if it is no file's."""
        file = self._found(config_path)
        return "" if file is None or (file is self.file and self.held is not None) else file.read_text(encoding="utf-8")

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

"""Which configs a job is made of: Hydra is told where they are, and puts them together."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from latentmill import registry, values
from latentmill.config.schema import Schema
from latentmill.text import one_line

logger = logging.getLogger("latentmill")

THE_FILE = "job file"
"""What a job's own file is called among the configs of its folder, whatever its name."""
WITHOUT = [
    f"~hydra/{group}" for group in "output launcher sweeper help hydra_help hydra_logging job_logging env".split()
]
"""What Hydra would read for each job, and is for apps that it starts."""


@cache
def prepare() -> None:
    """Tell Hydra our schema, our config folder and those that plugins bring, and a config for each plugin's name."""
    store = ConfigStore.instance()
    schema = OmegaConf.structured(Schema)
    OmegaConf.set_struct(schema.sampling, False)  # plugins have row fields of their own
    store.store(name="schema", node=schema)
    for plugin in (_Folder, _Names, _SearchPath):
        Plugins.instance().register(plugin)


def composed(config_name: str, choices: Sequence[str]) -> tuple[DictConfig, Mapping[Any, Any]]:
    """The config, and which config each group is."""
    config = compose(config_name, overrides=[*choices, *WITHOUT], return_hydra_config=True)
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    OmegaConf.set_struct(config, True)
    assert isinstance(chosen, dict)
    return config, chosen


def at(place: Path | str, held: Mapping[str, Any] | None = None) -> AbstractContextManager[Any]:
    """Hydra, looking at a job's file or in a package of jobs. Another program's use of Hydra in this process stays as it is.

    ``held``: what stands for the file's contents, if it is written in another way than ours.
    """
    _SearchPath.is_ours, _Folder.held = True, held
    try:
        if isinstance(place, Path):
            return initialize_config_dir(str(place), version_base="1.3")
        return initialize_config_module(place, version_base="1.3")
    finally:
        _SearchPath.is_ours = False


class _SearchPath(SearchPathPlugin):
    """Where Hydra looks for what a job's defaults name, after the job's own folder."""

    is_ours: ClassVar[bool] = False

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if not self.is_ours:
            return
        for element in search_path.get_path():
            if element.provider == "main":
                element.path = f"{_Folder.scheme()}://{element.path.removeprefix('pkg://')}"
        for distribution, package in _packages():
            search_path.append(distribution, f"{_Folder.scheme()}://{package}")
        search_path.append("latentmill", f"{_Names.scheme()}://")


class _Folder(ConfigSource):
    """The folder of a job's file, or a package of config; its path is the file's, or the package's name.

    Unlike Hydra's own, a scalar stays as it was written until its type is known, the file may have any name, and it may
    be a link: what lies beside it is found, then what lies beside the file that it leads to.
    """

    @staticmethod
    def scheme() -> str:
        return "latentmill"

    held: ClassVar[Mapping[str, Any] | None] = None

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


class _Names(ConfigSource):
    """A config for each plugin's name, for those to whom no folder brings one. Hydra's store is copied whole for each job, so not there."""

    @staticmethod
    def scheme() -> str:
        return "latentmill-names"

    def load_config(self, config_path: str) -> ConfigResult:
        kind, _, name = config_path.removesuffix(".yaml").rpartition("/")
        grid = {"grid": "trailing"} if kind == "scheduler" else {}
        held = OmegaConf.create({"name": name, **grid})
        return ConfigResult(self.provider, self.full_path(), held, {"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return _kind(config_path) in registry.KINDS

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return _kind(group) in registry.KINDS and name in _names(_kind(group), tuple(sys.path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return sorted(_names(_kind(config_path), tuple(sys.path)))


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

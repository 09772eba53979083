"""URLs in the settings of plugins, and the local paths that stand for them."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from latentmill import registry, storage
from latentmill.errors import PlanError, PluginError
from latentmill.models.nodes import bring
from latentmill.models.pins import ModelURL, Pin, is_url
from latentmill.models.places import place_of
from latentmill.plugin import WeightsPath
from latentmill.text import without_secrets


class Pins:
    """What the URLs of a job's models mean: in the driver found out, or what the output's plan has of them; in workers the plan's."""

    def __init__(
        self, config: str, output: str = "", planned: Mapping[str, Pin] | None = None, without_weights: bool = True
    ) -> None:
        """``config``: the job's, whose secrets are in no plan. ``planned``: of a worker, ``Plan.models``.

        ``without_weights``: nothing is to be loaded, and .safetensors are fetched only if plugins can't be built without.
        """
        self.config, self.output, self.without_weights = config, output, without_weights
        self.is_worker, self._planned = planned is not None, planned
        self._pins: dict[ModelURL, Pin] = {}
        """All that each has."""
        self._wanted: dict[ModelURL, Pin] = {}
        """What of it plugins want."""

    def local(self, url: ModelURL, mark: WeightsPath) -> Path:
        """The path that stands for a URL on this machine, fetched first. Raises PluginError and StorageError."""
        if url not in self._pins:
            self._pins[url] = self._pin(url)
        pin = self._pins[url]
        wanted = pin if pin.is_file else pin.of(_asked([file.name for file in pin.files], mark))
        if not wanted.files:
            raise PluginError(f"{url} has no file that is wanted")
        path, found = bring(url, wanted, self._name(url), without_weights=self.without_weights and mark.loads_late)
        files = {file.name: file for each in (self._wanted.get(url, found), found) for file in each.files}
        self._wanted[url] = replace(found, files=tuple(files[name] for name in sorted(files)))
        return path

    def wanted(self) -> dict[str, Pin]:
        """By URL, with all of it."""
        return {str(url): pin for url, pin in self._wanted.items()}

    def for_plan(self) -> dict[str, Pin]:
        """By URL without secrets."""
        return {self._name(url): pin for url, pin in self._wanted.items()}

    def _pin(self, url: ModelURL) -> Pin:
        if self._planned is None:
            self._planned = self._begun_with()
        if found := self._planned.get(self._name(url)):
            return found
        if self.is_worker:
            raise PluginError(f"{url} is not in the plan")
        return place_of(url).look()

    def _name(self, url: ModelURL) -> str:
        return without_secrets(str(url), self.config)

    def _begun_with(self) -> Mapping[str, Pin]:
        """What a dataset that is there was begun with: a branch may have moved on since, and the same command goes on."""
        if not self.output:
            return {}
        try:
            found = json.loads(storage.at(self.output).read("plan.json"))
            return {url: Pin.from_json(pin) for url, pin in found.get("models", {}).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{self.output}/plan.json can't be read as a plan: move the folder away") from error


def with_local_paths(kind: str, choice: Mapping[str, Any], pins: Pins) -> Mapping[str, Any]:
    """A plugin's choice, ``{"name": ..., setting: ...}``, with local paths where its weights' settings have URLs.

    Raises PluginError, in one line with the setting's name, and StorageError.
    """
    if not _has_url([value for key, value in choice.items() if key != "name"]):
        return choice
    found = dict(choice)
    for key, mark in _weights_paths(kind, str(choice["name"])).items():
        if _has_url(found.get(key)):
            try:
                found[key] = _local(found[key], choice.get(mark.revision), mark, pins)
            except (ValueError, PluginError) as error:
                raise PluginError(f"{kind} {choice['name']}: {key}: {error}") from error
    return found


def _asked(names: list[str], mark: WeightsPath) -> list[str]:
    try:
        return list(mark.files(names))
    except Exception as error:  # the plugin's own
        raise registry.refusal("which files are wanted", error) from error


def _has_url(value: Any) -> bool:
    """Whether a URL of a model may be in there."""
    if isinstance(value, Mapping):
        return any(map(_has_url, value.values()))
    return any(map(_has_url, value)) if isinstance(value, (list, tuple)) else is_url(value)


def _local(value: Any, revision: Any, mark: WeightsPath, pins: Pins) -> Any:
    if is_url(value):
        return str(pins.local(ModelURL.of(value, str(revision) if revision else None), mark))
    if isinstance(value, (list, tuple)):
        return [_local(each, None, mark, pins) for each in value]
    if isinstance(value, Mapping):
        path, revision = value.get("path"), value.get(mark.revision)
        rest = {key: each for key, each in value.items() if key != mark.revision or not is_url(path)}  # a URL takes it
        return {
            key: _local(each, revision, mark, pins) if key == "path" or not isinstance(each, str) else each
            for key, each in rest.items()
        }
    return value


def _weights_paths(kind: str, name: str) -> dict[str, WeightsPath]:
    """The settings of a plugin that say where weights lie, as its class marks them; none, if it can't be imported."""
    try:
        made = inspect.unwrap(registry.load(kind, name).__init__)
    except PluginError:  # it can't be imported, which is said when it is built
        return {}
    marks = {}
    for key, hint in getattr(made, "__annotations__", {}).items():
        alone = SimpleNamespace(__annotations__={key: hint})
        with suppress(Exception):  # each by itself: one may name what is imported for those who check types alone
            told = typing.get_type_hints(alone, made.__globals__, include_extras=True)
            marks[key] = next(_marks(told[key]), None)
    return {key: mark for key, mark in marks.items() if mark is not None}


def _marks(hint: Any) -> Iterator[WeightsPath]:
    """Also within ``... | None`` and ``list[...]``."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, WeightsPath) or mark is WeightsPath:
            yield mark if isinstance(mark, WeightsPath) else WeightsPath()
    for part in typing.get_args(hint):
        yield from _marks(part)

"""Plugins by name, through entry points. Listing imports nothing; only a chosen plugin is loaded."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from math import isnan
from types import NoneType, UnionType
from typing import Any, Union

from latentmill.declarations import wrong_in_class, wrong_in_object
from latentmill.errors import JobError, PluginError, StorageError
from latentmill.plugin import (
    CONTRACT,
    VAE,
    Denoiser,
    Grid,
    Launcher,
    Plugin,
    RowField,
    Scheduler,
    Sink,
    Source,
    Stage,
    TextEncoder,
)
from latentmill.text import first_line, near, one_line

KINDS: dict[str, type[Plugin]] = {
    "scheduler": Scheduler,
    "grid": Grid,
    "vae": VAE,
    "denoiser": Denoiser,
    "text_encoder": TextEncoder,
    "stage": Stage,
    "source": Source,
    "sink": Sink,
    "launcher": Launcher,
}
"""What can be chosen. The entry-point group of a kind is ``latentmill.<kind>s``."""

CONF_GROUP = "latentmill.conf"
"""Entry points whose value is a package of Hydra config (``my_package.conf``)."""
SHIPPED = "latentmill.jobs"
"""The package of our own jobs. A plugin's job is an entry point ``latentmill.jobs`` of its name; the value is the package with NAME.yaml."""


@dataclass(frozen=True)
class Entry:
    """A plugin as its distribution's metadata describe it."""

    group: str
    name: str
    distribution: str
    version: str
    state: str
    """``ok``, or what is wrong."""
    entry_point: EntryPoint

    def __str__(self) -> str:
        return f"{self.distribution}:{self.name} ({self.distribution} {self.version})"


def group(kind: str) -> str:
    """The entry-point group of a kind."""
    return f"latentmill.{kind}s"


def entries(kind: str | None = None) -> Sequence[Entry]:
    """All installed plugins, or those of a kind. Imports none of them."""
    return _scan(tuple(sys.path), None if kind is None else group(kind))


@cache
def _scan(path: tuple[str, ...], of_group: str | None) -> Sequence[Entry]:
    if of_group is not None:
        return tuple(entry for entry in _scan(path, None) if entry.group == of_group)
    found = []
    installed = entry_points()  # once: it reads what all distributions say of themselves
    identity = cache(
        lambda distribution: (distribution.name, distribution.version)
    )  # each is read from a file, each time
    for name in (*map(group, (*KINDS, "command", "job")), CONF_GROUP):
        # Entry points are equal even if their distributions aren't, so they are told apart by both.
        points = {(p.name, *identity(p.dist)): p for p in installed.select(group=name) if p.dist}
        for point_name, distribution, version in sorted(points):
            point = points[point_name, distribution, version]
            found.append(Entry(name, point_name, distribution, version, "ok", point))
    return tuple(found)


def find(kind: str, name: str) -> Entry:
    """The plugin that ``name`` or ``distribution:name`` chooses. Raises PluginError if that isn't exactly one.

    The ``latentmill-`` that a distribution's name begins with may be left out: ``diffusers:DDIMScheduler``.
    """
    distribution, _, short = name.rpartition(":")
    there = entries(kind)
    found = [
        entry
        for entry in there
        if entry.name == short and (not distribution or _is_named(entry.distribution, distribution))
    ]
    if not found:
        names = sorted({entry.name for entry in there})
        raise PluginError(
            f"no {kind} plugin {name!r} is installed{near(short, names)}; there are: {', '.join(names) or 'none'}"
        )
    if len(found) > 1:
        both = " and ".join(f"{entry.distribution} {entry.version}" for entry in found)
        choices = " or ".join(f"{entry.distribution}:{entry.name}" for entry in found)
        raise PluginError(f"{kind} {name!r} is in {both}: write {choices}")
    return found[0]


def load(kind: str, name: str) -> type[Plugin]:
    """Import the chosen plugin's class. Raises PluginError with distribution, version and cause if that fails."""
    entry = find(kind, name)
    who = f"{kind} {name!r} of {entry.distribution} {entry.version}"
    found = _imported(who, entry)
    expected = KINDS[kind]
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise PluginError(f"{who}: {entry.entry_point.value} is no subclass of latentmill.plugin.{expected.__name__}")
    contract = getattr(found, "contract", None)
    if contract is None:
        raise PluginError(
            f"{who} doesn't say for which contract it was written: write contract = {CONTRACT} in {found.__name__}"
        )
    if contract != CONTRACT:
        raise PluginError(f"{who} was written for contract {contract!r}, and this latentmill has {CONTRACT}")
    if wrong := wrong_in_class(found):
        raise PluginError(f"{who}: {wrong}")
    return found


def jobs() -> list[str]:
    """The names of the jobs that are installed. Imports no plugin."""
    return sorted({*shipped(), *(entry.name for entry in entries("job"))})


def shipped() -> list[str]:
    """The names of the jobs that come with latentmill."""
    return sorted(file.name.removesuffix(".yaml") for file in files(SHIPPED).iterdir() if file.name.endswith(".yaml"))


def package_of(job: str) -> str:
    """The package whose NAME.yaml the job ``NAME`` or ``distribution:NAME`` is. Raises JobError if that isn't exactly one."""
    distribution, _, name = job.rpartition(":")
    found = [(e.distribution, e.entry_point.value) for e in entries("job") if e.name == name]
    found += [("latentmill", SHIPPED)] * (name in shipped())
    found = [(brings, package) for brings, package in found if not distribution or _is_named(brings, distribution)]
    if not found:
        raise JobError(
            f"there is no job {job!r}{near(name, jobs())}; there are: {', '.join(jobs())}; a file's name ends in .yaml, or in .json if it is a workflow of ComfyUI"
        )
    if len(found) > 1:
        choices = " or ".join(sorted(f"{brings}:{name}" for brings, _ in found))
        raise JobError(f"job {job!r} is in {' and '.join(sorted(brings for brings, _ in found))}: write {choices}")
    return found[0][1]


def command(name: str) -> Callable[[Sequence[str]], int | None]:
    """A plugin's command: a function that takes the words after its name and returns an exit code. Raises PluginError."""
    entry = find("command", name)
    function = _imported(f"command {name!r} of {entry.distribution} {entry.version}", entry)
    if not callable(function):
        raise PluginError(f"command {name!r} of {entry.distribution} {entry.version} is no function")
    return function  # type: ignore[no-any-return]  # what it returns is its own affair


def _canonical(distribution: str) -> str:
    """A distribution's name as all its spellings are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported(who: str, entry: Entry) -> Any:
    try:
        return entry.entry_point.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises
        raise PluginError(f"{who} can't be imported: {type(error).__name__}: {first_line(error)}") from error


def _is_named(distribution: str, wanted: str) -> bool:
    """Whether a distribution may be called so: ``latentmill-`` may be left out."""
    return _canonical(distribution) in {_canonical(wanted), _canonical(f"latentmill-{wanted}")}


_names: dict[type[Plugin], str] = {}
"""How people are told of a plugin that was loaded, by its class."""


def called(plugin: Plugin) -> str:
    """How people are told of a plugin: kind and name, and the distribution that it is from, if it is not one of ours."""
    cls = type(plugin)
    return (
        _names.get(cls)
        or f"{next((kind for kind, base in KINDS.items() if isinstance(plugin, base)), 'plugin')} {cls.__name__}"
    )


def _call(kind: str, name: str, entry: Entry) -> str:
    ours = _canonical(entry.distribution).split("-")[0] == "latentmill"
    return f"{kind} {name}" if ours else f"{kind} {name} of {entry.distribution} {entry.version}"


@contextmanager
def asking(plugin: Plugin) -> Iterator[None]:
    """For the driver, where it asks a plugin something: what that raises becomes a PluginError, one line.

    A ValueError or OSError is a sentence for people, as the contract has it; of anything else the type is said, too. A store that fails
    is not the plugin's fault.
    """
    try:
        yield
    except (PluginError, StorageError, MemoryError):
        raise
    except Exception as error:
        raise refusal(called(plugin), error) from error


def refusal(who: str, error: Exception) -> PluginError:
    """What a plugin raised, in one line."""
    said = one_line(error)
    if not isinstance(error, (ValueError, OSError)) or not said:
        said = f"{type(error).__name__}: {said} (--debug shows where)"
    return PluginError(f"{who}: {said}")


def build(kind: str, choice: Mapping[str, Any]) -> Any:
    """Build ``{"name": ..., setting: ...}``. Raises PluginError for a wrong name, setting, type or value."""
    settings = dict(choice)
    name = str(settings.pop("name"))
    plugin = load(kind, name)
    if inspect.isabstract(plugin):
        missing = ", ".join(sorted(getattr(plugin, "__abstractmethods__", ())))
        raise PluginError(f"{kind} {name!r} is not complete: it lacks {missing}")
    _check(f"{kind} {name}", plugin, settings)
    who = _names[plugin] = _call(kind, name, find(kind, name))
    try:
        built = plugin(**settings)
    except (PluginError, StorageError, MemoryError):
        raise
    except Exception as error:
        raise refusal(who, error) from error
    if wrong := wrong_in_object(built):
        raise PluginError(f"{who}: {wrong}")
    return built


def provenance(kind: str, name: str) -> dict[str, str]:
    """``distribution`` and ``version`` of a plugin, for the plan."""
    entry = find(kind, name)
    return {"distribution": entry.distribution, "version": entry.version}


def _check(who: str, plugin: Any, settings: Mapping[str, Any]) -> None:
    parameters = _parameters(plugin)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [n for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
        for key in settings:
            if key not in known:
                raise PluginError(
                    f"{who} has no setting {key!r}{near(key, known)}; it has: {', '.join(known) or 'none'}"
                )
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and settings.get(key) is None:
            raise PluginError(f"{who} needs a value for {key!r}")
    annotated = _hints(plugin)
    for key, value in settings.items():
        if wrong := next(_misfits(key, value, annotated.get(key)), None):
            raise PluginError(f"{who}: {wrong}")


@lru_cache(maxsize=1024)
def _parameters(plugin: type[Plugin]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(plugin).parameters


def _misfits(key: str, value: Any, hint: Any) -> Iterator[str]:
    """What of a setting is not what its type says: scalars, and lists and dicts of them, or a TypedDict."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    if typing.get_origin(hint) in (Union, UnionType) and len(kinds) == 1:
        if value is not None:
            yield from _misfits(key, value, kinds[0])
    elif typing.is_typeddict(hint) or typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            yield f"{key} must be a dict, not {value!r}"
            return
        inside = typing.get_type_hints(hint) if typing.is_typeddict(hint) else dict.fromkeys(value, kinds[-1])
        for name, each in value.items():
            if name in inside:
                yield from _misfits(f"{key}.{name}", each, inside[name])
            else:
                yield f"{key}.{name} is no setting{near(str(name), inside)}; there are: {', '.join(inside)}"
    elif typing.get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            yield f"{key} must be a list, not {value!r}"
            return
        for number, each in enumerate(value):
            yield from _misfits(f"{key}.{number}", each, kinds[0])
    elif hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else int):
            yield f"{key} must be {hint.__name__}, not {value!r}"
    elif hint in (bool, str) and not isinstance(value, hint):
        yield f"{key} must be {hint.__name__}, not {value!r}"
    if isinstance(value, float) and isnan(value):  # as a bound it would let all pass
        yield f"{key} must be a number, not nan"


def hints(kind: str, name: str) -> dict[str, Any]:
    """The types of a plugin's settings, as far as it says them; none, if it can't be imported."""
    try:
        found: Any = load(kind, name)
    except PluginError:
        return {}
    return _hints(found)


def row_fields(kind: str, name: str) -> Sequence[RowField] | None:
    """The row fields that a plugin's class declares; none, if it can't be imported, and None if only an object knows them."""
    try:
        found = load(kind, name).row_fields
    except PluginError:
        return ()
    return found if isinstance(found, (list, tuple)) and all(isinstance(f, RowField) for f in found) else None


@lru_cache(maxsize=1024)
def _hints(plugin: type[Plugin]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(plugin.__init__)
    except Exception:  # annotations that can't be evaluated say nothing
        return {}


# ------------------------------------------------------------------------------------------------------- the list


def examine() -> list[Entry]:
    """All plugins with their state: each is imported once, in a process of its own that may do what it likes."""
    import subprocess  # none of the other commands needs it

    listed = entries()
    # Its path is ours: it would list other plugins otherwise, those of the folder it starts in among them.
    code = f"import sys; sys.path[:] = {sys.path!r}; from latentmill import registry; registry._report()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    states = dict(enumerate(_told(told.stdout)))
    return [
        replace(entry, state=states.get(at, "not examined: importing a plugin ended the process"))
        for at, entry in enumerate(listed)
    ]


def _told(text: str) -> Iterator[str]:
    for line in text.splitlines():  # a plugin may print when it is imported
        if line.startswith(_MARK):
            yield json.loads(line.removeprefix(_MARK))


_MARK = "\0latentmill:"  # which no plugin prints


def _report() -> None:
    for entry in entries():
        print("\n" + _MARK + json.dumps(_state(entry)), flush=True)


def _state(entry: Entry) -> str:
    kind = entry.group.removeprefix("latentmill.").removesuffix("s")
    try:
        if kind == "command":
            command(f"{entry.distribution}:{entry.name}")
        elif kind == "job" and not files(entry.entry_point.value).joinpath(f"{entry.name}.yaml").is_file():
            return f"there is no {entry.name}.yaml in {entry.entry_point.value}"
        elif kind not in KINDS:
            files(entry.entry_point.value)
    except PluginError as error:
        return str(error)
    except (Exception, SystemExit) as error:
        return f"can't be imported: {type(error).__name__}: {one_line(error)}"
    if kind not in KINDS:
        return "ok"
    try:
        load(kind, f"{entry.distribution}:{entry.name}")
    except PluginError as error:
        return str(error)
    others = [other for other in entries(kind) if other.name == entry.name and other != entry]
    return f"ok; the name is taken twice, choose {entry.distribution}:{entry.name}" if others else "ok"

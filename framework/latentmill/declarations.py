"""What plugins say of themselves, held against the contract before anybody reads it: a comma that is missing makes text of a list of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import getattr_static, isabstract
from typing import Any

from latentmill.plugin import Denoiser, Plugin, RowField, Scheduler, Sink, Stage

DECLARED: Mapping[type[Plugin], tuple[str, ...]] = {
    Plugin: ("row_fields", "libraries", "fingerprinted"),
    Stage: ("needs", "takes", "adds", "drops", "ignores", "resources"),
    Denoiser: ("noise_schedule", "parted_by"),
    Scheduler: ("on_cpu",),
    Sink: ("suffix",),
}
"""What the contract has plugins of a kind say of themselves; others may have attributes of these names for themselves."""


def wrong_in_class(plugin: type[Plugin]) -> str:
    """What a plugin's class says wrongly; "" if nothing is. What it computes, as a property does, is not asked for."""
    said = {name: getattr_static(plugin, name) for name in _declared(plugin) if hasattr(plugin, name)}
    if issubclass(plugin, Sink) and not isabstract(plugin) and "suffix" not in said:
        said["suffix"] = None
    computed = {name for name, value in said.items() if hasattr(value, "__get__") and not callable(value)}
    return next(_wrong({name: value for name, value in said.items() if name not in computed}), "")


def wrong_in_object(plugin: Plugin) -> str:
    """The same of what it says once it is built."""
    said = getattr(plugin, "__dict__", {})
    return next(_wrong({name: said[name] for name in _declared(type(plugin)) if name in said}), "")


def _declared(plugin: type[Plugin]) -> Iterator[str]:
    return (name for kind, names in DECLARED.items() if issubclass(plugin, kind) for name in names)


def _wrong(said: Mapping[str, Any]) -> Iterator[str]:
    for name, value in said.items():
        if name not in ("row_fields", "suffix", "resources", "noise_schedule"):
            listed = not isinstance(value, str) and hasattr(value, "__iter__")
            if not listed or (name != "adds" and not all(isinstance(each, str) for each in value)):
                yield f"{name} must be a list of names, not {value!r:.80}{' (a comma is missing?)' * isinstance(value, str)}"
        elif name == "row_fields":
            if not isinstance(value, (list, tuple)) or not all(isinstance(each, RowField) for each in value):
                yield f"row_fields must be a list of RowField, not {value!r:.80}"
            elif wrong := [f for f in value if not type(f.type).__module__.startswith("pyarrow")]:
                yield f"the row field {wrong[0].name} has the type {wrong[0].type!r}, and an Arrow type is expected, as pa.float64()"
        elif name == "suffix":
            if not isinstance(value, str) or value[:1] != "." or value.count(".") > 1 or len(value) < 2:
                yield f'suffix must be how its files end, one, with the dot, as ".parquet", not {value!r}'
        elif name == "resources":
            if not isinstance(value, Mapping):
                yield f"resources must be a mapping, as {{'num_cpus': 1}}, not {value!r:.80}"
        elif isinstance(value, type):
            yield f"noise_schedule is the class {value.__name__}, and an object of it is expected: {value.__name__}()"

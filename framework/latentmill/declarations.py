"""What plugins say of themselves, held against the contract before anybody reads it: a comma that is missing makes text of a list of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import getattr_static, isabstract
from typing import Any

from latentmill.plugin import Plugin, RowField, Sink

OF_NAMES = frozenset("fingerprinted libraries needs takes drops ignores on_cpu parted_by".split())
"""Attributes that are lists of names; ``adds`` is one of names and of fields."""
DECLARED = OF_NAMES | {"adds", "row_fields", "suffix", "resources", "noise_schedule"}


def wrong_in_class(plugin: type[Plugin]) -> str:
    """What a plugin's class says wrongly; "" if nothing is. What it computes, as a property does, is not asked for."""
    said = {name: getattr_static(plugin, name) for name in DECLARED if hasattr(plugin, name)}
    if issubclass(plugin, Sink) and not isabstract(plugin) and "suffix" not in said:
        said["suffix"] = None
    return next(
        _wrong({name: value for name, value in said.items() if callable(value) or not hasattr(value, "__get__")}), ""
    )


def wrong_in_object(plugin: Plugin) -> str:
    """The same of what it says once it is built."""
    return next(
        _wrong({name: value for name, value in getattr(plugin, "__dict__", {}).items() if name in DECLARED}), ""
    )


def _wrong(said: Mapping[str, Any]) -> Iterator[str]:
    for name, value in said.items():
        if name in OF_NAMES | {"adds"}:
            listed = not isinstance(value, str) and hasattr(value, "__iter__")
            if not listed or (name in OF_NAMES and not all(isinstance(each, str) for each in value)):
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

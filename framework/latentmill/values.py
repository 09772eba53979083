"""What is written for a value, on the command line or in YAML: text as it stands, a number, a list.

YAML 1.1 reads ``2026_11_25`` as 20261125, ``12e3456`` as infinity and ``no`` as false, before anybody can say that text is
wanted. So a scalar that would look otherwise if it were written back is kept as it was written, until its key's type is
known: ``keep`` and ``kept``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from math import isfinite, nan
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

NUMBERS = (int, float, bool)
WHOLE_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
REAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
QUOTED = re.compile(r"""(['"])(.*)\1""", re.DOTALL)
TAG = "tag:yaml.org,2002:"


def read(text: str, hint: Any = Any) -> Any:
    """The value that ``text`` is for a key of type ``hint``; Any: the type isn't known.

    Text where text is wanted, whatever it looks like. Else a number as JSON writes it, ``true``, ``false``, ``null``, a
    list in brackets or a dict in braces, and all else is text. Raises ValueError for a list or dict that can't be read.
    """
    kinds = list(_kinds(hint))
    if NoneType in kinds and text.lower() == "null":
        return None
    plain = [kind for kind in kinds if kind in (str, NoneType, *NUMBERS) or _is_path(kind)]
    if len(plain) < len(kinds) and text.strip()[:1] + text.strip()[-1:] in ("[]", "{}"):
        try:
            return _container(text.strip())
        except ValueError:
            if not is_text(hint):
                raise
    if is_text(hint):
        return text
    if plain == [] and (quoted := QUOTED.fullmatch(text)):  # how to write text that looks like something else
        return quoted[2]
    return scalar(text)


def name_in(text: str) -> str:
    """What a dict in braces has as ``name``; "" if there is none, or if it can't be read."""
    try:
        found = _container(text.strip())
    except ValueError:
        return ""
    return str(found.get("name") or "") if isinstance(found, dict) else ""


def ambiguous(text: str) -> bool:
    """Whether what ``text`` is depends on the key that it is for."""
    return not isinstance(scalar(text), str) or text.strip()[:1] in ("[", "{", "'", '"')


def scalar(text: str) -> Any:
    """A number as JSON writes it, ``true``, ``false`` or ``null``; anything else is text."""
    if (word := text.lower()) in ("true", "false"):
        return word == "true"
    if word == "null":
        return None
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if REAL.fullmatch(text) and isfinite(number := float(text)):
        return number
    return text


def is_text(hint: Any) -> bool:
    """Whether a key of this type takes text, and no numbers."""
    kinds = list(_kinds(hint))
    return any(kind is str or _is_path(kind) for kind in kinds) and not any(kind in NUMBERS for kind in kinds)


def is_dict(hint: Any) -> bool:
    """Whether a key of this type takes a dict."""
    return any(get_origin(kind) is dict for kind in _kinds(hint))


def inside(hint: Any) -> Any:
    """The type of what is in a list or dict of type ``hint``; Any if it doesn't say."""
    for kind in _kinds(hint):
        if arguments := get_args(kind):
            return arguments[-1] if arguments[-1] is not ... else arguments[0]
    return Any


def literal(text: str) -> str:
    r"""``text`` that stands for itself where ``${...}`` would be looked up, ``\${...}``, and ``???`` would be no value."""
    if text == "???":
        return "${oc.decode:\"'???'\"}"
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)


def in_bytes(text: str | float) -> float:
    """``8GiB``, ``500MB``, ``16G`` or a number, in bytes; NaN if it is neither."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kmgt])(i?))?b?", str(text).lower())
    if not match:
        return nan
    number, unit, binary = match.groups()
    return float(number) * float(1024 if binary else 1000) ** (" kmgt".index(unit) if unit else 0)


def in_seconds(text: str | float) -> float:
    """``10m``, ``90s``, ``1.5h``, ``2d`` or a number, in seconds; NaN if it is neither."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|m|min|h|d)?", str(text).lower())
    if not match:
        return nan
    number, unit = match.groups()
    return float(number) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[unit or "s"]


def load_yaml(text: str) -> Any:
    """What a YAML file holds, as OmegaConf reads it. Raises yaml.YAMLError."""
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        for value in _values(node, set()):
            if value.style is None and value.tag in (f"{TAG}int", f"{TAG}float", f"{TAG}bool"):
                _keep(value)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def kept(value: Any) -> str | None:
    """How a scalar of a YAML file was written, if it was kept."""
    match = KEPT.fullmatch(value) if isinstance(value, str) else None
    return bytes.fromhex(match[1]).decode() if match else None


KEPT = re.compile(r"\$\{latentmill\.as_written:x([0-9a-f]*)\}")
"""An interpolation, so that it may stand in a typed config for a value of any type."""


def as_yaml(text: str) -> Any:
    """A kept scalar as OmegaConf's YAML has it; text, if it is a number beyond all floats."""
    value = _as_yaml(text)
    return text if isinstance(value, float) and not isfinite(value) and re.search(r"[0-9]", text) else value


@lru_cache(maxsize=1024)
def _as_yaml(text: str) -> Any:
    return yaml.load(text, Loader=get_yaml_loader())


def read_yaml(text: str) -> Any:
    """What OmegaConf has written, as it reads it, interpolations as they are; a fifth of the time of its own reader."""
    return yaml.load(text, Loader=_quick_loader())


@cache
def _quick_loader() -> Any:
    theirs = get_yaml_loader()
    return type(
        "QuickLoader",
        (getattr(yaml, "CSafeLoader", yaml.SafeLoader),),
        {name: getattr(theirs, name) for name in ("yaml_implicit_resolvers", "yaml_constructors")},
    )


def to_yaml(held: Mapping[Any, Any]) -> str:
    """The text that OmegaConf writes of plain values; a tenth of its time, where libyaml writes the same."""
    with suppress(UnicodeEncodeError):  # a shell's bytes that are no text
        text: str = yaml.dump(held, Dumper=_quick_dumper(), **AS_OMEGACONF)
        if ALIKE.fullmatch(text):
            return text
    return str(yaml.dump(held, Dumper=get_omega_conf_dumper(), **AS_OMEGACONF))


AS_OMEGACONF: dict[str, Any] = {"default_flow_style": False, "allow_unicode": True, "sort_keys": False}
ALIKE = re.compile(r"""((?!\W*'':)[ !#-~]{0,120}\n)*""")
"""What libyaml and PyYAML write alike: short lines of ASCII without double quotes and empty keys."""


@cache
def _quick_dumper() -> Any:
    theirs = get_omega_conf_dumper()
    return type("QuickDumper", (getattr(yaml, "CDumper", theirs),), {"yaml_representers": theirs.yaml_representers})


def _keep(node: yaml.ScalarNode) -> None:
    if str(_as_yaml(node.value)) != node.value:
        node.tag, node.value = f"{TAG}str", f"${{latentmill.as_written:x{node.value.encode().hex()}}}"


def _values(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """All scalars that are no keys."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif id(node) not in seen:  # an alias may lead back
        seen.add(id(node))
        for child in node.value:
            yield from _values(child[1] if isinstance(child, tuple) else child, seen)


def _container(text: str) -> Any:
    """A list or dict in Hydra's grammar."""
    with suppress(Exception):  # its parser raises much, and none of it is for people
        override = OverridesParser.create().parse_override(f"x={text}")
        value: Any = override.value()
        if isinstance(value, (list, dict)):
            return value
    raise ValueError(
        f"{text!r} can't be read as a list or dict: in [a, 'b (1)'] and {{a: 1, b: 'c, d'}} values with signs in them are "
        "in quotes; text that only looks like a list or dict is in quotes as a whole"
    )


def _kinds(hint: Any) -> Iterator[Any]:
    """The types that a type is a union of."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for argument in get_args(hint):
            yield from _kinds(argument)
    elif origin is Literal:
        yield from map(type, get_args(hint))
    elif origin is Annotated:
        yield from _kinds(get_args(hint)[0])
    else:
        yield hint


def _is_path(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, os.PathLike)

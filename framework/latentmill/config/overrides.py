"""``key=value``: what is given beside the file, and the type that a key's value has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from operator import getitem
from typing import Any, TypeAlias

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from latentmill import registry, values
from latentmill.config.flow import name_of, names
from latentmill.config.messages import near_key
from latentmill.config.schema import OWN_PARTS, Schema, StageKeys, plugin_fields, types, whole_choice
from latentmill.errors import JobError
from latentmill.fields import IN_JOB, python_type

GROUPS = (*registry.KINDS, "cluster", "model", "stages")
"""Keys whose value may be the name of a config."""
OF_STAGE = ("sampling", *OWN_PARTS)
"""Keys of ``stages.NAME`` that hold keys of their own, beside the plugin's settings."""
Whole: TypeAlias = Callable[[], Any]
"""The job so far, as plain values: to make them takes as long as all else that is done for a key, and most need none."""
SET_WHOLE = ("size", "accept", "export")
"""Keys of which a value takes another's place as a whole: what one table has settings for another has not."""


@dataclass(frozen=True)
class Assignment:
    """``key=value`` that is no choice of a config."""

    key: str
    text: str
    new: bool
    """The key may be one that isn't there yet."""


def parse(overrides: Sequence[str]) -> tuple[list[str], list[Assignment]]:
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
            plugin = re.match(
                rf"(model|size|{'|'.join(registry.KINDS)})\.\w|stages\.\w+\.({'|'.join(('settings', *OF_STAGE))})(\.\w|$)",
                key,
            )
            assignments.pop(key, None)  # the last one counts, in its place
            assignments[key] = Assignment(key, text, bool(sign or plugin) or text[:1] == "{")
        elif key in GROUPS and re.fullmatch(r"null|true|false|[-+.\d]*|\[.*\]", text):
            raise JobError(f"{override}: a name is expected; ~{key} leaves it out")
        else:
            choices.append(f"{sign.replace('++', '')}{key}={_quoted(text)}")
    # The type of a setting is its plugin's to say, so names are known before settings, and what refers before what is read.
    first = [a for a in assignments.values() if a.key == "flow" or a.key.endswith(".name") or "${" in a.text]
    return choices, first + [a for a in assignments.values() if a not in first]


def named(assignments: Sequence[Assignment], config: DictConfig, chosen: Mapping[Any, Any]) -> Iterator[str]:
    """``scheduler=X`` for ``scheduler.name=X`` or ``scheduler={name: X}``, where the settings there are those of another scheduler's
    config.
    """
    for assignment in assignments:
        kind, name = assignment.key.removesuffix(".name"), assignment.text
        if kind in registry.KINDS and kind in chosen and "${" not in name:
            if kind == assignment.key:
                name = values.name_in(name)
            there = OmegaConf.to_container(config[kind]) or {}
            if name and isinstance(there, dict) and there.keys() > {"name"} and there["name"] != name:
                yield f"{kind}={_quoted(name)}"


def _quoted(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


def assign(config: DictConfig, assignment: Assignment) -> None:
    """Give a key its value, read as the type that the key has. Raises JobError."""
    key, path = assignment.key, assignment.key.split(".")
    whole: Whole = cache(lambda: OmegaConf.to_container(config))
    of_stage = path[0] == "stages" and len(path) > 2 and path[1] in names(whole().get("flow"))
    if of_stage and path[1] not in whole()["stages"]:
        OmegaConf.update(config, f"stages.{path[1]}", StageKeys(), force_add=True)
    if path[0] in SET_WHOLE and len(path) > 1 and whole()[path[0]] is None:
        OmegaConf.update(config, path[0], {}, merge=False)
    hint: Any = str
    if values.ambiguous(assignment.text):
        hint = _hint(path, whole)
    try:
        value = values.read(assignment.text, hint)
    except ValueError as error:
        raise JobError(f"{key}: {error}") from error
    try:
        new = assignment.new or of_stage or path[0] in ("sampling", "accept", "export")
        OmegaConf.update(config, key, value, merge=key not in SET_WHOLE, force_add=new)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise JobError(f"there is no key {key}{near_key(key)}") from error
    except (ValueError, AssertionError) as error:  # OmegaConf's of a key that goes into a list, or into text
        if isinstance(error, OmegaConfBaseException):
            raise
        raise JobError(f"there is no key {key}") from error


def settle(config: DictConfig, raw: dict[Any, Any]) -> None:
    """Give scalars of YAML files that were kept as they were written the type that their keys have, in a config and its plain values."""
    found = list[tuple[tuple[Any, ...], Any]]()
    for path, value in _leaves(raw):
        text = values.kept(value)
        if text is not None or isinstance(value, values.NUMBERS):
            wanted = values.is_text(_hint(path, lambda: raw))
            if text is not None or wanted:
                found.append((path, str(value) if text is None else text if wanted else values.as_yaml(text)))
    for (*above, key), value in found:
        node: Any = reduce(getitem, above, config)
        plain: Any = reduce(getitem, above, raw)
        node[key] = value
        plain[key] = node[key]


def _hint(path: Sequence[Any], whole: Whole) -> Any:
    """The type that the schema, or a plugin's constructor, gives a key. Any: neither does, and no text is made of it."""
    hint: Any = Schema
    if path[0] == "stages" and len(path) > 3 and path[2] == "sampling":
        of_field = IN_JOB.get(path[3]) or (plugin_fields(whole()) or {}).get(path[3])
        return Any if of_field is None else python_type(of_field) | None
    if path[0] == "stages" and len(path) > 3 and path[2] in OWN_PARTS:
        said = whole()["stages"].get(path[1])
        own = (said.get(path[2]) if isinstance(said, Mapping) else None) or {}
        choice = whole_choice(own, whole().get(path[2])) if isinstance(own, Mapping) else own
        return _inside(_setting(path[2], choice, path[3]), path[4:])
    if path[0] == "sampling" and len(path) > 1 and path[1] not in IN_JOB:
        of = (plugin_fields(whole()) or {}).get(path[1])
        return Any if of is None else python_type(of) | (None if of.default is None else python_type(of))
    if path[0] in registry.KINDS and len(path) > 1:
        hint, path = _setting(path[0], whole()[path[0]], path[1]), path[2:]
    elif path[0] == "stages" and len(path) > 3 and path[2] == "settings":
        hint, path = _setting("stage", {"name": _stage(path[1], whole())}, path[3]), path[4:]
    elif path[0] == "flow" and len(path) == 2:
        return str
    elif path[0] == "flow" and len(path) > 2:
        hint, path = (str, ()) if path[2] == "as" else (_setting("stage", whole()["flow"][path[1]], path[2]), path[3:])
    elif path[0] == "model":
        hint = (
            str
            if any(_makes_text(".".join(map(str, path)), leaf, value, whole) for leaf, value in _leaves(whole()))
            else Any
        )
        path = ()
    return _inside(hint, path)


def _inside(hint: Any, path: Sequence[Any]) -> Any:
    """The type of what lies at a path in what is of a type."""
    for key in path:
        hint = types(hint).get(key, Any) if isinstance(hint, type) and is_dataclass(hint) else values.inside(hint)
    return hint


def _stage(name: str, raw: Any) -> str:
    """The plugin that a stage of the job is."""
    said = raw["stages"].get(name)
    inline = [
        item["name"] for item in raw["flow"] if isinstance(item, dict) and name_of(item) == name and "name" in item
    ]
    return str((said.get("name") if isinstance(said, dict) else None) or next(iter(inline), name))


def _setting(kind: str, choice: Any, key: str) -> Any:
    if key == "name":
        return str
    name = choice.get("name") if isinstance(choice, Mapping) else None
    return registry.hints(kind, str(name)).get(key, Any)


def _makes_text(key: str, leaf: Sequence[str], value: Any, whole: Whole) -> bool:
    """Whether text is made of ``key`` at ``leaf``: it is part of a longer text there, or all of what takes text."""
    if leaf[0] == "model" or not isinstance(value, str) or f"${{{key}}}" not in value:
        return False
    return value != f"${{{key}}}" or values.is_text(_hint(leaf, whole))


def _leaves(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield at, node
        return
    for key, value in children:
        yield from _leaves(value, (*at, key))

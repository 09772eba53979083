"""What Hydra and OmegaConf say at length, as one line that names the key and the nearest right one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields

from hydra.errors import MissingConfigException
from omegaconf.errors import GrammarParseError, InterpolationResolutionError

from latentmill import registry
from latentmill.config.schema import Cluster, Schema, StageSettings
from latentmill.fields import IN_JOB
from latentmill.text import near

DOLLAR = "${oc.env:NAME} is an environment variable, ${KEY} another key of the job; \\${ is ${ as it stands"

BROUGHT_BY = {
    "shapes": "latentmill-shapes",
    "diffusers": "latentmill-diffusers",
    "scheduler/model": "latentmill-diffusers",
    "model/pipeline": "latentmill-diffusers",
}
"""Which of our distributions brings what a shipped job may name."""


def explained(error: BaseException) -> str:
    """Hydra's and OmegaConf's long messages, as one line that names the key and the nearest right one."""
    text = f"{error}\n{error.__cause__ or ''}"
    for cause in (error, error.__cause__):
        if isinstance(cause, GrammarParseError):
            key, said = _found(r"full_key: (\S+)", text), "${ begins what can't be read"
            return f"{key}: {said}; {DOLLAR}" if key else f"{said}; {DOLLAR}"
    if isinstance(error, RecursionError):
        return "its defaults lead back to themselves"
    if isinstance(error, InterpolationResolutionError):
        key, said = _found(r"full_key: (\S+)", text), str(error).partition("\n")[0]
        return f"{key}: {said}; \\${{ is ${{ as it stands" if key else said
    if mark := getattr(error, "problem_mark", None):
        return f"line {mark.line + 1}: {error.problem}"  # type: ignore[attr-defined]  # a yaml.MarkedYAMLError
    if isinstance(error, MissingConfigException) and (missing := _found(r"Could not (?:find|load) '([^']+)'", text)):
        group, _, wanted = missing.rpartition("/")
        there = sorted(name for name in error.options or ([] if group else ["job"]) if ":" not in name)
        what = group or "config"
        said = f"there is no {what} {wanted!r}{near(wanted.rpartition(':')[2], there)}; there are: {', '.join(there) or 'none'}"
        brings = BROUGHT_BY.get(missing) or BROUGHT_BY.get(wanted.partition(":")[0])
        return f"{said}; pip install {brings} brings it" if brings else said
    key = _found(r"Could not override '([^']+)'", text) or _found(r"full_key: (\S+)", text)
    if found := re.search(r"Cannot assign (\w+) to Dict|\b(\w+) is not a subclass of \w+(?:.*value: (.*))?", text):
        assigned, given, value = found.groups()
        what = value or {"str": "text", "list": "a list"}.get(assigned or given, "a number")
        return f"{f'{key}: ' if key else ''}keys and their values are expected, not {what}"
    if "is not a ListConfig" in text:
        return f"{key}: a list is expected"
    if key:
        if re.search(r"Key '[^']*' (is )?not in", text):
            return f"there is no key {key}{near_key(key)}"
        if reason := _found(r"(Value .*)", text) or _found(r"(.*is not .*)", text):
            return f"{key}: {reason}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    detail = next((line for line in lines[1:] if not re.match(r"(full_key|object_type|reference_type|set_)", line)), "")
    said = f"{lines[0].rstrip('.:')}: {detail}" if detail else lines[0]
    return f"{key}: {said}" if key and not re.search(rf"\b{re.escape(key)}\b", said) else said


def near_key(key: str, own: Iterable[str] = ()) -> str:
    """What was meant by a key that isn't there, if it can be told: all of it is like a right one, or its last part."""
    every = [
        *(f.name for f in fields(Schema)),
        *(f"sampling.{name}" for name in (*IN_JOB, *own)),
        *(f"cluster.{f.name}" for f in fields(Cluster)),
        *(
            f"stages.{stage}.{f.name}"
            for stage in sorted({e.name for e in registry.entries("stage")})
            for f in fields(StageSettings)
        ),
    ]
    same = [name for name in every if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if len(same) == 1:
        return f" (did you mean {same[0]!r}?)"
    last = {name.rpartition(".")[2]: name for name in reversed(every)}
    like = difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
    return near(key, every) or (f" (did you mean {last[like[0]]!r}?)" if like else "")


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None

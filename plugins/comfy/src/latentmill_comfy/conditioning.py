"""What stands between a prompt's encoding and the sampler in a workflow, as a small tree: combined, averaged, in parts of the time.

A leaf is a text, ``{text: prompt}`` or ``{words: "a fox"}``, or one for each text encoder, ``{sdxl: {g: {text: prompt}, l: ...}}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ALWAYS = (0.0, 1.0)
SIZE_NAMES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
"""What the networks of Stable Diffusion XL are told of a picture, in their order."""
ENCODERS = {
    "sdxl": {"g": "clip_g", "l": "clip_l"},
    "sdxl_refiner": {"text": "clip_g"},
    "flux": {"clip_l": "clip_l", "t5xxl": "t5xxl"},
    "sd3": {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5xxl"},
}
"""Leaves with texts of their own for each text encoder: what they are called there."""
_NUMBERS = {"sdxl": (*SIZE_NAMES,), "sdxl_refiner": ("ascore", "width", "height"), "flux": (), "sd3": ()}


@dataclass(frozen=True)
class Text:
    """A row's text, by the name of its column, or words that are the same for all."""

    column: str | None
    words: str = ""


@dataclass(frozen=True)
class Leaf:
    """One text for all text encoders, or one for each."""

    texts: tuple[tuple[str, Text], ...]
    """With the text encoder of each, "" for all."""
    node: str = ""
    size: tuple[float, ...] | None = None
    score: float | None = None
    unfilled: bool = False
    """Whether an empty text gives no token at all, where its encoder's neighbours have some."""


@dataclass(frozen=True)
class TreeNode:
    """An operation on trees."""

    kind: str
    of: tuple[ConditioningTree, ...]
    numbers: tuple[float, ...] = ()


ConditioningTree = Leaf | TreeNode


@dataclass(frozen=True)
class ConditioningEntry:
    """One of what ComfyUI calls a conditioning: the network is asked for each of them, and the answers are averaged."""

    hidden: Tensor
    """``[L, D]``, float32."""
    pooled: Tensor | None
    window: tuple[float, float] = ALWAYS
    """From which share of the way to which, 0 at the noise."""
    size: tuple[float, ...] | None = None
    score: float | None = None


def parse(tree: object, where: str, columns: frozenset[str]) -> ConditioningTree:
    """The tree that a job says. ``columns``: texts that rows have there. Raises ValueError."""
    if not isinstance(tree, Mapping) or not tree:
        raise ValueError(f"{where}: expected a mapping as {{text: prompt}}, not {tree!r}")
    given = {str(key): value for key, value in tree.items()}
    kind = next((name for name in _PARSERS if name in given), None)
    if kind is None:
        raise ValueError(f"{where}: {', '.join(given)}: expected one of {', '.join(_PARSERS)}")
    taken, parser = _PARSERS[kind]
    if unknown := given.keys() - {kind, *taken}:
        raise ValueError(f"{where}.{kind}: {', '.join(sorted(unknown))} is unknown there")
    return parser(kind, given, f"{where}.{kind}", columns)


def _leaf(kind: str, given: dict[str, Any], where: str, columns: frozenset[str]) -> ConditioningTree:
    return Leaf((("", _text(given, where.removesuffix(f".{kind}"), columns)),))


def _text(given: object, where: str, columns: frozenset[str]) -> Text:
    if isinstance(given, Mapping) and len(given) == 1:
        [(kind, value)] = given.items()
        if kind == "words":
            return Text(None, str(value))
        if kind == "text" and value in columns:
            return Text(str(value))
        if kind == "text":
            raise ValueError(f"{where}: there is no text {value!r} there: {', '.join(sorted(columns))}")
    raise ValueError(f"{where}: expected {{text: NAME}} or {{words: ...}}, not {given!r}")


def _texts(kind: str, given: dict[str, Any], where: str, columns: frozenset[str]) -> ConditioningTree:
    inside = given[kind]
    named, numbers = ENCODERS[kind], _NUMBERS[kind]
    known = {*named, *numbers, *(("empty_padding",) if kind == "sd3" else ())}
    if not isinstance(inside, Mapping) or (inside.keys() - known) or (named.keys() - inside.keys()):
        raise ValueError(f"{where}: expected {', '.join(sorted(known))}, not {inside!r}")
    size = tuple(_number(inside.get(name, -1), f"{where}.{name}") for name in SIZE_NAMES) if numbers else None
    if size and size[4] < 0:  # where a target is not said it is the size
        size = (*size[:2], *(max(value, 0.0) for value in size[2:4]), *size[:2])
    return Leaf(
        tuple((part, _text(inside[name], f"{where}.{name}", columns)) for name, part in named.items()),
        kind,
        size,
        _number(inside["ascore"], f"{where}.ascore") if "ascore" in inside else None,
        inside.get("empty_padding") == "none",
    )


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a number, not {value!r}")
    return float(value)


def _one(kind: str, given: dict[str, Any], where: str, columns: frozenset[str]) -> ConditioningTree:
    numbers = tuple(_number(given.get(n, d), f"{where}.{n}") for n, d in zip(_PARSERS[kind][0], ALWAYS))
    return TreeNode(kind, (parse(given[kind], where, columns),), numbers)


def _several(kind: str, given: dict[str, Any], where: str, columns: frozenset[str]) -> ConditioningTree:
    inside = given[kind]
    if not isinstance(inside, list | tuple) or len(inside) < 2 or (kind != "combine" and len(inside) != 2):
        raise ValueError(f"{where}: expected a list of two{' or more' if kind == 'combine' else ''}")
    numbers = (_number(given.get("strength", 1.0), f"{where}.strength"),) if kind == "average" else ()
    return TreeNode(kind, tuple(parse(each, f"{where}[{k}]", columns) for k, each in enumerate(inside)), numbers)


_PARSERS: dict[str, tuple[tuple[str, ...], Callable[[str, dict[str, Any], str, frozenset[str]], ConditioningTree]]] = {
    "text": ((), _leaf),
    "words": ((), _leaf),
    "sdxl": ((), _texts),
    "sdxl_refiner": ((), _texts),
    "flux": ((), _texts),
    "sd3": ((), _texts),
    "combine": ((), _several),
    "concat": ((), _several),
    "average": (("strength",), _several),
    "zero_out": ((), _one),
    "timestep_range": (("start", "end"), _one),
}
"""By name: what may stand beside it, and what makes it."""


def leaves(tree: ConditioningTree) -> Iterator[Leaf]:
    """All, from left to right."""
    if isinstance(tree, Leaf):
        yield tree
    else:
        for each in tree.of:
            yield from leaves(each)


def entries(tree: ConditioningTree) -> int:
    """How many entries it comes to."""
    if isinstance(tree, Leaf):
        return 1
    return sum(map(entries, tree.of)) if tree.kind == "combine" else entries(tree.of[0])


def in_windows(tree: ConditioningTree) -> bool:
    """Whether some of it counts for a part of the time alone."""
    return isinstance(tree, TreeNode) and (tree.kind == "timestep_range" or any(map(in_windows, tree.of)))


def length(tree: ConditioningTree, of_leaf: Callable[[Leaf], int]) -> int:
    """Tokens that its longest entry comes to, where leaves come to what ``of_leaf`` says."""
    if isinstance(tree, Leaf):
        return of_leaf(tree)
    each = [length(part, of_leaf) for part in tree.of]
    return {"concat": sum(each), "average": each[0]}.get(tree.kind, max(each))


def evaluate(tree: ConditioningTree, encode: Callable[[Leaf], ConditioningEntry]) -> list[ConditioningEntry]:
    """What it comes to, with leaves encoded by ``encode``."""
    if isinstance(tree, Leaf):
        return [encode(tree)]
    each = [evaluate(part, encode) for part in tree.of]
    if tree.kind == "combine":
        return [entry for found in each for entry in found]
    if tree.kind == "concat":
        return [replace(to, hidden=torch.cat([to.hidden, each[1][0].hidden])) for to in each[0]]
    if tree.kind == "average":
        return [_averaged(to, each[1][0], tree.numbers[0]) for to in each[0]]
    if tree.kind == "timestep_range":
        start, end = tree.numbers
        return [replace(entry, window=(start, end)) for entry in each[0]]
    return [
        replace(
            entry,
            hidden=torch.zeros_like(entry.hidden),
            pooled=None if entry.pooled is None else torch.zeros_like(entry.pooled),
        )
        for entry in each[0]
    ]


def _averaged(to: ConditioningEntry, other: ConditioningEntry, share: float) -> ConditioningEntry:
    """As long as the first: the second is cut, or filled up with zeros."""
    fitting = torch.zeros_like(to.hidden)
    common = min(len(to.hidden), len(other.hidden))
    fitting[:common] = other.hidden[:common]
    pooled = to.pooled
    if pooled is not None and other.pooled is not None:
        pooled = pooled * share + other.pooled * (1.0 - share)
    return replace(to, hidden=to.hidden * share + fitting * (1.0 - share), pooled=pooled)

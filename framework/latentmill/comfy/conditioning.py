"""Nodes between texts and a sampler: each becomes part of the tree that text encoder ``comfy`` is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from latentmill.comfy.inputs import Inputs
from latentmill.comfy.links import Clip, Cond, Setting, Tree, Words

SIZES = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")

MOST_TEXTS = 100
"""Of one conditioning. Each combination of two with themselves doubles them."""


def encode(given: Inputs) -> Sequence[Any]:
    """`prompt`, `negative_prompt`, another column, or words that stay."""
    return (Cond(given.node, Tree("text", (("text", _words(given, "text")),)), given.take("clip", Clip)),)


def encode_sdxl(given: Inputs) -> Sequence[Any]:
    """The same with two texts, and the sizes that the network is told."""
    texts = (("g", _words(given, "text_g")), ("l", _words(given, "text_l")))
    sizes = {name: given.fixed(name, int) for name in SIZES}
    return (Cond(given.node, Tree("sdxl", texts, sizes), given.take("clip", Clip)),)


def encode_refiner(given: Inputs) -> Sequence[Any]:
    """The same with a score and a size."""
    numbers = {"ascore": given.fixed("ascore", float), **{name: given.fixed(name, int) for name in SIZES[:2]}}
    return (
        Cond(given.node, Tree("sdxl_refiner", (("text", _words(given, "text")),), numbers), given.take("clip", Clip)),
    )


def encode_flux(given: Inputs) -> Sequence[Any]:
    """The same with two texts, and `guidance`."""
    tree = Tree("flux", tuple((name, _words(given, name)) for name in ("clip_l", "t5xxl")))
    return (Cond(given.node, tree, given.take("clip", Clip), given.real("guidance")),)


def encode_sd3(given: Inputs) -> Sequence[Any]:
    """The same with three texts."""
    texts = tuple((name, _words(given, name)) for name in ("clip_l", "clip_g", "t5xxl"))
    padding = {"empty_padding": given.one_of("empty_padding", ("none", "empty_prompt"))}
    return (Cond(given.node, Tree("sd3", texts, padding), given.take("clip", Clip)),)


def guidance(given: Inputs) -> Sequence[Any]:
    """`guidance`, which a distilled network is told."""
    return (replace(given.take("conditioning", Cond), guidance=given.real("guidance")),)


def zero_out(given: Inputs) -> Sequence[Any]:
    """A conditioning of zeros, as long."""
    of = given.take("conditioning", Cond)
    return (replace(of, tree=Tree("zero_out", (("of", of.tree),))),)


def timestep_range(given: Inputs) -> Sequence[Any]:
    """A conditioning for some of the steps."""
    of = given.take("conditioning", Cond)
    numbers = {name: given.fixed(name, float) for name in ("start", "end")}
    return (replace(of, tree=Tree("timestep_range", (("of", of.tree),), numbers)),)


def combine(given: Inputs) -> Sequence[Any]:
    """Two conditionings, whose predictions are averaged."""
    return (_both(given, "combine", "conditioning_1", "conditioning_2"),)


def concat(given: Inputs) -> Sequence[Any]:
    """Two conditionings, one behind the other."""
    return (_both(given, "concat", "conditioning_to", "conditioning_from"),)


def average(given: Inputs) -> Sequence[Any]:
    """Two conditionings, mixed."""
    numbers = {"strength": given.fixed("conditioning_to_strength", float)}
    found = _both(given, "average", "conditioning_to", "conditioning_from")
    return (replace(found, tree=replace(found.tree, numbers=numbers)),)


def _both(given: Inputs, operation: str, first: str, second: str) -> Cond:
    """One conditioning of two, which must be of one text encoder, and be told one guidance."""
    one, other = given.take(first, Cond), given.take(second, Cond)
    if one.clip.settings != other.clip.settings:
        raise given.refuse(f"{first} and {second} come from two text encoders, and one is supported")
    if operation == "combine" and one.guidance != other.guidance:
        raise given.refuse(f"{first} and {second} have different guidance, and one is supported")
    tree = Tree(operation, ((first, one.tree), (second, other.tree)))
    if tree.size > MOST_TEXTS:
        raise given.refuse(f"{tree.size} texts are put together, and {MOST_TEXTS} are supported")
    return replace(one, tree=tree)


def _words(given: Inputs, name: str) -> Words:
    text: Setting = given.text(name)
    return Words(given.node, text)

"""What ``encode_prompt`` returned, taken apart into tensors of each row and put together again for several rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NOTED = b"latentmill_diffusers.noted"
"""Metadata key, on the first column of conditioning, of how ``encode_prompt`` returned it."""


def kind_of(value: Any) -> Any:
    """What values of one form have in common, whatever the prompt: JSON."""
    if isinstance(value, (list, tuple)):
        return [kind_of(each) for each in value]
    return value.ndim if isinstance(value, Tensor) else type(value).__name__


def form_of(single: Any, double: Any, leaf: Iterator[int]) -> Any:
    """The form of what came back for a row, which for the same row twice was ``double``; ``leaf`` numbers its tensors.

    JSON: null; ``{leaf, axis}``, with null for the axis of what both rows share, "list" for a list of each row's own, "ends" for
    ends of tokens, counted on; ``{number}``, of a leaf; ``[...]``. Raises ValueError for what can't travel.
    """
    if single is None:
        return None
    if isinstance(single, Tensor):
        if single.ndim == 1 and (len(single), len(double)) == (2, 3):
            return {"leaf": next(leaf), "axis": "ends"}
        axes = [k for k, (one, two) in enumerate(zip(single.shape, double.shape)) if one != two]
        if axes and (len(axes), single.shape[axes[0]], double.shape[axes[0]]) != (1, 1, 2):
            shapes = f"{tuple(single.shape)} for a row and {tuple(double.shape)} for two"
            raise ValueError(f"encode_prompt returned a tensor of {shapes}")
        return {"leaf": next(leaf), "axis": axes[0] if axes else None}
    if isinstance(single, (bool, int, float)):
        return {"number": next(leaf)}
    if isinstance(single, (list, tuple)):
        if len(double) == 2 * len(single) == 2 and isinstance(single[0], Tensor):
            return {"leaf": next(leaf), "axis": "list"}
        return [form_of(one, two, leaf) for one, two in zip(single, double)]
    raise ValueError(f"encode_prompt returned a {type(single).__name__}, which can't travel")


def leaves_of(value: Any, form: Any) -> Iterator[Tensor]:
    """The tensors of one row's value, without a batch axis, in the order of their numbers."""
    if isinstance(form, list):
        for one, each in zip(value, form):
            yield from leaves_of(one, each)
    elif form is not None:
        axis = form.get("axis")
        if "number" in form:
            yield torch.tensor(value)
        elif isinstance(axis, str):
            yield value[{"list": 0, "ends": 1}[axis]]
        else:
            yield value if axis is None else value.squeeze(axis)


def filled(form: Any, leaves: Sequence[Tensor]) -> Any:
    """What ``encode_prompt`` would have returned for several rows, out of their ``leaves``, each ``[B, ...]``."""
    if form is None:
        return None
    if isinstance(form, list):
        return tuple(filled(each, leaves) for each in form)
    if "number" in form:
        return leaves[form["number"]][0].item()
    leaf = leaves[form["leaf"]]
    if form["axis"] == "list":
        return list(leaf)
    if form["axis"] == "ends":
        return torch.nn.functional.pad(leaf.cumsum(0), (1, 0)).to(leaf.dtype)
    return leaf[0] if form["axis"] is None else leaf.movedim(0, form["axis"]).contiguous()


def shared_leaves(form: Any) -> Iterator[int]:
    """The leaves that rows must agree in to go together."""
    if isinstance(form, list):
        for each in form:
            yield from shared_leaves(each)
    elif isinstance(form, dict) and (form.get("axis", 0) is None or "number" in form):
        leaf: int = form["leaf"] if "leaf" in form else form["number"]
        yield leaf

"""Rows that were stored one by one, as batches again: what sinks give back when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from latentmill.batch import CONDITIONING, SPACED, spec_from_json, with_latents
from latentmill.plugin import RowError, tensors

if TYPE_CHECKING:  # who reads no tensors takes no torch
    import torch
    from torch import Tensor


MOST = 64
"""Rows of a table that is given back: pictures are large, once they are decoded."""


def batches(
    scalars: pa.Table, stored: Iterable[Mapping[str, Tensor] | RowError], spec: bytes | None
) -> Iterator[pa.Table | RowError]:
    """Tables of one tensor shape each, in order, out of rows' scalar columns and their tensors by name; or their RowErrors.

    ``spec`` is the space of ``latents``, as JSON.
    """
    found = iter(stored)
    for start in range(0, len(scalars), MOST):
        piece = list(islice(found, min(MOST, len(scalars) - start)))
        at = 0
        while at < len(piece):
            first = piece[at]
            if isinstance(first, RowError):
                yield first
                at += 1
                continue
            run = [first]
            for other in piece[at + 1 :]:
                if isinstance(other, RowError) or _key(other) != _key(first):
                    break
                run.append(other)
            yield _with_tensors(scalars.slice(start + at, len(run)), run, spec)
            at += len(run)


def _key(row: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in row.items()]


def _with_tensors(table: pa.Table, run: list[Mapping[str, Tensor]], spec: bytes | None) -> pa.Table:
    import torch

    for name in run[0]:
        if name.startswith(CONDITIONING):
            table = tensors.with_each(table, name, [row[name] for row in run])
            continue
        tensor = torch.stack([row[name] for row in run])
        if name in SPACED and spec is not None:
            table = with_latents(table, tensor, spec_from_json(spec), name)
        else:
            table = tensors.with_tensor(table, name, tensor)
    return table

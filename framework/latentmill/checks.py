"""What a plugin gives back, held against its contract, and whose fault an exception is.

A plugin that breaks its contract, or can't be loaded, is no row's fault: both end the job, in one line that names the plugin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from latentmill.batch import CARRIED, SPEC_KEY, spec_from_json
from latentmill.errors import ContractError, LoadError, NoRowError, StorageError
from latentmill.fields import BATCH_SCHEMA, HALFWAY
from latentmill.plugin import (
    Conditioning,
    Filtered,
    LatentSpec,
    Plugin,
    Reason,
    RowError,
    Stage,
    State,
    TextEncoder,
    tensors,
)
from latentmill.plugin.stage import named
from latentmill.registry import called

if TYPE_CHECKING:  # who reads or writes rows without tensors takes no torch
    import torch
    from torch import Tensor


def load(plugin: Plugin, device: torch.device) -> None:
    """Load a plugin onto a device. Raises LoadError."""
    try:
        plugin.load(device)
    except Exception as error:
        raise LoadError(f"{called(plugin)}: {type(error).__name__}: {error}") from error


@contextmanager
def inside(plugin: Plugin) -> Iterator[None]:
    """Exceptions from here on say which plugin raised them."""
    try:
        yield
    except (RowError, ContractError):
        raise
    except Exception as error:
        error.add_note(called(plugin))
        raise


def cause(error: BaseException) -> Literal["raised", "unloaded", "contract", "store"]:
    """What an exception of a worker means to the flow."""
    if isinstance(error, ContractError):
        return "contract"
    if isinstance(error, StorageError):
        return "store"
    return "unloaded" if isinstance(error, LoadError) else "raised"


def told(error: BaseException) -> str:
    """An exception in words: its type, unless the words are ours; what it says; the plugin that raised it."""
    if isinstance(error, (ContractError, LoadError, NoRowError, StorageError)):
        return str(error)
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", [])[:1])
    return f"{type(error).__name__}: {error}{notes}"


def tensor(plugin: Plugin, method: str, found: Any, expected: Sequence[int], why: str = "") -> None:
    """Raise ContractError unless ``found`` is a tensor of the shape ``expected``."""
    if not _is_tensor(found):
        raise ContractError(f"{called(plugin)}: {method} returned {_a(found)}, not a tensor {list(expected)}")
    if tuple(found.shape) != tuple(expected):
        more = f", {why}" if why else ""
        raise ContractError(
            f"{called(plugin)}: {method} returned a tensor {list(found.shape)}, and {list(expected)} was expected{more}"
        )


def latents(vae: Plugin, spec: LatentSpec, method: str, found: Any, images: Tensor) -> None:
    """Raise ContractError unless ``found`` are latents ``[B, C, h, w]`` of ``images[B, 3, H, W]`` as ``spec`` says."""
    count, _, *frames, height, width = images.shape
    why = f"the latents of {count} pictures of {width}x{height} pixels (channels {spec.channels}, downscale {spec.downscale})"
    tensor(vae, method, found, (count, *spec.shape(height, width, *frames)), why)


def pictures(vae: Plugin, spec: LatentSpec, found: Any, given: Tensor) -> None:
    """Raise ContractError unless ``found`` are pictures ``[B, 3, H, W]`` of the latents ``given[B, C, h, w]`` as ``spec`` says."""
    *frames, height, width = spec.pixels(given.shape[1:])
    why = f"{len(given)} pictures of {width}x{height} pixels (downscale {spec.downscale})"
    tensor(vae, "decode", found, (len(given), 3, *frames, height, width), why)


def conditioning(
    encoder: TextEncoder, method: str, found: Any, count: int, known: dict[str, tuple[int, ...]]
) -> Conditioning:
    """``found``, if it is the conditioning of ``count`` prompts, in the shapes ``known`` so far, to which it adds. Raises ContractError."""
    who = f"{called(encoder)}: {method}"
    if not isinstance(found, Mapping) or not all(map(_is_tensor, found.values())):
        raise ContractError(f"{who} returned {_a(found)}, not a dict of tensors")
    for name, value in found.items():
        if value.shape[:1] != (count,):
            raise ContractError(
                f"{who} returned {name} of shape {list(value.shape)} for {count} prompts: the batch axis comes first"
            )
        shape = known.setdefault(name, tuple(value.shape[1:]))
        if tuple(value.shape[1:]) != shape:
            raise ContractError(
                f"{who} returned {name} of shape {list(value.shape[1:])} behind the batch axis, and of {list(shape)} for "
                "prompts before: shapes must be the same for all prompts (pad to one length)"
            )
    return dict(found)


def state(scheduler: Plugin, method: str, found: Any, count: int) -> State:
    """``found``, if it is a state of ``count`` rows. Raises ContractError."""
    who = f"{called(scheduler)}: {method}"
    if not isinstance(found, dict) or not all(map(_is_tensor, found.values())):
        raise ContractError(f"{who} returned {_a(found)} as state, not a dict of tensors")
    for name, value in found.items():
        if value.shape[:1] != (count,):
            raise ContractError(
                f"{who} returned state {name!r} of shape {list(value.shape)} for {count} rows: the batch axis comes first"
            )
    return found


def same_rows(plugin: Plugin, given: pa.Table, returned: Sequence[Any], rejected: Collection[int] = ()) -> None:
    """Raise ContractError unless the tables hold each given row once, as itself, but for those that were rejected."""
    who, found = called(plugin), []
    for table in returned:
        if not isinstance(table, pa.Table):
            raise ContractError(f"{who} returned {_a(table)}, not a table")
        for name in {"row", "row_id"} & {*given.column_names}:
            if name not in table.column_names:
                raise ContractError(f"{who} returned rows without the column {name}")
        found += table.column("row").to_pylist()
    numbers = given.column("row").to_pylist()
    if sorted([*found, *rejected]) != sorted(numbers):
        raise ContractError(
            f"{who} was given {len(numbers)} rows, returned {len(found)} and rejected {len(rejected)}: "
            "each row must come back once or be rejected"
        )
    if "row_id" in given.column_names:
        ids = dict(zip(numbers, given.column("row_id").to_pylist()))
        for table in returned:
            for number, row_id in zip(table.column("row").to_pylist(), table.column("row_id").to_pylist()):
                if row_id != ids[number]:
                    raise ContractError(
                        f"{who} returned row {ids[number]} with the row_id {row_id!r}: keep it as it is"
                    )


def reason(plugin: Plugin, why: Reason) -> Reason:
    """Why a row goes no further, in plain values: it travels. Raises ContractError if nothing is said, or one is filtered by no numbers."""
    if not isinstance(why, Filtered):
        if not isinstance(why, str) or not why.strip():
            raise ContractError(
                f"{called(plugin)} rejects a row without a reason, as {why!r:.80}: people read it in errors/"
            )
        return why
    if not isinstance(why.reason, str) or not why.reason.strip():
        raise ContractError(f"{called(plugin)} filters a row without a reason: people read it in filtered/")
    try:
        if any(isinstance(part, str) for part in why.scores.values()):
            raise ValueError
        return Filtered(why.reason, {str(name): float(score) for name, score in why.scores.items()})
    except (AttributeError, OverflowError, TypeError, ValueError):
        raise ContractError(
            f"{called(plugin)} filters a row with the scores {why.scores!r:.80}: they are numbers, by name"
        ) from None


def same_columns(stage: Stage, given: pa.Table, returned: Sequence[pa.Table]) -> None:
    """Raise ContractError if a column that later stages need, or a field that it adds, is gone or has another type, or a tensor is not as large as its row says."""
    who = called(stage)
    for table in returned:
        if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
            raise ContractError(
                f"{who} returned the column {twice[0]} twice: replace the one that is there, or name yours otherwise"
            )
        for field in given.schema:
            dropped = any(named(field.name, each) for each in stage.drops)
            if field.name in BATCH_SCHEMA.names or not (dropped or _may_go(field)):
                if field.name not in table.column_names:
                    raise ContractError(f"{who} returned rows without the column {field.name}")
                if (kind := table.schema.field(field.name).type) != field.type:
                    raise ContractError(f"{who} returned {field.name} as {kind}, and {field.type} was expected")
        for field in stage.adds if len(table) else ():
            if isinstance(field, str):
                continue
            if field.name not in table.column_names:
                raise ContractError(f"{who} returned rows without the column {field.name}, which its `adds` names")
            if (kind := table.schema.field(field.name).type) != field.type:
                raise ContractError(f"{who} returned {field.name} as {kind}, and its `adds` says {field.type}")
        if not len(table) or not {"width", "height"} <= {*table.column_names}:
            continue
        sizes = {(row["width"], row["height"]) for row in table.select(["width", "height"]).to_pylist()}
        for name, found in _sizes(who, table):
            for width, height in sizes - {found}:
                raise ContractError(
                    f"{who} returned {name} of {found[0]}x{found[1]} pixels for a row of {width}x{height}: "
                    "width and height must be changed along with it"
                )


def _may_go(field: pa.Field) -> bool:
    """Whether a column is only for the way: tensors, and what stands beside half-way latents, or beside rows that were handed over."""
    return tensors.is_tensor(field) or field.name in HALFWAY.names or field.name.startswith(CARRIED)


def _sizes(who: str, table: pa.Table) -> Iterator[tuple[str, tuple[int, int]]]:
    """Width and height in pixels that the tensors of a table have."""
    for name in {"image", "video", "latents"} & {*table.column_names}:
        field = table.schema.field(name)
        if not tensors.is_tensor(field):
            continue
        shape = tensors.shape_of(field)
        if name in ("image", "video"):
            yield "pictures", (shape[-2], shape[-3])
            continue
        about = (field.metadata or {}).get(SPEC_KEY)
        if about is None:
            raise ContractError(f"{who} returned latents that don't say of which space they are: use with_latents")
        downscale = spec_from_json(about).downscale
        yield "latents", (shape[-1] * downscale, shape[-2] * downscale)


def _is_tensor(found: Any) -> bool:
    import torch

    return isinstance(found, torch.Tensor)


def _a(found: Any) -> str:
    return "None" if found is None else f"a {type(found).__name__}"

"""A row's fields: one table. Columns, what a source may say, the job's ``sampling``, the card and the docs follow from it.

A field of ours is added here and nowhere else (its default for people to read stands in conf/job.yaml too). Plugins bring
fields of their own: ``Plugin.row_fields``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from latentmill.plugin import RowError, RowField
from latentmill.plugin.stage import BATCH_COLUMNS

MAX_TEXT = 1_000_000
"""Characters of a prompt; a longer one is a file that was taken for a line."""
MAX_SIDE = 1 << 16
"""Pixels of a picture's side; more is a slip. Width times height is bounded by ``sampling.max_pixels``."""


@dataclass(frozen=True)
class OwnField(RowField):
    """A field of ours."""

    read_by: tuple[str, ...] = ()
    """The stages that read it."""
    in_source: bool = True
    """Whether a source's rows may say it."""
    in_job: bool = True
    """Whether the job's ``sampling`` may say it."""
    sampling: bool = False
    """Whether it says how a row is denoised: of one that never was it means nothing."""
    unset: int | None = None
    """A number that stands for none, as null does."""
    also: str = ""
    """What other tools call it, the likeliest first. Such a column is named to people, and never taken for ours."""


_NOBODY_S: dict[str, Any] = {"in_source": False, "in_job": False}
_DENOISED: dict[str, Any] = {"sampling": True, "read_by": ("denoise",)}

OWN_FIELDS: tuple[OwnField, ...] = (
    OwnField("row", pa.int64(), "the row's number in the plan", stored=False, **_NOBODY_S, read_by=("read", "write")),
    OwnField("row_id", pa.string(), "the row's name, which never changes", **_NOBODY_S, read_by=("write",)),
    OwnField(
        "prompt",
        pa.string(),
        "what was asked for",
        default="",
        read_by=("encode",),
        also="prompts caption captions text txt positive_prompt positive description",
    ),
    OwnField(
        "negative_prompt",
        pa.string(),
        "what was asked not to be there; null: none was given, which is not an empty one",
        nullable=True,
        read_by=("encode", "denoise"),
        also="negative neg neg_prompt uc",
    ),
    OwnField(
        "seed",
        pa.uint64(),
        "all noise of the row follows from it; -1 and null: the row's own, hashed from its id",
        unset=-1,
        in_job=False,
        read_by=("read", "denoise"),
        also="seeds noise_seed random_seed",
    ),
    OwnField(
        "steps",
        pa.int32(),
        "steps of the scheduler",
        default=20,
        least=1,
        most=100_000,
        **_DENOISED,
        also="num_inference_steps inference_steps sampling_steps num_steps step",
    ),
    OwnField(
        "guidance_scale",
        pa.float64(),
        "classifier-free guidance; 1 is none",
        default=4.0,
        **_DENOISED,
        also="cfg_scale cfg guidance scale",
    ),
    OwnField(
        "guidance_rescale",
        pa.float64(),
        "how far guided predictions were brought back to the spread of unguided ones",
        default=0.0,
        least=0,
        most=1,
        **_DENOISED,
        also="cfg_rescale rescale rescale_cfg",
    ),
    OwnField(
        "guidance_from",
        pa.float64(),
        "the time, from 1 for noise down to 0, at which guidance began",
        default=1.0,
        least=0,
        most=1,
        **_DENOISED,
    ),
    OwnField(
        "guidance_until",
        pa.float64(),
        "the time at which it ended",
        default=0.0,
        least=0,
        most=1,
        **_DENOISED,
    ),
    OwnField(
        "strength",
        pa.float64(),
        "share of the steps that were made; 1 starts from pure noise",
        default=1.0,
        least=0,
        most=1,
        sampling=True,
        read_by=("read", "denoise"),
        also="denoising_strength denoise",
    ),
    OwnField(
        "scheduler",
        pa.string(),
        "the solver; null: scheduler.name",
        in_job=False,
        **_DENOISED,
        also="sampler sampler_name scheduler_name",
    ),
    OwnField(
        "width",
        pa.int32(),
        "pixels; null: the picture's. 0 where only prompts were encoded",
        least=1,
        most=MAX_SIDE,
        read_by=("read", "encode"),
        also="w",
    ),
    OwnField(
        "height",
        pa.int32(),
        "pixels; null: the picture's",
        least=1,
        most=MAX_SIDE,
        read_by=("read", "encode"),
        also="h",
    ),
    OwnField(
        "warning",
        pa.string(),
        "what is to be known of the row, and did not make it fail",
        default="",
        in_job=False,
        read_by=("encode", "write"),
    ),
)
"""The columns that every batch has, in order, from read to write."""

SOMETIMES: tuple[OwnField, ...] = (
    OwnField("id", pa.string(), "the row's own name in the source", in_job=False, read_by=("read",)),
    OwnField(
        "time",
        pa.float64(),
        "half-way latents: the time that they are at, from 1 for noise down to 0",
        least=0,
        most=1,
        in_job=False,
        read_by=("denoise",),
    ),
    OwnField(
        "trajectory",
        pa.string(),
        "half-way latents: the noise schedule that they are on, and the model and scheduler that state is of",
        in_job=False,
        read_by=("denoise",),
    ),
)
"""Columns that some batches have: ``id`` where the source has an ``id_column``, the others beside half-way latents."""

PICTURES = {
    "image": "file_name image_path image_file init_image img picture path",
    "mask": "mask_path mask_image mask_file",
}
"""Pictures that a source's row may bring beside its fields, and what other tools call them."""

_OF_BATCHES = {column.name: column.meaning for column in BATCH_COLUMNS}
BESIDE = {
    **_OF_BATCHES,
    "shape": "shape of the latents: channels, height, width",
    "state": _OF_BATCHES["state:"],
}
"""What columns mean that are no fields: those of batches, and what sinks make of them."""
NOT_RESERVED = frozenset(column.name for column in BATCH_COLUMNS if not column.reserved)
"""Those of them whose names a source's column may have, in a job that has none of ours."""

JOB = (
    RowField("max_pixels", pa.int64(), "the most that a row's width times height may be", default=1 << 24, least=1),
    RowField("until", pa.float64(), "above 0: stop half-way, at the first time below it", default=0.0),
    RowField(
        "first_noise",
        pa.string(),
        "where the first noise comes from: latentmill, diffusers, comfy or comfy_each, which draws pictures of a batch one by one, or none",
        default="latentmill",
    ),
)
"""Keys of ``sampling`` that hold for all rows of a job, and are no fields."""

NOISE_INDEX = RowField(
    "noise_index",
    pa.int32(),
    "which picture of the batch that first_noise comfy draws for; a further sample of a row with a seed is the next one",
    default=0,
    least=0,
    most=4095,
)
"""A field of rows that begin with ComfyUI's noise, and of no others."""


FROM_COMFY = "comfy", "comfy_each", "none"
"""Of ``first_noise``, with which rows begin as ComfyUI's."""


def of_first_noise(sampling: Mapping[str, Any]) -> Mapping[str, RowField]:
    """The fields, by name, that rows have for the sake of where their first noise comes from."""
    return {NOISE_INDEX.name: NOISE_INDEX} if sampling.get("first_noise") in ("comfy", "comfy_each") else {}


BY_NAME: Mapping[str, OwnField] = {field.name: field for field in (*OWN_FIELDS, *SOMETIMES)}
FROM_SOURCE = tuple(field for field in OWN_FIELDS if field.in_source)
"""The fields that a row of any source may say."""
IN_JOB: Mapping[str, RowField] = {field.name: field for field in (*(f for f in OWN_FIELDS if f.in_job), *JOB)}
"""The keys of ``sampling`` that every job has."""


def arrow(field: RowField) -> pa.Field:
    """The field as a column of a batch."""
    return pa.field(field.name, field.type, nullable=field.nullable)


BATCH_SCHEMA = pa.schema([arrow(field) for field in OWN_FIELDS])
"""The columns that every batch has."""
ID = arrow(SOMETIMES[0])
"""Of rows whose source has an ``id_column``."""
HALFWAY = pa.schema([arrow(field) for field in SOMETIMES[1:]])
"""Beside half-way latents: the time that they are at, and what their state can be continued with (see ``denoise``)."""


def meaning(name: str) -> str:
    """What a column of a dataset is, or "" if we don't know."""
    if name in BY_NAME:
        return BY_NAME[name].meaning
    return BESIDE.get(name) or BESIDE.get(name.partition(":")[0] + ":", "")


# ------------------------------------------------------------------------------------------------------- values


def parse(field: RowField, value: Any, called: str = "") -> Any:
    """``value``, of a row or of a job, as the field's type has it; None for one that stands for none.

    Raises RowError, which names the field (``called``).
    """
    name, kind = called or field.name, python_type(field)
    if kind is str:
        return text(name, value)
    if kind is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise RowError(f"{name} must be true or false, not {value!r:.80}")
        return bool(value)
    number = whole(name, value) if kind is int else real(name, value)
    unset = getattr(field, "unset", None)
    if unset is not None and number == unset:
        return None
    for least, most in ((field.least, field.most), limits(field)):  # what it says, then what its type holds
        if (least is None or number >= least) and (most is None or number <= most):
            continue
        shown = str(number) if isinstance(number, int) else f"{number:g}"
        own = "" if unset is None else f", or {unset} for the row's own"
        raise RowError(f"{name} must be {_range(least, most)}{own}, not {shown}"[:200])
    return number


def python_type(field: RowField) -> type:
    """What a value of the field is in Python: bool, int, float or str."""
    tests = {bool: pa.types.is_boolean, int: pa.types.is_integer, float: pa.types.is_floating}
    return next((kind for kind, test in tests.items() if test(field.type)), str)


def parse_text(field: RowField, value: str) -> Any:
    """What text, of a CSV file say, is for a field: a number, true or false, or text. None if it is blank. Raises RowError."""
    if python_type(field) is str:
        return value
    word = value.strip()
    if not word:
        return None
    if python_type(field) is bool:
        known = {"true": True, "false": False, "1": True, "0": False}
        return known.get(word.lower(), value)
    for number in (int, float) if "_" not in word else ():  # Python's own way to write a thousand
        try:
            return number(word)
        except ValueError:
            pass
    raise RowError(f"{field.name} must be a number, not {value!r:.80}")


def limits(field: RowField) -> tuple[float | None, float | None]:
    """The least and the most that a field may be; of whole numbers, what its type holds bounds them too."""
    if not pa.types.is_integer(field.type):
        return field.least, field.most
    bits = field.type.bit_width
    signed = pa.types.is_signed_integer(field.type)
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return lowest if field.least is None else field.least, highest if field.most is None else field.most


def _range(least: float | None, most: float | None) -> str:
    if least is None or most is None:
        return f"{least} or more" if most is None else f"{most} or less"
    return f"from {least} to {'2^64 - 1' if most == 2**64 - 1 else most}"


def text(name: str, value: Any) -> str:
    """``value``, if it is text that can be stored as UTF-8. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, not {value!r:.80}")
    if len(value) > MAX_TEXT:
        raise RowError(f"{name} has {len(value)} characters, and {MAX_TEXT} are the most")
    if "\0" in value:
        raise RowError(f"{name} holds a NUL, at character {value.index(chr(0))}: is it text in UTF-8?")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half a surrogate pair, at character {error.start}") from error
    return value


def whole(name: str, value: Any) -> int:
    """``value`` as an int. Raises RowError.

    A float that is whole will do: tables make floats of integers beside nulls.
    """
    if isinstance(value, (float, np.floating)) and float(value).is_integer() and abs(float(value)) < 2**53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RowError(f"{name} must be a whole number, not {value!r:.80}")
    return int(value)


def real(name: str, value: Any) -> float:
    """``value`` as a finite float. Raises RowError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise RowError(f"{name} must be a number, not {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"{name} must be a finite number, not {number}")
    return number


def defaults(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the default of each of our fields that they don't say."""
    plain = {field.name: field.default for field in OWN_FIELDS if field.default is not None or field.nullable}
    return [{**plain, **row} for row in rows]

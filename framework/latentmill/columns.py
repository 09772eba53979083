"""What a job's rows have beside our fields: the fields that its plugins declare, and the source's columns that it keeps.

Both are settled in the driver and stand in the plan, so that a worker knows them without the plugins that they come from.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from latentmill.fields import (
    BESIDE,
    BY_NAME,
    FROM_SOURCE,
    IN_JOB,
    NOT_RESERVED,
    arrow,
    meaning,
    of_first_noise,
    parse,
)
from latentmill.plugin import Declaration, Denoiser, Plugin, RowError, RowField, Source
from latentmill.plugin.stage import named
from latentmill.registry import called
from latentmill.text import near

Keep: TypeAlias = Literal["all"] | Mapping[str, pa.DataType | None]
"""What ``source.keep`` says: every column that no field is read from, or some, with the type of those that are told one."""

FIXED = pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string
READ_NO_ROWS = "vae", "scheduler"
NONE_KEPT = pa.schema([])
NOT_TAKEN: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Columns:
    """The columns of a job's rows beside ours."""

    fields: tuple[RowField, ...] = ()
    """Of plugins."""
    kept: pa.Schema = NONE_KEPT
    """The source's."""

    def schema(self) -> pa.Schema:
        """All of them, in the order in which they stand in a batch."""
        return pa.schema([*(arrow(each) for each in self.fields), *self.kept])

    def meaning(self, name: str) -> str:
        """What a column of the dataset is, ours among them; "" if we don't know."""
        own = {of.name: of.meaning for of in self.fields}
        return own.get(name) or ("as in the source" if name in self.kept.names else meaning(name))

    def of_stage(self, stage: str) -> dict[str, RowField]:
        """The fields that a stage has for itself, by the names that it knows them by: ``refine.steps`` by ``steps``."""
        return {of.name.removeprefix(f"{stage}."): of for of in self.fields if of.name.startswith(f"{stage}.")}

    def names_in(self, stage: str, flow: Sequence[Declaration]) -> dict[str, str]:
        """Columns that a stage knows by another name, both ways.

        One that denoises reads the negative prompt that was encoded for it last.
        """
        names = {name: of.name for name, of in self.of_stage(stage).items()}
        at = [each.name for each in flow].index(stage)
        if "denoiser" in flow[at].needs:
            encoded = next((each.name for each in reversed(flow[:at]) if "text_encoder" in each.needs), "")
            if own := self.of_stage(encoded).get("negative_prompt"):
                names["negative_prompt"] = own.name
        return names | {name: known for known, name in names.items()}

    def unstored(self) -> list[str]:
        """Those that are no columns of the dataset."""
        return [each.name for each in self.fields if not each.stored]

    def to_json(self) -> dict[str, Any]:
        """For a plan; nothing where there are none. ``arrow_schema`` repeats the types, for ``from_json``."""
        if not self.schema().names:
            return {}
        about = [
            {**{key: value for key, value in vars(each).items() if value is not None}, "type": str(each.type)}
            for each in self.fields
        ]
        kept = {each.name: str(each.type) for each in self.kept}
        return {
            "columns": {"fields": about, "kept": kept},
            "arrow_schema": base64.b64encode(self.schema().serialize().to_pybytes()).decode(),
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Columns:
        """Out of a plan. Raises KeyError or TypeError if it can't be."""
        if "columns" not in content:
            return Columns()
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["arrow_schema"])))
        found = [
            RowField(**{**field, "type": schema.field(field["name"]).type}) for field in content["columns"]["fields"]
        ]
        return Columns(tuple(found), pa.schema(list(schema)[len(found) :]))


# ------------------------------------------------------------------------------------------------ plugins' fields


def of_plugins(
    plugins: Mapping[str, Plugin], sampling: Mapping[str, Any], taken: Mapping[str, str] = NOT_TAKEN
) -> tuple[RowField, ...]:
    """The fields that a job's plugins declare, by their places in the job. Raises ValueError if one can't be.

    ``taken``: names of columns that are beside them in this job, each with what it is.

    So does a key of ``sampling`` that nobody reads, and one whose value is not of its field.
    """
    first = of_first_noise(sampling) if "denoiser" in plugins else {}
    found: dict[str, tuple[str, RowField]] = {name: ("first_noise comfy", field) for name, field in first.items()}
    for kind, plugin in plugins.items():
        for field in plugin.row_fields:
            who = called(plugin)
            _require(field, who, kind, plugin, taken)
            other, known = found.setdefault(field.name, (who, field))
            if (known.type, known.default, limits_of(known)) != (field.type, field.default, limits_of(field)):
                raise ValueError(f"{who} and {other} both have a row field {field.name}, and they are not the same")
    for key, value in sampling.items():
        if key not in IN_JOB and key not in found:
            raise ValueError(
                f"there is no key sampling.{key}{near(key, [*IN_JOB, *found])}: no plugin of the job reads it"
            )
        if key in found and value is not None:
            parse(found[key][1], value, f"sampling.{key}")
    return tuple(field for _, field in found.values())


OF_KIND: Mapping[str, tuple[RowField, ...]] = MappingProxyType(
    {
        "text_encoder": tuple(BY_NAME[name] for name in ("prompt", "negative_prompt")),
        "denoiser": tuple(of for of in FROM_SOURCE if "denoise" in of.read_by and "encode" not in of.read_by),
    }
)
"""The fields of ours that plugins of a kind go by."""
OF_ROW = "seed", "row"
"""A key of a stage's ``sampling`` with what it says where the stage has the row's own seed, and none hashed from that."""
NO_FIELDS = "until", "first_noise"
"""Keys of ``sampling`` that are no fields, and that a stage may say for itself."""


def of_stage(
    stage: Declaration,
    own: Mapping[str, Any],
    sampling: Mapping[str, Any],
    plugins: Mapping[str, Plugin],
    scheduler: str | None,
    beside: Sequence[RowField],
) -> Iterator[RowField]:
    """The fields that a stage has for itself, which its part of a job says: where neither that nor a source does, a row's own hold.

    ``own``: its ``sampling``, and ``sampling`` with the job's; ``plugins``: those that it works with, by kind; ``scheduler``: the name of its own, if it has one;
    ``beside``: the plugins' fields that rows have. Raises ValueError for one that can't be, and for a key that the stage doesn't read.
    """
    read: dict[str, RowField] = {}
    for kind in (kind for kind in OF_KIND if kind in stage.needs):
        read |= {of.name: of for of in OF_KIND[kind]}
        read |= of_first_noise(sampling) if kind == "denoiser" else {}
        for field in plugins[kind].row_fields:
            _require(field, called(plugins[kind]), kind, plugins[kind], NOT_TAKEN)
            read[field.name] = field
    for key, value in own.items():
        at = f"stages.{stage.name}.sampling.{key}"
        if key not in read and not (key in NO_FIELDS and "denoiser" in stage.needs):
            raise ValueError(f"there is no key {at}{near(key, read)}: stage {stage.name} doesn't read it")
        if key in read and value is not None and (key, value) != OF_ROW:
            parse(read[key], value, at)
    of_rows = {*BY_NAME, *(field.name for field in beside)}
    for name, of in read.items():
        default = scheduler if name == "scheduler" else None if (name, own.get(name)) == OF_ROW else own.get(name)
        if default is None and name not in of_rows:
            default = of.default
        about = {each.name: getattr(of, each.name) for each in fields(RowField)}
        about |= {"name": f"{stage.name}.{name}", "default": default, "meaning": f"{of.meaning}; for {stage.name}"}
        yield RowField(**about)


def limits_of(field: RowField) -> tuple[Any, ...]:
    """What two plugins must say alike of a field that both read, beside its type."""
    return field.least, field.most, field.nullable, field.stored


def _require(field: Any, who: str, kind: str, plugin: Plugin, taken: Mapping[str, str]) -> None:
    if not isinstance(field, RowField):
        raise ValueError(f"{who}: row_fields must be a list of RowField, and there is {field!r:.80}")
    if kind in READ_NO_ROWS:
        raise ValueError(f"{who} has row field {field.name}, and a {kind} is not given any")
    if why := reserved(field.name) or taken.get(field.name):
        raise ValueError(f"{who} has a row field {field.name}, which is {why}")
    if not re.fullmatch(r"[A-Za-z_]\w*", field.name):
        raise ValueError(f"{who}: the name of a row field must be letters, digits and underscores, not {field.name!r}")
    if not any(test(field.type) for test in FIXED):
        raise ValueError(f"{who}: row field {field.name} must be a number, a bool or a string, not {field.type}")
    if isinstance(plugin, Denoiser) and (pa.types.is_string(field.type) or field.nullable):
        raise ValueError(
            f"{who}: row field {field.name} becomes a tensor, so it must be a number or a bool, and never null"
        )
    if field.default is not None:
        try:
            parse(field, field.default)
        except RowError as error:
            raise ValueError(f"{who}: the default of row field {field.name}: {error}") from error


def reserved(name: str) -> str:
    """What of ours has this name, in words; "" if nothing has."""
    if name in BY_NAME:
        return "a field of every row"
    if name in IN_JOB:
        return "a key of sampling"
    if name not in NOT_RESERVED and any(named(name, column) for column in BESIDE):
        return "a column of ours"
    return ""


# ------------------------------------------------------------------------------------------------- kept columns


def wanted(keep: Any) -> Keep:
    """What ``source.keep`` asks for. Raises ValueError."""
    if keep == "all":
        return "all"
    if isinstance(keep, Mapping):
        return {str(name): None if type is None else type_of(str(name), type) for name, type in keep.items()}
    if isinstance(keep, list) and all(isinstance(name, str) for name in keep):
        return dict.fromkeys(keep)
    raise ValueError(
        f"source.keep must be all, a list of columns, or columns and their types as {{score: float32}}, not {keep!r}"
    )


def type_of(name: str, text: Any) -> pa.DataType:
    """The Arrow type that a job names. Raises ValueError."""
    inside = re.fullmatch(r"list<(.+)>", str(text))
    if inside:
        return pa.list_(type_of(name, inside[1]))
    try:
        return pa.type_for_alias(str(text))
    except ValueError:
        raise ValueError(
            f"source.keep: {name}: {text!r} is no type; int64, float32, string, bool, timestamp[us] and list<int64> are"
        ) from None


def kept(source: Source, keep: Keep, taken: Mapping[str, str]) -> pa.Schema:
    """The columns that a job keeps. Raises ValueError for one that isn't there, or whose name is ours or ``taken``, by what."""
    there = list(source.columns())
    told = {} if keep == "all" else keep
    names = there if keep == "all" else list(told)
    if keep == "all" and not names:
        raise ValueError("source.keep=all: the source has no columns that could be kept")
    for name in names:
        why = reserved(name) or taken.get(name, "")
        if why:
            hint = "; name the columns to keep, without it" if keep == "all" else ""
            raise ValueError(f"source.keep: the column {name} can't be kept, since that is {why}{hint}")
    guessed = [name for name in names if told.get(name) is None]
    found = {field.name: plain_type(field.type) for field in source.column_types(names)}
    for name in names:
        if name not in found:
            raise ValueError(f"source.keep: there is no column {name}{near(name, [*there, *found])}")
    types = pa.schema([pa.field(name, found[name] if name in guessed else told[name]) for name in names])
    return pa.ipc.read_schema(types.serialize())  # as a plan that is read says them: its hash is of the bytes


def plain_type(type: pa.DataType) -> pa.DataType:
    """A column's type without what is only its encoding or its name: a dictionary's values, an extension's storage, text for a view of text."""
    if pa.types.is_dictionary(type):
        return plain_type(type.value_type)
    return plain_type(type.storage_type) if isinstance(type, pa.BaseExtensionType) else _without_views(type)


def _without_views(type: pa.DataType) -> pa.DataType:
    """Arrow takes no rows out of columns that have some."""
    if pa.types.is_string_view(type):
        return pa.string()
    if pa.types.is_binary_view(type):
        return pa.binary()
    if pa.types.is_list(type) or pa.types.is_list_view(type):
        return pa.list_(type.value_field.with_type(_without_views(type.value_type)))
    if pa.types.is_struct(type):
        return pa.struct([each.with_type(_without_views(each.type)) for each in type])
    if pa.types.is_map(type):  # files call its parts as they like
        return pa.map_(_without_views(type.key_type), _without_views(type.item_type), type.keys_sorted)
    return type


def unified(types: Iterable[tuple[str, str, pa.DataType]]) -> pa.Schema:
    """One type for each column out of those that it has in several files: ``(file, column, type)``. Raises ValueError."""
    found: dict[str, tuple[str, pa.Field]] = {}
    for file, name, type in types:
        field = pa.field(name, plain_type(type))
        first, known = found.setdefault(name, (file, field))
        try:
            both = pa.unify_schemas([pa.schema([known]), pa.schema([field])], promote_options="permissive").field(0)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise ValueError(
                f"column {name} is {known.type} in {first} and {field.type} in {file}: say what it is to be, as "
                f"source.keep={{{name}: string}}"
            ) from None
        found[name] = first, both
    return pa.schema([field for _, field in found.values()])


def values(columns: pa.Schema, given: Mapping[str, Any]) -> Iterator[pa.Array]:
    """A row's values of the kept columns, an array of one each: null for one that isn't there. Raises RowError."""
    for field in columns:
        value = given.get(field.name)
        try:
            yield _array(value, field.type)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise RowError(f"column {field.name}: {_shown(value)} is no {field.type}") from error


def _array(value: Any, type: pa.DataType) -> pa.Array:
    if isinstance(value, pa.Scalar):
        array = pa.repeat(value, 1)
        array = array if value.type == type else array.cast(type)
    elif isinstance(value, str) and not (pa.types.is_string(type) or pa.types.is_large_string(type)):
        array = pa.array([value]).cast(type)  # text of a CSV file, say
        if pa.types.is_floating(type) and value.lstrip("-").isdecimal() and int(value) != array[0].as_py():
            raise ValueError("a whole number of more digits than that has")
    else:
        array = pa.array([value], type)
    array.validate(full=True)  # text of a Parquet file may be no UTF-8
    return array


def _shown(value: Any) -> str:
    try:
        return f"{value.as_py() if isinstance(value, pa.Scalar) else value!r:.80}"
    except UnicodeDecodeError:
        return "what is no UTF-8"

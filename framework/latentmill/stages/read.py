"""The read stage: row numbers to rows, with the job's values where the source says nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from latentmill import buckets, checks, columns, registry
from latentmill.batch import ATTEMPT, CONDITIONING, PROMPT_PREFIX, from_dicts, with_latents
from latentmill.buckets import Size
from latentmill.columns import Columns
from latentmill.errors import ContractError
from latentmill.fields import BY_NAME, FROM_COMFY, FROM_SOURCE, HALFWAY, ID, parse
from latentmill.identity import attempt_seed, row_seed, stage_seed
from latentmill.pixels import require_few
from latentmill.plugin import Declaration, Reject, RowError, Source, Stage, StageContext, tensors
from latentmill.registry import called
from latentmill.stages import stored_conditioning
from latentmill.stages.field_values import FieldValues

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.stages.row_tensors import RowTensors

READ_AGAIN = 8
"""Rows that a worker reads a second time, to see whether a source gives what it is asked for."""
DENOISED_AGAIN = "again"
"""The stage by whose name latents are denoised a second time in a job of their own: with the noise of such a stage in one job."""


class Rows(Protocol):
    """What a plan knows of a row by its number."""

    def locate(self, row: int) -> tuple[str, int, int]: ...

    def row_id(self, row: int) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def columns(self) -> Columns: ...


class Read(Stage):
    """Takes a table of row numbers (``row``) and returns the rows, a table for each shape of tensor.

    A picture is brought to the row's width and height: scaled (Lanczos) until it covers them, the middle cut out. Where
    neither row nor job gives a size it keeps its own, less what is over a multiple of ``StageContext.multiple_of`` pixels,
    cut evenly from both edges; all of it where a stage before the VAE cuts it. Latents are taken as they are and give the row its size. A row of more pixels
    than ``sampling.max_pixels`` is an error before any are made, since the memory of every stage grows with them.

    In a job with ``size`` each sample of a picture is brought to its bucket instead (``latentmill.buckets``); a row's own width
    and height stand for the bucket's. Where that is cut at random, it hangs on the seed of the first attempt: a later one has the same
    picture.

    A row's seed is ``identity.row_seed``'s, and of a later attempt ``identity.attempt_seed``'s. -1 and null in the source stand for
    none, as in other tools.
    """

    contract = 2
    needs = ("source",)
    position = "first"

    def declare(self, context: StageContext) -> Declaration:
        source: Source = context.plugin("source")
        with registry.asking(source):
            latents = ("latents",) if source.latent_spec() is not None else ()
        own = ("id",) if source.id_column is not None else ()
        stored = CONDITIONING if stored_conditioning.wanted(context, source) else ()
        return replace(super().declare(context), adds=(*own, *_added(context), *latents, *stored))

    def prepare(self, context: StageContext) -> None:
        self.source: Source = context.plugin("source")
        self.plan: Rows = context.plan
        self.columns = self.plan.columns
        self.source.job_fields, self.source.kept = self.columns.fields, self.columns.kept
        self.source.wants_conditioning = PROMPT_PREFIX in context.declaration.adds
        self.sampling, self.require = context.sampling, context.require_fragment
        self.from_comfy = context.sampling.get("first_noise") in FROM_COMFY
        """Whether rows begin as ComfyUI's: masks are soft, and latents of nothing may begin with a share of the noise."""
        self.texts_alone = stored_conditioning.texts_alone(context)
        self.size = Size.of(context.size) if context.size is not None and not self.texts_alone else None
        if self.size is not None:
            self.source.pixels = self.size.pixels
        self.added = _added(context)
        self.denoises = context.needed_later("denoiser")
        """Whether a scheduler will move the rows: else they have none, no mask, and no use for a strength."""
        self.draws_again = (context.attempts or 1) > 1
        self.fields = FieldValues(self.columns, context)
        whole = any(stage.cuts for stage in takewhile(lambda stage: "vae" not in stage.needs, context.after))
        self.multiple_of = 1 if whole else context.multiple_of
        self.spec = self.source.latent_spec()
        self.again = READ_AGAIN
        self.sound: set[str] = set()
        """Fragments of which a row was read twice."""
        self.known: set[str] = set()
        """Fragments that were what was planned before any row was read."""

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        groups: dict[Any, list[tuple[dict[str, Any], dict[str, Tensor]]]] = defaultdict(list)
        attempts = batch.column("attempt").to_pylist() if "attempt" in batch.column_names else [0] * len(batch)
        for found, wanted in self._source_rows(batch.column("row").to_pylist()):
            try:
                if isinstance(found, RowError):
                    raise found
                values, stored = self._row(found)
            except RowError as error:
                for i, _, _ in wanted:
                    reject(i, str(error))
                continue
            for i, number, sample in wanted:
                row_id = self.plan.row_id(number)
                of_batch = self.fields.of_batch(values)
                drawn_as = 0 if of_batch else sample
                seed = row_seed(self.plan.seed, row_id, drawn_as, values["seed"], values.get("id"))
                about: dict[str, Any] = {"row": number, "row_id": row_id, "attempt": attempts[i]}
                about["seed"] = attempt_seed(seed, attempts[i])
                drawn = partial(self._drawn, row_id, drawn_as, attempts[i])
                about["beside"] = self.fields.of_sample(values, sample if of_batch else 0, about["seed"], drawn)
                row, tensors_of_row = {**values, **about}, stored
                if self.size is not None:
                    try:
                        whole = {name: value for name, value in stored.items() if not name.startswith(CONDITIONING)}
                        tensors_of_row = {**stored, **self.row_tensors.sized(self.size, row, seed, whole, sample)}
                    except RowError as error:
                        reject(i, str(error))
                        continue
                shapes = ((name, tuple(value.shape), value.dtype) for name, value in tensors_of_row.items())
                groups["time" in values, *shapes].append((row, tensors_of_row))
        for members in groups.values():
            table = from_dicts([row for row, _ in members])
            for column in [column for column in (ID, *HALFWAY) if column.name in members[0][0]]:
                table = table.append_column(column, pa.array([row[column.name] for row, _ in members], column.type))
            for at, column in enumerate(self.columns.schema()):
                each = [row["beside"][at] for row, _ in members]
                table = table.append_column(column, pa.concat_arrays(each))
            for column in self.added:
                table = table.append_column(column, pa.array([row[column.name] for row, _ in members], column.type))
            for name in members[0][1]:
                if name.startswith(CONDITIONING):
                    table = tensors.with_each(table, name, [stored[name] for _, stored in members])
                    continue
                stacked = self.row_tensors.stacked([stored[name] for _, stored in members])
                if name == "latents":
                    assert self.spec is not None
                    table = with_latents(table, stacked, self.spec)
                else:
                    table = tensors.with_tensor(table, name, stacked)
            yield table

    def _source_rows(
        self, numbers: list[int]
    ) -> Iterator[tuple[Mapping[str, Any] | RowError, list[tuple[int, int, int]]]]:
        """Each source row once, with what is wanted of it: (place in the batch, row number, sample)."""
        wanted: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
        for i, number in sorted(enumerate(numbers), key=lambda pair: pair[1]):
            fragment, index, sample = self.plan.locate(number)
            wanted[fragment, index].append((i, number, sample))
        places = list(wanted)
        start = 0
        for end in range(1, len(places) + 1):
            fragment, last = places[end - 1]
            if end < len(places) and places[end] == (fragment, last + 1):
                continue
            first = places[start][1]
            if fragment not in self.known:
                self.require(fragment)
                self.known.add(fragment)
            yield from zip(self._items(fragment, first, last + 1), [wanted[place] for place in places[start:end]])
            self.require(fragment)  # it may have changed while it was read
            start = end

    def _items(self, fragment: str, first: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """The source's items, exactly one for each of rows ``first`` to ``stop``, the last of which may be read again to compare.

        Raises ContractError.
        """
        ends: list[Mapping[str, Any] | RowError] = []
        for item in self._asked(fragment, first, stop):
            ends = [*ends[:1], item]
            yield item
        if self.again and fragment not in self.sound and stop > 1:
            # Alone if it came in company, and in company if it came alone: a source that passes over start gives another.
            begin = stop - 1 if stop - first > 1 else stop - 2
            *others, again = self._asked(fragment, begin, stop)
            self.again -= 1
            last = self._compared(ends[-1])
            if self._compared(again) != last:
                raise ContractError(
                    f"{called(self.source)}: read gave another row {stop - 1} of {fragment} when asked for rows {first} to "
                    f"{stop - 1} than for rows {begin} to {stop - 1} (from 0 on): it must follow start and stop, and always give the same"
                )
            if self._compared([*others, ends[0]][0]) != last:  # equal rows show nothing
                self.sound.add(fragment)

    def _asked(self, fragment: str, first: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """What the source gives for rows ``first`` to ``stop``. Raises ContractError unless that is an item for each."""
        who, nothing, count = called(self.source), object(), 0
        with checks.inside(self.source):
            found = iter(self.source.read(fragment, first, stop))
        while True:
            with checks.inside(self.source):
                item: Any = next(found, nothing)
            if (item is nothing) != (count == stop - first):
                less = f"{count}" if item is nothing else "more than that"
                raise ContractError(
                    f"{who}: read was asked for rows {first} to {stop - 1} of {fragment}, {stop - first} of them, and gave {less}"
                )
            if item is nothing:
                return
            if not isinstance(item, (Mapping, RowError)):
                raise ContractError(
                    f"{who}: read gave a {type(item).__name__} for row {first + count} of {fragment}, not a dict or a RowError"
                )
            count += 1
            yield item

    def _compared(self, item: Mapping[str, Any] | RowError) -> Any:
        """What makes an item a row: values and tensors; None of one that is an error."""
        try:
            if isinstance(item, RowError):
                return None
            values, stored = self._row(item)
        except RowError:
            return None
        values["beside"] = [str(array) for array in values["beside"]]
        return values, self.row_tensors.bits(stored) if stored else {}

    def _row(self, found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The scalars of a source row (``seed`` may be None), and its tensors. Raises RowError."""
        values = {field.name: self.fields.of(field, found) for field in FROM_SOURCE}
        values["beside"] = [
            *self.fields.beside(found, values),
            *columns.values(self.columns.kept, found.get("kept") or {}),
        ]
        if self.source.id_column is not None:
            values["id"] = parse(BY_NAME["id"], found.get("id"))
        stored: dict[str, Tensor] = {}
        if self.texts_alone:
            found = {name: value for name, value in found.items() if name not in ("image", "mask", "video")}
        if found.get("latents") is not None:
            stored["latents"] = self.row_tensors.latents(found["latents"])
            if found.get("time") is not None:
                values |= self._halfway(found, stored)
            elif found.get("denoised") and values["seed"] is not None and self._is_denoised_in_part(values):
                values["seed"] = stage_seed(values["seed"], DENOISED_AGAIN)
            assert self.spec is not None
            *frames, values["height"], values["width"] = self.spec.pixels(stored["latents"].shape)
            require_few(values["width"], values["height"], self.sampling["max_pixels"], *frames)
        elif (values["width"] is None) != (values["height"] is None):
            raise RowError("width and height must be given together, or neither")
        elif self.size is not None:
            stored = self.row_tensors.whole(found)
        elif found.get("image") is not None:
            picture = self.row_tensors.picture(found["image"], values["width"], values["height"])
            stored["image"] = picture
            if found.get("mask") is not None and self.denoises:
                stored["mask"] = self.row_tensors.mask(found, values["width"], values["height"])
            values["height"], values["width"] = picture.shape[:2]
        elif found.get("video") is not None:
            stored["video"] = self.row_tensors.clip(found["video"], values["width"], values["height"])
            values["height"], values["width"] = stored["video"].shape[1:3]
        elif values["width"] is None and self.texts_alone:
            values["width"] = values["height"] = 0  # the column has no nulls
        elif values["width"] is None:
            raise RowError("a row without a picture needs width and height")
        elif self.denoises and not self.from_comfy and (strength := values[self.fields.strength]) < 1.0:
            raise RowError(
                f"{self.fields.strength} {strength:g} is for rows with a picture or latents, and there are none"
            )
        else:
            require_few(values["width"], values["height"], self.sampling["max_pixels"])
        if self.source.wants_conditioning:
            stored |= stored_conditioning.of_row(found.get("conditioning"))
        return values, stored

    def _is_denoised_in_part(self, values: Mapping[str, Any]) -> bool:
        """Whether noise of the row's seed is added to its latents. A stage under another name has a seed of its own, and ComfyUI takes any as it is."""
        first = self.denoises and not self.from_comfy and self.fields.strength == "strength"
        return first and values["strength"] < 1.0

    @cached_property
    def row_tensors(self) -> RowTensors:
        """Makes the tensors of rows that have some. Only these take torch: a worker that reads prompts does without, and is there sooner."""
        from latentmill.stages.row_tensors import RowTensors

        return RowTensors(
            self.spec, self.size, self.sampling["max_pixels"], self.multiple_of, self.denoises, self.from_comfy
        )

    def _drawn(self, row_id: str, sample: int, attempt: int, given: int) -> int:
        return attempt_seed(row_seed(self.plan.seed, row_id, sample, given), attempt)

    def _halfway(self, found: Mapping[str, Any], stored: dict[str, Tensor]) -> dict[str, Any]:
        time = parse(BY_NAME["time"], found["time"])
        if not self.denoises:
            if time > 0:
                raise RowError(f"the latents are half-way, at time {time:g}: only a job with denoise can finish them")
            return {}
        if self.draws_again:
            raise RowError(
                f"the latents are half-way, at time {time:g}: their noise was drawn where they were made, and accept can draw no other"
            )
        stored |= self.row_tensors.state(found.get("state"))
        return {"time": time, "trajectory": parse(BY_NAME["trajectory"], found.get("trajectory"))}


def _added(context: StageContext) -> tuple[pa.Field, ...]:
    """What rows have beside others in a job with ``size``, if it makes anything of pictures, or with ``accept``."""
    sized = buckets.SIZE_COLUMNS if context.size is not None and not stored_conditioning.texts_alone(context) else ()
    return sized if context.attempts is None else (*sized, ATTEMPT)

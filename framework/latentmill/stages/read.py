"""The read stage: row numbers to rows, with the job's values where the source says nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentmill import buckets, checks, columns, registry
from latentmill.batch import ATTEMPT, CONDITIONING, PROMPT_PREFIX, STATE_PREFIX, from_dicts, with_latents
from latentmill.buckets import Size
from latentmill.columns import Columns
from latentmill.errors import ContractError
from latentmill.fields import BY_NAME, FROM_COMFY, FROM_SOURCE, HALFWAY, ID, parse
from latentmill.identity import attempt_seed, row_seed
from latentmill.pixels import cover, crop, fitted
from latentmill.plugin import Declaration, Reject, RowError, Source, Stage, StageContext, tensors
from latentmill.registry import called
from latentmill.stages import stored_conditioning
from latentmill.stages.field_values import FieldValues

READ_AGAIN = 8
"""Rows that a worker reads a second time, to see whether a source gives what it is asked for."""


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
        self.size = Size.of(context.size) if context.size is not None else None
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
        self.texts_alone = stored_conditioning.texts_alone(context)
        self.again = READ_AGAIN
        self.sound: set[str] = set()
        """Fragments of which a row was read twice."""

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
                        tensors_of_row = {**stored, **self._sized(self.size, row, seed, whole, sample)}
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
                stacked = torch.stack([stored[name] for _, stored in members])
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
            self.require(fragment)
            yield from zip(self._items(fragment, first, last + 1), [wanted[place] for place in places[start:end]])
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
        return values, {
            name: (value.shape, value.dtype, value.flatten().view(torch.uint8).numpy().tobytes())
            for name, value in stored.items()
        }

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
            stored["latents"] = self._latents(found["latents"])
            if found.get("time") is not None:
                values |= self._halfway(found, stored)
            assert self.spec is not None
            *frames, values["height"], values["width"] = self.spec.pixels(stored["latents"].shape)
            self._bound(values["width"], values["height"], *frames)
        elif (values["width"] is None) != (values["height"] is None):
            raise RowError("width and height must be given together, or neither")
        elif self.size is not None:
            stored = self._whole(found)
        elif found.get("image") is not None:
            picture = self._picture(found["image"], values["width"], values["height"])
            stored["image"] = picture
            if found.get("mask") is not None and self.denoises:
                stored["mask"] = self._mask(self._painted(found, values["width"], values["height"]))
            values["height"], values["width"] = picture.shape[:2]
        elif found.get("video") is not None:
            stored["video"] = self._clip(found["video"], values["width"], values["height"])
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
            self._bound(values["width"], values["height"])
        if self.source.wants_conditioning:
            stored |= stored_conditioning.of_row(found.get("conditioning"))
        return values, stored

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
        stored |= {STATE_PREFIX + name: torch.as_tensor(value) for name, value in (found.get("state") or {}).items()}
        return {"time": time, "trajectory": parse(BY_NAME["trajectory"], found.get("trajectory"))}

    def _latents(self, array: Any) -> Tensor:
        if self.spec is None:
            raise RowError("latents from a source that doesn't say of which space they are")
        latents = torch.tensor(array) if isinstance(array, np.ndarray) else torch.as_tensor(array)
        if (
            latents.ndim != (4 if self.spec.time_downscale else 3)
            or latents.shape[0] != self.spec.channels
            or not latents.numel()
        ):
            raise RowError(f"latents of shape {tuple(latents.shape)}, and {self.spec.channels} channels were expected")
        if not latents.is_floating_point() or not bool(latents.isfinite().all()):
            raise RowError("the latents are not finite numbers")
        return latents

    def _painted(self, found: Mapping[str, Any], width: int | None, height: int | None) -> Tensor:
        """The picture of a mask: of the size of the row's, but ComfyUI stretches one where it is used. Raises RowError."""
        mask = require_picture(found["mask"])
        if self.from_comfy and width is None and mask.shape != found["image"].shape:
            return torch.from_numpy(mask)
        self._require_mask(found)
        return self._picture(mask, width, height)

    def _require_mask(self, found: Mapping[str, Any]) -> None:
        if np.shape(found["mask"])[:2] != np.shape(found["image"])[:2]:
            raise RowError("the mask is of another size than the picture")

    def _mask(self, picture: Tensor) -> Tensor:
        light = picture.float().mean(-1)
        return light / 255 if self.from_comfy else (light >= 127.5).to(torch.uint8)

    def _whole(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """A row's picture as it was opened, and its mask, or its clip: what is brought to a bucket. Raises RowError."""
        whole = {}
        for name in ("image", "mask") if found.get("image") is not None else ("video",):
            if found.get(name) is not None and (name != "mask" or self.denoises):
                frames = found[name] if name == "video" else [found[name]]
                whole[name] = torch.from_numpy(np.stack([require_picture(frame, self.size) for frame in frames]))
        if not whole:
            raise RowError("size is for rows with a picture, and there is none")
        if "mask" in whole:
            self._require_mask(found)
        return whole

    def _sized(
        self, size: Size, row: dict[str, Any], seed: int, whole: Mapping[str, Tensor], sample: int
    ) -> dict[str, Tensor]:
        """A sample's picture, brought to its bucket; the row is told how. Raises RowError."""
        count, height, width = next(iter(whole.values())).shape[:3]
        own = row["width"], row["height"]
        fit = size.fit(width, height, sample) if own[0] is None else buckets.covering(own, width, height)
        self._bound(*fit.bucket, count)
        if size.pixels != "ours" and fit.scaled[0] * fit.scaled[1] > width * height:
            self._bound(*fit.scaled)  # all of it is made before it is cut
        found = {}
        for name, frames in whole.items():
            each = [fitted(frame, fit, size.draw(seed), size.pixels) for frame in frames.numpy()]
            found[name] = torch.from_numpy(np.stack([pixels for pixels, _ in each]))
            row["crop_ltrb"] = each[0][1]
        row |= {"original_size": (width, height), "bucket": fit.bucket, "width": fit.bucket[0], "height": fit.bucket[1]}
        return {
            name: frames if name == "video" else self._mask(frames[0]) if name == "mask" else frames[0]
            for name, frames in found.items()
        }

    def _picture(self, array: Any, width: int | None, height: int | None) -> Tensor:
        require_picture(array)
        if width is None or height is None:
            self._bound(*(side - side % self.multiple_of for side in array.shape[1::-1]))
            return torch.from_numpy(crop(array, self.multiple_of))
        self._bound(width, height)
        return torch.from_numpy(cover(array, width, height))

    def _clip(self, array: Any, width: int | None, height: int | None) -> Tensor:
        """A clip ``[T, H, W, 3]``, each frame brought to size as a picture is."""
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise RowError("a clip must be a uint8 array [T, H, W, 3]")
        if not array.size:
            raise RowError("the clip has no pixels")
        self._bound(width or array.shape[2], height or array.shape[1], len(array))
        return torch.stack([self._picture(frame, width, height) for frame in array])

    def _bound(self, width: int, height: int, frames: int = 1) -> None:
        if width * height * frames > self.sampling["max_pixels"]:
            most = f"sampling.max_pixels={self.sampling['max_pixels']}"
            size = f"{width}x{height}" if frames == 1 else f"{frames} frames of {width}x{height}"
            raise RowError(f"{size} are {width * height * frames} pixels, more than {most} allows")


def _added(context: StageContext) -> tuple[pa.Field, ...]:
    """What rows have beside others in a job with ``size``, or with ``accept``."""
    sized = buckets.SIZE_COLUMNS if context.size is not None else ()
    return sized if context.attempts is None else (*sized, ATTEMPT)


def require_picture(array: Any, size: Size | None = None) -> np.ndarray[Any, Any]:
    """The array, if it is a picture. Raises RowError."""
    channels = (3, 4) if size is not None and size.pixels == "musubi" else (3,)
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != np.uint8
        or array.ndim != 3
        or array.shape[2] not in channels
    ):
        raise RowError("a picture must be a uint8 array [H, W, 3]")
    if not array.size:
        raise RowError("the picture has no pixels")
    return array

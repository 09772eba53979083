"""The read stage: row numbers to rows, with the job's values where the source says nothing."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from latentmill import checks, rows, tensors
from latentmill.plugin import Reject, RowError, Source, Stage
from latentmill.registry import called

if TYPE_CHECKING:
    from latentmill.job import Sampling

MAX_TEXT = 1_000_000
"""Characters of a prompt; a longer one is a file that was taken for a line."""


READ_AGAIN = 8
"""Rows that a worker reads a second time, to see whether a source gives what it is asked for."""


class Rows(Protocol):
    """What a plan knows of a row by its number."""

    def locate(self, row: int) -> tuple[str, int, int]: ...

    def row_id(self, row: int) -> str: ...

    def row_seed(self, row: int) -> int: ...

    def id_seed(self, id: str, sample: int) -> int: ...


class Read(Stage):
    """Takes a table of row numbers (``row``) and returns the rows, a table for each shape of tensor.

    A picture is brought to the row's width and height: scaled (Lanczos) until it covers them, the middle cut out. Where
    neither row nor job gives a size it keeps its own, less what is over a multiple of ``multiple_of`` pixels, the VAE's
    downscale, cut evenly from both edges. Latents are taken as they are and give the row its size. A row of more pixels
    than ``sampling.max_pixels`` is an error before any are made, since the memory of every stage grows with them.

    A row's seed from the source is its first sample's, as it stands; ``sample_seed`` of it is that of each further one. -1
    and null stand for no seed, as in other tools.
    """

    def __init__(
        self,
        source: Source,
        plan: Rows,
        sampling: Sampling,
        scheduler: str,
        multiple_of: int = 1,
        require: Callable[[str], None] = lambda fragment: None,
    ) -> None:
        """``require`` raises if a fragment is not what was planned; asked whenever one is read."""
        self.source, self.plan, self.sampling, self.require = source, plan, sampling, require
        self.scheduler, self.multiple_of = scheduler, multiple_of
        self.spec = source.latent_spec()
        self.again = READ_AGAIN
        self.sound: set[str] = set()
        """Fragments of which a row was read twice."""

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        groups: dict[Any, list[tuple[dict[str, Any], dict[str, Tensor]]]] = defaultdict(list)
        for found, wanted in self._source_rows(batch.column("row").to_pylist()):
            try:
                if isinstance(found, RowError):
                    raise found
                values, stored = self._row(found)
            except RowError as error:
                for i, _, _ in wanted:
                    reject(i, str(error))
                continue
            key = ("time" in values, *((name, tuple(value.shape), value.dtype) for name, value in stored.items()))
            for _, number, sample in wanted:
                if values["seed"] is not None:
                    seed = sample_seed(values["seed"], sample)
                elif "id" in values:
                    seed = self.plan.id_seed(values["id"], sample)
                else:
                    seed = self.plan.row_seed(number)
                row = {**values, "row": number, "row_id": self.plan.row_id(number), "seed": seed}
                groups[key].append((row, stored))
        for members in groups.values():
            table = rows.from_dicts([row for row, _ in members])
            for column in [column for column in (rows.ID, *rows.HALFWAY) if column.name in members[0][0]]:
                table = table.append_column(column, pa.array([row[column.name] for row, _ in members], column.type))
            for name in members[0][1]:
                stacked = torch.stack([stored[name] for _, stored in members])
                if name == "latents":
                    assert self.spec is not None
                    table = rows.with_latents(table, stacked, self.spec)
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
                raise checks.ContractError(
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
                raise checks.ContractError(
                    f"{who}: read was asked for rows {first} to {stop - 1} of {fragment}, {stop - first} of them, and gave {less}"
                )
            if item is nothing:
                return
            if not isinstance(item, (Mapping, RowError)):
                raise checks.ContractError(
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
        return values, {
            name: (value.shape, value.dtype, value.flatten().view(torch.uint8).numpy().tobytes())
            for name, value in stored.items()
        }

    def _row(self, found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The scalars of a source row (``seed`` may be None), and its tensors. Raises RowError."""
        job = self.sampling

        def value(name: str, default: Any) -> Any:
            return default if found.get(name) is None else found[name]

        width, height = value("width", job.width), value("height", job.height)
        negative = value("negative_prompt", job.negative_prompt)
        values: dict[str, Any] = {
            "prompt": text("prompt", value("prompt", job.prompt)),
            "negative_prompt": None if negative is None else text("negative_prompt", negative),
            "scheduler": text("scheduler", value("scheduler", self.scheduler)),
            "seed": own_seed(found.get("seed")),
            "steps": whole("steps", value("steps", job.steps), least=1),
            "guidance_scale": real("guidance_scale", value("guidance_scale", job.guidance_scale)),
            **{name: share(name, value(name, getattr(job, name))) for name in (*rows.PLAIN_GUIDANCE, "strength")},
            "width": None if width is None else whole("width", width, least=1),
            "height": None if height is None else whole("height", height, least=1),
            "warning": text("warning", value("warning", "")),
        }
        if self.source.id_column is not None:
            values["id"] = text("id", found.get("id"))
        stored: dict[str, Tensor] = {}
        if found.get("latents") is not None:
            stored["latents"] = self._latents(found["latents"])
            if found.get("time") is not None:
                values |= self._halfway(found, stored)
            assert self.spec is not None
            values["height"], values["width"] = (side * self.spec.downscale for side in stored["latents"].shape[-2:])
            self._bound(values["width"], values["height"])
        elif (values["width"] is None) != (values["height"] is None):
            raise RowError("width and height must be given together, or neither")
        elif found.get("image") is not None:
            picture = self._picture(found["image"], values["width"], values["height"])
            stored["image"] = picture
            if found.get("mask") is not None and self.scheduler:
                if np.shape(found["mask"])[:2] != np.shape(found["image"])[:2]:
                    raise RowError("the mask is of another size than the picture")
                painted = self._picture(found["mask"], values["width"], values["height"])
                stored["mask"] = (painted.float().mean(-1) >= 127.5).to(torch.uint8)
            values["height"], values["width"] = picture.shape[:2]
        elif values["width"] is None:
            raise RowError("a row without a picture needs width and height")
        elif self.scheduler and values["strength"] < 1.0:
            raise RowError(f"strength {values['strength']:g} is for rows with a picture or latents, and there are none")
        else:
            self._bound(values["width"], values["height"])
        return values, stored

    def _halfway(self, found: Mapping[str, Any], stored: dict[str, Tensor]) -> dict[str, Any]:
        time = share("time", found["time"])
        if not self.scheduler:
            if time > 0:
                raise RowError(f"the latents are half-way, at time {time:g}: only a job with denoise can finish them")
            return {}
        stored |= {rows.STATE + name: torch.as_tensor(value) for name, value in (found.get("state") or {}).items()}
        return {"time": time, "trajectory": text("trajectory", found.get("trajectory"))}

    def _latents(self, array: Any) -> Tensor:
        if self.spec is None:
            raise RowError("latents from a source that doesn't say of which space they are")
        latents = torch.tensor(array) if isinstance(array, np.ndarray) else torch.as_tensor(array)
        if latents.ndim != 3 or latents.shape[0] != self.spec.channels or not latents.numel():
            raise RowError(f"latents of shape {tuple(latents.shape)}, and {self.spec.channels} channels were expected")
        if not latents.is_floating_point() or not bool(latents.isfinite().all()):
            raise RowError("the latents are not finite numbers")
        return latents

    def _picture(self, array: Any, width: int | None, height: int | None) -> Tensor:
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise RowError("a picture must be a uint8 array [H, W, 3]")
        if not array.size:
            raise RowError("the picture has no pixels")
        if width is None or height is None:
            self._bound(*(side - side % self.multiple_of for side in array.shape[1::-1]))
            return torch.from_numpy(crop(array, self.multiple_of))
        self._bound(width, height)
        return torch.from_numpy(cover(array, width, height))

    def _bound(self, width: int, height: int) -> None:
        if width * height > self.sampling.max_pixels:
            most = f"sampling.max_pixels={self.sampling.max_pixels}"
            raise RowError(f"{width}x{height} are {width * height} pixels, more than {most} allows")


def cover(picture: np.ndarray[Any, Any], width: int, height: int) -> np.ndarray[Any, Any]:
    """The middle of ``picture[H, W, 3]``, scaled to cover ``width`` x ``height``; itself if it has that size."""
    have_height, have_width = picture.shape[:2]
    if (have_width, have_height) == (width, height):
        return np.array(picture)
    # The middle is cut out first: 1 x 20000 pixels, scaled to cover a square, would be a million and more high.
    scale = max(width / have_width, height / have_height)
    cut_x, cut_y = (have_width - width / scale) / 2, (have_height - height / scale) / 2
    box = (max(cut_x, 0.0), max(cut_y, 0.0), min(have_width - cut_x, have_width), min(have_height - cut_y, have_height))
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box=box))


def crop(picture: np.ndarray[Any, Any], multiple_of: int) -> np.ndarray[Any, Any]:
    """The middle of ``picture[H, W, 3]`` with sides that are multiples. Raises RowError if it is too small for one."""
    height, width = (side - side % multiple_of for side in picture.shape[:2])
    if not width or not height:
        raise RowError(f"a picture of {picture.shape[1]}x{picture.shape[0]} pixels, and the VAE needs {multiple_of}")
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.array(picture[top : top + height, left : left + width])


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


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a sample of a row whose seed the source says: that one for sample 0, a hash of 64 bits for the others.

    Seeds that counted up would give rows with neighbouring seeds the same pictures.
    """
    if sample == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest(), "little")


def own_seed(value: Any) -> int | None:
    """The seed that a source's row says, or None: it says none, or -1. Raises RowError."""
    seed = None if value is None else whole("seed", value)
    if seed is None or seed == -1:
        return None
    if not 0 <= seed < 2**64:
        raise RowError(f"seed must be from 0 to 2^64 - 1, or -1 for the row's own, not {seed}"[:200])
    return seed


def whole(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int. Raises RowError.

    A float that is whole will do: tables make floats of integers beside nulls.
    """
    if isinstance(value, (float, np.floating)) and float(value).is_integer() and abs(float(value)) < 2**53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RowError(f"{name} must be a whole number, not {value!r:.80}")
    number = int(value)
    if least is not None and not least <= number <= rows.LIMITS[name]:
        raise RowError(f"{name} must be from {least} to {rows.LIMITS[name]}, not {number}"[:200])
    return number


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


def share(name: str, value: Any) -> float:
    """``value`` as a float from 0 to 1. Raises RowError."""
    number = real(name, value)
    if not 0.0 <= number <= 1.0:
        raise RowError(f"{name} must be from 0 to 1, not {number:g}")
    return number

"""Prompts to conditioning, each text once: what was encoded is kept in memory, up to a bound, and in files if the job has a folder for them.

In a deterministic job what a prompt becomes may depend on the batch's size and on its slot, so it is kept by slot: a row's bits
are what its slot gives, whether they are computed or found.
"""

from __future__ import annotations

import pickle
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentmill import checks, syntax, weights
from latentmill.batch import ENCODER_KEY, NEGATIVE_PREFIX, PROMPT_PREFIX
from latentmill.plugin import Conditioning, RowError, StageContext, TextEncoder, tensors
from latentmill.registry import called
from latentmill.stages.prompt_files import Asked, Place, PromptFiles, bits

V = TypeVar("V")

MEMORY = 512 << 20
"""Bytes of conditioning that a worker keeps: some 130 prompts of FLUX.1 in bfloat16, 1,700 of Stable Diffusion XL in half precision."""
WARNINGS_MEMORY = 16 << 20
"""Bytes of texts whose warnings a worker keeps."""


GUIDED = {"negative_prompt": None, "guidance_rescale": 0.0, "guidance_from": 1.0, "guidance_until": 0.0}
"""Fields that a network that guides itself does not read, and their values where nobody says one."""


class Recent(Generic[V]):
    """Values by key, of so many bytes together: what was asked for longest ago goes first."""

    def __init__(self, room: int) -> None:
        self.room, self.bytes = room, 0
        self.entries: OrderedDict[Any, tuple[V, int]] = OrderedDict()

    def get(self, key: Any) -> V | None:
        """The value, if it is there."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: Any, value: V, size: int) -> None:
        """Keep a value of so many bytes, in place of the one that is there."""
        _, before = self.entries.pop(key, (None, 0))
        self.entries[key] = value, size
        self.bytes += size - before
        while self.bytes > self.room:
            _, (_, gone) = self.entries.popitem(last=False)
            self.bytes -= gone


class Kept:
    """The conditioning of a text, by slot. Slots in which it came to the same bits share one."""

    def __init__(self) -> None:
        self.slots: dict[int, Conditioning] = {}
        self.in_files: set[int] = set()

    def add(self, slot: int, value: Conditioning) -> Conditioning:
        """What is kept for the slot: the value, or its equal."""
        same = (each for each in self.distinct() if _same(each, value))
        self.slots[slot] = next(same, value)
        return self.slots[slot]

    def distinct(self) -> list[Conditioning]:
        """Each once."""
        return list({id(value): value for value in self.slots.values()}.values())

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(tensor.nbytes for value in self.distinct() for tensor in value.values())


class PromptEncoding:
    """Prompts to conditioning, by a text encoder."""

    def __init__(self, context: StageContext) -> None:
        self.context, self.fixed = context, context.fixed
        self.encoder: TextEncoder = context.plugin("text_encoder")
        self.fields = [field.name for field in self.encoder.row_fields]
        self.negative = context.is_read(NEGATIVE_PREFIX)
        self.stored = not context.needed_later("denoiser")
        self.plain_negative = type(self.encoder).encode_negative is TextEncoder.encode_negative
        """Whether a negative prompt is encoded as any, and none as an empty one."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the conditioning, by name, as the text encoder's first call made it."""
        self.kept: Recent[Kept] = Recent(MEMORY)
        self.warned: Recent[list[str]] = Recent(WARNINGS_MEMORY)
        self.files: PromptFiles | None = None

    def load(self, device: torch.device) -> None:
        """Load the text encoder onto a device."""
        with weights.reading(self.context.place("text_encoder")):
            checks.load(self.encoder, device)
        self.files = PromptFiles.of(self.context, self.encoder, device)

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """What of a row's prompts the encoder will not read. Raises RowError for one that can't be encoded."""
        found, negative = self._warnings(row["prompt"]), row["negative_prompt"]
        if not self.negative:
            unread = [
                name
                for name, plain in GUIDED.items()
                if row[name] != plain and (name, row[name]) != ("negative_prompt", "")
            ]
            return [*found, f"not read, since the network guides itself: {', '.join(unread)}"] if unread else found
        if negative is None:
            return found
        try:
            return [*found, *(f"negative_prompt: {text}" for text in self._warnings(negative))]
        except RowError as error:
            raise RowError(f"negative_prompt: {error}") from error

    def _warnings(self, text: str) -> list[str]:
        found = self.warned.get(text)
        if found is None:
            with checks.inside(self.encoder):
                self.encoder.check(text)
                found = of_prompt(self.encoder, text)
            self.warned.put(text, found, len(text.encode(errors="replace")) + 200)
        return found

    def encode(self, part: pa.Table, slots: Tensor, size: int) -> pa.Table:
        """The rows with ``prompt:*`` and, if they are read, ``negative:*``; rows of one prompt share a tensor."""
        # One for all: rows are grouped by them.
        own = tuple((name, part.column(name)[0].as_py()) for name in self.fields)
        columns = [(PROMPT_PREFIX, "prompt"), (NEGATIVE_PREFIX, "negative_prompt")][: 2 if self.negative else 1]
        for prefix, column in columns:
            negative = prefix == NEGATIVE_PREFIX
            asked = [self._asked(text, negative, own) for text in part.column(column).to_pylist()]
            places = list(zip(asked, slots.tolist() if self.fixed else [0] * len(asked)))
            found = self._found(places, size)
            distinct = {id(found[place]): found[place] for place in places}
            order = {key: k for k, key in enumerate(distinct)}
            for name in sorted(found[places[0]]):
                values = torch.stack([value[name] for value in distinct.values()])
                part = tensors.with_shared(part, prefix + name, values, [order[id(found[each])] for each in places])
                if self.stored:
                    part = _of_encoder(part, prefix + name, self.encoder.fingerprint())
        return part

    def _asked(self, text: str | None, negative: bool, own: tuple[tuple[str, Any], ...]) -> Asked:
        if negative and self.plain_negative:
            return Asked(text or "", False, own)
        return Asked(text, negative, own)

    def _found(self, places: Sequence[Place], size: int) -> dict[Place, Conditioning]:
        """The conditioning of each: as it is kept, or else encoded."""
        wanted = list(dict.fromkeys(places))
        found = self._in_memory(wanted)
        from_files = self.files.read([place for place in wanted if place not in found]) if self.files else {}
        for place, value in from_files.items():
            found[place] = self._keep(place, value, in_files=True)
        rows, unsound = Counter(asked for asked, _ in places), set[Place]()
        missing = [place for place in wanted if place not in found] or self._misfits(found)
        there = {*from_files}
        while missing:  # once more, where what the encoder makes shows that files hold something else
            encoded, drawn = self._encoded(missing, rows, size)
            for place, value in encoded.items():
                if drawn or not _finite(value):
                    unsound.add(place)
                else:
                    encoded[place] = self._keep(place, value)
            found |= encoded
            there -= {*missing}
            missing = self._misfits(found)
        if self.files is not None:
            self._write([place for place in wanted if place not in there and place not in unsound], found)
        return found

    def _misfits(self, found: Mapping[Place, Conditioning]) -> list[Place]:
        """Those, out of files, that are of other shapes than what the encoder makes."""
        misfits = [
            place
            for place, value in found.items()
            if any(self.shapes.get(name, tensor.shape) != tensor.shape for name, tensor in value.items())
        ]
        for asked, slot in misfits:
            if self.files is not None:
                self.files.misfit((asked, slot))
            if kept := self.kept.get(asked):
                kept.in_files.discard(slot)
        return misfits

    def _in_memory(self, wanted: Iterable[Place]) -> dict[Place, Conditioning]:
        found = {}
        for asked, slot in wanted:
            kept = self.kept.get(asked)
            if kept is not None and slot in kept.slots:
                found[asked, slot] = kept.slots[slot]
        return found

    def _keep(self, place: Place, value: Conditioning, in_files: bool = False) -> Conditioning:
        asked, slot = place
        kept = self.kept.get(asked) or Kept()
        value = kept.add(slot, value)
        kept.in_files |= {slot} if in_files else set()
        self.kept.put(asked, kept, kept.size + len((asked.text or "").encode(errors="replace")))
        return value

    def _write(self, places: Sequence[Place], found: Mapping[Place, Conditioning]) -> None:
        """Into the files, what is not there."""
        assert self.files is not None
        fresh = {}
        for asked, slot in places:
            kept = self.kept.get(asked)
            if kept is None or slot not in kept.in_files:
                fresh[asked, slot] = found[asked, slot]
        for asked, slot in self.files.write(fresh):
            if (kept := self.kept.get(asked)) is not None:
                kept.in_files.add(slot)

    def _encoded(
        self, missing: Sequence[Place], rows: Mapping[Asked, int], size: int
    ) -> tuple[dict[Place, Conditioning], bool]:
        """What the encoder makes of these, in one call, and whether it drew random numbers for it.

        In a deterministic job slots that would idle are given texts that several rows have: they will be asked for there.
        """
        if self.fixed is None:
            called_for = list(missing)
        else:
            first, _ = missing[0]
            again = [asked for asked in dict.fromkeys(asked for asked, _ in missing) if rows[asked] > 1]
            again = again or [first._replace(text="")]
            there = {slot: asked for asked, slot in missing}
            called_for = [(there.get(slot, again[slot % len(again)]), slot) for slot in range(size)]
        made, drawn = self._call([asked for asked, _ in called_for])
        asked_for = {asked for asked, _ in missing}
        return {
            (asked, slot): {name: value[k].clone(memory_format=torch.contiguous_format) for name, value in made.items()}
            for k, (asked, slot) in enumerate(called_for)
            if asked in asked_for
        }, drawn

    def _call(self, all_asked: Sequence[Asked]) -> tuple[Conditioning, bool]:
        texts, (_, negative, own) = [asked.text for asked in all_asked], all_asked[0]
        method = "encode_negative" if negative else "encode"
        before = _generators()
        with checks.inside(self.encoder):
            found = getattr(self.encoder, method)(texts, **dict(own))
        # CUDA's counts only if CUDA had begun before.
        drawn = any(now != then for now, then in zip(_generators(), before) if then)
        found = checks.conditioning(self.encoder, method, found, len(texts), self.shapes)
        if drawn:
            warnings.warn(
                f"{called(self.encoder)}: {method} draws from a global random generator: what it makes is not kept",
                PromptsWarning,
                stacklevel=2,
            )
        return {name: value.cpu() for name, value in found.items()}, drawn


class PromptsWarning(UserWarning):
    """Why what a text encoder made isn't kept."""


def _of_encoder(part: pa.Table, name: str, fingerprint: str) -> pa.Table:
    """The rows with, in a column's metadata, by which text encoder it is."""
    at, field = part.schema.get_field_index(name), part.schema.field(name)
    field = field.with_metadata({**field.metadata, ENCODER_KEY: fingerprint.encode()})
    return part.set_column(at, field, part.column(at))


def of_prompt(encoder: TextEncoder, prompt: str) -> list[str]:
    """What of a prompt the encoder will not read as it is meant."""
    return [*syntax.told(prompt, encoder.reads), *filter(None, [encoder.warn(prompt)])]


def not_finite(part: pa.Table) -> dict[int, str]:
    """Rows whose conditioning has NaN or infinity in it, with the reason: no picture that is made of it would be right."""
    wrong: dict[int, str] = {}
    for prefix, prompt in ((PROMPT_PREFIX, "prompt"), (NEGATIVE_PREFIX, "negative prompt")):
        for column in part.column_names:
            if column.startswith(prefix):
                values, index = tensors.shared(part, column)
                fine = values.reshape(len(values), -1).isfinite().all(1).tolist()
                for k in [k for k, value in enumerate(index) if not fine[value]]:
                    wrong.setdefault(
                        k, f"the text encoder's {column.removeprefix(prefix)} of the {prompt} are not finite"
                    )
    return wrong


def _finite(value: Conditioning) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in value.values())


def _same(a: Conditioning, b: Conditioning) -> bool:
    """Whether both are the same to the bit."""
    return a.keys() == b.keys() and all(
        (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape) and torch.equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def _generators() -> tuple[Any, ...]:
    """The state of the global random generators: an encoder that moves one makes no two alike."""
    numbers = pickle.dumps(np.random.get_state(legacy=False))
    cuda = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b""
    return torch.get_rng_state().numpy().tobytes(), cuda, numbers, random.getstate()

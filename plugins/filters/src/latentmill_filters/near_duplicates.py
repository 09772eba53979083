"""Pictures that are nearly the same as another of the dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from latentmill import read
from latentmill.plugin import Declaration, RowError, StageContext, tensors
from latentmill_filters.phash import MAX_DISTANCE, as_numbers, firsts, phash
from latentmill_filters.scorer import Scorer, no_pictures


class NearDuplicates(Scorer):
    """Stores each picture's perceptual hash, ``phash``, 16 hex digits; given ``of``, a finished dataset of hashes, filters near duplicates.

    Rows of ``of`` whose hashes differ in ``distance`` bits of 64 or fewer are near, and what is near to one of a group is of the
    group, of which the first row of ``of`` is kept. So nothing hangs on the order in which workers see rows, or on which rows the job
    has. As a rule half the bits of a hash are ones, and two hashes differ in an even number. A filtered row's score is ``bits``, in
    which its hash differs from that of the row that is kept: in a long group more than ``distance``.

    A row is found in ``of`` by its id, if the job's source has an ``id_column``: by the ``id`` there, or the ``row_id`` if that is the
    column; else by its own ``row_id``, as in a job over the same source. A row that isn't there is an error, and so is one whose hash
    differs from that there in more than ``distance`` bits: fewer may come from its picture's having been stored as JPEG or WebP. Groups
    go by the hashes in ``of``, and so does the column ``phash``. A million rows of ``of`` take some 200 MB in each worker.
    """

    contract = 2
    adds = (pa.field("phash", pa.string(), nullable=False),)
    fingerprinted = ("of",)

    def __init__(self, of: str | None = None, distance: int = 4) -> None:
        if not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"distance must be 0 to {MAX_DISTANCE} bits, not {distance}")
        self.distance = distance
        self.known = Hashes(of) if of is not None else None

    def fingerprint(self) -> str:
        return self.known.digest() if self.known is not None else ""

    def declare(self, context: StageContext) -> Declaration:
        numbered_anew = any(stage.position == "first" and "latents" in stage.added() for stage in context.before)
        if self.known is not None and numbered_anew and context.choices["source"].get("id_column") is None:
            raise ValueError("with stored latents, of needs source.id_column=row_id, by which it knows the rows")
        if self.known is not None:
            self.known.places(_names(context)[1])  # what can't be told apart there is said before anything starts
        return super().declare(context)

    def prepare(self, context: StageContext) -> None:
        self.key, self.key_there = _names(context)

    def load(self, device: torch.device) -> None:
        if self.known is not None:
            self.places = self.known.places(self.key_there)
            self.firsts = firsts(self.known.numbers, self.distance)

    def scores(self, batch: pa.Table) -> Iterable[Mapping[str, Any] | RowError]:
        without = no_pictures(batch)
        if without and self.known is None:
            return without
        pictures = tensors.from_arrow(batch, "image").numpy() if not without else [None] * len(batch)
        hashes = [None if picture is None else phash(picture) for picture in pictures]
        if self.known is None:
            return [{"phash": found} for found in hashes]
        return [self._known(*row) for row in zip(batch.column(self.key).to_pylist(), hashes)]

    def reason(self, scores: Mapping[str, Any]) -> str:
        if self.known is None or "of" not in scores:
            return ""
        return f"a near duplicate of row {scores['of']} of {self.known.path}"

    def _known(self, name: str, found: str | None) -> Mapping[str, Any] | RowError:
        """What is known of a row, whose picture has the hash ``found``, if it has a picture."""
        assert self.known is not None
        at = self.places.get(name)
        if at is None:
            return RowError(f"there is no row {name} in {self.known.path}")
        there = self.known.rows["phash"][at].as_py()
        if found is not None and _apart(as_numbers([found])[0], self.known.numbers[at]) > self.distance:
            return RowError(
                f"row {name} of {self.known.path} is of another picture, or was hashed in another size: "
                f"phash {there}, and here {found}"
            )
        first = int(self.firsts[at])
        if first == at:
            return {"phash": there}
        bits = _apart(self.known.numbers[at], self.known.numbers[first])
        return {"phash": there, "bits": bits, "of": self.known.rows[self.key_there][first].as_py()}


def _names(context: StageContext) -> tuple[str, str]:
    """The columns by which a row is known, the batch's and that of ``of``."""
    column = context.choices.get("source", {}).get("id_column")
    return "id" if column is not None else "row_id", "id" if column not in (None, "row_id") else "row_id"


def _apart(a: np.uint64, b: np.uint64) -> int:
    """In how many bits two hashes differ."""
    return int(np.bitwise_count(a ^ b))


class Hashes:
    """The hashes of a finished dataset, read once, when they are first asked for."""

    def __init__(self, path: str) -> None:
        """``path`` is the dataset's folder, or its address in a store."""
        self.path = path

    @cached_property
    def rows(self) -> pa.Table:
        """``row_id`` and ``phash``, and ``id`` where there are ids, of all rows in their order. Raises ValueError."""
        pieces = list(read(self.path, ["row_id", "phash", "id"]))
        if not all("phash" in piece.column_names for piece in pieces):
            raise ValueError(f"{self.path} has no column phash: a job with near_duplicates in its flow stores it")
        if not pieces:
            raise ValueError(f"{self.path} has no rows")
        return pa.concat_tables(pieces).combine_chunks()

    @cached_property
    def numbers(self) -> npt.NDArray[np.uint64]:
        """The hashes as numbers, ``[N]``."""
        return as_numbers(self.rows["phash"].to_pylist())

    def digest(self) -> str:
        """16 hex digits over all rows' ids and hashes."""
        digest = hashlib.blake2b(digest_size=8)
        for name in self.rows.column_names:
            digest.update(f"{name}\0".encode())
            for value in self.rows[name].to_pylist():
                digest.update(f"{value}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def places(self, column: str) -> dict[str, int]:
        """Where each row is, by its name in ``column``. Raises ValueError if two have one name."""
        if column not in self.rows.column_names:
            raise ValueError(f"{self.path} has no ids: read it with source.id_column=row_id")
        found = {name: at for at, name in enumerate(self.rows[column].to_pylist())}
        if len(found) < len(self.rows):
            raise ValueError(f"{self.path} has several rows of one id: know them by source.id_column=row_id")
        return found

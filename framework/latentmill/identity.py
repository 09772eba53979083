"""What a row is called for ever, and the seed that all its noise hangs on: one place for both."""

from __future__ import annotations

import hashlib


def row_id(source_row: int, sample: int) -> str:
    """A row's name: its place in the source, and which sample of it. Safe as a file name."""
    return f"{source_row:09d}-{sample:03d}"


def row_seed(job_seed: int, row_id: str, sample: int, given: int | None = None, id: str | None = None) -> int:
    """The seed of a row: what the source gives, or else a hash of its id there, or else of its ``row_id``.

    A given one is the first sample's, as it stands. Each further sample has a hash of it, of 64 bits: seeds that counted up
    would give rows with neighbouring seeds the same pictures. An id's seed stays when rows come and go before it.
    """
    if given is not None:
        return given if sample == 0 else _hash(f"{given}/{sample}")
    return (_hash(f"{job_seed}/{row_id}") if id is None else _hash(f"{job_seed}/id/{sample:03d}/{id}")) >> 1


def attempt_seed(row_seed: int, attempt: int) -> int:
    """The seed of a row's sample by its attempt, from 0: the row's own, and then a hash of that and of the attempt, of 63 bits.

    A hash of other words than a further sample of a row has: else its first attempt would be another row's second.
    """
    return _hash(f"{row_seed}/attempt/{attempt}") >> 1 if attempt else row_seed


def stage_seed(row_seed: int, stage: str) -> int:
    """The seed of a row in a later stage that begins anew, by the stage's name, 63 bits: its noise is not that of the first again."""
    return _hash(f"{row_seed}/stage/{stage}") >> 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

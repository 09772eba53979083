"""Weights out of files, checked, for plugins: names, shapes and numbers are right, or an error says what is not.

What a worker reads is recorded, so that all workers of a dataset, in all its runs, read the same: ``load`` does so, and ``record``
is for plugins that leave the reading to a library.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from latentmill.digests import digest, digests
from latentmill.text import one_line

if TYPE_CHECKING:  # who reads no weights takes no torch
    from torch import Tensor

__all__ = ["digest", "digests", "load", "record"]

MAX_HEADER = 100_000_000
"""Bytes; safetensors itself reads no larger one."""

Reading: TypeAlias = dict[str, list[tuple[str, str]]]
"""For each plugin, what it has read: names of files, without their folders, and the SHA-256 of their contents, sorted."""


def load(
    path: str | os.PathLike[str], expected: Mapping[str, Tensor] | None = None, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, by name.

    ``expected`` (a model's ``state_dict()``, on the meta device too) says which there must be, and of which shapes; dtypes may
    differ. A pickle (``.pt``, ``.ckpt``, ``.bin``) is refused, whatever it is called, unless ``allow_pickle``; then torch's
    loader for weights alone reads it. Raises ValueError, in one line, for whatever is wrong: a file of another kind, a
    name that is there twice, which safetensors itself accepts, NaN or infinity, tensors missing, unknown or of other shapes.
    """
    import safetensors.torch

    record(path)
    with open(path, "rb") as file:
        head = file.read(9)
        if head[8:] == b"{":
            length = int.from_bytes(head[:8], "little")
            if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
                raise ValueError(f"{path}: no safetensors file: its header would have {length} bytes")
            _require_single(path, b"{" + file.read(length - 1))
    if head[8:] == b"{":
        try:
            found = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: no safetensors file that can be read: {error}") from error
    else:
        found = _unpickled(path, head, allow_pickle)
    if expected is not None:
        _require_expected(path, found, expected)
    for name, tensor in found.items():
        if tensor.is_floating_point() and not _finite(tensor):
            raise ValueError(f"{path}: {name} is not finite: the file is damaged, or its training failed")
    record(path)  # again: one that was replaced meanwhile is noted as two
    return found


def record(*paths: str | os.PathLike[str]) -> None:
    """Note that these files are read, of which a row's numbers depend: to be called before they are, in ``load(device)``.

    Workers whose files are others than those with which a dataset was begun are refused, also where a fingerprint misses it. Outside
    of a worker nothing is noted. Raises OSError if a file can't be read.
    """
    now = _readers.now()
    if now is None:
        return
    found = list(zip(map(Path, paths), digests(paths)))
    now.files += found
    tell(found)


@contextmanager
def noting() -> Iterator[list[tuple[Path, str]]]:
    """The files that are recorded meanwhile, each with its content, for ``tell``."""
    before = _readers.now()
    if before is None:
        yield []
        return
    with reading(before.unit, before.each, before.into):
        now = _readers.now()
        assert now is not None
        yield now.files


def tell(files: Sequence[tuple[Path, str]]) -> None:
    """Record files that were read before, as they were then; for the framework."""
    if (now := _readers.now()) is None:
        return
    for path, found in files:
        unit = now.unit
        if now.each:
            unit += f", file {hashlib.blake2b(f'{path.parent.name}/{path.name}'.encode(), digest_size=4).hexdigest()}"
        note(unit, path.name, found)


def note(unit: str, name: str, content: str) -> None:
    """Add to what is told of a worker; for the framework."""
    if (now := _readers.now()) is None:
        return
    with _readers.lock:
        entries = now.into.setdefault(unit, [])
        if (name, content) not in entries:
            entries.append((name, content))
            entries.sort()


@contextmanager
def reading(unit: str, each: bool = False, into: Reading | None = None) -> Iterator[None]:
    """What is read meanwhile is the ``unit``'s, and goes ``into`` what is told of its worker; within another, into that one's.

    Of ``each`` file by itself, where not all are read at once. Several may read at a time, each in a thread of its own; what
    another thread reads, one that a library has started, is the one's that began last.
    """
    before = _readers.here.__dict__.get("now")
    if into is None:
        into = before.into if before else {}
    now = _Reader(unit, each, into)
    _readers.here.now = now
    _readers.all.append(now)
    try:
        yield
    finally:
        _readers.all.remove(now)
        _readers.here.now = before


def taken(reading: Reading) -> Reading:
    """What was read into ``reading``, which is empty then."""
    with _readers.lock:
        found = dict(reading)
        reading.clear()
        return found


@dataclass(eq=False)
class _Reader:
    """For whom a thread reads."""

    unit: str
    each: bool
    into: Reading
    files: list[tuple[Path, str]] = field(default_factory=list)
    """What it has read."""


class _Readers:
    """All for whom is read in this process, the last to begin last."""

    def __init__(self) -> None:
        self.all: list[_Reader] = []
        self.here = threading.local()
        self.lock = threading.Lock()

    def now(self) -> _Reader | None:
        """For whom this thread reads."""
        here: _Reader | None = self.here.__dict__.get("now")
        return here or next(iter(self.all[-1:]), None)


_readers = _Readers()


def _require_single(path: str | os.PathLike[str], header: bytes) -> None:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"{path}: {twice} is in its header twice")
        return found

    try:
        json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no safetensors file: its header is no JSON: {error}") from error


def _unpickled(path: str | os.PathLike[str], head: bytes, allow_pickle: bool) -> dict[str, Tensor]:
    import torch

    if not head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip, and pickles before it
        raise ValueError(f"{path}: no safetensors file")
    if not allow_pickle:
        raise ValueError(f"{path}: a pickle, which may run code when it is read: convert it to safetensors")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle ends in whatever its bytes lead to
        said = one_line(error, 200) or type(error).__name__
        raise ValueError(f"{path}: a pickle of more than weights, or a damaged one: {said}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path}: holds no tensors by name")
    return {str(name): tensor for name, tensor in found.items()}


def _require_expected(
    path: str | os.PathLike[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for what, names in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path}: tensors that are {what}: {', '.join(sorted(names)[:3])}{more}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} is of shape {tuple(found[name].shape)}, and {tuple(tensor.shape)} was expected"
            )


def _finite(tensor: Tensor) -> bool:
    import torch

    if tensor.element_size() == 1:  # of the 8-bit floats torch knows little more than how to widen them
        tensor = tensor.to(torch.float32)
    # Both bounds are NaN if one number is. To ask each number takes ten times as long.
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())

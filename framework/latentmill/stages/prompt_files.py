"""Encoded prompts as files, so that later runs needn't encode them: a folder of safetensors, which anyone can read.

``ENCODER/KK/KEY.safetensors`` holds the conditioning of one prompt, a tensor for each name without the batch axis, and in its
metadata what it is of. ENCODER and KEY are hashes of that description, KK the first two digits of KEY. A file is put in place
whole, so that any number of workers read and write at once; of two that encode one prompt the last stays.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentmill.plugin import Conditioning, StageContext, TextEncoder
from latentmill.registry import called
from latentmill.storage import Storage
from latentmill.text import one_line

FORMAT = "latentmill.prompt/1"
"""Of a file, in its metadata under ``format``."""
FILES_AT_ONCE = 8
"""Files that are read or written at the same time: an object store takes some 50 ms to answer."""


class Asked(NamedTuple):
    """What the encoder is asked, but for the slot."""

    text: str | None
    negative: bool
    """Whether by ``encode_negative``."""
    fields: tuple[tuple[str, Any], ...]
    """The encoder's row fields."""


Place = tuple[Asked, int]
"""In which slot of a deterministic job; 0 in another."""


class PromptCacheWarning(UserWarning):
    """What is wrong with a job's prompt cache. The job goes on without it, or without the file."""


class PromptFiles:
    """The files of one encoder in a job's prompt cache."""

    def __init__(
        self,
        store: Storage,
        encoder: Mapping[str, Any],
        secret: Any,
        fixed: bool,
        files_of: Callable[..., str],
    ) -> None:
        """``encoder`` describes what encodes, ``secret`` is of it and not to be written; ``fixed``: slots count.

        ``files_of`` tells a prompt's files, as ``TextEncoder.fingerprint_of``.
        """
        self.store, self.fixed = store, fixed
        self.encoder = json.dumps(encoder, sort_keys=True)
        self.files_of = files_of
        self.folder = _hash(self.encoder, json.dumps(secret, sort_keys=True, default=repr))
        self.reads = self.writes = True
        self.threads = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="prompt-cache")

    @classmethod
    def of(cls, context: StageContext, encoder: TextEncoder, device: torch.device) -> PromptFiles | None:
        """Those of a worker's text encoder; None if the job has no prompt cache, or the encoder nothing to tell its weights by.

        In a deterministic job a prompt's bits depend on whatever the plan's do, and on the device.
        """
        if context.open_prompt_cache is None:
            return None
        plan, choice = context.plan, context.choices["text_encoder"]
        about = plan.plugins[context.place("text_encoder")]
        if not about.get("fingerprint"):
            _warn(
                f"not used: {called(encoder)} has no fingerprint, so other weights would be given the prompts of these"
            )
            return None
        kept = {key for key in choice if key != "name" and key not in encoder.fingerprinted}
        stage, _, kind = context.place("text_encoder").rpartition(".")
        said = dict((plan.config["stages"][stage] if stage else plan.config)[kind])
        about = {**about, "settings": {key: value for key, value in said.items() if key in kept}}
        if context.fixed is not None:
            threads = plan.config["stages"][context.declaration.name]["threads"]
            about["deterministic"] = {
                "batch_size": context.fixed.batch_size,
                "threads": threads,
                "device": _name_of(device),
                "libraries": plan.libraries,
            }
        store: Storage = context.open_prompt_cache()
        with suppress(OSError):  # what is wrong with it is told of where it is read
            store.sweep()
        return cls(store, about, {key: choice[key] for key in kept}, context.fixed is not None, encoder.fingerprint_of)

    def read(self, places: Sequence[Place]) -> dict[Place, Conditioning]:
        """Those that are there. A file that isn't what was written under its name is told of, and not believed."""
        if not self.reads:
            return {}
        found: dict[Place, Conditioning] = {}
        for place, data in zip(places, self.threads.map(self._data, places)):
            if isinstance(data, OSError):
                self.reads = self.writes = False
                _warn(f"can't be read, and is left alone: {one_line(data)}")
                return found
            if data is not None:
                try:
                    found[place] = _conditioning(data, self._about(place))
                except ValueError as error:
                    self._bad(place, error)
        return found

    def misfit(self, place: Place) -> None:
        """Tell of a file whose tensors are of other shapes than the text encoder's."""
        self._bad(place, "is damaged: its shapes are not those of the text encoder")

    def _bad(self, place: Place, why: object) -> None:
        _warn(f"{self.store.url.rstrip('/')}/{self._name(place)} {why}: its prompt is encoded anew")

    def write(self, values: Mapping[Place, Conditioning]) -> list[Place]:
        """Put these in place; those that are there."""
        written: list[Place] = []
        if not self.writes:
            return written
        for place, error in zip(values, self.threads.map(self._put, values.items())):
            if error is None:
                written.append(place)
            elif self.writes:
                self.writes = False
                _warn(f"can't be written to, and is only read: {one_line(error)}")
        return written

    def _data(self, place: Place) -> bytes | OSError | None:
        try:
            return self.store.read(self._name(place))
        except FileNotFoundError:
            return None
        except OSError as error:
            return error

    def _put(self, item: tuple[Place, Conditioning]) -> Exception | None:
        place, value = item
        try:
            metadata = {**self._about(place), "digest": _digest(value)}
            self.store.put(self._name(place), safetensors.torch.save(value, metadata))
        except Exception as error:  # no row is to fail for what it could do without
            return error
        return None

    def _about(self, place: Place) -> dict[str, str]:
        """What a file is of."""
        (text, negative, fields), slot = place
        about = {"format": FORMAT, "key": self._key(place), "encoder": self.encoder}
        about |= {"negative": json.dumps(negative), "fields": json.dumps(dict(fields), sort_keys=True)}
        return about | ({"prompt": text} if text is not None else {}) | ({"slot": str(slot)} if self.fixed else {})

    def _key(self, place: Place) -> str:
        (text, negative, fields), slot = place
        of_it = self.files_of(text or "", **dict(fields))
        key = [FORMAT, self.folder, text, negative, dict(fields), slot, *([of_it] if of_it else [])]
        return _hash(json.dumps(key, sort_keys=True))

    def _name(self, place: Place) -> str:
        key = self._key(place)
        return f"{self.folder}/{key[:2]}/{key}.safetensors"


def _conditioning(data: bytes, about: Mapping[str, str]) -> Conditioning:
    """The tensors of a file that is ``about`` this. Raises ValueError, saying what else it is."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = dict(header["__metadata__"])
        found = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"is torn, or no file of a prompt cache ({one_line(error, 100)})") from error
    digest = said.pop("digest", None)
    if said != about:
        raise ValueError("is another's: its metadata says that it is of another prompt or encoder")
    if digest != _digest(found):
        raise ValueError("is damaged: its numbers are not those that were written")
    return found


def bits(tensor: Tensor) -> Tensor:
    """Its bytes, one after another."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _digest(value: Conditioning) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(value):
        digest.update(json.dumps([name, str(value[name].dtype), list(value[name].shape)]).encode())
        digest.update(bits(value[name]).numpy().tobytes())
    return digest.hexdigest()


def _hash(*texts: str) -> str:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def _name_of(device: torch.device) -> str:
    """The make of a device: others may sum in another order."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_model()}"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _warn(text: str) -> None:
    warnings.warn(f"prompt_cache: {text}", PromptCacheWarning, stacklevel=3)

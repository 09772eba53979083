"""Text encoders."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from latentmill.plugin.contract import Plugin

if TYPE_CHECKING:  # to list plugins takes none of them
    from torch import Tensor


Conditioning: TypeAlias = "dict[str, Tensor]"
"""What a text encoder hands to a denoiser, by name: every tensor has the batch axis first and one shape for all rows."""


@dataclass(frozen=True)
class TensorSpec:
    """What one prompt's tensor of a conditioning is."""

    shape: tuple[int, ...]
    """Without the batch axis."""
    dtype: str
    """As torch calls it: ``float32``, ``bfloat16``, ``int64``."""

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """What a tensor without the batch axis is."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def bytes(self) -> int:
        """What its numbers take."""
        import torch

        size: int = getattr(torch, self.dtype).itemsize
        return size * math.prod(self.shape)


class TextEncoder(Plugin, ABC):
    """Prompts to conditioning: tensors of any dtype, on any device, which are the framework's; what is not finite is an error."""

    reads: Mapping[str, str | None] = {}
    """What it does with other tools' syntax, by the names in ``latentmill.syntax.SYNTAXES``: None for a kind that it reads as it is
    meant, else what a person should do instead. Kinds that are not here are read as words."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], *_: Any, **fields: Any) -> Conditioning:
        """Conditioning of B prompts. ``""`` is the unconditional prompt. ``fields``: its ``row_fields``, of one value for all.

        Called for prompts that ``check`` has passed. Shapes behind the batch axis are the same for all prompts.

        What a prompt becomes is kept, across batches, and across runs for a job with ``prompt_cache``: so each prompt is asked
        for once, in whatever company, and none at all if it is known. For ``deterministic`` jobs a prompt's bits must follow
        from its text, its slot in the call and the call's size alone, never from the other prompts of the call: 8-bit
        quantization that picks outliers over all rows of a call (bitsandbytes' ``load_in_8bit``) doesn't hold that.
        """

    def encode_negative(self, prompts: Sequence[str | None], *_: Any, **fields: Any) -> Conditioning:
        """Conditioning of what a picture is guided away from: ``encode``'s, unless the model treats it otherwise.

        None is a row that gives no negative prompt, which is encoded as an empty one, unless the model has something else for it.
        """
        return self.encode([prompt or "" for prompt in prompts], **fields)

    def conditioning_spec(self) -> Mapping[str, TensorSpec] | None:
        """What ``encode`` makes of one prompt, by name, as it will be once weights are loaded; None: it can't be said. Needs no weights.

        ``plan`` reckons by it how large a dataset of encoded prompts will be, before anything is made.
        """
        return None

    def check(self, prompt: str) -> None:
        """Raise RowError, naming the cause, for a prompt that can't be encoded. Needs no weights. A worker that has asked may keep the answer, unless it is an error."""

    def warn(self, prompt: str) -> str:
        """What of a prompt that ``check`` has passed will not be read, or "": it stands in the row's ``warning``.

        The same words for all prompts of a kind, so that rows can be counted by them. Needs no weights. Asked once a text and
        worker, as ``check`` is: what is said follows from the text alone.
        """
        return ""

    def fingerprint_of(self, prompt: str, **fields: Any) -> str:
        """Of what a prompt makes the encoder read beside what ``fingerprint`` is of, as a file that it names; "" of one that names none.

        By it a ``prompt_cache`` tells apart what one prompt became with two contents of such a file. Needs no weights.
        """
        return ""

"""Prompts to chunks of tokens, each with its weight, as ComfyUI cuts and fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from latentmill_comfy import prompts
from latentmill_comfy.embeddings import Embeddings

Token: TypeAlias = "tuple[int | Tensor, float]"
"""A number of the vocabulary, or a textual inversion's vector, of this network's width or another's, and its weight."""
TokenChunk: TypeAlias = "list[Token]"
"""What the network sees at once."""

UNBROKEN = 8
"""Tokens from which on a piece of text is cut where a chunk ends; a shorter one goes to the next chunk whole."""


@dataclass(frozen=True)
class Filling:
    """How one text encoder's chunks are filled."""

    begins: bool
    """Whether a chunk begins with a token of its own."""
    pad: int | None
    """The token that fills up; None: the one that ends a chunk."""
    least: int = 0
    """Tokens that the last chunk has at least."""
    full: bool = True
    """Whether chunks are filled up to the network's length, and cut there."""


class Chunks:
    """Of one text encoder: its tokenizer, and the width and length that its network takes."""

    def __init__(
        self, key: str, tokenizer: Any, filling: Filling, width: int, length: int, embeddings: Embeddings
    ) -> None:
        self.key, self.tokenizer, self.filling, self.width, self.length = key, tokenizer, filling, width, length
        self.embeddings = embeddings
        empty = list(tokenizer("")["input_ids"])
        self.begin = empty[:1] if filling.begins else []
        self.end: int = empty[len(self.begin)]
        self.pad = self.end if filling.pad is None else filling.pad

    def read(self, prompt: str) -> list[TokenChunk]:
        """The chunks of a prompt, one at least. Raises RowError."""
        filling, begin, end = self.filling, [(token, 1.0) for token in self.begin], (self.end, 1.0)
        chunks: list[TokenChunk] = [list[Token](begin)]
        for group in self._groups(prompt):
            breaks = len(group) >= UNBROKEN
            while group:
                room = self.length - 1 - len(chunks[-1]) if filling.full else len(group)
                if len(group) <= room:
                    chunks[-1] += group
                    break
                fill = group[:room] if breaks else []
                group = group[len(fill) :]
                chunks[-1] += [*fill, end, *[(self.pad, 1.0)] * (room - len(fill))]
                chunks.append(list(begin))
        last = chunks[-1]
        last.append(end)
        last += [(self.pad, 1.0)] * (max(filling.least, self.length if filling.full else 0) - len(last))
        return chunks

    def _groups(self, prompt: str) -> list[list[Token]]:
        groups: list[list[Token]] = []
        for part in prompts.read(prompt, self.embeddings.exists):
            if isinstance(part, prompts.WeightedWords):
                numbers = self.tokenizer(part.text)["input_ids"]
                groups.append([(number, part.weight) for number in numbers[len(self.begin) : -1]])
            else:
                vectors = self.embeddings.vectors(part.name, self.key, self.width)
                groups.append([(vector, part.weight) for vector in vectors])
        return groups

    def empty(self, length: int) -> list[int]:
        """What weights are measured against: no words, as long as the longest chunk, and never shorter than its ends."""
        ends = [*self.begin, self.end]
        return ends + [self.pad] * (length - len(ends))


def weighs(chunks: Sequence[TokenChunk]) -> bool:
    """Whether any token has a weight of its own."""
    return any(weight != 1.0 for chunk in chunks for _, weight in chunk)

"""The text encoder: a vocabulary of words, and a small transformer over them.

"A red star, left of a blue ring on a yellow background" reads as: red star left blue ring on yellow background. Case
and punctuation don't matter; the words in FILLERS may be written or left out. The empty prompt means "any picture".
"""

from __future__ import annotations

import difflib
import re

import torch
from torch import Tensor, nn

from latentmill.plugin import RowError
from latentmill_shapes.draw import COLOURS, SHAPES

LENGTH = 12
"""Tokens of every encoded prompt: a start token, the words, padding."""
WIDTH, POOLED = 64, 192
"""Channels of a token, and of the whole prompt."""

FILLERS = frozenset({"a", "an", "the", "of", "to"})
"""Words that the captions use and that change no picture."""

PAD, START = 0, 1
VOCABULARY: tuple[str, ...] = (
    "<pad>",
    "<start>",
    *COLOURS,
    *SHAPES,
    "above",
    "below",
    "left",
    "right",
    "on",
    "background",
)
_TOKEN = {word: token for token, word in enumerate(VOCABULARY)}


def tokenise(prompt: str) -> list[int]:
    """The LENGTH tokens of a prompt, padded.

    Raises RowError, naming the word, for a word outside the vocabulary, and for a prompt of too many words.
    """
    words = [w for w in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", prompt.lower()) if w not in FILLERS]
    known = [w for w in VOCABULARY if not w.startswith("<")]
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; it knows {', '.join(sorted(known))}"
            raise RowError(f"unknown word {word!r} in prompt {prompt!r}{hint}")
    if len(words) > LENGTH - 1:
        raise RowError(f"prompt of {len(words)} words, {LENGTH - 1} at most (besides a, an, the, of, to): {prompt!r}")
    return [START, *(_TOKEN[w] for w in words)] + [PAD] * (LENGTH - 1 - len(words))


def drawn(*shape: int, deviation: float = 1.0) -> Tensor:
    """Normally distributed numbers. Nothing is drawn on the meta device: torch would import its compiler for it, for a second."""
    numbers = torch.empty(shape)
    return numbers if numbers.is_meta else numbers.normal_(0, deviation)


class TextTransformer(nn.Module):
    """Tokens [B, LENGTH] to (embeds [B, LENGTH, width], pooled [B, pooled]).

    `pooled` reads all positions side by side, not their mean, so which colour goes with which shape survives.
    """

    def __init__(self, width: int = WIDTH, pooled: int = POOLED) -> None:
        super().__init__()
        self.token = nn.Embedding.from_pretrained(drawn(len(VOCABULARY), width), freeze=False)
        self.position = nn.Parameter(drawn(LENGTH, width, deviation=0.5))
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm3 = nn.LayerNorm(width)
        self.pool = nn.Sequential(nn.Linear(LENGTH * width, pooled), nn.SiLU(), nn.Linear(pooled, pooled))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token(tokens) + self.position
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = self.norm3(x + self.mlp(self.norm2(x)))
        return x, self.pool(x.flatten(1))

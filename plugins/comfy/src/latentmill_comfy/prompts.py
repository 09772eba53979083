r"""Prompts as ComfyUI reads them: parentheses, weights, escapes, embeddings. Text alone, no tokens yet.

``(word)`` is a weight of 1.1 times that of what is around it, ``(word:1.3)`` one of 1.3 whatever is around it; ``\(`` and ``\)`` are
parentheses. ``embedding:name`` at the beginning, or behind a blank or a line break, is a textual inversion. Nothing else is special.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from latentmill.plugin import RowError

EMBEDDING_MARK = "embedding:"
EMPHASIS = 1.1
"""What parentheses without a number multiply by."""
DEEPEST = 300
"""Parentheses in each other that a prompt may have: each is a call."""
_ESCAPED = re.compile(r"\\([()])")
_PARENTHESIS = re.compile(r"\\?[()]")


@dataclass(frozen=True)
class WeightedWords:
    """Text that is tokenised at once, and its weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Embedding:
    """A textual inversion in the place of words."""

    name: str
    weight: float


def read(prompt: str, exists: Callable[[str], bool]) -> list[WeightedWords | Embedding]:
    """What a prompt says, in its order. ``exists`` knows which embeddings there are.

    Raises RowError for an embedding that there is not, for parentheses in more depth than can be read, and for halves of characters.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the prompt is no text: {prompt[error.start]!a} is half of a character") from None
    found: list[WeightedWords | Embedding] = []
    for text, weight in _weighted(prompt, 1.0):
        for part in _parted(_ESCAPED.sub(r"\1", text)):
            if part.startswith(EMBEDDING_MARK):
                name, part = _named(part.removeprefix(EMBEDDING_MARK).strip("\n"), exists)
                found.append(Embedding(name, weight))
            if part:
                found.append(WeightedWords(part, weight))
    return found


def _weighted(text: str, weight: float, depth: int = 0) -> Iterator[tuple[str, float]]:
    if depth > DEEPEST:
        raise RowError(f"the prompt has parentheses in each other, more than {DEEPEST}")
    for part in _groups(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")" or part[-2] == "\\":
            yield part, weight
            continue
        inside, its_own = part[1:-1], weight * EMPHASIS
        before, _, number = inside.rpartition(":")
        if before:
            with suppress(ValueError):
                its_own, inside = float(number), before
        yield from _weighted(inside, its_own, depth + 1)


def _groups(text: str) -> Iterator[str]:
    """Cut before a parenthesis that opens where none is open, and behind the one that closes it.

    One that closes what was never opened counts: the next that opens then opens nothing.
    """
    begin = depth = 0
    for found in _PARENTHESIS.finditer(text):
        if found[0] == "(":
            if depth == 0 and found.start() > begin:
                yield text[begin : found.start()]
                begin = found.start()
            depth += 1
        elif found[0] == ")":
            depth -= 1
            if depth == 0:
                yield text[begin : found.end()]
                begin = found.end()
    if begin < len(text):
        yield text[begin:]


def _parted(text: str) -> list[str]:
    """The text, cut before each embedding that a blank or a line break precedes, which goes."""
    first, *others = re.split(rf"[ \n]{EMBEDDING_MARK}", text)
    return [part for part in (first, *(EMBEDDING_MARK + other for other in others)) if part]


def _named(text: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """The embedding's name, and what is left as words: all behind the first blank, and commas at the name's end."""
    name, *others = text.split() or [""]
    rest = " ".join(others)
    if name and exists(name):
        return name, rest
    bare = name.strip(",")
    if bare and bare != name and exists(bare):
        return bare, f"{name[len(bare) :]} {rest}"
    raise RowError(f"the prompt asks for embedding:{bare}, and there is no such file in the folder of embeddings")

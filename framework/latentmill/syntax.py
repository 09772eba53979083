"""Prompts in another tool's language: what a text encoder would read as words, and what is none.

Only what is clearly such counts: a bracket, a ratio or a word in capitals may be meant as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LOOKED_AT = 10_000
"""Characters of a prompt that are looked at: beyond, no tool's users write by hand."""

_WEIGHT = r"[-+]?(?:\d?\.\d+|\d)"

SYNTAXES: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "lora": ("a LoRA as <lora:name:0.8>", ("<",), r"(?i)<(?:lora|lyco|lycoris|locon|hypernet):[^<>\n]+>"),
    "weight": ("a weight as (word:1.2)", (":",), rf"\((?!\s*:)[^()\n]*[^()\s\d]\s*:\s*{_WEIGHT}\s*\)"),
    "compel": (
        "a weight as (word)1.2 or (word)++",
        (").", ")0", ")1", ")2", ")+", ")-"),
        r"(?<!\w)\([^()\n]+\)(?:\d?\.\d+|\+++|--++)(?![\w-])",
    ),
    "emphasis": (
        "emphasis as ((word))",
        ("((", "[[", "{{"),
        r"\(\([^()\n]+\)\)|\[\[[^\[\]\n]+\]\]|\{\{[^{}|\n]+\}\}",
    ),
    "schedule": (
        "words for some of the steps as [cat:dog:0.5]",
        ("[",),
        r"\[(?=[^\[\]\n]*[A-Za-z])[^\[\]:\n]*:[^\[\]:\n]*:\s*(?:\d+|\d*\.\d+)\s*\]|\[[^\[\]|\n]+\|[^\[\]\n]+\]",
    ),
    "break": ("the keyword BREAK", ("BREAK",), r"(?<![^\s,.])BREAK(?![^\s,.])"),
    "and": ("the keyword AND", ("AND",), rf"(?<=\s)AND\s+[a-z(]|(?<=\s)AND:{_WEIGHT}"),
    "choice": ("a choice as {cat|dog}", ("{",), r"\{[^{}|\n]*\|[^{}\n]*\}"),
    "wildcard": ("a wildcard as __name__", ("__",), r"(?<![\w/])__[A-Za-z0-9][\w*/.-]*?__(?!\w)"),
    "embedding": ("an embedding as embedding:name", ("embedding:",), r"(?<!\w)embedding:[\w./\\-]+"),
    "parameter": (
        "a parameter as --ar 16:9 or a weight as word::2",
        ("--", "::"),
        r"(?<!\S)--(?:(?:ar|aspect)\s+\d+:\d+|(?:v|version|niji|stylize|s|chaos|c|seed|q|quality|iw|weird|stop)\s+\.?\d"
        r"|style\s+raw|(?:tile|hd|testp?|creative|upbeta|uplight)(?:\s*$|\s+--))|[\w)]::-?[\d.]*\d(?![^\s,])",
    ),
}
"""By name: what a person is told that it is; characters, of which it has some, that are quick to look for; its pattern."""

_PATTERNS = {kind: (marks, re.compile(pattern)) for kind, (_, marks, pattern) in SYNTAXES.items()}


def found(prompt: str) -> list[str]:
    """The kinds of SYNTAXES that a prompt holds."""
    prompt = prompt[:LOOKED_AT]
    kinds = [
        kind
        for kind, (marks, pattern) in _PATTERNS.items()
        if any(mark in prompt for mark in marks) and pattern.search(prompt)
    ]
    if {"break", "and"} & {*kinds} and not _in_small_letters(prompt):
        kinds = [kind for kind in kinds if kind not in ("break", "and")]
    return kinds


def told(prompt: str, reads: Mapping[str, str | None]) -> list[str]:
    """What a person is told of a prompt, a line for each kind, the same for all prompts; ``reads`` is a text encoder's."""
    lines = []
    for kind in found(prompt):
        advice = reads.get(kind, "")
        if advice is not None:
            lines.append(f"the prompt holds {SYNTAXES[kind][0]}, which is read as words{advice and f': {advice}'}")
    return lines


def _in_small_letters(prompt: str) -> bool:
    """Whether most letters are small: A CAT AND A DOG is a prompt of someone who shouts."""
    letters = [letter for letter in prompt if letter.isalpha()]
    return sum(map(str.islower, letters)) > len(letters) / 2

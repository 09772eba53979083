"""Which of a workflow's texts are the row's own: its prompt, its negative prompt, or further columns; the others stay words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from latentmill.comfy.inputs import RefusedError
from latentmill.comfy.links import Cond, Guider, Setting, Tree, Words

LISTS = {"combine", "concat", "average"}
"""Operations whose parts stand in a list; the others take one, or texts by name."""
OTHER_SIDE = {"prompt": ("negative_prompt", "negative_text"), "negative_prompt": ("prompt", "positive_text")}
"""Of each text that is a row's own, that of the other side, and what it is called where this side has it, too."""


@dataclass
class Texts:
    """The texts of a job, as its samplers tell of them, the first one first."""

    fields: dict[str, Setting] = field(default_factory=dict)
    """``prompt`` and ``negative_prompt``, as far as there are."""
    more: dict[str, Setting] = field(default_factory=dict)
    """Further texts of rows, by the names that they have there."""
    places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Of each of them: the inputs that it gives, by node id and name."""
    notices: list[str] = field(default_factory=list)
    """What is likely not meant."""

    def settings(self, guider: Guider) -> dict[str, Any]:
        """The settings ``positive`` and ``negative`` of the text encoder for a sampler; none where they are plain. Raises RefusedError."""
        found: dict[str, Any] = {}
        sides = [("positive", "prompt", guider.positive), ("negative", "negative_prompt", guider.negative)]
        for side, name, cond in sides:
            if cond is None:
                continue
            if name not in self.fields and (own := _own(cond, self._taken(name))) is not None:
                self.fields[name] = own
            tree = self._tree(cond.tree, name)
            if tree != {"text": name}:
                found[side] = tree
        if self.more:
            found["texts"] = [*self.more]
        return found

    def _taken(self, name: str) -> str | None:
        """The column that the other side's text comes from."""
        other = self.fields.get("prompt") if name == "negative_prompt" else None
        return other.column if other is not None else None

    def _tree(self, tree: Tree, name: str, hidden: bool = False) -> Any:
        if tree.operation == "text":
            [(_, words)] = tree.parts
            assert isinstance(words, Words)
            return self._leaf(words, name, hidden)
        hidden = hidden or tree.operation == "zero_out"
        parts = {
            key: self._tree(part, name, hidden) if isinstance(part, Tree) else self._leaf(part, name, hidden)
            for key, part in tree.parts
        }
        if tree.operation in LISTS:
            return {tree.operation: [*parts.values()], **tree.numbers}
        if [*parts] == ["of"]:
            return {tree.operation: parts["of"], **tree.numbers}
        return {tree.operation: {**parts, **tree.numbers}}

    def _leaf(self, words: Words, name: str, hidden: bool) -> dict[str, str]:
        text = words.text
        if text == self.fields.get(name):
            return self._own(name, text)
        other, again = OTHER_SIDE[name]
        if text.column is not None and text == self.fields.get(
            other
        ):  # an encoder is told the text of one side at a time
            self.more[again] = text
            return self._own(again, text)
        if text.column is None or hidden:  # of what is zeroed out nothing is left but its length
            own = self.fields.get(name)
            if not hidden and own is not None and own.value == text.value and text.place is not None:
                as_is = f"{words.node} keeps its text, which is the one that the column {own.column} replaces elsewhere"
                self.notices.append(f"{as_is}: map.{'.'.join(text.place)}={own.column} replaces it, too")
            return {"words": str(text.value)}
        if text.column in ("prompt", "negative_prompt"):
            raise RefusedError(
                words.node,
                f"its text comes from the column {text.column}, which another text of this side stands in the way of",
            )
        self.more.setdefault(text.column, text)
        return self._own(text.column, text)

    def _own(self, name: str, text: Setting) -> dict[str, str]:
        if text.place is not None and text.place not in (places := self.places.setdefault(name, [])):
            places.append(text.place)
        return {"text": name}


def _own(cond: Cond, taken: str | None) -> Setting | None:
    """The text of a conditioning that is the row's own: the first that a column gives, or else the first; None if all are zeroed out."""
    leaves = [words.text for words in _leaves(cond.tree)]
    columns = [text for text in leaves if text.column is not None and text.column != taken]
    return next(iter([*columns, *(text for text in leaves if text.column is None)]), None)


def _leaves(tree: Tree) -> Iterator[Words]:
    """The texts of a tree of which something is left."""
    if tree.operation == "zero_out":
        return
    for _, part in tree.parts:
        if isinstance(part, Words):
            yield part
        else:
            yield from _leaves(part)

"""A node on its way into a job: what it is given, checked as it is asked for, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from latentmill.comfy.links import Setting
from latentmill.comfy.workflow import Link, Value, WorkflowNode
from latentmill.errors import JobError
from latentmill.text import escaped

Flowing = TypeVar("Flowing")

IDLE = {"upload", "filename_prefix", "speak_and_recognation", "choose file to upload", "control_after_generate"}
"""Inputs that change no picture: buttons of the editor, and the names of files."""
LOADED_ONCE = "model files are loaded once, for all rows"
LOADED = "it is added to the weights once, for all rows"
BUILT = "it is the same for all rows"


class RefusedError(JobError):
    """A node that can't become part of a job; its text names the node."""

    def __init__(self, node: WorkflowNode, why: str) -> None:
        super().__init__(f"{node}: {why}")
        self.node, self.why = node, why


class BlockedError(RefusedError):
    """A node that waits for another, which was refused."""


class Inputs:
    """What a node is given. Each input is asked for by name, once; those that nobody asks for are not understood."""

    def __init__(self, node: WorkflowNode, linked: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        """``linked``: what comes over the links; ``columns``: of the source, by the inputs whose values they give."""
        self.node, self._linked, self._columns = node, linked, columns
        self._asked: set[str] = set()

    def take(self, name: str, kind: type[Flowing]) -> Flowing:
        """What comes over a link. Raises RefusedError if that is nothing, or of another kind."""
        found = self._linked.get(name)
        self._asked.add(name)
        if self._columns.get(name) is not None:
            raise self.refuse(f"{name} is a link, and no column can give it")
        if not isinstance(found, kind):
            there = "is not linked" if name not in self._linked else "is linked to something else than it needs"
            raise self.refuse(f"{name} {there}")
        return found

    def may_take(self, name: str, kind: type[Flowing]) -> Flowing | None:
        """The same, where a link may be missing."""
        return self.take(name, kind) if name in self.node.inputs else None

    def text(self, name: str) -> Setting:
        """Text that may differ from row to row."""
        return self._setting(name, str)

    def whole(self, name: str) -> Setting:
        """A whole number that may differ from row to row."""
        return self._setting(name, int)

    def real(self, name: str) -> Setting:
        """A number that may differ from row to row."""
        return self._setting(name, float)

    def fixed(self, name: str, kind: type[Any], why: str = BUILT, default: Any = None) -> Any:
        """A value that holds for all rows; ``why`` it does."""
        if default is not None and name not in self.node.inputs:
            self._asked.add(name)
            return default
        found = self._setting(name, kind)
        if found.column is not None:
            raise self.refuse(f"{name} can't come from the column {found.column}: {why}")
        return found.value

    def one_of(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """A choice that holds for all rows."""
        found = str(self.fixed(name, str, default=default))
        if found not in known:
            raise self.refuse(f"{name} {found!r:.60} is not supported; {', '.join(known)} are")
        return found

    def refuse(self, why: str) -> RefusedError:
        """The error that says so of this node."""
        return RefusedError(self.node, why)

    def require_all_asked(self) -> None:
        """Raises RefusedError for an input that the node's class doesn't have, as far as we know it, or that no column may give."""
        for name in self._columns:
            if name not in self.node.inputs:
                raise self.refuse(
                    f"it has no input {escaped(name)}; it has {', '.join(map(escaped, self.node.inputs))}"
                )
            if name not in self._asked:
                raise self.refuse(f"{escaped(name)} can't come from a column")
        for name in self.node.inputs:
            if name not in self._asked and name not in IDLE:
                raise self.refuse(f"its input {escaped(name)} is not understood")

    def _setting(self, name: str, kind: type[Any]) -> Setting:
        self._asked.add(name)
        if name not in self.node.inputs:
            raise self.refuse(f"it has no input {name}")
        value: Value = self.node.inputs[name]
        column, place = self._columns.get(name), (self.node.id, name)
        if isinstance(value, Link):
            found = self._linked.get(name)
            if not isinstance(found, Setting):
                raise self.refuse(f"{name} is linked to what is no value")
            value, place = found.value, (found.place if column is None else None) or place
            column = column or found.column
        return Setting(self._read(name, value, kind), column, place)

    def _read(self, name: str, value: Any, kind: type[Any]) -> Any:
        """The value as ComfyUI would take it: ``int(value)``, ``float(value)`` or ``str(value)``."""
        wrong = self.refuse(f"{name} must be {_IN_WORDS[kind]}, not {value!r:.60}")
        if isinstance(value, (list, tuple, Mapping)) or value is None:
            raise wrong
        try:
            found = kind(value)
        except (ValueError, OverflowError) as error:
            raise wrong from error
        if isinstance(found, float) and not math.isfinite(found):
            raise wrong
        return found


_IN_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

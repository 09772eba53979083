"""What a workflow's job is told beside the file: ``comfy.KEY=VALUE``, and ``map.NODE.INPUT=COLUMN``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from latentmill.comfy.workflow import Workflow
from latentmill.errors import JobError
from latentmill.text import near

MAPPED = re.compile(r"""map\.(?:"([^"]*)"|'([^']*)'|([^.=]+))\.([^.=]+)=(.+)""", re.DOTALL)
COMFY_KEYS = ("models", "input", "output", "seed", "metadata", "tokenizers")
CHOICES = {"seed": ("row", "workflow"), "metadata": ("true", "false")}


@dataclass(frozen=True)
class Options:
    """Of one workflow."""

    models: str | None = None
    """ComfyUI's folder of models."""
    input: str | None = None
    """ComfyUI's folder of pictures; None: ``input`` beside the models."""
    output: str | None = None
    """The one output that is made, by id or title; None: all that are saved."""
    seed: str = "row"
    """Whose seed a row of a source has that brings none: its own, or the workflow's."""
    tokenizers: str | None = None
    """A folder with the tokenizers, for all text encoders; None: where they look by themselves."""
    metadata: str = "false"
    """Whether picture files carry the workflow, as ComfyUI's do."""
    columns: dict[tuple[str, str], str] = field(default_factory=dict)
    """The source's columns, by node id and input."""

    def input_folder(self) -> str:
        """Where LoadImage's pictures are."""
        beside = os.path.join(os.path.dirname(os.path.normpath(self.models or "models")), "input")
        return self.input or beside


def split(overrides: Sequence[str], workflow: Workflow) -> tuple[Options, list[str]]:
    """The options among the overrides, and the rest. Raises JobError."""
    told: dict[str, str] = {}
    columns: dict[tuple[str, str], str] = {}
    rest = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key.startswith("comfy."):
            name = key.removeprefix("comfy.")
            if name not in COMFY_KEYS:
                raise JobError(f"there is no key {key}{near(name, COMFY_KEYS)}; there are: {', '.join(COMFY_KEYS)}")
            if not value or (name in CHOICES and value not in CHOICES[name]):
                raise JobError(f"{key} must be {' or '.join(CHOICES.get(name, ['a folder']))}, not {value!r}")
            told[name] = os.path.expanduser(value) if name in ("models", "input", "tokenizers") else value
        elif key.startswith("map."):
            if not (match := MAPPED.fullmatch(word)):
                raise JobError(
                    f'{word!r}: map.NODE.INPUT=COLUMN is expected, as in map.6.text=prompt or map."Positive".text=prompt'
                )
            node = workflow.find(match[1] or match[2] or match[3])
            columns[node.id, match[4]] = match[5]
        else:
            rest.append(word)
    return Options(**told, columns=columns), rest

"""What ``latentmill comfy`` says of a workflow, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentmill.comfy.flowing import (
    Clip,
    Cond,
    Decoded,
    Empty,
    Encoded,
    Guider,
    Loaded,
    LoadedMask,
    Model,
    Noise,
    Output,
    Sampled,
    Sampler,
    Scaled,
    ScaledLatent,
    Setting,
    Sigmas,
    UpscaleModel,
    Vae,
)
from latentmill.comfy.graph import Graph
from latentmill.comfy.nodes import OUTPUTS
from latentmill.comfy.reading import BlockedError, RefusedError
from latentmill.comfy.workflow import WorkflowNode
from latentmill.text import escaped, plural


@dataclass(frozen=True)
class Explanation:
    """A workflow, for people."""

    rows: Sequence[Sequence[str]]
    """Of each node its id, class, title, and what it becomes."""
    lines: Sequence[str]
    """What is to be said of all."""
    runs: bool
    """Whether there is a job in it."""


def table(graph: Graph) -> list[list[str]]:
    """Of each node its id, class, title, and what it becomes."""
    return [
        [
            escaped(node.id),
            escaped(node.type),
            escaped(node.title) if node.title != node.type else "",
            _said(node, graph),
        ]
        for node in graph.workflow.nodes.values()
    ]


def summary(graph: Graph) -> str:
    """How many nodes are refused."""
    refused = [each.node.type for each in graph.refused]
    kinds = ", ".join(dict.fromkeys(map(escaped, refused)))
    return f"{plural(len(refused), 'node')} of {len(graph.found)} can't become part of a job: {kinds}"


def _said(node: WorkflowNode, graph: Graph) -> str:
    found = graph.found.get(node.id)
    if found is None:
        return (
            "nothing: a preview, which is not kept"
            if node.type in OUTPUTS
            else "nothing: what is saved does not hang on it"
        )
    if isinstance(found, BlockedError):
        return f"({found.why})"
    if isinstance(found, RefusedError):
        return f"REFUSED: {found.why}"
    return ", ".join(dict.fromkeys(said for each in found if (said := _of(each))))


def _of(each: Any) -> str:
    """What a node's output is in a job, in a few words."""
    if isinstance(each, (Model, Clip, Vae)):
        kind = {Model: "denoiser", Clip: "text_encoder", Vae: "vae"}[type(each)]
        return f"{kind} {_settings(each.settings)}"
    if isinstance(each, Cond):
        return "conditioning"
    if isinstance(each, Sampled):
        how = f"{_value(each.sampler.name)}, {each.sigmas.settings['scheduler']}, {_value(each.sigmas.steps)} steps"
        return f"stage denoise: {how}, guidance {_value(each.guider.cfg)}"
    if isinstance(each, Setting):
        return f"the value {_value(each)}"
    if isinstance(each, Loaded):
        return f"the row's image: {_value(each.image)}"
    if isinstance(each, Empty):
        return f"{_value(each.width)}x{_value(each.height)} pixels, {plural(each.batch, 'picture')}"
    return SAID_OF.get(type(each), "")


SAID_OF = {
    LoadedMask: "",
    Decoded: "stage decode",
    Encoded: "stage encode",
    Scaled: "stage image_upscale",
    ScaledLatent: "stage latent_upscale",
    UpscaleModel: "the model of image_upscale",
    Sampler: "scheduler",
    Sigmas: "grid of the scheduler",
    Guider: "guidance",
    Noise: "seed",
    Output: "the dataset's image",
}


def _value(setting: Setting) -> str:
    column = f" (column {escaped(setting.column)})" if setting.column is not None else ""
    value = f"{setting.value:g}" if isinstance(setting.value, float) else escaped(str(setting.value))
    return f"{value:.60}{column}"


def _settings(settings: Any) -> str:
    return escaped(", ".join(f"{name}: {value}" for name, value in settings.items()))

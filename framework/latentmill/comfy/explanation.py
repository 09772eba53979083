"""What ``latentmill comfy`` says of a workflow, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmill.comfy.config import recipes_of
from latentmill.comfy.graph import Graph, look
from latentmill.comfy.inputs import BlockedError, RefusedError
from latentmill.comfy.job import Recipe
from latentmill.comfy.links import (
    Clip,
    Cond,
    Empty,
    Encoded,
    Loaded,
    LoadedMask,
    Model,
    Output,
    Sampled,
    Sampler,
    Setting,
    Sigmas,
    UpscaleModel,
    Vae,
    Words,
)
from latentmill.comfy.nodes import OUTPUTS
from latentmill.comfy.options import split
from latentmill.comfy.workflow import WorkflowNode, read
from latentmill.errors import JobError
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


def explained(job: str, overrides: Sequence[str]) -> Explanation:
    """What ``latentmill comfy`` says of a workflow's file. Raises JobError for what is no workflow at all."""
    path = Path(job).expanduser()
    if not path.is_file():
        raise JobError(f"there is no file {job}")
    try:
        workflow = read(path)
        options, _ = split(overrides, workflow)
        graph = look(workflow, options.columns, options.output)
    except JobError as error:
        raise JobError(f"{job}: {error}") from error
    if graph.refused:
        return Explanation(_table(graph), [_summary(graph)], False)
    try:
        recipes = recipes_of(graph, options)
    except JobError as error:
        return Explanation(_table(graph), [str(error)], False)
    pictures = sum(len(each.batch) for each in recipes)
    rows = f"a row makes {plural(pictures, 'picture')}" if not recipes[1:] else f"{plural(pictures, 'picture')}"
    flow = [stage if isinstance(stage, str) else stage.get("as", stage["name"]) for stage in recipes[0].config["flow"]]
    return Explanation(_table(graph, recipes), [f"flow: {' > '.join(flow)}", rows], True)


def _table(graph: Graph, recipes: Sequence[Recipe] = ()) -> list[list[str]]:
    """Of each node its id, class, title, and what it becomes in the jobs of these recipes."""
    stages = {id: stage for each in recipes for id, stage in each.stages.items()}
    places = {place: name for each in recipes for name, at in each.places.items() for place in at}
    return [
        [
            escaped(node.id),
            escaped(node.type),
            escaped(node.title) if node.title != node.type else "",
            _said(node, graph, stages, places),
        ]
        for node in graph.workflow.nodes.values()
    ]


def _summary(graph: Graph) -> str:
    """How many nodes are refused."""
    refused = [each.node.type for each in graph.refused]
    kinds = ", ".join(dict.fromkeys(map(escaped, refused)))
    return f"{plural(len(refused), 'node')} of {len(graph.found)} can't become part of a job: {kinds}"


def _said(node: WorkflowNode, graph: Graph, stages: Mapping[str, str], places: Mapping[tuple[str, str], str]) -> str:
    found = graph.found.get(node.id)
    if found is None:
        return "nothing: it is not kept" if node.type in OUTPUTS else "nothing: what is saved does not hang on it"
    if isinstance(found, BlockedError):
        return f"({found.why})"
    if isinstance(found, RefusedError):
        return f"REFUSED: {found.why}"
    said: dict[str, list[str]] = {}
    for each in found:
        if isinstance(each, (Model, Clip, Vae)):
            said.setdefault(_settings(each.settings), []).append(PART_NAMES[type(each)])
    parts = [f"{', '.join(names)}: {settings}" for settings, names in said.items()]
    own = [
        f"{name} is {places[at]}" for name in node.inputs if (at := (node.id, name)) in places and name != places[at]
    ]
    texts = [
        f"{name} stays as it is" for name in node.inputs if _is_words(found, name) and (node.id, name) not in places
    ]
    stage = [f"stage {stages[node.id]}"] if node.id in stages else []
    rest = [of for each in found if (of := _of(each))]
    return "; ".join(dict.fromkeys([*parts, *stage, *rest, *own, *texts]))


PART_NAMES = {Model: "denoiser", Clip: "text_encoder", Vae: "vae"}


def _is_words(found: Sequence[Any], name: str) -> bool:
    """Whether an input of this name is a text of what the node gives."""
    trees = [each.tree for each in found if isinstance(each, Cond)]
    return any(
        isinstance(part, Words) and part.text.place is not None and part.text.place[1] == name
        for tree in trees
        for _, part in tree.parts
    )


def _of(each: Any) -> str:
    """What a node's output is in a job, in a few words, beside the stage and the fields that it has become."""
    if isinstance(each, Sampled):
        return f"{each.sampler.name}, {each.sigmas.settings['scheduler']}, {_value(each.sigmas.steps)} steps, guidance {_value(each.guider.cfg)}"
    if isinstance(each, Setting):
        return f"the value {_value(each)}"
    if isinstance(each, Loaded):
        return f"the picture {_value(each.image)}"
    if isinstance(each, LoadedMask) and each.channel != "image":
        return f"the mask {_value(each.image)}"
    if isinstance(each, Encoded) and each.mask is not None:
        return "only what the mask shows is made new"
    if isinstance(each, Empty):
        return f"{_value(each.width)}x{_value(each.height)} pixels, {plural(each.batch, 'picture')}"
    return SAID_OF.get(type(each), "")


SAID_OF = {
    UpscaleModel: "the model of upscale_model",
    Sampler: "the scheduler",
    Sigmas: "the scheduler's grid",
    Output: "the dataset's image",
}


def _value(setting: Setting) -> str:
    column = f" (column {escaped(setting.column)})" if setting.column is not None else ""
    value = f"{setting.value:g}" if isinstance(setting.value, float) else escaped(str(setting.value))
    return f"{value:.60}{column}"


def _settings(settings: Any) -> str:
    return escaped(", ".join(f"{name}: {value}" for name, value in settings.items()))

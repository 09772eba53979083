"""A workflow in ComfyUI's API format: nodes by id, each with its class, its inputs, and links to other nodes' outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from latentmill.errors import JobError
from latentmill.text import escaped, near

Value: TypeAlias = Any
"""What an input holds: text, a number, true or false, or a Link."""

EXPORT = "in ComfyUI, Workflow > Export (API) writes the file that runs here (older versions: Save (API Format), once Settings > Dev mode Options is on)"


@dataclass(frozen=True)
class Link:
    """The output of another node."""

    node: str
    output: int


@dataclass(frozen=True)
class WorkflowNode:
    """A node of a workflow."""

    id: str
    type: str
    """Its class in ComfyUI."""
    title: str
    """What the editor shows; the class, if the file doesn't say."""
    inputs: Mapping[str, Value]

    def __str__(self) -> str:
        titled = f" ({escaped(self.title)})" if self.title != self.type else ""
        return f"node {escaped(self.id)} {escaped(self.type)}{titled}"

    def links(self) -> Iterator[tuple[str, Link]]:
        """The inputs that are linked, in the file's order."""
        for name, value in self.inputs.items():
            if isinstance(value, Link):
                yield name, value


@dataclass(frozen=True)
class Workflow:
    """A workflow: its nodes by id, in the file's order."""

    nodes: Mapping[str, WorkflowNode]
    content: Mapping[str, Any]
    """As the file has it: node ids, and what each holds."""

    def find(self, name: str) -> WorkflowNode:
        """The node of that id, or else of that title. Raises JobError unless it is one."""
        if name in self.nodes:
            return self.nodes[name]
        found = [node for node in self.nodes.values() if node.title == name]
        if len(found) > 1:
            raise JobError(f"{len(found)} nodes have the title {escaped(name)}: write the id, {_ids(found)}")
        if not found:
            titles = [node.title for node in self.nodes.values()]
            raise JobError(f"there is no node {escaped(name)}{near(name, [*self.nodes, *titles])}")
        return found[0]

    def upstream(self, node: WorkflowNode) -> list[WorkflowNode]:
        """The nodes on which this one hangs, itself the last, each behind those that it needs. Raises JobError for a circle, or a link to nowhere."""
        order: dict[str, WorkflowNode] = {}
        path: dict[str, Iterator[tuple[str, Link]]] = {node.id: node.links()}
        while path:
            at = [*path][-1]
            for name, link in path[at]:
                if link.node in path:
                    circle = [*path][[*path].index(link.node) :]
                    raise JobError(f"its links lead back to themselves: nodes {', '.join(map(escaped, circle))}")
                if link.node not in self.nodes:
                    raise JobError(
                        f"{self.nodes[at]}: {name} is linked to node {escaped(link.node)}, which is not there"
                    )
                if link.node not in order:
                    path[link.node] = self.nodes[link.node].links()
                    break
            else:
                order[at] = self.nodes[at]
                del path[at]
        return [*order.values()]


def read(path: Path) -> Workflow:
    """The workflow in a file. Raises JobError, of one line, if that is no workflow in the API format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise JobError(f"it is no JSON: {error}") from error
    return parse(content)


def parse(content: Any) -> Workflow:
    """The workflow that JSON holds. Raises JobError."""
    content = _unwrapped(content)
    if not isinstance(content, Mapping) or not content:
        raise JobError("it is no workflow of ComfyUI: {node id: {class_type, inputs}} is expected")
    if isinstance(content.get("nodes"), list):
        raise JobError(f"it is a workflow as ComfyUI's editor saves it, without what runs: {EXPORT}")
    nodes = {}
    if not any(_is_node(about) for about in content.values()):
        raise JobError(f"none of it is a node of a workflow, with a class_type; {EXPORT}")
    for key, about in content.items():
        if not _is_node(about):  # notes of whoever made the file; a link to one leads nowhere
            continue
        inputs, meta = about.get("inputs", {}), about.get("_meta") or {}
        title = meta.get("title") if isinstance(meta, Mapping) else None
        if not isinstance(inputs, Mapping):
            raise JobError(f"the inputs of node {escaped(key)} must be names with values")
        held = {str(of): _value(value) for of, value in inputs.items()}
        nodes[str(key)] = WorkflowNode(str(key), about["class_type"], str(title or about["class_type"]), held)
    return Workflow(nodes, content)


def _is_node(about: Any) -> bool:
    return isinstance(about, Mapping) and isinstance(about.get("class_type"), str)


def _unwrapped(content: Any) -> Any:
    """What is posted to a server, ComfyUI's or another that hands it on, holds the workflow inside."""
    for keys in (("prompt",), ("input", "workflow"), ("input", "prompt"), ("workflow",)):
        inside = content
        for key in keys:
            inside = inside.get(key) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping) and inside and "class_type" not in inside:
            return inside
    return content


def _value(value: Any) -> Value:
    if isinstance(value, Mapping) and "__value__" in value:  # how the editor writes a list that is no link
        value = value["__value__"]
        return value if not _is_link(value) else tuple(value)
    return Link(value[0], int(value[1])) if _is_link(value) else value


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and (type(value[1]) is int or (type(value[1]) is float and value[1].is_integer()))
    )


def _ids(nodes: list[WorkflowNode]) -> str:
    return " or ".join(escaped(node.id) for node in nodes)

"""A workflow, node by node: what each becomes, what is refused, and which pictures come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentmill.comfy.inputs import BlockedError, Inputs, RefusedError
from latentmill.comfy.links import Output
from latentmill.comfy.nodes import NODES, OUTPUTS, PREVIEWS, SAVED
from latentmill.comfy.workflow import Link, Workflow, WorkflowNode
from latentmill.errors import JobError


@dataclass(frozen=True)
class Graph:
    """A workflow whose nodes have been looked at, each behind those that it needs."""

    workflow: Workflow
    found: Mapping[str, Sequence[Any] | RefusedError]
    """Of the nodes that outputs hang on: what each gives, by its outputs, or why it is refused."""

    @property
    def refused(self) -> list[RefusedError]:
        """The nodes that are refused themselves, and don't just wait for one."""
        return [
            each
            for each in self.found.values()
            if isinstance(each, RefusedError) and not isinstance(each, BlockedError)
        ]

    def outputs(self) -> list[Output]:
        """The pictures that are kept, those that are one picture once. Raises RefusedError, of the first node that is refused."""
        if refused := self.refused:
            more = f" (and {len(refused) - 1} more nodes: latentmill comfy lists them)" if refused[1:] else ""
            raise RefusedError(refused[0].node, f"{refused[0].why}{more}")
        every = [each for values in self.found.values() if not isinstance(values, RefusedError) for each in values]
        found: list[Output] = []
        for each in every:
            if isinstance(each, Output) and each.image not in [other.image for other in found]:
                found.append(each)
        return found


def look(workflow: Workflow, columns: Mapping[tuple[str, str], str], chosen: str | None = None) -> Graph:
    """Look at all nodes that outputs hang on. ``columns``: of the source, by node id and input; ``chosen``: the one output, by id or title.

    A preview is an output only if it is chosen, or nothing is saved. Raises JobError for a workflow without outputs, or whose links
    lead nowhere or back to themselves.
    """
    ends = [workflow.find(chosen)] if chosen is not None else []
    for kinds in (SAVED, PREVIEWS):
        ends = ends or [node for node in workflow.nodes.values() if node.type in kinds]
    if not ends or ends[0].type not in OUTPUTS:
        where = f"{ends[0]} is no output" if ends else f"there is no {SAVED[0]} or {PREVIEWS[0]} in it"
        raise JobError(f"{where}, and only what they hang on is run{_other_ends(workflow)}")
    found: dict[str, Sequence[Any] | RefusedError] = {}
    for end in ends:
        for node in workflow.upstream(end):
            if node.id not in found:
                own = {name: column for (of, name), column in columns.items() if of == node.id}
                try:
                    found[node.id] = _outputs(node, found, own)
                except RefusedError as error:
                    found[node.id] = error
                except RecursionError:
                    found[node.id] = RefusedError(node, "the nodes before it stand in too long a line")
    return Graph(workflow, found)


def _outputs(
    node: WorkflowNode, found: Mapping[str, Sequence[Any] | RefusedError], columns: Mapping[str, str]
) -> Sequence[Any]:
    """What a node gives, by its outputs. Raises RefusedError."""
    convert = NODES.get(node.type)
    if convert is None:
        raise RefusedError(node, "nodes of this class are not supported")
    linked = {}
    for name, link in node.links():
        values = found[link.node]
        if isinstance(values, RefusedError):
            raise BlockedError(node, f"{name} waits for node {link.node}")
        linked[name] = _output(node, name, link, values)
    given = Inputs(node, linked, columns)
    outputs = convert(given)
    given.require_all_asked()
    return outputs


def _output(node: WorkflowNode, name: str, link: Link, values: Sequence[Any]) -> Any:
    if not 0 <= link.output < len(values):
        raise RefusedError(node, f"{name} is linked to output {link.output} of node {link.node}, which we don't have")
    return values[link.output]


def _other_ends(workflow: Workflow) -> str:
    """The nodes that nothing hangs on, for people."""
    taken = {link.node for node in workflow.nodes.values() for _, link in node.links()}
    ends = [str(node) for node in workflow.nodes.values() if node.id not in taken]
    return f"; at its ends are {', '.join(ends[:5])}" if ends else ""

"""What Ray raises for a call whose worker is no more, and what it says of the worker's end."""

from __future__ import annotations

from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from latentmill.checks import told
from latentmill.text import one_line

GONE = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError)
"""What Ray raises for a call whose worker is no more. OutOfMemoryError: Ray's memory monitor killed it."""
WITH_NODE = ("its node has died", "the actor's node was ", "The actor never ran")
"""What Ray says of a worker whose node died, was taken out of the cluster, or went before the worker began."""


def with_node(error: RayError) -> bool:
    """Whether a worker was lost with its node, or with the way to it: of a process that died Ray hears at once.

    Of a node's death Ray tells in words alone, unless the autoscaler drained it.
    """
    gone = isinstance(error, (NodeDiedError, ActorUnavailableError)) or getattr(error, "preempted", False)
    return gone or any(words in str(error) for words in WITH_NODE)


def cause_of(error: RayError) -> str:
    """Why a worker is gone: what it raised while it was built, or the last thing that Ray says of its end."""
    raised = getattr(error, "cause", None)
    if isinstance(raised, RayTaskError):
        raised = raised.cause
    if raised is not None:
        return one_line(told(raised))
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else type(error).__name__

"""A question to every node of a cluster at once, or to this machine alone, each with a time by which it must have answered."""

from __future__ import annotations

import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from latentmill.config import Job
from latentmill.text import one_line
from latentmill.workers.context import enter, store_environment
from latentmill.workers.examination import said

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A machine, or what Ray takes for one."""

    id: str
    name: str
    resources: Mapping[str, float]
    """In Ray's words."""


@dataclass(frozen=True)
class NoAnswer:
    """Instead of an answer."""

    why: str
    """With the node before it a sentence."""
    silent: bool = False
    """It did not answer in time, or is gone: it isn't asked again."""


Hello: TypeAlias = dict[str, Any]
"""What a node says at first, though it may lack all of ours: ``python``, ``ray``, ``latentmill`` (None: not there), ``time``."""


class Everyone(Protocol):
    """Who can be asked."""

    nodes: Sequence[Node]

    def hello(self, within: float) -> dict[str, Hello | NoAnswer]:
        """What each node says at first, by its id."""

    def ask(
        self, question: Callable[..., T], arguments: Mapping[str, Sequence[Any]], within: float
    ) -> dict[str, T | NoAnswer]:
        """What a function of a module of ours says on each node, given the ``arguments`` for it."""


class Here:
    """This process, as its machine's only node."""

    def __init__(self, gpus: float) -> None:
        """``gpus``: of how many there must be one each, at least."""
        self.nodes: Sequence[Node] = [Node("", f"node {socket.gethostname()}", {"GPU": gpus})]

    def hello(self, within: float) -> dict[str, Hello | NoAnswer]:
        return {"": _hello()()}

    def ask(
        self, question: Callable[..., T], arguments: Mapping[str, Sequence[Any]], within: float
    ) -> dict[str, T | NoAnswer]:
        found: dict[str, T | NoAnswer] = {}
        for node, given in arguments.items():
            try:
                found[node] = question(*given)
            except Exception as error:
                found[node] = NoAnswer(said(error))
        return found


class OnRay:
    """The nodes of the Ray cluster that this process has joined."""

    def __init__(self) -> None:
        import ray

        self.ray: Any = ray
        self.task: Any = cast(Any, ray.remote)(num_cpus=0, max_retries=0, max_calls=0)
        alive = [node for node in cast(Any, ray).nodes() if node["Alive"]]
        named = Counter(map(_named, alive))
        self.nodes: Sequence[Node] = [
            Node(
                node["NodeID"],
                _named(node) if named[_named(node)] == 1 else f"{_named(node)[:-1]}, {node['NodeID'][:8]})",
                node["Resources"],
            )
            for node in sorted(alive, key=lambda node: (_named(node), node["NodeID"]))
        ]

    def hello(self, within: float) -> dict[str, Hello | NoAnswer]:
        return self._answers(self.task(_hello()), {node.id: () for node in self.nodes}, within)

    def ask(
        self, question: Callable[..., T], arguments: Mapping[str, Sequence[Any]], within: float
    ) -> dict[str, T | NoAnswer]:
        driver = os.getcwd(), store_environment()
        calls = {
            node: (pickle.dumps((_as_a_worker, (*driver, question, *given))),) for node, given in arguments.items()
        }
        return self._answers(self.task(_call()), calls, within)

    def _answers(self, task: Any, arguments: Mapping[str, Sequence[Any]], within: float) -> dict[str, Any]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {}
        for node, given in arguments.items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[task.options(scheduling_strategy=there).remote(*given)] = node
        answered, late = self.ray.wait(list(asked), num_returns=len(asked), timeout=within) if asked else ([], [])
        found: dict[str, Any] = {}
        for reference in answered:
            try:
                found[asked[reference]] = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raised = error.cause
                if isinstance(raised, (ImportError, AttributeError, pickle.UnpicklingError)):
                    found[asked[reference]] = NoAnswer(
                        f"can't run latentmill: {type(raised).__name__}: {one_line(raised, 300)}. Install the driver's version",
                        silent=True,
                    )
                else:
                    found[asked[reference]] = NoAnswer(
                        said(raised) if isinstance(raised, Exception) else one_line(error)
                    )
            except self.ray.exceptions.RayError as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                found[asked[reference]] = NoAnswer(
                    f"can't be asked: {one_line((lines or [type(error).__name__])[0])}", silent=True
                )
        for reference in late:
            self.ray.cancel(reference, force=True)
            found[asked[reference]] = NoAnswer(f"has not answered in {within:g} s", silent=True)
        return found


@contextmanager
def nodes(job: Job, gpus: float) -> Iterator[Everyone]:
    """The nodes of the job's cluster; this machine, where the job would start its own. Raises ClusterError."""
    if job.cluster.kind != "ray":
        yield Here(gpus)
        return
    import ray

    from latentmill.workers import cluster

    joined = not ray.is_initialized()
    cluster.connect(job.cluster.address)
    try:
        yield OnRay()
    finally:
        if joined:
            cluster.disconnect()


def _as_a_worker(folder: str, environment: Mapping[str, str], question: Callable[..., T], *given: Any) -> T:
    enter(folder, environment)
    return question(*given)


def _named(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


# Both are functions within a function, so that they travel whole: a node may lack latentmill, or have another.


def _hello() -> Callable[[], Hello]:
    def hello() -> Hello:
        import platform
        import time
        from importlib import metadata

        found: dict[str, Any] = {"python": platform.python_version(), "time": time.time()}
        for name in ("ray", "latentmill"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
        return found

    return hello


def _call() -> Callable[[bytes], Any]:
    def call(given: bytes) -> Any:
        import pickle

        function, arguments = pickle.loads(given)
        return function(*arguments)

    return call

"""How many nodes of which kind a job's workers need, for targets that make a cluster: each worker where there is room, the largest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isnan

from latentmill.plugin import WorkerNeeds
from latentmill.values import in_bytes

ANY_GPU, NO_GPU = "gpu", "cpu"
"""Names of the groups of nodes whose GPUs have no type that a stage asks for, and of those without a GPU."""


@dataclass(frozen=True)
class Shape:
    """What a node has for workers."""

    gpus: int
    cpus: int
    memory: int
    """Bytes, without those of the object store."""


@dataclass(frozen=True)
class Group:
    """Nodes that are alike."""

    name: str
    """The type of their GPUs as Ray has it (``H100``), or ANY_GPU, or NO_GPU."""
    nodes: int
    """As few as hold the workers whose numbers are given, and one of each of the others."""
    grows: bool
    """Whether the number of some of its workers is to be found, so that more nodes are of use."""


@dataclass
class _Node:
    group: str
    shape: Shape
    gpus: list[float] = field(init=False)
    """What is free of each GPU: a worker's share is of one, or it has whole ones."""

    def __post_init__(self) -> None:
        self.gpus = [1.0] * self.shape.gpus
        self.cpus: float = self.shape.cpus
        self.memory = self.shape.memory

    def takes(self, worker: WorkerNeeds) -> bool:
        """Whether there is room for a worker; if so, it has it from now on."""
        share, number = (1.0, int(worker.num_gpus)) if worker.num_gpus >= 1 else (worker.num_gpus, 1)
        found = [at for at, free in enumerate(self.gpus) if free >= share - 1e-6][:number]
        if worker.num_gpus and len(found) < number:
            return False
        if worker.num_cpus > self.cpus + 1e-6 or (worker.memory or 0) > self.memory:
            return False
        for at in found if worker.num_gpus else []:
            self.gpus[at] -= share
        self.cpus -= worker.num_cpus
        self.memory -= worker.memory or 0
        return True


def size(name: str, text: str) -> int:
    """Bytes of a setting, as ``32GiB``. Raises ValueError."""
    found = in_bytes(text)
    if isnan(found):
        raise ValueError(f"target.{name}={text}: a size is expected, as 32GiB")
    return int(found)


def at_least(least: int, **numbers: int | None) -> None:
    """Raises ValueError for a setting that is below."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"target.{name}={number}: {least} or more are expected")


def group_of(worker: WorkerNeeds) -> str:
    """The group of nodes that a worker asks for. One that asks for neither GPU nor type may also be beside those that do."""
    return worker.accelerator_type or (ANY_GPU if worker.num_gpus else NO_GPU)


def groups(needs: Sequence[WorkerNeeds], shape: Callable[[str], Shape]) -> list[Group]:
    """The groups of nodes that the workers fit on; ``shape``: what a node of a group has.

    Raises ValueError if a worker fits on no node.
    """
    nodes: list[_Node] = []
    unbound: set[str] = set()
    for worker in sorted(needs, key=_size):
        if worker.resources:
            raise ValueError(
                f"{_named(worker)} asks for {', '.join(worker.resources)}: nodes that are made have CPUs, GPUs and memory alone"
            )
        group = group_of(worker)
        for _ in range(worker.replicas or 1):
            may = (node for node in nodes if worker.accelerator_type in (None, node.group))
            node = next((node for node in may if node.takes(worker)), None)
            if node is None:
                node = _Node(group, shape(group))
                if not node.takes(worker):
                    has = f"{node.shape.gpus} GPUs, {node.shape.cpus} CPUs and {node.shape.memory / 2**30:.3g} GiB"
                    raise ValueError(
                        f"{_named(worker)} asks for more than a node of group {group} has for workers ({has}): target.gpus, .cpus and .memory say so"
                    )
                nodes.append(node)
            if worker.replicas is None:
                # What needs no GPU goes beside what does, where there is any: more nodes with GPUs are of use to it, but not asked for by it.
                unbound.add(NO_GPU if group == NO_GPU else node.group)
    names = list(dict.fromkeys(node.group for node in nodes))
    return [Group(name, sum(node.group == name for node in nodes), name in unbound) for name in names]


def _size(worker: WorkerNeeds) -> tuple[bool, bool, float, float, int]:
    return (
        not worker.num_gpus,
        worker.accelerator_type is None,
        -worker.num_gpus,
        -worker.num_cpus,
        -(worker.memory or 0),
    )


def _named(worker: WorkerNeeds) -> str:
    return " + ".join(worker.stages)

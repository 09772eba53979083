"""A worker as a Ray actor: a process of its own, on whichever node Ray puts it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import ray

from latentmill.errors import WrongWorker
from latentmill.half_done import HalfDone
from latentmill.text import secrets
from latentmill.weights import Reading
from latentmill.workers.context import enter, this_node
from latentmill.workers.devices import wait_for
from latentmill.workers.hosted import StageWork
from latentmill.workers.meter import memory_held
from latentmill.workers.speech import Speech, WorkerName
from latentmill.workers.watch import Notice
from latentmill.workers.worker import Worker, WorkerSetup

logger = logging.getLogger("latentmill")


@dataclass(frozen=True)
class Ready:
    """What the driver must know of a worker before it gives it work."""

    node: str
    probe: str = ""
    """A file that the driver must see, if it is to see what the worker writes."""
    read: Reading = field(default_factory=dict)
    heard: Mapping[str, list[str]] = field(default_factory=dict)
    """What libraries said while each stage was loaded."""
    notice: Notice = field(default_factory=Notice)
    """What it printed, and uses."""
    memory: int = 0
    """The bytes that it holds."""
    wrong: str = ""
    """Why it can't work for this plan."""
    node_id: str = ""
    """Ray's id of its node."""


class _Actor(Worker):
    """As many threads as calls, so that Ray unpacks and packs batches while the stage computes another."""

    def __init__(
        self,
        folder: str,
        environment: Mapping[str, str],
        stages: Sequence[StageWork],
        name: WorkerName,
        half_done: HalfDone | None,
        asks: Mapping[str, float],
    ) -> None:
        enter(folder, environment)
        name = _with_secrets(name)
        self.speech = Speech(name)
        self.speech.begin()
        self.speech.note(f"{name.short} of run {name.run} on {this_node()}, process {os.getpid()}")
        self._wait_for_devices(asks)
        self.is_ready = self._made_ready(partial(super().__init__, stages, half_done))

    def _wait_for_devices(self, asks: Mapping[str, float]) -> None:
        assert self.speech is not None
        here = ray.get_runtime_context()
        for kind, names in here.get_accelerator_ids().items():
            if not (share := min(1.0, asks.get(kind, 0.0))):
                continue
            try:
                seconds, taken = wait_for(here.get_node_id(), [f"{kind} {name}" for name in names], share)
            except OSError as error:  # no file, no pidfd: then nobody knows, and the device is free in almost all cases
                self.speech.note(f"can't see who has {kind} {', '.join(names)}: {error}")
                continue
            if taken:
                logger.warning(
                    f"{taken} is still held by a worker before, after {seconds:.0f} s: its memory may not suffice"
                )
            elif seconds > 0.1:
                self.speech.note(f"waited {seconds:.1f} s for the worker before to leave {kind} {', '.join(names)}")

    def _made_ready(self, make: Callable[[], None]) -> Ready:
        assert self.speech is not None
        try:
            make()
        except WrongWorker as error:  # Ray would tell of it in words alone
            return Ready(this_node(), wrong=str(error))
        self.speech.note("ready")
        notice = Notice(self.speech.take(), usage=self.meter.take())
        return Ready(this_node(), self.probe(), self.loaded, self.heard(), notice, memory_held())

    def ready(self) -> Ready:
        return replace(self.is_ready, node_id=ray.get_runtime_context().get_node_id())

    def ready_for(self, stages: Sequence[StageWork], name: WorkerName, half_done: HalfDone | None) -> Ready:
        """``ready``, after ``take_over``. To Ray it is still called what the first run called it."""
        assert self.speech is not None
        before = self.speech.name
        self.speech.go_on_as(name := _with_secrets(name))
        self.speech.note(
            f"{name.short} of run {name.run} on {this_node()}, process {os.getpid()}, which was {before.short} of run {before.run}"
        )
        self.is_ready = self._made_ready(partial(self.take_over, stages, half_done))
        return self.ready()

    @ray.method(concurrency_group="told")
    def told_to_hand_over(self) -> None:
        """``hand_over``, in a thread of its own: it doesn't wait for batches, of which more may be here than there are threads."""
        self.hand_over()

    def end(self) -> None:
        """The run has ended, and the process with it."""
        if self.speech:
            self.speech.end()


def _with_secrets(name: WorkerName) -> WorkerName:
    return replace(name, secrets={**name.secrets, **secrets("", keys=True)})


REMOTE: Any = cast(Any, ray.remote)(max_restarts=0, concurrency_groups={"told": 1})(_Actor)
"""Ray's own types don't know ``options``."""


def resources(work: WorkerSetup) -> dict[str, Any]:
    """What such a worker asks Ray for."""
    options: dict[str, Any] = {"num_cpus": work.num_cpus, "num_gpus": work.num_gpus, "resources": dict(work.resources)}
    if work.memory:
        options["memory"] = work.memory
    if work.accelerator_type:
        options["accelerator_type"] = work.accelerator_type
    return options

"""A job's workers as Ray actors, pinned to what they ask for. The driver passes references and never fetches a batch."""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from latentmill.checks import cause, told
from latentmill.driver.messages import (
    AskFor,
    Died,
    Dispatch,
    Draining,
    Event,
    Failed,
    Finished,
    HandOver,
    PoolOrder,
    Started,
    StartWorker,
    StopWorker,
)
from latentmill.errors import WrongWorker
from latentmill.text import one_line
from latentmill.workers.actor import REMOTE, Ready, resources
from latentmill.workers.answers import handed_over, taken_up
from latentmill.workers.cluster import disconnect
from latentmill.workers.context import store_environment
from latentmill.workers.draining import DrainedNodes
from latentmill.workers.left import LeftWorkers
from latentmill.workers.left_actors import LeftActors
from latentmill.workers.nodes import Nodes
from latentmill.workers.places import PATIENCE, Places
from latentmill.workers.ray_errors import GONE, cause_of, with_node
from latentmill.workers.speech import WorkerName
from latentmill.workers.watch import Watch
from latentmill.workers.worker import Admit, Outcome, Resumed, WorkerSetup

logger = logging.getLogger("latentmill")

LOOK_EVERY = 0.25
"""Seconds between two looks for workers that hang."""
LAST_WORDS = 3.0
"""Seconds that workers are given at the end to put into an object store what they have said last."""


class RayPool:
    """Starts actors, sends them dispatches, and turns what comes back into events."""

    def __init__(
        self,
        setups: Sequence[WorkerSetup],
        owns_cluster: bool = False,
        sees: Callable[[str], bool] = bool,
        admit: Admit = lambda node, read: "",
        watch: Watch | None = None,
        wait: float | None = None,
        left: LeftWorkers | None = None,
    ) -> None:
        """``sees`` says whether a file that a worker has written is there for the driver, too; ``admit`` what is wrong with what it has
        read; ``watch`` is told of the workers; ``wait``: ``cluster.wait`` in seconds; ``left``: workers of the run before.
        """
        self.setups, self.owns_cluster, self.sees, self.admit = setups, owns_cluster, sees, admit
        self.stages = [stage for setup in setups for stage in setup.stages]
        self.watch = watch or Watch()
        self.actors: dict[int, Any] = {}
        self.types: dict[int, int] = {}
        """The type of each worker that was started."""
        self.starting: dict[int, StartWorker] = {}
        self.asked: dict[int, float] = {}
        """When those workers were asked for that are not there yet."""
        self.took: dict[int, float] = {}
        """Of each type, the seconds that the first worker took to be ready."""
        self.late: set[int] = set()
        """Those of which people have been told that they take long."""
        self.in_flight: dict[int, dict[int, Dispatch]] = {}
        """What each worker has, by number."""
        self.blocks: dict[int, Any] = {}
        self.heard: dict[int, float] = {}
        """When a worker that has work last finished some, or was given its first."""
        self.looked = 0.0
        """When it was last looked for workers that hang."""
        self.answers: queue.SimpleQueue[tuple[StartWorker | Dispatch, Future[Any]]] = queue.SimpleQueue()
        """Orders of which something has come, each with what has; Ray's own thread puts them in."""
        self.left = LeftActors(setups, left)
        self.places = Places(setups, self.watch.full, wait, self.left.places(), self.left.left.end)
        finds = any(setup.replicas is None or setup.min_replicas is not None for setup in setups)
        self.nodes = Nodes(partial(self.left.reserved, self.places.by_node), watch=not owns_cluster) if finds else None
        """The nodes, if it depends on them how many workers there are."""
        self.drained = DrainedNodes(self._there)

    def submit(self, order: PoolOrder) -> None:
        if isinstance(order, StopWorker):
            if order.reason:
                self.watch.gone(order.worker, f"it was ended: {order.reason}")
            else:
                self.watch.left(order.worker)
            self._bury(order.worker)
        elif isinstance(order, StartWorker):
            self._start(order)
        elif isinstance(order, HandOver):
            if actor := self.actors.get(order.worker):
                actor.told_to_hand_over.remote()
        elif isinstance(order, AskFor):
            self.places.ask(order.more)
        else:
            self._dispatch(order)

    def _start(self, order: StartWorker) -> None:
        setup = self.setups[order.worker_type]
        self.types[order.worker] = order.worker_type
        called = self.watch.called(order.worker, order.worker_type, [stage.name for stage in setup.stages])
        if actor := self.left.take(order, self.places):
            ready = actor.ready_for.remote(setup.stages, called, setup.half_done)
        else:
            actor = self._begun(order, called)
            ready = actor.ready.remote()
        self.actors[order.worker] = actor
        self.starting[order.worker], self.asked[order.worker] = order, time.monotonic()
        self._await(order, ready)

    def _begun(self, order: StartWorker, called: WorkerName) -> Any:
        """A new actor."""
        setup = self.setups[order.worker_type]
        options = {**resources(setup), "max_concurrency": sum(stage.calls for stage in setup.stages)}
        options["name"] = self.watch.full(called.short)
        if place := self.places.take(order.worker_type, order.worker):
            options["scheduling_strategy"] = place
        else:
            self.left.make_room()
        driver = os.getcwd(), store_environment()
        return REMOTE.options(**options).remote(*driver, setup.stages, called, setup.half_done, setup.asks)

    def _dispatch(self, order: Dispatch) -> None:
        actor, stage = self.actors[order.worker], self.stages[order.stage].name
        held = self.in_flight.setdefault(order.worker, {})
        if not held:
            self.heard[order.worker] = time.monotonic()
        held[order.id] = order
        blocks = [self.blocks[name] for name in order.blocks()]
        if order.task == "commit":
            ended = order.errors, order.filtered, order.not_needed
            self._await(order, actor.commit.remote(stage, order.shard, *ended, order.addresses(), *blocks))
            return
        if order.task == "keep":
            about = order.stages, order.filtered, order.attempt_of
            self._await(order, actor.keep.remote(order.shard, *about, order.addresses(), *blocks))
            return
        if order.task == "take up":
            outcome, block = actor.take_up.options(num_returns=2).remote(order.shard, order.file)
        elif order.task == "read":
            outcome, block = actor.read.options(num_returns=2).remote(stage, list(order.rows), order.attempts)
        else:
            outcome, block = actor.batch.options(num_returns=2).remote(stage, order.addresses(), *blocks)
        self.blocks[order.id] = block
        self._await(order, outcome)

    def _await(self, order: StartWorker | Dispatch, reference: Any) -> None:
        reference.future().add_done_callback(lambda future: self.answers.put((order, future)))

    def collect(self, timeout: float) -> list[Event]:
        """Wait up to ``timeout`` seconds for something to happen, and say all that has. Raises BusyError, before any is taken in, as long
        as places have been lacking for longer than ``wait``.
        """
        self.left.look(self.places)
        self.places.require(self.types, self.actors, self.starting)
        leave = [] if self.owns_cluster else self.drained.news()
        events: list[Event] = [Draining(self.types[worker], worker) for worker in leave]
        self.places.drained = self.drained.nodes
        if self.nodes:
            events += self.nodes.news(not self.actors.keys() - self.places.taken.keys(), self.drained.nodes)
        dead: dict[int, RayError] = {}
        waits = bool(self.starting or self.heard)
        while True:
            try:
                first = waits and not events and not dead
                order, future = self.answers.get(timeout=timeout) if first else self.answers.get_nowait()
            except queue.Empty:
                break
            answer = self._started if isinstance(order, StartWorker) else self._done
            try:
                if event := answer(cast(Any, order), future):
                    events.append(event)
            except GONE as error:
                dead[order.worker] = error
        for worker, death in dead.items():
            if start := self.starting.get(worker):
                self._could_not_start(start, cause_of(death))
            self._bury(worker)
            at_start = getattr(death, "actor_init_failed", False)
            events.append(Died(self.types[worker], worker, cause_of(death), at_start, with_node=with_node(death)))
        events += self._late() + self._hanging()
        for event in events:
            if isinstance(event, Died):
                self._tell_of(event)
        return events

    def _tell_of(self, death: Died) -> None:
        """Say of a worker that it is gone, unless the job ends for just that reason, or it was one more than there need be."""
        setup = self.setups[death.worker_type]
        first_or_more = death.worker_type not in self.took or setup.replicas is None or setup.min_replicas is not None
        if death.wrong or (death.at_start and first_or_more):
            self.watch.left(death.worker)
        else:
            self.watch.gone(death.worker, death.reason)

    def _started(self, start: StartWorker, future: Future[Any]) -> Event | None:
        """A worker is ready, or is not what it should be."""
        if start.worker not in self.starting:
            return None
        seconds = time.monotonic() - self.asked.pop(start.worker)
        try:
            found: Ready = future.result()
        except (RayTaskError, *GONE):
            if self.left.loading.pop(start.worker, None) is None:
                raise
            self.starting.pop(start.worker)  # its place is the next one's
            self._bury(start.worker)
            self._start(start)  # one that is new shows whether it is this run's fault
            return None
        seconds = max(seconds, self.left.loading.get(start.worker, 0.0))
        self.watch.runs(start.worker, found.node)
        self.drained.node_of[start.worker] = found.node_id
        for stage, messages in found.heard.items():
            self.watch.heard(stage, messages, start.worker)
        self.watch.noticed(start.worker, "", found.notice)
        if reason := found.wrong or self.admit(found.node, found.read):
            self._could_not_start(start, reason)
            self._bury(start.worker)
            return Died(start.worker_type, start.worker, one_line(reason), wrong=True)
        if found.probe and not self.sees(found.probe):
            self._bury(start.worker)
            reason = (
                f"what {found.node} writes is not seen by the driver: "
                "the output must be one folder or store for all nodes, by its whole path"
            )
            self._could_not_start(start, reason)
            return Died(start.worker_type, start.worker, reason, at_start=True)
        self.starting.pop(start.worker)
        self.took.setdefault(start.worker_type, seconds)
        self.watch.ready(start.worker)
        return Started(start.worker_type, start.worker, seconds, found.memory)

    def _done(self, order: Dispatch, future: Future[Any]) -> Event | None:
        """A dispatch has come back, unless its worker was given up."""
        if order.id not in self.in_flight.get(order.worker, ()):
            return None
        try:
            outcome = future.result()
        except GONE:
            raise
        except ObjectLostError as error:
            return self._failed(order, "lost", error)
        except RayTaskError as error:
            if isinstance(error.cause, WrongWorker):
                self._bury(order.worker)
                return Died(self.types[order.worker], order.worker, one_line(str(error.cause)), wrong=True)
            lost = isinstance(error.cause, ObjectLostError)
            return self._failed(order, "lost" if lost else cause(error.cause), error.cause)
        except RayError as error:
            return self._failed(order, "raised", error)
        if isinstance(outcome, Outcome) and (reason := self.admit(outcome.node, outcome.read)):
            self._bury(order.worker)
            return Died(self.types[order.worker], order.worker, reason, wrong=True)
        self._answered(order)
        if isinstance(outcome, Resumed):
            return taken_up(order, outcome)
        if not isinstance(outcome, Outcome):
            return Finished(order.id, seconds=outcome)
        self.watch.heard(self.stages[order.stage].name, outcome.heard, order.worker)
        self.watch.noticed(order.worker, self.stages[order.stage].name, outcome.notice)
        if outcome.back:
            if outcome.back != "half-way":  # its block is empty, and nobody will release it
                self.blocks.pop(order.id, None)
            return handed_over(order, outcome)
        return Finished(order.id, outcome.parts, outcome.rejected, outcome.bytes, outcome.seconds, outcome.memory)

    def _failed(self, order: Dispatch, why: Any, error: BaseException) -> Failed:
        self._answered(order)
        self.blocks.pop(order.id, None)
        return Failed(order.id, why, one_line(told(error)))

    def _answered(self, order: Dispatch) -> None:
        held = self.in_flight[order.worker]
        del held[order.id]
        if held:
            self.heard[order.worker] = time.monotonic()
        else:
            self.heard.pop(order.worker, None)

    def _late(self) -> list[Event]:
        """Say once of a worker that it isn't ready: its model is large, or its node is gone and no other has come. One that the
        job can do without is given up after as long again as the first of its type took five times.
        """
        events: list[Event] = []
        for worker, when in list(self.asked.items()):
            worker_type, waited = self.types[worker], time.monotonic() - when
            if waited <= PATIENCE:
                continue
            setup = self.setups[worker_type]
            if worker not in self.late:
                self.late.add(worker)
                logger.warning(
                    f"a worker of {setup.name} has not been ready for {PATIENCE:g} s; is there a place for it?"
                )
            took = self.took.get(worker_type)
            if self._is_spare(worker_type) and took is not None and waited > PATIENCE + 5 * took + setup.fetching:
                reason = f"it was not ready after {waited:.0f} s"
                self._could_not_start(self.starting[worker], reason)
                self._bury(worker)
                events.append(Died(worker_type, worker, reason, at_start=True))
        return events

    def _could_not_start(self, start: StartWorker, reason: str) -> None:
        """Tell of a worker without which the job may go on."""
        setup = self.setups[start.worker_type]
        if self._is_spare(start.worker_type) and start.worker_type in self.took:
            logger.warning(f"one more worker of {setup.name} could not start: {one_line(reason)}")

    def _is_spare(self, worker_type: int) -> bool:
        """Whether the job can do with one worker of a type less: no death of one that waits for a node may end it."""
        setup = self.setups[worker_type]
        least = setup.replicas if setup.min_replicas is None else setup.min_replicas
        stay = self.actors.keys() - self.drained.told
        return sum(self.types[worker] == worker_type for worker in stay) > (least or 1)

    def _hanging(self) -> list[Event]:
        """End workers that have work and have finished none for as long as the stages of that work give them."""
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY:
            return []
        self.looked = now
        events: list[Event] = []
        for worker, when in list(self.heard.items()):
            stages = {self.stages[order.stage] for order in self.in_flight[worker].values()}
            timed = [(stage.timeout, stage.name) for stage in stages if stage.timeout is not None]
            if len(timed) < len(stages):  # one of them may take as long as it likes
                continue
            timeout, name = max(timed)
            if now - when > timeout:
                self._bury(worker)
                reason = f"it finished nothing for {timeout:g} s (stages.{name}.timeout)"
                events.append(Died(self.types[worker], worker, reason))
        return events

    def _there(self) -> list[Any]:
        under_way = {id for held in self.in_flight.values() for id in held}
        return [block for id, block in self.blocks.items() if id not in under_way]

    def release(self, block: int) -> None:
        self.blocks.pop(block, None)

    def close(self, leave: bool = False) -> None:
        """End all workers, at once. ``leave``: those that have nothing to do stay for the next run, unless Ray itself ends with this one."""
        self.left.let_go(self.places)
        leave = leave and not self.owns_cluster
        if "://" in self.watch.output and self.actors:
            with suppress(RayError):
                last = [actor.end.remote() for actor in self.actors.values()]
                ray.wait(last, num_returns=len(last), timeout=LAST_WORDS)
        for worker, actor in self.actors.items():
            node, worker_type = self.drained.node_of.get(worker), self.types[worker]
            if not leave or node is None or node in self.drained.nodes or self.in_flight.get(worker):
                ray.kill(actor)
            else:
                self.left.leave(actor, worker_type, self.places.hand_on(worker), node, self.took.get(worker_type, 0.0))
        self.actors.clear()
        self.blocks.clear()
        self.in_flight.clear()
        self.places.close()
        if self.owns_cluster:
            disconnect()

    def _bury(self, worker: int) -> None:
        """Forget a worker, and end it if it lives: one that was only out of reach would keep its place."""
        if actor := self.actors.pop(worker, None):
            ray.kill(actor)
        self.places.give_back(worker, self.starting)
        self.drained.gone(worker)
        self.heard.pop(worker, None)
        self.starting.pop(worker, None)
        self.asked.pop(worker, None)
        self.late.discard(worker)
        for id in self.in_flight.pop(worker, ()):
            self.blocks.pop(id, None)

"""The same workers in this process: for a debugger, a notebook, one GPU and no Ray."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from latentmill.checks import cause, told
from latentmill.driver.messages import (
    AskFor,
    Died,
    Dispatch,
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
from latentmill.workers.answers import handed_over, taken_up
from latentmill.workers.context import this_node
from latentmill.workers.hosted import Block, Call
from latentmill.workers.left import LeftWorker, LeftWorkers
from latentmill.workers.watch import Watch
from latentmill.workers.worker import Admit, Outcome, Resumed, Worker, WorkerSetup

ALL = -1
"""The number of all workers together, for whoever watches them."""

_Made: TypeAlias = "tuple[Outcome | Resumed, Block] | Exception | float"
"""What was made of an order; of a commit, and of what is kept, the seconds that it took."""


class InlinePool:
    """Does what the workers that compute are given here, in ``collect``, one at a time: there a debugger stops. Each other worker,
    one that reads rows or writes files, has a thread beside.
    """

    def __init__(
        self,
        setups: Sequence[WorkerSetup],
        admit: Admit = lambda node, read: "",
        watch: Watch | None = None,
        left: LeftWorkers | None = None,
    ) -> None:
        """``admit`` says what is wrong with what a worker has read; ``watch`` is told of the workers; ``left``: those of the run before,
        which take this one over.
        """
        self.setups, self.admit, self.left = setups, admit, left or LeftWorkers()
        self.left.keep({_alike(setup): 1 for setup in setups})
        self.torch_threads = torch.get_num_threads()
        """As many as torch has for others than workers."""
        self.stages = [stage.name for setup in setups for stage in setup.stages]
        self.watch = watch or Watch()
        self.watch.called(ALL, ALL, self.stages)
        self.workers: dict[int, Worker] = {}
        self.types: dict[int, int] = {}
        self.inboxes: dict[int, queue.SimpleQueue[Dispatch | None]] = {}
        """Of each worker that has a thread of its own; None ends the thread."""
        self.threads: dict[int, threading.Thread] = {}
        self.starts: deque[StartWorker] = deque()
        self.orders: deque[Dispatch] = deque()
        self.calls: dict[int, tuple[Dispatch, Call]] = {}
        """Batches that were begun, by the numbers of their orders."""
        self.beside: dict[int, Dispatch] = {}
        """Orders that threads work on."""
        self.answers: queue.SimpleQueue[tuple[Dispatch, _Made | KeyboardInterrupt]] = queue.SimpleQueue()
        self.blocks: dict[int, Block] = {}
        self.waited = 0.0
        """Seconds in which this thread had nothing to do but to wait for the others."""

    def submit(self, order: PoolOrder) -> None:
        assert not isinstance(order, AskFor)  # it has told of no nodes
        if isinstance(order, StopWorker):  # what it held is given out anew
            self._forget(order.worker)
        elif isinstance(order, StartWorker):
            self.starts.append(order)
        elif isinstance(order, HandOver):
            self.workers[order.worker].hand_over()
        elif order.worker in self.inboxes:
            self.beside[order.id] = order
            self.inboxes[order.worker].put(order)
        else:
            self.orders.append(order)

    def collect(self, timeout: float) -> list[Event]:
        events = self._answered(0.0)
        while self.starts:  # all, before any is given work: nobody reads while models are loaded
            events.append(self._start(self.starts.popleft()))
        if self.orders:
            return events + self._begin(self.orders.popleft())
        if self.calls:
            for worker in {order.worker for order, _ in self.calls.values()}:
                self.workers[worker].advance()
            return events + [self._end(order, call) for order, call in list(self.calls.values()) if call.done]
        return events or self._answered(timeout if self.beside else 0.0)

    def _answered(self, timeout: float) -> list[Event]:
        """What threads have done; if there is nothing yet, wait for it."""
        events: list[Event] = []
        while True:
            before = time.monotonic()
            try:
                order, answer = (
                    self.answers.get(timeout=timeout) if timeout and not events else self.answers.get_nowait()
                )
            except queue.Empty:
                return events
            finally:
                self.waited += time.monotonic() - before
            if self.beside.pop(order.id, None) is None:
                continue
            if isinstance(answer, KeyboardInterrupt):  # it is meant for the run
                raise answer
            events.append(self._event(order, answer))

    def _live(self, worker: Worker, inbox: queue.SimpleQueue[Dispatch | None]) -> None:
        """In a worker's own thread: do what it is given."""
        while (order := inbox.get()) is not None:
            if order.id in self.beside:  # else it was taken back
                self._work(worker, order)

    def _work(self, worker: Worker, order: Dispatch) -> None:
        answer: _Made | KeyboardInterrupt
        try:
            answer = self._do(worker, order)
        except (Exception, KeyboardInterrupt) as error:
            answer = error
        except BaseException as error:  # a library that calls sys.exit: somebody waits for an answer
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        self.answers.put((order, answer))

    def _do(self, worker: Worker, order: Dispatch) -> tuple[Outcome | Resumed, Block] | float:
        stage, blocks = self.stages[order.stage], self._blocks(order)
        if order.task == "read":
            return worker.read(stage, order.rows, order.attempts)
        if order.task == "commit":
            ended = order.errors, order.filtered, order.not_needed
            return worker.commit(stage, order.shard, *ended, order.addresses(), *blocks)
        if order.task == "keep":
            about = order.stages, order.filtered, order.attempt_of
            return worker.keep(order.shard, *about, order.addresses(), *blocks)
        if order.task == "take up":
            return worker.take_up(order.shard, order.file)
        return worker.batch(stage, order.addresses(), *blocks)

    def _begin(self, order: Dispatch) -> list[Event]:
        """Let a worker without a thread of its own take in a batch; what is no batch it does at once."""
        worker, stage = self.workers[order.worker], self.stages[order.stage]
        try:
            if order.task != "batch":
                return [self._event(order, self._do(worker, order))]
            self.calls[order.id] = order, worker.begin(stage, order.addresses(), *self._blocks(order))
            return []
        except Exception as error:
            return [self._event(order, error)]

    def _start(self, order: StartWorker) -> Event:
        setup = self.setups[order.worker_type]
        try:
            before = torch.get_num_threads()
            try:
                if taken := self.left.take(_alike(setup)):
                    worker = taken.worker
                    worker.take_over(setup.stages, setup.half_done)
                else:
                    worker = Worker(setup.stages, setup.half_done)
            finally:  # a stage that only reads has fewer threads; this thread of Python is for those that compute
                torch.set_num_threads(before)
            for stage, messages in worker.heard().items():
                self.watch.heard(stage, messages)
            if reason := self.admit(this_node(), worker.loaded):
                raise WrongWorker(reason)
        except WrongWorker as error:
            return Died(order.worker_type, order.worker, one_line(str(error)), wrong=True)
        except Exception as error:
            return Died(order.worker_type, order.worker, one_line(told(error)), at_start=True)
        self.workers[order.worker], self.types[order.worker] = worker, order.worker_type
        if not setup.computes:
            inbox = self.inboxes[order.worker] = queue.SimpleQueue()
            name = f"latentmill {setup.name}"
            # Such a thread doesn't keep the process: it may hang in a file that doesn't come.
            thread = threading.Thread(target=self._live, args=(worker, inbox), name=name, daemon=True)
            self.threads[order.worker] = thread
            thread.start()
        return Started(order.worker_type, order.worker)

    def _end(self, order: Dispatch, call: Call) -> Event:
        del self.calls[order.id]
        try:
            return self._event(order, self.workers[order.worker].result(self.stages[order.stage], call))
        except Exception as error:
            return self._event(order, error)

    def _event(self, order: Dispatch, answer: _Made) -> Event:
        if isinstance(answer, float):
            return Finished(order.id, seconds=answer)
        if isinstance(answer, WrongWorker):
            return Died(self.types[order.worker], order.worker, one_line(str(answer)), wrong=True)
        if isinstance(answer, Exception):
            return Failed(order.id, cause(answer), one_line(told(answer)))
        outcome, block = answer
        if isinstance(outcome, Resumed):
            self.blocks[order.id] = block
            return taken_up(order, outcome)
        if reason := self.admit(outcome.node, outcome.read):
            return Died(self.types[order.worker], order.worker, reason, wrong=True)
        self.blocks[order.id] = block
        self.watch.heard(self.stages[order.stage], outcome.heard)
        self._note(order, outcome)
        if outcome.back:
            return handed_over(order, outcome)
        return Finished(order.id, outcome.parts, outcome.rejected, outcome.bytes, outcome.seconds, outcome.memory)

    def _note(self, order: Dispatch, outcome: Outcome) -> None:
        """All workers are this process: what it uses is told once, of the one that computes, if one does."""
        notice = outcome.notice
        if not self.setups[self.types[order.worker]].computes and any(setup.computes for setup in self.setups):
            notice = replace(notice, usage=None)
        self.watch.noticed(ALL, self.stages[order.stage], notice)

    def _blocks(self, order: Dispatch) -> list[Block]:
        return [self.blocks[name] for name in order.blocks()]

    def _forget(self, worker: int) -> None:
        self.starts = deque(order for order in self.starts if order.worker != worker)
        self.orders = deque(order for order in self.orders if order.worker != worker)
        self.calls = {id: (order, call) for id, (order, call) in self.calls.items() if order.worker != worker}
        self.beside = {id: order for id, order in self.beside.items() if order.worker != worker}
        self.workers.pop(worker, None)
        self.threads.pop(worker, None)
        if inbox := self.inboxes.pop(worker, None):
            inbox.put(None)

    def release(self, block: int) -> None:
        self.blocks.pop(block, None)

    def close(self, leave: bool = False) -> None:
        """End all workers. Shards that are being written are finished first; another Ctrl-C doesn't wait for them.

        ``leave``: those that have nothing to do stay for the next run.
        """
        busy = {
            order.worker
            for order in (*self.beside.values(), *self.orders, *(order for order, _ in self.calls.values()))
        }
        if leave:
            self.left.workers += [
                LeftWorker(_alike(self.setups[self.types[number]]), worker)
                for number, worker in self.workers.items()
                if number not in busy
            ]
        torch.set_num_threads(self.torch_threads)
        self.beside = {id: order for id, order in self.beside.items() if order.task == "commit"}
        for inbox in self.inboxes.values():
            inbox.put(None)
        # Answers are not waited for: an interrupt that comes as one is taken loses it.
        for worker in {order.worker for order in self.beside.values()} & self.threads.keys():
            self.threads[worker].join()
        self.inboxes.clear()
        self.threads.clear()
        self.workers.clear()
        self.calls.clear()
        self.blocks.clear()


def _alike(setup: WorkerSetup) -> tuple[str, ...]:
    """Which worker takes over from which: each has the process that all have, and lets go what it doesn't need."""
    return ("inline", "computes") if setup.computes else ("inline", *(stage.name for stage in setup.stages))

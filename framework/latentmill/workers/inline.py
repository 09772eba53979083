"""The same workers in this process: for a debugger, a notebook, one GPU and no Ray."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from latentmill.checks import cause, told
from latentmill.driver.messages import (
    Died,
    Dispatch,
    Event,
    Failed,
    Finished,
    PoolOrder,
    Started,
    StartWorker,
    StopWorker,
)
from latentmill.errors import WrongWorker
from latentmill.text import one_line
from latentmill.workers.context import this_node
from latentmill.workers.hearing import Telling
from latentmill.workers.worker import Admit, Block, Call, Outcome, Worker, WorkerSetup


class InlinePool:
    """Does what the workers that compute are given here, in ``collect``, one at a time: there a debugger stops. Each other worker,
    one that reads rows or writes files, has a thread beside.
    """

    def __init__(self, setups: Sequence[WorkerSetup], admit: Admit = lambda node, read: "") -> None:
        """``admit`` says what is wrong with what a worker has read."""
        self.setups, self.admit = setups, admit
        self.stages = [stage.name for setup in setups for stage in setup.stages]
        self.tell = Telling()
        self.workers: dict[int, Worker] = {}
        self.types: dict[int, int] = {}
        self.threads: dict[int, ThreadPoolExecutor] = {}
        """Of each worker that is not driven by ``collect``."""
        self.orders: deque[StartWorker | Dispatch] = deque()
        self.calls: dict[int, tuple[Dispatch, Call]] = {}
        """Batches that were begun, by the numbers of their orders."""
        self.beside: dict[int, Dispatch] = {}
        """Orders that threads work on."""
        self.answers: queue.SimpleQueue[tuple[Dispatch, tuple[Outcome, Block] | Exception | None]] = queue.SimpleQueue()
        self.blocks: dict[int, Block] = {}

    def submit(self, order: PoolOrder) -> None:
        if isinstance(order, StopWorker):  # what it held is given out anew
            self._forget(order.worker)
        elif isinstance(order, Dispatch) and order.worker in self.threads:
            self.beside[order.id] = order
            blocks = self._blocks(order)
            self.threads[order.worker].submit(self._work, self.workers[order.worker], order, blocks)
        else:
            self.orders.append(order)

    def collect(self, timeout: float) -> list[Event]:
        events = self._answered(0.0)
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
            try:
                order, answer = (
                    self.answers.get(timeout=timeout) if timeout and not events else self.answers.get_nowait()
                )
            except queue.Empty:
                return events
            if self.beside.pop(order.id, None) is not None:
                events.append(self._event(order, answer))

    def _work(self, worker: Worker, order: Dispatch, blocks: Sequence[Block]) -> None:
        """In a worker's own thread."""
        try:
            self.answers.put((order, self._do(worker, order, blocks)))
        except Exception as error:
            self.answers.put((order, error))

    def _do(self, worker: Worker, order: Dispatch, blocks: Sequence[Block]) -> tuple[Outcome, Block] | None:
        stage = self.stages[order.stage]
        if order.task == "read":
            return worker.read(stage, order.rows)
        if order.task == "commit":
            worker.commit(stage, order.shard, order.errors, order.addresses(), *blocks)
            return None
        return worker.batch(stage, order.addresses(), *blocks)

    def _begin(self, order: StartWorker | Dispatch) -> list[Event]:
        """Here: start a worker, or let one take in a batch; what is no batch is done at once."""
        if isinstance(order, StartWorker):
            return [self._start(order)]
        worker, blocks = self.workers[order.worker], self._blocks(order)
        try:
            if order.task != "batch":
                return [self._event(order, self._do(worker, order, blocks))]
            self.calls[order.id] = order, worker.begin(self.stages[order.stage], order.addresses(), *blocks)
            return []
        except Exception as error:
            return [self._event(order, error)]

    def _start(self, order: StartWorker) -> Event:
        setup = self.setups[order.worker_type]
        try:
            worker = Worker(setup.stages, setup.num_gpus > 0)
            self.tell(setup.name, worker.hearing.take())
            if reason := self.admit(this_node(), worker.loaded):
                raise WrongWorker(reason)
        except WrongWorker as error:
            return Died(order.worker_type, order.worker, one_line(str(error)), wrong=True)
        except Exception as error:
            return Died(order.worker_type, order.worker, one_line(told(error)), at_start=True)
        self.workers[order.worker], self.types[order.worker] = worker, order.worker_type
        if not setup.computes:
            self.threads[order.worker] = ThreadPoolExecutor(1, f"latentmill {setup.name}")
        return Started(order.worker_type, order.worker)

    def _end(self, order: Dispatch, call: Call) -> Event:
        del self.calls[order.id]
        try:
            return self._event(order, self.workers[order.worker].result(self.stages[order.stage], call))
        except Exception as error:
            return self._event(order, error)

    def _event(self, order: Dispatch, answer: tuple[Outcome, Block] | Exception | None) -> Event:
        if answer is None:
            return Finished(order.id)
        if isinstance(answer, WrongWorker):
            return Died(self.types[order.worker], order.worker, one_line(str(answer)), wrong=True)
        if isinstance(answer, Exception):
            return Failed(order.id, cause(answer), one_line(told(answer)))
        outcome, block = answer
        if reason := self.admit(outcome.node, outcome.read):
            return Died(self.types[order.worker], order.worker, reason, wrong=True)
        self.blocks[order.id] = block
        self.tell(self.stages[order.stage], outcome.heard)
        return Finished(order.id, outcome.parts, outcome.rejected, outcome.bytes)

    def _blocks(self, order: Dispatch) -> list[Block]:
        return [self.blocks[name] for name in order.blocks()]

    def _forget(self, worker: int) -> None:
        self.orders = deque(order for order in self.orders if order.worker != worker)
        self.calls = {id: (order, call) for id, (order, call) in self.calls.items() if order.worker != worker}
        self.beside = {id: order for id, order in self.beside.items() if order.worker != worker}
        self.workers.pop(worker, None)
        if thread := self.threads.pop(worker, None):
            thread.shutdown(wait=False, cancel_futures=True)

    def release(self, block: int) -> None:
        self.blocks.pop(block, None)

    def close(self) -> None:
        """End all workers. What a thread is at is finished first: a file is half written otherwise."""
        for thread in self.threads.values():
            thread.shutdown(cancel_futures=True)
        self.workers.clear()
        self.calls.clear()
        self.blocks.clear()

"""The same stages in this process: for a debugger, a notebook, one GPU and no Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

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
from latentmill.workers.worker import Admit, Block, Call, Outcome, StageWork, Worker


class InlinePool:
    """Does each order when its turn comes, one at a time. A stage has one worker.

    Rows that are being denoised are moved when there is nothing else to do: so others join them, as many as there can be.
    """

    def __init__(self, stages: Sequence[StageWork], admit: Admit = lambda node, read: "") -> None:
        """``admit`` says what is wrong with what a worker has read."""
        self.stages, self.admit = stages, admit
        self.tell = Telling()
        self.workers: dict[int, Worker] = {}
        self.orders: deque[PoolOrder] = deque()
        self.calls: dict[int, tuple[Dispatch, Call]] = {}
        """Batches that were begun, by the numbers of their orders."""
        self.blocks: dict[int, Block] = {}

    def submit(self, order: PoolOrder) -> None:
        if isinstance(order, StopWorker):  # what it held is given out anew, and the next worker is built afresh
            self.orders = deque(o for o in self.orders if o.worker != order.worker)
            self.calls = {id: (o, call) for id, (o, call) in self.calls.items() if o.worker != order.worker}
            self.workers.pop(order.worker_type, None)
            return
        self.orders.append(order)

    def collect(self, timeout: float) -> list[Event]:
        if self.orders:
            return self._begin(self.orders.popleft())
        for stage in {order.stage for order, _ in self.calls.values()}:
            self.workers[stage].advance()
        return [self._end(order, call) for order, call in list(self.calls.values()) if call.done]

    def _begin(self, order: PoolOrder) -> list[Event]:
        assert not isinstance(order, StopWorker)
        if isinstance(order, StartWorker):
            work = self.stages[order.worker_type]
            try:
                if order.worker_type not in self.workers:
                    worker = Worker(work.make, work.num_gpus > 0, work.threads, work.name)
                    self.tell(work.name, worker.hearing.take())
                    if reason := self.admit(this_node(), worker.loaded):
                        raise WrongWorker(reason)
                    self.workers[order.worker_type] = worker
            except WrongWorker as error:
                return [Died(order.worker_type, order.worker, one_line(str(error)), wrong=True)]
            except Exception as error:
                return [Died(order.worker_type, order.worker, one_line(told(error)), at_start=True)]
            return [Started(order.worker_type, order.worker)]
        worker = self.workers[order.stage]
        try:
            if order.task == "read":
                return [self._finished(order, *worker.read(order.rows))]
            names = list(dict.fromkeys(p.block for p in order.slices))
            slices = [(names.index(p.block), p.table, p.start, p.stop) for p in order.slices]
            blocks = [self.blocks[name] for name in names]
            if order.task == "commit":
                worker.commit(order.shard, order.errors, slices, *blocks)
                return [Finished(order.id)]
            self.calls[order.id] = order, worker.begin(slices, *blocks)
            return []
        except Exception as error:
            return [_failed(order, error)]

    def _end(self, order: Dispatch, call: Call) -> Event:
        del self.calls[order.id]
        try:
            return self._finished(order, *self.workers[order.stage].result(call))
        except Exception as error:
            return _failed(order, error)

    def _finished(self, order: Dispatch, outcome: Outcome, block: Block) -> Event:
        if reason := self.admit(outcome.node, outcome.read):
            return Died(order.stage, order.worker, reason, wrong=True)
        self.blocks[order.id] = block
        self.tell(self.stages[order.stage].name, outcome.heard)
        return Finished(order.id, outcome.parts, outcome.rejected)

    def release(self, block: int) -> None:
        self.blocks.pop(block, None)

    def close(self) -> None:
        self.workers.clear()
        self.calls.clear()
        self.blocks.clear()


def _failed(order: Dispatch, error: Exception) -> Event:
    if isinstance(error, WrongWorker):
        return Died(order.stage, order.worker, one_line(str(error)), wrong=True)
    return Failed(order.id, cause(error), one_line(told(error)))

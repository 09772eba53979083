"""The same stages in this process: for a debugger, a notebook, one GPU and no Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from latentmill.flow import Died, Dispatch, Event, Failed, Finished, Order, Start, Started, Stop
from latentmill.worker import Block, StageWork, Worker


class InlinePool:
    """Does each order when its turn comes, one at a time; a stage's replicas share one worker."""

    def __init__(self, stages: Sequence[StageWork]) -> None:
        self.stages = stages
        self.workers: dict[int, Worker] = {}
        self.orders: deque[Order] = deque()
        self.blocks: dict[int, Block] = {}

    def submit(self, order: Order) -> None:
        if isinstance(order, Stop):  # what it held is given out anew, and the next worker is built afresh
            self.orders = deque(o for o in self.orders if o.worker != order.worker)
            self.workers.pop(order.stage, None)
            return
        self.orders.append(order)

    def collect(self, timeout: float) -> list[Event]:
        if not self.orders:
            return []
        order = self.orders.popleft()
        assert not isinstance(order, Stop)
        if isinstance(order, Start):
            work = self.stages[order.stage]
            try:
                if order.stage not in self.workers:
                    self.workers[order.stage] = Worker(work.make, work.num_gpus > 0, work.threads)
            except Exception as error:
                return [Died(order.stage, order.worker, f"{type(error).__name__}: {error}", at_start=True)]
            return [Started(order.stage, order.worker)]
        try:
            return [self._work(order)]
        except Exception as error:
            return [Failed(order.id, "raised", f"{type(error).__name__}: {error}")]

    def _work(self, order: Dispatch) -> Event:
        worker = self.workers[order.stage]
        if order.kind == "read":
            outcome, block = worker.read(order.rows)
        else:
            names = list(dict.fromkeys(piece.block for piece in order.pieces))
            cuts = [(names.index(p.block), p.part, p.start, p.stop) for p in order.pieces]
            blocks = [self.blocks[name] for name in names]
            if order.kind == "commit":
                worker.commit(order.shard, order.errors, cuts, *blocks)
                return Finished(order.id)
            outcome, block = worker.batch(cuts, *blocks)
        self.blocks[order.id] = block
        return Finished(order.id, outcome.parts, outcome.rejected)

    def release(self, block: int) -> None:
        self.blocks.pop(block, None)

    def close(self) -> None:
        self.workers.clear()
        self.blocks.clear()

"""Nodes, workers and blocks that are made up, under one driver."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.actor import Actor
from tests.simulation.settings import DRAWS, EARLY, LARGEST_ROW, NAMES, Gone, Row, Wrong, attempt_of, value

from latentmill.driver.limits import MAX_QUARANTINED_ON_TRUST
from latentmill.driver.messages import (
    AskFor,
    Died,
    Dispatch,
    Draining,
    Event,
    Failed,
    Finished,
    HandedOver,
    HandOver,
    NodesSeen,
    PoolOrder,
    Started,
    StartWorker,
    StopWorker,
    TakenUp,
)
from latentmill.plugin import Filtered, Reason
from latentmill.stages import write

if TYPE_CHECKING:
    from tests.simulation.world import Driver, World


class Pool:
    """Nodes, workers and blocks of one driver's life."""

    def __init__(self, world: World, driver: Driver) -> None:
        self.world, self.driver = world, driver
        self.inbox: list[Event] = []
        self.happened = 0
        """Orders and events, in all."""
        self.nodes = list(range(world.settings.nodes))
        self.places: Counter[int] = Counter()
        """Of each node, how many workers it has, those that start included."""
        self._tell_of_nodes()
        self.next_node = len(self.nodes)
        self.expected = 0
        """Nodes that are on their way."""
        for seconds in world.settings.comes:
            self._expect_node(seconds)
        for seconds in world.settings.goes:
            driver._while_alive(seconds, self._node_goes)
        self.actors: dict[int, Actor] = {}
        self.coming: dict[int, Actor] = {}
        """Workers that start."""
        self.homeless: list[StartWorker] = []
        self.blocks: dict[int, tuple[int, list[list[Row]]]] = {}
        """Node and parts of each block that is held."""
        self.lost: set[int] = set()

    def submit(self, order: PoolOrder) -> None:
        self.happened += 1
        if isinstance(order, StopWorker):
            self._stop(order.worker)
        elif isinstance(order, StartWorker):
            self._house(order)
        elif isinstance(order, HandOver):
            self._hand_over(order.worker)
        elif isinstance(order, AskFor):
            self._scale(sum(order.more))
        else:
            for slice_ in order.slices:
                if slice_.block not in self.blocks and slice_.block not in self.lost:
                    raise Wrong(f"block {slice_.block} is wanted, and was released")
            actor = self.actors.get(order.worker)
            if actor is not None:  # else it has died, and the driver is about to hear
                actor.orders.append(order)
                self._work(actor)

    def collect(self, timeout: float) -> list[Event]:
        events, self.inbox = self.inbox, []
        self.happened += len(events)
        return events

    def release(self, block: int) -> None:
        if block not in self.blocks and block not in self.lost:
            raise Wrong(f"block {block} is released twice")
        self.blocks.pop(block, None)
        self.lost.discard(block)

    def close(self) -> None:
        self.end()

    def end(self) -> None:
        """All workers end."""
        self.actors.clear()
        self.coming.clear()
        self.homeless.clear()

    def _house(self, start: StartWorker) -> None:
        free = [node for node in self.nodes if self.places[node] < self.world.settings.node_size]
        if not free:
            self.homeless.append(start)
            return
        actor = Actor(start.worker_type, start.worker, self.world.dice.choice(free))
        self.places[actor.node] += 1
        self.coming[start.worker] = actor
        seconds = self.world.dice.uniform(0.5, 5)

        def ready() -> None:
            if self.coming.pop(start.worker, None) is None:  # it was stopped
                return
            if actor.node not in self.nodes:  # the node went before it was there
                self._house(start)
                return
            if self.world.trouble("load"):  # it raises, or is killed, while it loads its model
                self._leave(actor)
                raised = self.world.dice.random() < 0.5
                self.inbox.append(Died(start.worker_type, start.worker, "not loaded", at_start=raised))
                return
            self.actors[start.worker] = actor
            self.inbox.append(Started(start.worker_type, start.worker, seconds * self.world.settings.loading))

        self.driver._while_alive(seconds, ready)

    def _stop(self, worker: int) -> None:
        self.homeless = [start for start in self.homeless if start.worker != worker]
        actor = self.actors.pop(worker, None) or self.coming.pop(worker, None)
        if actor is not None:
            self._leave(actor)

    def _leave(self, actor: Actor) -> None:
        """A worker's place is free: another that waits for one has it."""
        self.places[actor.node] -= 1
        waiting, self.homeless = self.homeless, []
        for start in waiting:
            self._house(start)

    def _tell_of_nodes(self) -> None:
        if self.world.settings.node_size < math.inf:
            nodes = tuple({"CPU": self.world.settings.node_size} for _ in self.nodes)
            self.inbox.append(NodesSeen(nodes, self.world.settings.scales))

    def _work(self, actor: Actor) -> None:
        if actor.busy or not actor.orders:
            return
        world, order = self.world, actor.orders[0]
        actor.busy = True
        rows, settings = set(order.rows), world.settings
        worst = order.stage == DRAWS and order.task == "batch"
        if world.trouble("node"):
            self._node_dies(actor.node)
            return
        if world.trouble("hang") or (worst and rows & settings.hanging):
            self._while_there(actor, 60, lambda: self._die(actor, "it finished nothing for 60 s"))
            return
        seconds = settings.slowness[order.stage] * world.dice.expovariate(1 / (0.2 + 0.1 * len(rows)))
        wrecked = order.stage == self.driver.wreck and order.task != "commit"
        if world.trouble("late"):
            seconds += world.dice.uniform(0, 200)
        if world.trouble("die") or (worst and rows & settings.killing) or (wrecked and self.driver.how == "dies"):
            self._while_there(actor, seconds * world.dice.random(), lambda: self._die(actor, "killed"))
        else:
            self._while_there(actor, seconds, lambda: self._done(actor, order, seconds))

    def _done(self, actor: Actor, order: Dispatch, seconds: float) -> None:
        """A worker has come to the end of an order."""
        world = self.world
        answer: Event
        if order not in actor.orders:  # it was handed over
            return
        if any(slice_.block in self.lost for slice_ in order.slices):
            answer = Failed(order.id, "lost", "its node is gone")
        elif order.stage == self.driver.wreck and order.task != "commit":
            how: Any = self.driver.how
            answer = Failed(order.id, how, "nothing works here")
        elif world.trouble("raise") or (order.stage == DRAWS and self._raises(order)):
            answer = Failed(order.id, "raised", "boom")
        elif order.task == "take up":
            answer = self._take_up(actor, order)
        elif order.task in ("commit", "keep"):
            try:
                (self._commit if order.task == "commit" else self._keep)(order)
            except Gone:  # it did, or didn't; nobody was told
                self._die(actor, "killed while it committed")
                return
            except (OSError, RuntimeError) as error:
                answer = Failed(order.id, "raised", str(error))
            else:
                answer = Finished(order.id, seconds=seconds)
        else:
            answer = self._made(actor, order, seconds)
        actor.orders.remove(order)
        actor.busy = False
        self.inbox.append(answer)
        self._work(actor)

    def _hand_over(self, worker: int) -> None:
        """What nobody has begun with comes back at once, and what is denoised after a step."""
        actor = self.actors.get(worker)
        if actor is None:
            return
        begun = actor.orders[:1] if actor.busy else []
        for order in actor.orders[len(begun) :]:
            actor.orders.remove(order)
            self.inbox.append(HandedOver(order.id))
        for order in begun:
            if order.stage == DRAWS and order.task == "batch" and self.world.dice.random() < 0.7:
                self._while_there(
                    actor, self.world.dice.uniform(0, 4), lambda order=order: self._half_way(actor, order)
                )

    def _half_way(self, actor: Actor, order: Dispatch) -> None:
        """A batch comes back in the middle: what it was made of still, or as its stage left it."""
        if order not in actor.orders:
            return
        actor.orders.remove(order)
        actor.busy = False
        if any(slice_.block in self.lost for slice_ in order.slices) or self.world.dice.random() < 0.3:
            self.inbox.append(HandedOver(order.id, begun=True))
            return
        rows = self._gather(order)
        parts = [[row for row in rows if row[0] % 2 == odd] for odd in (0, 1)]
        self.blocks[order.id] = actor.node, parts
        told = [(f"half-way {odd}", tuple(row for row, _ in part)) for odd, part in enumerate(parts)]
        self.inbox.append(HandedOver(order.id, told, bytes=sum(1 + row % LARGEST_ROW for row, _ in rows)))

    def _keep(self, order: Dispatch) -> None:
        """What ``HalfDone.keep`` does. A file may be torn, and is found out by whoever takes it up."""
        store, rows = self.world.store, self._gather(order)
        stages = [stage for stage, slice_ in zip(order.stages, order.slices) for _ in slice_.rows]
        for (row, made), stage in zip(rows, stages, strict=True):
            if made != value(row, stage - 1, attempt_of(row, made)) or attempt_of(row, made) != order.attempt_of.get(
                row, 0
            ):
                raise Wrong(f"row {row} is kept for stage {stage} as {made}")
        if self.world.trouble("dies before"):
            raise Gone
        newest = store.half_done(order.shard)
        number = int(newest.split("-")[1]) + 1 if newest else 1
        kept = [[row, made, stage] for (row, made), stage in zip(rows, stages)]
        content = json.dumps(
            {"rows": kept, "filtered": order.filtered, "attempts": [*order.attempt_of.items()]}
        ).encode()
        store.create(f"half_done/{order.shard:05d}-{number}", content[:-9] if self.world.trouble("torn") else content)

    def _take_up(self, actor: Actor, order: Dispatch) -> Event:
        """What ``Worker.take_up`` does."""
        try:
            found = json.loads(self.world.store.read(f"half_done/{order.file}"))
        except (OSError, ValueError):
            self.blocks[order.id] = actor.node, []
            return TakenUp(order.id)
        self.driver.resumes = True
        stages = sorted({stage for _, _, stage in found["rows"]})
        parts = [[(row, made) for row, made, at in found["rows"] if at == stage] for stage in stages]
        self.blocks[order.id] = actor.node, parts
        told = [(stage, "taken up", tuple(row for row, _ in part)) for stage, part in zip(stages, parts)]
        return TakenUp(order.id, told, found["filtered"], dict(found["attempts"]))

    def _made(self, actor: Actor, order: Dispatch, seconds: float) -> Finished:
        settings = self.world.settings
        attempts = order.attempts or [0] * len(order.rows)
        asked = [(row, value(row, -1, attempt)) for row, attempt in zip(order.rows, attempts)]
        given = asked if order.task == "read" else self._gather(order)
        if [row for row, _ in given] != list(order.rows):
            raise Wrong(f"{NAMES[order.stage]} was promised rows {order.rows}, and has {given}")
        rejected = {row: why for row, made in given if (why := self._unwanted(order.stage, row, attempt_of(row, made)))}
        parts: list[list[Row]] = [[] for _ in range(settings.shapes)]
        for row, made in given:
            attempt = attempt_of(row, made)
            if made != value(row, order.stage - 1, attempt) or attempt >= settings.attempts:
                raise Wrong(f"row {row} comes to {NAMES[order.stage]} as {made}")
            if row not in rejected:
                parts[row % settings.shapes].append((row, value(row, order.stage, attempt)))
        self.blocks[order.id] = actor.node, parts
        told = [(f"shape {k}", tuple(row for row, _ in part)) for k, part in enumerate(parts)]
        size = sum(1 + row % LARGEST_ROW for part in parts for row, _ in part)
        return Finished(order.id, told, [*rejected.items()], size, seconds)

    def _unwanted(self, stage: int, row: int, attempt: int) -> Reason | None:
        """Why a stage lets a row go no further; None if it does."""
        settings = self.world.settings
        if stage == EARLY and row in settings.rejected:
            return "unfit"
        by = settings.filters[(row + attempt) % len(settings.filters)]
        if (stage == EARLY and row in settings.early) or (stage == by and attempt < settings.passes_at[row]):
            return Filtered("unwanted", {"score": float(row)})
        return None

    def _raises(self, order: Dispatch) -> bool:
        raising = self.world.settings.raising
        return any(raising.get(row) == attempt_of(row, made) for row, made in self._gather(order))

    def _gather(self, order: Dispatch) -> list[Row]:
        return [row for p in order.slices for row in self.blocks[p.block][1][p.table][p.start : p.stop]]

    def _commit(self, order: Dispatch) -> None:
        """What ``Write.commit`` does, with a worker that may end before or after, and a disk that may lie."""
        world, name = self.world, f"data/{order.shard:05d}"
        needed = order.rows[: len(order.rows) - order.not_needed]
        rows = sorted(row for row in self._gather(order) if row[0] in needed)
        errors = sorted(error["row"] for error in order.errors if error["row"] in needed)
        told = [row for row in order.filtered if row["row"] in needed]
        filtered = sorted((row["row"], row.get("attempts", 1), NAMES.index(row["stage"])) for row in told)
        self._check_blame(order)
        about = {"rows": rows, "errors": errors, "filtered": filtered, "not needed": order.not_needed}
        content = json.dumps(about).encode()

        def store(temporary: str) -> None:
            world.store.temporary[temporary] = content[:-9] if world.trouble("torn") else content

        def check(temporary: str) -> None:
            if world.store.temporary[temporary] != content:
                raise RuntimeError("the file just written has not the rows that were written")

        if world.trouble("dies before"):
            if world.trouble("zombie"):  # what it had asked of the store is done later

                def late() -> None:
                    if name not in world.store.files:
                        world.store.publish(name, content)

                world.later(world.dice.uniform(0, 100), late)
            raise Gone
        write.publish(world.store, name, store, check)
        if world.trouble("dies after"):
            raise Gone

    def _check_blame(self, order: Dispatch) -> None:
        """No row is blamed for a stage that can do nothing, but for a few where the dataset shows that it could before."""
        world, wreck = self.world, self.driver.wreck
        if wreck is None:
            return
        blamed = {
            error["row"] for error in order.errors if error["stage"] == NAMES[wreck] and error["reason"] != "unfit"
        }
        if blamed - world.blamed and not world.has_worked(wreck):
            raise Wrong(f"rows {sorted(blamed)} are blamed for a stage that never worked")
        world.blamed |= blamed
        self.driver.blamed_rows |= blamed
        if len(self.driver.blamed_rows) > MAX_QUARANTINED_ON_TRUST:
            raise Wrong(f"rows {sorted(self.driver.blamed_rows)} are blamed for a stage at which nothing can be done")

    def _die(self, actor: Actor, why: str, with_node: bool = False) -> None:
        if self.actors.pop(actor.id, None):
            self._leave(actor)
            stages = self.world.settings.worker_types[actor.worker_type].stages
            hosted = ", ".join(NAMES[stage] for stage in stages)
            self.world.say(f"driver {self.driver.number}: a worker of {hosted} dies: {why}")
            self.inbox.append(Died(actor.worker_type, actor.id, why, with_node=with_node))

    def _node_dies(self, node: int) -> None:
        self.world.say(f"driver {self.driver.number}: node {node} dies")
        self.nodes.remove(node)
        for actor in [actor for actor in self.actors.values() if actor.node == node]:
            self._die(actor, "its node is gone", with_node=True)
        gone = {block for block, (where, _) in self.blocks.items() if where == node}
        self.lost |= gone
        for block in gone:
            del self.blocks[block]
        too_few = (len(self.nodes) + self.expected) * self.world.settings.node_size < self.world.settings.fewest
        if too_few or not self.nodes or self.world.dice.random() < 0.7:  # or none comes in its place
            self._expect_node(self.world.dice.uniform(0, 60))
        self._tell_of_nodes()

    def _scale(self, asked: int) -> None:
        if asked and not self.expected:
            self._expect_node(self.world.dice.uniform(5, 40))

    def _node_goes(self) -> None:
        """One is lost, or drained some seconds before it goes."""
        if not self.nodes:
            return
        node, drained = self.world.dice.choice(self.nodes), self.world.dice.random() < 0.5
        if drained:
            there = [actor for actor in self.actors.values() if actor.node == node]
            self.inbox += [Draining(actor.worker_type, actor.id) for actor in there]
        seconds = self.world.dice.uniform(0, 20) if drained else 0.0
        self.driver._while_alive(seconds, lambda: self._node_dies(node) if node in self.nodes else None)

    def _expect_node(self, seconds: float) -> None:
        self.expected += 1
        self.driver._while_alive(seconds, self._node_comes)

    def _node_comes(self) -> None:
        self.expected -= 1
        self.nodes.append(self.next_node)
        self.next_node += 1
        self._tell_of_nodes()
        waiting, self.homeless = self.homeless, []
        for start in waiting:
            self._house(start)

    def _while_there(self, actor: Actor, seconds: float, event: Callable[[], None]) -> None:
        def happen() -> None:
            if self.actors.get(actor.id) is actor:
                event()

        self.world.later(seconds, happen)

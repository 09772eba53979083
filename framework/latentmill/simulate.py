"""The same flow on virtual time: machines that die, hang and come, a store that fails, drivers that share. From one seed.

    python -m latentmill.simulate --seeds 1000          # seeds 0 to 999
    python -m latentmill.simulate --seed 417            # one of them again, with what happened

What runs is ours: ``run.turn``, ``flow``, ``leases`` and the commit of ``write.publish``. What is made up is the world: nodes,
workers, blocks, a store in memory, and a clock. After every event it is checked that each row of an open shard is in
exactly one place, that no queue grows beyond its bound, that no block is missed that is still wanted, and that what is in
the store is whole, right and never changes. Troubles end after a while, except for rows that can't be done; then all must
be finished: each row in the dataset once, or in its errors. In some of a driver's lives a whole stage does nothing right: then
no row may be blamed, or as few as the flow promises where the dataset shows that the stage has worked before.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

from latentmill import flow
from latentmill.dataset import done_shards
from latentmill.flow import Died, Dispatch, Event, Failed, Finished, StageSpec, Start, Started, State, Stop
from latentmill.leases import EVERY, Leases
from latentmill.run import turn
from latentmill.stages import write
from latentmill.storage import Storage

NAMES = ("read", "encode", "denoise", "decode", "write")
TROUBLED = 120.0
"""Virtual seconds until troubles end."""
LONGEST = 20_000.0
"""Virtual seconds after which a world that isn't finished never will be."""

Row: TypeAlias = tuple[int, int]
"""A row's number, and what has been made of it."""


class Wrong(AssertionError):
    """Something happened that must not."""


class Gone(Exception):
    """A process ended here."""


@dataclass
class Settings:
    """What a seed draws: a job, and how bad its world is."""

    rows: int
    rows_per_shard: int
    stages: tuple[StageSpec, ...]
    fixed: bool
    shapes: int
    drivers: int
    nodes: int
    rejected: set[int]
    """Rows that a stage rejects."""
    raising: set[int]
    killing: set[int]
    hanging: set[int]
    """Rows on which a stage raises, dies, or hangs, each time: for good."""
    rates: dict[str, float]
    """Chance of a trouble for each dispatch, commit, or use of the store."""

    @property
    def bad(self) -> set[int]:
        """Rows that can't be done."""
        return self.rejected | self.raising | self.killing | self.hanging

    @classmethod
    def draw(cls, dice: random.Random) -> Settings:
        """Draw them."""
        fixed, rows = dice.random() < 0.4, dice.randint(1, 70)
        kinds = 1 if fixed else dice.choice((1, 1, 3))
        stages = [
            StageSpec(
                name,
                batch_size=dice.randint(1, 9),
                replicas=dice.randint(1, 3),
                in_flight=dice.choice((1, 2, 2)),
                kinds=kinds if name == "denoise" else 1,
                retries=dice.choice((0, 1, 1, 2)),
            )
            for name in NAMES
        ]
        often = ("torn", "dies before", "dies after", "zombie", "misheard")
        seldom = ("raise", "die", "hang", "node", "late", "store", "driver", "pause")
        wrecked = dice.choice((0.0, 0.0, 0.3, 0.6))
        bad = dice.sample(range(rows), min(rows, dice.choice((0, 0, 1, 3))))
        kinds_of_bad: list[set[int]] = [set(), set(), set(), set()]
        for row in bad:
            dice.choice(kinds_of_bad).add(row)
        return cls(
            rows,
            dice.randint(1, 25),
            tuple(stages),
            fixed,
            shapes=dice.choice((1, 1, 2, 4)),
            drivers=dice.choice((1, 1, 2, 3)),
            nodes=dice.randint(1, 3),
            rejected=kinds_of_bad[0],
            raising=kinds_of_bad[1],
            killing=kinds_of_bad[2],
            hanging=kinds_of_bad[3],
            rates={
                **{name: dice.choice((0.0, 0.0, 0.01, 0.04)) for name in seldom},
                **{name: dice.choice((0.0, 0.1, 0.3)) for name in often},
                "wrecked": wrecked,
            },
        )


def value(row: int, stage: int) -> int:
    """What a row is behind a stage: it depends on the row, and on nothing else."""
    return row * 1_000_003 + stage


class World:
    """A clock, a store, and the drivers. What happens next is always the earliest event."""

    def __init__(self, seed: int, told: Callable[[str], None] = lambda line: None) -> None:
        self.dice = random.Random(seed)
        self.settings, self.told = Settings.draw(self.dice), told
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = 0
        self.blamed: set[int] = set()
        """Rows that failed in a stage at which nothing could be done."""
        self.store = Store(self)
        self.drivers = [Driver(self, number) for number in range(self.settings.drivers)]

    def run(self) -> None:
        """Until all is finished. Raises Wrong."""
        for driver in self.drivers:
            self.later(self.dice.uniform(0, 20), driver.start)
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
            if self.now > LONGEST:
                raise Wrong(f"not finished after {LONGEST:g} s: {[driver.place() for driver in self.drivers]}")
        self.check_end()

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen in so many seconds."""
        self.order += 1
        heapq.heappush(self.events, (self.now + seconds, self.order, event))

    def trouble(self, name: str) -> bool:
        """Whether it happens now."""
        rate = self.settings.rates[name]
        return rate > 0 and self.now < TROUBLED and self.dice.random() < rate

    def say(self, line: str) -> None:
        """For whoever looks at one seed."""
        self.told(f"{self.now:9.2f}  {line}")

    def check_end(self) -> None:
        """Every row is in the dataset, or in its errors, and those that can't be done are in the errors."""
        settings, places = self.settings, Counter[int]()
        failed = set()
        for name in self.store.names("data"):
            content = json.loads(self.store.files[f"data/{name}"])
            places.update(row for row, _ in content["rows"])
            places.update(content["errors"])
            failed.update(content["errors"])
        planned = set(range(settings.rows))
        if self.hopeless():
            planned &= places.keys()
        if wrong := {row for row in planned if places[row] != 1} | (places.keys() - planned):
            raise Wrong(f"rows {sorted(wrong)} are not in the dataset once: {[places[row] for row in sorted(wrong)]}")
        bad = settings.bad
        if bad & planned - failed:
            raise Wrong(f"rows {sorted(bad & planned - failed)} can't be done, and are in the dataset")
        chance = any(settings.rates[name] for name in ("raise", "die", "hang"))
        if failed - bad - self.blamed and not chance:
            raise Wrong(f"rows {sorted(failed - bad)} are in the errors, and nothing is wrong with them")

    def hopeless(self) -> bool:
        """Whether there is no row to show that it is not a stage's fault: none is ok, and none of those that are left will be."""
        done, size = done_shards(self.store, ""), self.settings.rows_per_shard
        left = {row for row in range(self.settings.rows) if row // size not in done}
        return bool(left) and left <= self.settings.bad and not self.holds_ok()

    def holds_ok(self) -> bool:
        """Whether the dataset holds a row that is ok."""
        return any(json.loads(file)["rows"] for name, file in self.store.files.items() if name.startswith("data/"))


class Store(Storage):
    """Files in memory, of a store that may fail, tear what is written aside, or do what a dead process had asked for."""

    def __init__(self, world: World) -> None:
        super().__init__("memory")
        self.world = world
        self.files: dict[str, bytes] = {}
        self.temporary: dict[str, bytes] = {}

    def _used(self) -> None:
        if self.world.trouble("store"):
            raise OSError("the store does not answer")

    @contextmanager
    def aside(self, name: str) -> Iterator[str]:
        self.world.order += 1
        temporary = f"{self.world.order}-{name}"
        try:
            yield temporary
        finally:
            self.temporary.pop(temporary, None)

    def create(self, name: str, content: str | bytes) -> bool:
        self._used()
        if name in self.files:
            return False
        self.publish(name, content if isinstance(content, bytes) else self.temporary[content])
        return not self.world.trouble(
            "misheard"
        )  # the answer was lost, the request made again, and the name taken: by us

    def publish(self, name: str, content: bytes) -> None:
        """Let a file appear, under the eyes of the world."""
        if name.startswith("data/"):
            if name in self.files:
                raise Wrong(f"{name} was there, and is another now")
            shard = int(name.removeprefix("data/"))
            settings = self.world.settings
            planned = list(
                range(settings.rows)[shard * settings.rows_per_shard : (shard + 1) * settings.rows_per_shard]
            )
            try:
                found = json.loads(content)
            except ValueError:
                raise Wrong(f"{name} is not whole") from None
            if sorted([*(row for row, _ in found["rows"]), *found["errors"]]) != planned:
                raise Wrong(f"{name} has not the rows that were planned: {found}")
            if wrong := [row for row, made in found["rows"] if made != value(row, len(NAMES) - 1)]:
                raise Wrong(f"{name} has other rows' values at {wrong}")
        self.files[name] = content

    def put(self, name: str, content: bytes) -> None:
        self._used()
        self.files[name] = content

    def read(self, name: str) -> bytes:
        self._used()
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def open(self, name: str) -> BinaryIO:
        raise NotImplementedError

    def names(self, folder: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/")]

    def delete(self, name: str) -> None:
        self._used()
        self.files.pop(name, None)

    def move(self, name: str, to: str) -> None:
        self.files[to] = self.files.pop(name)

    def sweep(self) -> None:
        pass

    def exists(self, name: str) -> bool:
        self._used()
        return name in self.files


class Driver:
    """A process that runs the job, killed or stopped at times and begun again, with nodes of its own."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.lives = 0
        self.awake_at = 0.0
        self.finished = False
        self.state: State | None = None

    def place(self) -> str:
        """Where it stands, for a message."""
        return f"driver {self.number}: {'finished' if self.finished else (self.state and self.state.failed) or 'under way'}"

    def start(self) -> None:
        """Begin, or go on after a death: all that it knows is what is in the store."""
        world, settings = self.world, self.world.settings
        self.lives += 1
        world.say(f"driver {self.number} begins, with {len(world.store.names('data'))} shards done")
        self.wreck = world.dice.randrange(len(NAMES)) if world.trouble("wrecked") else None
        """The stage at which nothing can be done in this life."""
        self.how = world.dice.choice(("raised", "raised", "unloaded", "contract", "dies"))
        self.blamed_rows: set[int] = set()
        if self.wreck is not None:
            world.say(f"driver {self.number}: {NAMES[self.wreck]} can do nothing: {self.how}")
        self.pool = Pool(world, self)
        self.leases = Leases(
            world.store,
            "data/{:05d}".format,
            f"machine-{self.number}/{self.lives}/{self.number}.{self.lives}",
            lambda: world.now,
        )
        self.state = State(
            settings.stages,
            settings.rows,
            settings.rows_per_shard,
            done_shards(world.store, ""),
            shared=True,
            fixed=settings.fixed,
        )
        self._while_alive(0, self.turn)
        self._while_alive(0, self.beat)

    def end(self, why: str) -> None:
        """The process is gone, and all its workers; what it had asked of the store may still be done."""
        self.world.say(f"driver {self.number} ends: {why}")
        self.lives += 1
        self.pool.end()
        self.world.later(self.world.dice.uniform(1, 100), self.start)

    def beat(self) -> None:
        """The heart of its leases."""
        with suppress(OSError):
            self.leases.beat()
        self._while_alive(EVERY, self.beat)

    def turn(self) -> None:
        """One turn of the loop."""
        world, state = self.world, self.state
        assert state is not None
        if world.trouble("pause"):
            self.awake_at = world.now + world.dice.uniform(0, 300)
            world.say(f"driver {self.number} is stopped until {self.awake_at:.0f}")
        if world.now < self.awake_at:
            self._while_alive(self.awake_at - world.now, self.turn)
            return
        if world.trouble("driver"):
            self.end("killed")
            return
        try:
            turn(state, self.pool, self.leases, world.holds_ok)
        except OSError as error:
            self.end(str(error))
            return
        check(state)
        if state.failed and world.now > TROUBLED and world.hopeless():
            self.finished = True
            self.lives += 1
            self.pool.end()
            world.say(f"driver {self.number} gives up: {state.failed}")
        elif state.failed:
            self.end(state.failed)
        elif flow.finished(state):
            self.finished = True
            self.lives += 1
            self.pool.end()
            world.say(f"driver {self.number} has finished")
        else:
            self._while_alive(0.5 if self.pool.inbox or not state.elsewhere else EVERY / 4, self.turn)

    def _while_alive(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen later, unless the process has another life by then."""
        life = self.lives
        pause = max(0.0, self.awake_at - self.world.now)  # a stopped process does nothing, heart included
        self.world.later(max(seconds, pause), lambda: event() if self.lives == life else None)


@dataclass(eq=False)
class Actor:
    """A worker on a node, and what it has been given."""

    stage: int
    id: int
    node: int
    orders: list[Dispatch] = field(default_factory=list)
    busy: bool = False


class Pool:
    """Nodes, workers and blocks of one driver's life."""

    def __init__(self, world: World, driver: Driver) -> None:
        self.world, self.driver = world, driver
        self.inbox: list[Event] = []
        self.nodes = list(range(world.settings.nodes))
        self.next_node = len(self.nodes)
        self.actors: dict[tuple[int, int], Actor] = {}
        self.homeless: list[Start] = []
        self.blocks: dict[int, tuple[int, list[list[Row]]]] = {}
        """Node and parts of each block that is held."""
        self.lost: set[int] = set()

    def submit(self, order: flow.Order) -> None:
        if isinstance(order, Stop):
            self.actors.pop((order.stage, order.worker), None)
        elif isinstance(order, Start):
            self._house(order)
        else:
            for piece in order.pieces:
                if piece.block not in self.blocks and piece.block not in self.lost:
                    raise Wrong(f"block {piece.block} is wanted, and was released")
            actor = self.actors.get((order.stage, order.worker))
            if actor is not None:  # else it has died, and the driver is about to hear
                actor.orders.append(order)
                self._work(actor)

    def collect(self, timeout: float) -> list[Event]:
        events, self.inbox = self.inbox, []
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
        self.homeless.clear()

    def _house(self, start: Start) -> None:
        if not self.nodes:
            self.homeless.append(start)
            return
        actor = Actor(start.stage, start.worker, self.world.dice.choice(self.nodes))

        def ready() -> None:
            if actor.node not in self.nodes:  # the node went before it was there
                self._house(start)
                return
            self.actors[start.stage, start.worker] = actor
            self.inbox.append(Started(start.stage, start.worker))

        self.driver._while_alive(self.world.dice.uniform(0.5, 5), ready)

    def _work(self, actor: Actor) -> None:
        if actor.busy or not actor.orders:
            return
        world, order = self.world, actor.orders[0]
        actor.busy = True
        rows, settings = set(order.rows), world.settings
        worst = order.stage == 2 and order.kind == "batch"
        if world.trouble("node"):
            self._node_dies(actor.node)
            return
        if world.trouble("hang") or (worst and rows & settings.hanging):
            self._while_there(actor, 60, lambda: self._die(actor, "it finished nothing for 60 s"))
            return
        seconds = world.dice.expovariate(1 / (0.2 + 0.1 * len(rows)))
        wrecked = order.stage == self.driver.wreck and order.kind != "commit"
        if world.trouble("late"):
            seconds += world.dice.uniform(0, 200)
        if world.trouble("die") or (worst and rows & settings.killing) or (wrecked and self.driver.how == "dies"):
            self._while_there(actor, seconds * world.dice.random(), lambda: self._die(actor, "killed"))
        else:
            self._while_there(actor, seconds, lambda: self._done(actor, order))

    def _done(self, actor: Actor, order: Dispatch) -> None:
        """A worker has come to the end of an order."""
        world, settings = self.world, self.world.settings
        answer: Event
        if any(piece.block in self.lost for piece in order.pieces):
            answer = Failed(order.id, "lost", "its node is gone")
        elif order.stage == self.driver.wreck and order.kind != "commit":
            how: Any = self.driver.how
            answer = Failed(order.id, how, "nothing works here")
        elif world.trouble("raise") or (order.stage == 2 and set(order.rows) & settings.raising):
            answer = Failed(order.id, "raised", "boom")
        elif order.kind == "commit":
            try:
                self._commit(order)
            except Gone:  # it did, or didn't; nobody was told
                self._die(actor, "killed while it committed")
                return
            except (OSError, RuntimeError) as error:
                answer = Failed(order.id, "raised", str(error))
            else:
                answer = Finished(order.id)
        else:
            answer = self._made(actor, order)
        actor.orders.remove(order)
        actor.busy = False
        self.inbox.append(answer)
        self._work(actor)

    def _made(self, actor: Actor, order: Dispatch) -> Finished:
        settings = self.world.settings
        given = [(row, value(row, -1)) for row in order.rows] if order.kind == "read" else self._gather(order)
        if [row for row, _ in given] != list(order.rows):
            raise Wrong(f"{NAMES[order.stage]} was promised rows {order.rows}, and has {given}")
        rejected = [row for row, _ in given if order.stage == 1 and row in settings.rejected]
        parts: list[list[Row]] = [[] for _ in range(settings.shapes)]
        for row, made in given:
            if made != value(row, order.stage - 1):
                raise Wrong(f"row {row} comes to {NAMES[order.stage]} as {made}")
            if row not in rejected:
                parts[row % settings.shapes].append((row, value(row, order.stage)))
        self.blocks[order.id] = actor.node, parts
        told = [(f"shape {k}", tuple(row for row, _ in part)) for k, part in enumerate(parts)]
        return Finished(order.id, told, [(row, "unfit") for row in rejected])

    def _gather(self, order: Dispatch) -> list[Row]:
        return [row for p in order.pieces for row in self.blocks[p.block][1][p.part][p.start : p.stop]]

    def _commit(self, order: Dispatch) -> None:
        """What ``Write.commit`` does, with a worker that may end before or after, and a disk that may lie."""
        world, name = self.world, f"data/{order.shard:05d}"
        rows, errors = sorted(self._gather(order)), sorted(error["row"] for error in order.errors)
        self._check_blame(order)
        content = json.dumps({"rows": rows, "errors": errors}).encode()

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
        if blamed - world.blamed and not world.holds_ok():
            raise Wrong(f"rows {sorted(blamed)} are blamed for a stage that never worked")
        world.blamed |= blamed
        self.driver.blamed_rows |= blamed
        if len(self.driver.blamed_rows) > flow.STRIKES:
            raise Wrong(f"rows {sorted(self.driver.blamed_rows)} are blamed for a stage at which nothing can be done")

    def _die(self, actor: Actor, why: str, with_node: bool = False) -> None:
        if self.actors.pop((actor.stage, actor.id), None):
            self.world.say(f"driver {self.driver.number}: a worker of {NAMES[actor.stage]} dies: {why}")
            self.inbox.append(Died(actor.stage, actor.id, why, with_node=with_node))

    def _node_dies(self, node: int) -> None:
        self.world.say(f"driver {self.driver.number}: node {node} dies")
        self.nodes.remove(node)
        for actor in [actor for actor in self.actors.values() if actor.node == node]:
            self._die(actor, "its node is gone", with_node=True)
        gone = {block for block, (where, _) in self.blocks.items() if where == node}
        self.lost |= gone
        for block in gone:
            del self.blocks[block]
        if not self.nodes or self.world.dice.random() < 0.7:  # or none comes in its place
            self.driver._while_alive(self.world.dice.uniform(0, 60), self._node_comes)

    def _node_comes(self) -> None:
        self.nodes.append(self.next_node)
        self.next_node += 1
        waiting, self.homeless = self.homeless, []
        for start in waiting:
            self._house(start)

    def _while_there(self, actor: Actor, seconds: float, event: Callable[[], None]) -> None:
        def happen() -> None:
            if self.actors.get((actor.stage, actor.id)) is actor:
                event()

        self.world.later(seconds, happen)


def check(state: State) -> None:
    """That each row of each open shard is in exactly one place, and that nothing grows beyond its bound. Raises Wrong."""
    if state.failed:
        return
    places = Counter(row for rows in state.to_read for row in rows)
    for stage in range(len(state.stages)):
        for queue in state.queues[stage].values():
            places.update(row for piece in queue for row in piece.rows)
        places.update(row for retry in state.retries[stage] for row in retry.rows)
    places.update(row for order in state.flying.values() if order.kind != "commit" for row in order.rows)
    places.update(row for record in state.records.values() for order, _ in record.verdicts for row in order.rows)
    places.update(row for order, _ in state.fatal for row in order.rows)
    for shard in state.shards.values():
        places.update(row for piece in shard.packed for row in piece.rows)
        places.update(error["row"] for error in shard.errors)
    planned = {row for shard in state.shards for row in state.shard_rows(shard)}
    if wrong := {row for row in planned if places[row] != 1} | (places.keys() - planned):
        raise Wrong(f"rows {sorted(wrong)} are in {[places[row] for row in sorted(wrong)]} places")
    for stage, spec in enumerate(state.stages[1:], start=1):
        before = state.stages[stage - 1]
        most = flow._limit(state, stage) + before.batch_size * (before.replicas * before.in_flight + 1)
        most += spec.batch_size * spec.replicas * spec.in_flight * spec.kinds  # what its own workers gave back
        # Where batches are fixed, one may wait for rows that others have to pass: open shards bound them.
        if state.queued(stage) > most and not state.fixed:
            raise Wrong(f"{state.queued(stage)} rows wait for {spec.name}, and {most} is the most")
    if len(state.shards) > flow._most_shards(state):
        raise Wrong(f"{len(state.shards)} shards are open")


def trial(seed: int) -> str:
    """What is wrong with a seed; nothing, as it should be."""
    try:
        World(seed).run()
    except Exception as error:  # a KeyError in the flow is as wrong
        return f"{type(error).__name__}: {error}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run seeds, on all cores; say which fail and how to see them again."""
    parser = argparse.ArgumentParser(
        prog="python -m latentmill.simulate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many, from 0 on")
    parser.add_argument("--seed", type=int, help="this one alone, telling what happens")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        World(options.seed, print).run()
        return 0
    failed = 0
    with multiprocessing.Pool() as processes:
        for seed, wrong in enumerate(processes.imap(trial, range(options.seeds), chunksize=20)):
            if wrong:
                failed += 1
                print(f"seed {seed}: {wrong}\n    python -m latentmill.simulate --seed {seed}", flush=True)
    print(f"{options.seeds - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

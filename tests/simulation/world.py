"""A clock, a store, and the drivers."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from collections.abc import Callable, Set
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from tests.simulation.check import check
from tests.simulation.pool import Pool
from tests.simulation.settings import DRAWS, LONGEST, NAMES, TROUBLED, Settings, Wrong
from tests.simulation.store import Store

from latentmill.driver.apply import apply
from latentmill.driver.leases import BEAT_EVERY, Leases
from latentmill.driver.loop import turn
from latentmill.driver.messages import Stop, TakenOut
from latentmill.driver.state import DriverState, finished
from latentmill.shard_index import Inventory, Summary
from latentmill.shards import done_shards


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
        self.taken_out = 0
        """Shards that ended elsewhere than the dataset."""
        self.store = Store(self)
        self.drivers = [Driver(self, number) for number in range(self.settings.drivers)]

    def run(self) -> None:
        """Until all is finished. Raises Wrong."""
        for driver in self.drivers:
            self.later(self.dice.uniform(0, 20), driver.start)
        self.later(self.dice.uniform(10, 60), lambda: self.dice.shuffle(self.settings.slowness))
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
        """Every row is ok, failed or filtered, once, and those that can't be done have failed, and those that nobody wants are filtered."""
        settings, places = self.settings, Counter[int]()
        failed, stored = set[int](), set[int]()
        for name in self.store.names("data"):
            content = json.loads(self.store.files[f"data/{name}"])
            places.update(row for row, _ in content["rows"])
            places.update(content["errors"])
            places.update(row for row, *_ in content["filtered"])
            if content["not needed"]:
                places.update(self.shard_rows(int(name))[-content["not needed"] :])
            failed.update(content["errors"])
            stored.update(row for row, _ in content["rows"])
        planned = set(settings.numbers)
        if self.hopeless():
            planned &= places.keys()
        if wrong := {row for row in planned if places[row] != 1} | (places.keys() - planned):
            raise Wrong(f"rows {sorted(wrong)} are not in the dataset once: {[places[row] for row in sorted(wrong)]}")
        bad = settings.bad
        if settings.accept_rows is None and bad & planned - failed:
            raise Wrong(f"rows {sorted(bad & planned - failed)} can't be done, and are in the dataset")
        if bad & stored:
            raise Wrong(f"rows {sorted(bad & stored)} can't be done, and are stored")
        if settings.accept_rows is not None and not self.hopeless():
            self.check_ends(stored, failed)
        if unwanted := stored & settings.filtered.keys():
            raise Wrong(f"rows {sorted(unwanted)} are filtered, and are in the dataset")
        chance = any(settings.rates[name] for name in ("raise", "die", "hang"))
        if failed - bad - self.blamed and not chance:
            raise Wrong(f"rows {sorted(failed - bad)} are in the errors, and nothing is wrong with them")

    def check_ends(self, stored: set[int], failed: set[int]) -> None:
        """The rows that are stored are the first that can be."""
        settings = self.settings
        good = [row for row in settings.numbers if row not in settings.bad | settings.filtered.keys() | failed]
        if sorted(stored) != good[: settings.accept_rows]:
            raise Wrong(f"rows {sorted(stored)} are stored, and {good[: settings.accept_rows]} are the first")

    def settle(self) -> frozenset[int]:
        """What ``Dataset.settle`` does: take out what ends elsewhere than the dataset. Returns shards that are not there."""
        every = range(-(-self.settings.rows // self.settings.rows_per_shard))
        plan: Any = SimpleNamespace(accept_rows=self.settings.accept_rows, shard_rows=self.shard_rows)
        if not (missing := {*every} - done_shards(self.store, "")):
            shards = {shard: json.loads(self.store.files[f"data/{shard:05d}"]) for shard in every}
            told = {
                shard: Summary({"": len(of["errors"])}, {}, (), {"": len(of["filtered"])}, of["not needed"])
                for shard, of in shards.items()
            }
            missing = {*Inventory(plan, told, []).out_of_step()}
            self.taken_out += len(missing)
            for shard in missing:
                self.say(f"shard {shard} ends elsewhere than the dataset, and is taken out")
                del self.store.files[f"data/{shard:05d}"]
        return frozenset(missing)

    def shard_rows(self, shard: int) -> range:
        """The numbers of a shard's rows."""
        size = self.settings.rows_per_shard
        return range(shard * size, min(shard * size + self.settings.short.get(shard, size), self.settings.rows))

    def stored(self, shards: Set[int]) -> dict[int, int]:
        """How many rows shards store; one that is not there, none."""
        found = {shard: self.store.files.get(f"data/{shard:05d}", b'{"rows": []}') for shard in shards}
        return {shard: len(json.loads(content)["rows"]) for shard, content in found.items()}

    def hopeless(self) -> bool:
        """Whether there is no row to show that it is not a stage's fault: none is there, and none of those that are left will be."""
        done, size = done_shards(self.store, ""), self.settings.rows_per_shard
        left = {row for row in self.settings.numbers if row // size not in done}
        return bool(left) and left <= self.settings.bad | self.settings.early and not self.has_worked(DRAWS)

    def has_worked(self, stage: int) -> bool:
        """Whether the dataset holds a row that a stage has done: one that is ok, or was filtered there or later."""
        shards = [json.loads(file) for name, file in self.store.files.items() if name.startswith("data/")]
        return any(shard["rows"] or any(stage <= at for *_, at in shard["filtered"]) for shard in shards)


class Driver:
    """A process that runs the job, killed or stopped at times and begun again, with nodes of its own."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.lives = 0
        self.awake_at = 0.0
        self.finished = False
        self.state: DriverState | None = None

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
        self.how = world.dice.choice(("raised", "store", "unloaded", "contract", "dies"))
        self.blamed_rows: set[int] = set()
        self.largest: list[int] = []
        """The most workers of each type that were wanted in this life."""
        if self.wreck is not None:
            world.say(f"driver {self.number}: {NAMES[self.wreck]} can do nothing: {self.how}")
        self.pool = Pool(world, self)
        self.leases = Leases(
            world.store,
            "data/{:05d}".format,
            f"machine-{self.number}/{self.lives}/{self.number}.{self.lives}",
            lambda: world.now,
            world.store.half_done,
        )
        self.stops: list[tuple[float, Stop]] = []
        """What this life is told, and when, once it is to stop."""
        self.resumes = False
        self.seen = -1, -1
        """What had happened at the turn before the last look at the state, and at that look."""
        rows = settings.rows if world.now >= settings.grows_at else settings.begun
        done = {shard for shard in done_shards(world.store, "") if shard * settings.rows_per_shard < rows}
        self.state = DriverState(
            settings.stages,
            rows,
            settings.rows_per_shard,
            done,
            short=settings.short,
            shared=True,
            fixed=settings.fixed,
            worker_types=settings.worker_types,
            max_bytes_in_flight=settings.max_bytes,
            attempts=settings.attempts,
            drawn_in=DRAWS,
            accept_rows=settings.accept_rows,
            accepted=world.stored(done),
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
        self._while_alive(BEAT_EVERY, self.beat)

    def turn(self) -> None:
        """One turn of the loop."""
        world, state, settings = self.world, self.state, self.world.settings
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
            self.told_to_stop(state)
            turn(state, self.pool, self.leases, world.has_worked, stored=world.stored)
        except OSError as error:
            self.end(str(error))
            return
        happened = self.pool.happened + world.store.uses + len(self.stops)
        if self.seen != (
            happened,
            happened,
        ):  # else the state has been looked at after a turn in which nothing happened
            self.seen = self.seen[1], happened
            check(state, self.largest, self.resumes)
        if state.failed and settings.calm:
            raise Wrong(f"nothing but nodes came and went, and the job ends: {state.failed}")
        self.check_reason()
        if state.failed and world.now > TROUBLED and world.hopeless():
            self.finished = True
            self.lives += 1
            self.pool.end()
            world.say(f"driver {self.number} gives up: {state.failed}")
        elif state.failed:
            self.end(state.failed)
        elif finished(state) and state.rows < settings.rows:
            self.end("its plan is done, and the dataset has grown, or will")
        elif state.stopping.how == "stopped":
            with suppress(OSError):
                self.leases.give_back_all()
            self.end(f"it was told to, and has kept {state.stopping.kept} rows")
        elif finished(state) and (again := world.settle()):
            apply(state, TakenOut(again))
            self._while_alive(0, self.turn)
        elif finished(state):
            self.finished = True
            self.lives += 1
            self.pool.end()
            world.say(f"driver {self.number} has finished")
        else:
            self._while_alive(0.5 if self.pool.inbox or not state.leased_by_others else BEAT_EVERY / 4, self.turn)

    def told_to_stop(self, state: DriverState) -> None:
        """Now and then a driver is to stop: it has some time to go on, and then some for its workers to hand over what they hold."""
        now, dice = self.world.now, self.world.dice
        if not self.stops and (state.blocks or state.in_flight) and self.world.trouble("stop"):
            ends = now + dice.choice((0.0, dice.uniform(0, 20)))
            self.stops = [(now, Stop("finish")), (ends, Stop("hand over")), (ends + dice.uniform(0, 10), Stop("keep"))]
            self.world.say(f"driver {self.number} is to stop, after {ends - now:.1f} s")
        for when, stop in self.stops:
            if now >= when:
                apply(state, stop)

    def check_reason(self) -> None:
        """Where one stage ends each of its workers, the job ends for that stage's sake: chance ends others, but not so many."""
        state = self.state
        assert state is not None
        if self.wreck is None or self.how != "dies" or "one after another" not in state.failed:
            return
        if not state.failed.startswith(f"stage {NAMES[self.wreck]}:"):
            raise Wrong(f"{NAMES[self.wreck]} ends its workers, and the job ends with: {state.failed}")

    def _while_alive(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen later, unless the process has another life by then."""
        life = self.lives
        pause = max(0.0, self.awake_at - self.world.now)  # a stopped process does nothing, heart included
        self.world.later(max(seconds, pause), lambda: event() if self.lives == life else None)

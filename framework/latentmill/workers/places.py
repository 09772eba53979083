"""Places for workers: reserved on a cluster's nodes, and waited for."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from latentmill.errors import BusyError, PlacementError
from latentmill.progress import duration_text
from latentmill.text import plural
from latentmill.workers.nodes import SEE_EVERY, alive, amounts_text, check_placement
from latentmill.workers.worker import WorkerSetup

logger = logging.getLogger("latentmill")

PATIENCE = 60.0
"""Seconds to wait for room on a cluster that would have it if others didn't use it."""
TELL_EVERY = 60.0
"""Seconds between two lines of what is waited for."""
UNTOLD = 2.0
"""Seconds of waiting that nobody is told of."""
INTERRUPTIBLE = 1
"""Seconds of a call to Ray, which no Ctrl-C ends. Ray takes whole ones."""
SETTLING = 5
"""Seconds in which places must be there of which there was room a moment ago."""


class Patience:
    """Says what is waited for as the waiting begins, then every minute, and ends it when it has been too long."""

    def __init__(self, seconds: float | None) -> None:
        """``seconds`` that a wait may take; None: as long as it likes."""
        self.seconds = seconds
        self.since: float | None = None
        """When the wait under way began."""
        self.tell_at = UNTOLD

    def lacks(self, what: Callable[[], str]) -> None:
        """Something isn't there: ``what``. Raises BusyError if it hasn't been for too long."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        waited = now - self.since
        if self.seconds is not None and waited >= self.seconds:
            raise BusyError(f"waited {duration_text(waited)} for places: {what()}")
        if waited >= self.tell_at:
            self.tell_at = waited + TELL_EVERY
            of = "" if self.seconds is None else f"up to {duration_text(self.seconds)} "
            so_far = f", {duration_text(waited)} so far" if waited > TELL_EVERY else ""
            logger.warning(f"waiting {of}for places{so_far}: {what()}")

    def has_all(self) -> None:
        """Nothing is lacking."""
        if self.since is not None and self.tell_at > UNTOLD:
            logger.warning(f"the places are there, after {duration_text(time.monotonic() - self.since)}")
        self.since, self.tell_at = None, UNTOLD


class Places:
    """Places on the nodes that are reserved for workers, each by itself: those that are lost with a node come back one by one.

    What a job needs to begin is reserved before anything starts: all of it, or none. Of a type whose number is given its fewest are
    kept as long as the job runs: a worker's place is its replacement's, and Ray finds it another node if its own has gone. Of those
    beyond each has one for as long as it lives. Of a type whose number is found one worker has a place, at first and whenever no
    other of its type has: the others go where there is room, and nobody must wait for just one place.
    """

    def __init__(
        self,
        setups: Sequence[WorkerSetup],
        name: Callable[[str], str],
        wait: float | None = None,
        left: Mapping[int, Sequence[PlacementGroup]] | None = None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """``name`` makes the name by which people find a place; ``wait``: seconds for nodes to come and others to make room; None: no
        node is waited for, and others for a minute. ``left``: by worker type, places that a run before has left to its workers;
        ``let_go`` ends these.

        Raises PlacementError if the nodes can't hold the workers, BusyError if that, or what others use, has not changed in time.
        """
        self.setups, self.name = setups, name
        self.numbers = Counter[int]()
        """For each worker type, how many places were asked for."""
        self.free: dict[int, list[PlacementGroup]] = {number: [] for number in range(len(setups))}
        """By worker type."""
        self.taken: dict[int, PlacementGroup] = {}
        """Of each worker that has one, its place."""
        self.asked: dict[int, list[PlacementGroup]] = {}
        """By worker type, places of which only the autoscaler is to know."""
        self.groups: dict[PlacementGroup, int] = {}
        """For each place, its worker type."""
        self.patience = Patience(None if wait is None else max(wait, SETTLING))
        """Of what is lost while the job runs."""
        self.looked = 0.0
        """When it was last looked for that."""
        self.drained: Set[str] = frozenset()
        """The ids of nodes that are about to be taken away: nobody comes in the place of who leaves them."""
        if wait is None:
            check_placement(setups, list(alive().values()))
        for number, places in (left or {}).items():
            self.free[number] += places
            self.groups.update(dict.fromkeys(places, number))
        try:
            if self.groups and not self._reserve_lacking():
                let_go()  # who holds some and waits for more may be waited for
                self.close()
            self._reserve_together(self._lacking(), Patience(PATIENCE if wait is None else wait))
        except BaseException:
            let_go()
            self.close()
            raise

    def _lacking(self) -> list[int]:
        """The types of the places that the job needs to begin and has not, those first that have the fewest nodes to choose from."""
        setups = self.setups
        needed = [
            number
            for number, setup in enumerate(setups)
            for _ in range(setup.fewest - len(self.free[number]))
            if setup.asks
        ]
        needed.sort(key=lambda number: (setups[number].num_gpus, *sorted(setups[number].asks.values())), reverse=True)
        return needed

    def _reserve_lacking(self) -> bool:
        """Reserve what is lacking beside what is there, if that can be had soon; whether it can."""
        places = [self._reserve(number) for number in self._lacking()]
        return all(place.wait(SETTLING) for place in places)

    def _reserve_together(self, needed: Sequence[int], patience: Patience) -> None:
        """Reserve places for workers of these types: all, or none. Two jobs of which each holds half would wait for each other."""
        while needed:
            bundles = [self.setups[number].asks for number in needed]
            together = placement_group(bundles, strategy="PACK", name=self.name("all places to begin with"))
            try:
                while not together.wait(INTERRUPTIBLE):
                    patience.lacks(lambda: lacking(self.setups))
            finally:
                remove_placement_group(together)
            places = [self._reserve(number) for number in needed]
            if all(place.wait(SETTLING) for place in places):
                break
            self.close()
            patience.lacks(lambda: lacking(self.setups))
        patience.has_all()

    def _reserve(self, worker_type: int) -> PlacementGroup:
        setup = self.setups[worker_type]
        self.numbers[worker_type] += 1
        called = f"place of {'+'.join(stage.name for stage in setup.stages)}-{self.numbers[worker_type]}"
        place: PlacementGroup = placement_group([setup.asks], strategy="PACK", name=self.name(called))
        self.groups[place] = worker_type
        self.free[worker_type].append(place)
        return place

    def take_left(self, worker_type: int, worker: int, place: PlacementGroup | None) -> bool:
        """Note where a worker is that was left: at a place of its own, or at none. Whether it may stay there."""
        if place is None:
            alone = all(self.groups[other] != worker_type for other in self.taken.values())
            return not self.setups[worker_type].asks or not alone
        if place not in self.free[worker_type]:
            return False
        self.free[worker_type].remove(place)
        self.taken[worker] = place
        return True

    def take(self, worker_type: int, worker: int) -> PlacementGroupSchedulingStrategy | None:
        """A place for a worker, if it is to have one. It may be one that isn't there yet."""
        setup, free = self.setups[worker_type], self.free[worker_type]
        alone = all(self.groups[place] != worker_type for place in self.taken.values())
        if not free and setup.asks and (alone or setup.replicas is not None):
            self._reserve(worker_type)
        if not free:
            return None
        self.taken[worker] = free.pop()
        return PlacementGroupSchedulingStrategy(self.taken[worker], 0)

    def give_back(self, worker: int, starting: Container[int]) -> None:
        """A worker is no more; ``starting``: it, and others, if they were not there yet."""
        if (place := self.taken.pop(worker, None)) is None:
            return
        worker_type = self.groups[place]
        kept = 0 if self.setups[worker_type].replicas is None else self.setups[worker_type].fewest
        if worker in starting:
            others = sum(of == worker_type for of in self.groups.values()) - 1
        else:  # what others only wait for is no reason to give this one away: another job may be quicker
            ready = [place for other, place in self.taken.items() if other not in starting]
            others = sum(self.groups[other] == worker_type for other in (*ready, *self.free[worker_type]))
        if others >= kept or (self.drained and _node_of(place) in self.drained):
            remove_placement_group(place)
            del self.groups[place]
        else:
            self.free[worker_type].append(place)

    def ask(self, more: Sequence[int]) -> None:
        """Let the autoscaler see that so many more workers of each type would be of use: places that wait, and go as soon as they are there.

        Ray's ``request_resources`` is one for the whole cluster: the next job's takes the place of ours, and ours would stay in force
        if this process was killed. A placement group ends with its job.
        """
        for worker_type, count in enumerate(more):
            wanted = self.asked.setdefault(worker_type, [])
            for place in wanted[count:]:
                remove_placement_group(place)
            del wanted[count:]
            setup = self.setups[worker_type]
            wanted += [placement_group([setup.asks], strategy="PACK") for _ in range(count - len(wanted))]

    def _set_free(self) -> None:
        """Give up places that were asked for and have come: who gets the room is decided once the nodes are looked at."""
        for wanted in self.asked.values():
            for place in _nodes_of(wanted):
                remove_placement_group(place)
                wanted.remove(place)

    def require(self, types: Mapping[int, int], workers: Iterable[int], starting: Container[int]) -> None:
        """Wait for places where nodes have gone and left a type too few. Raises BusyError where that takes longer than ``wait``.

        ``types`` of the ``workers``, of which some are ``starting``.
        """
        if time.monotonic() - self.looked < (SEE_EVERY if self.patience.since is None else INTERRUPTIBLE):
            return
        self.looked = time.monotonic()
        with suppress(RayError):  # whoever keeps the list of places is away for a moment
            self._set_free()
            self._require(types, workers, starting)

    def _require(self, types: Mapping[int, int], workers: Iterable[int], starting: Container[int]) -> None:
        lacking = []
        of_type: dict[int, list[int]] = {}
        for worker in workers:
            of_type.setdefault(types[worker], []).append(worker)
        for number, setup in enumerate(self.setups):
            wanted = of_type.get(number, [])
            least = setup.min_replicas or 1
            there = sum(worker not in starting for worker in wanted)
            there += sum(self._is_there(worker) for worker in wanted if there < least and worker in starting)
            if there < least and setup.asks:
                lacking.append(f"{setup.name} has {there} of {plural(least, 'worker')} ({amounts_text(setup.asks)})")
        if lacking:
            self.patience.lacks(lambda: f"{'; '.join(lacking)}; free {free_text(self.setups)}")
        else:
            self.patience.has_all()

    def _is_there(self, worker: int) -> bool:
        """Whether a worker's place is on a node."""
        return worker in self.taken and bool(_node_of(self.taken[worker]))

    def by_node(self) -> dict[str, Counter[str]]:
        """What is reserved on each node."""
        found: dict[str, Counter[str]] = {}
        places = self.groups | {place: worker_type for worker_type, asked in self.asked.items() for place in asked}
        for place, node in _nodes_of(places).items():
            found.setdefault(node, Counter()).update(cast(Any, self.setups[places[place]].asks))
        return found

    def forget(self, place: PlacementGroup | None) -> None:
        """A place that was left, and goes with the worker that nobody has taken over."""
        if place in self.groups:
            self.free[self.groups.pop(place)].remove(place)

    def hand_on(self, worker: int) -> PlacementGroup | None:
        """The place of a worker that is left to another run, which is no longer ours; None if it has none of its own."""
        place = self.taken.pop(worker, None)
        if place is not None:
            del self.groups[place]
        return place

    def close(self) -> None:
        """Give all of them back."""
        self.ask([0] * len(self.setups))
        for place in self.groups:
            remove_placement_group(place)
        self.groups.clear()
        for free in self.free.values():
            free.clear()


def _node_of(place: PlacementGroup) -> str:
    """The id of the node that a place is on; "" as long as it is on none."""
    nodes: dict[int, str] = placement_group_table(place).get("bundles_to_node_id", {})
    return nodes.get(0, "")


def _nodes_of(places: Collection[PlacementGroup]) -> dict[PlacementGroup, str]:
    """The ids of the nodes of those places that are on one. Ray is asked once, however many there are."""
    table = placement_group_table() if places else {}
    found = ((place, table.get(place.id.hex(), {}).get("bundles_to_node_id", {}).get(0, "")) for place in places)
    return {place: node for place, node in found if node}


def lacking(setups: Sequence[WorkerSetup]) -> str:
    """Why there are no places for the workers that a job needs to begin."""
    try:
        check_placement(setups, list(alive().values()))
    except PlacementError as error:
        return str(error)
    wants = ", ".join(f"{setup.name} {setup.fewest} x ({amounts_text(setup.asks)})" for setup in setups)
    return f"the cluster is large enough, and others use it: wanted {wants}; free {free_text(setups)}"


def free_text(setups: Sequence[WorkerSetup]) -> str:
    """What the cluster has free of all that workers ask for."""
    there = cast(Any, ray).available_resources()
    return amounts_text(
        {name: there.get(name, 0.0) for name in sorted({name for setup in setups for name in setup.asks})}
    )

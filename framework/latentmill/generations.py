"""A source that grew: which of its rows are new, where those are now that were there before, and the plan that says so.

What a fragment held is still there if its name, its rows and its fingerprint are. Of any other the source says whether rows that lie
elsewhere now, or are the beginning of more, are those that it held (``Source.still``). Rows whose ids the source knows are found
by their ids, wherever they are: for that the ids of all planned rows are kept in ``.rows/``, a file a generation, named by its hash.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import TypeAlias

from latentmill import plan_files, registry
from latentmill.errors import PlanError
from latentmill.plan import Generation, Plan
from latentmill.plugin import Fragment, Source
from latentmill.storage import Storage
from latentmill.text import escaped, plural

logger = logging.getLogger("latentmill")

Run: TypeAlias = tuple[int, int, int]
"""Rows that lie one after another: a fragment's number, the first of them in it, how many."""
IDS_FOLDER = ".rows"
SHOWN = 6
"""Rows or fragments that are named of those that are no more what they were."""


def settle(plan: Plan, store: Storage, source: Source, grow: bool = False) -> Plan:
    """A job's plan as its dataset in ``store`` has it: with the generations that are there and, with ``grow``, one for rows that have come.

    Raises PlanError if the dataset is another's, or if not all of its rows are in the source any more as they were. Writes nothing.
    """
    if not store.exists(plan_files.next_name(plan)) and not (grow and store.exists(plan_files.FIRST_PLAN)):
        return plan  # whoever goes on compares
    begun, there = plan_files.first(store), plan_files.load(store)
    plan_files.compare(replace(plan, fragments=begun.fragments, fingerprinted=begun.fingerprinted), store)
    if tuple(plan.fragments) == tuple(there.fragments):
        if grow:
            logger.warning(f"--grow: nothing has come to {registry.called(source)}")
        return replace(plan, generations=there.generations, places=there.places)
    if not grow:
        was, now = (
            [[f.name, f.rows, f.fingerprint] for f in fragments] for fragments in (there.fragments, plan.fragments)
        )
        [difference] = plan_files.differences(was, now)
        raise PlanError(
            f"{store.url}: the source is not what it was, fragments{difference}; --grow takes in rows that have come"
        )
    with registry.asking(source):
        further = _Growth(there, plan.fragments, source, store).plan()
    last = further.generations[-1]
    came = (
        f"{plural(last.rows, 'row')} of {registry.called(source)}"
        if last.rows
        else f"nothing has come to {registry.called(source)}"
    )
    logger.warning(f"--grow: {came}; {plural(sum(f.rows for f in there.fragments), 'row')} were there")
    return replace(plan, generations=further.generations, places=further.places)


def publish(plan: Plan, store: Storage, source: Source) -> None:
    """Write what is not there of a plan. Raises PlanError if another's is, RunError if it has been grown otherwise meanwhile."""
    new = not plan_files.is_published(plan, store)
    if new and _knows_rows(source):
        with registry.asking(source):
            _keep_ids(plan, store, source)
    if new and plan.generations:
        store.delete(
            "_SUCCESS"
        )  # before: a driver that is killed here leaves no dataset that says it is whole and isn't
    plan_files.publish(plan, store)
    if new and plan.generations:
        store.delete("_SUCCESS")  # and behind: another may have finished what it knew of


def _knows_rows(source: Source) -> bool:
    return source.knows_rows or source.id_column is not None


# ------------------------------------------------------------------------------------------------ ids that are kept


def _keep_ids(plan: Plan, store: Storage, source: Source) -> None:
    """Keep the ids of the last generation's rows."""
    name = f"{IDS_FOLDER}/{plan.hash}.gz"
    before = sum(each.rows for each in plan.generations[:-1])
    with store.aside(name) as path:
        with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as file:
            runs = _cut(plan.runs, before)
            for id in _ids(source, plan.fragments, runs):
                file.write(json.dumps(id).encode() + b"\n")
        if not source.knows_rows:  # such a one's fragments are named by their rows
            for fragment in (plan.fragments[at] for at in dict.fromkeys(at for at, _, _ in runs)):
                if source.changed(fragment):
                    raise ValueError(
                        f"{escaped(fragment.name)} has changed since it was planned: the same command plans anew"
                    )
        store.create(name, path)


def _ids(source: Source, fragments: Sequence[Fragment], runs: Sequence[Run]) -> Iterator[str | None]:
    """The ids of rows; a fragment's are read once for all runs of it, which ascend. Raises ValueError if the source has too few."""
    ids: Iterator[str | None] = iter(())
    last = reached = -1
    for at, first, rows in runs:
        if at != last:
            last, reached, ids = at, 0, iter(source.ids(fragments[at]))
        end = first + rows
        for id in islice(ids, first - reached, end - reached):
            yield id
            rows -= 1
        if rows:
            raise ValueError(f"ids gave fewer than the {fragments[at].rows} rows of {fragments[at].name}")
        reached = end


def _kept_ids(plan: Plan, store: Storage) -> Iterator[str | None] | None:
    """The ids of all rows of a plan, in the order of their numbers; None if they were not kept."""
    kept = plan.generations or [Generation(plan.hash, sum(fragment.rows for fragment in plan.fragments))]
    if not {f"{each.hash}.gz" for each in kept} <= {*store.names(IDS_FOLDER)}:
        return None
    return (id for each in kept for id in _lines(store, each))


def _lines(store: Storage, generation: Generation) -> Iterator[str | None]:
    """The ids of a generation's rows. Raises PlanError if they can't be read, or are not as many: those behind would be of other rows."""
    name, read = f"{IDS_FOLDER}/{generation.hash}.gz", 0
    try:
        with store.open(name) as file, gzip.GzipFile(fileobj=file) as lines:
            for line in lines:
                read += 1
                if read <= generation.rows:
                    yield json.loads(line)
        if read != generation.rows:
            raise ValueError(f"it says of {plural(read, 'row')}, and {generation.rows:,} were planned")
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise PlanError(f"{store.url.rstrip('/')}/{name} can't be read: {error}") from error


# -------------------------------------------------------------------------------------- what is where, and what is new


class _Growth:
    """A source as it was planned, and as it is now."""

    def __init__(self, there: Plan, now: Sequence[Fragment], source: Source, store: Storage) -> None:
        self.there, self.now, self.source, self.store = there, now, source, store
        self.numbers = {fragment.name: at for at, fragment in enumerate(now)}
        self.wrong: list[str] = []
        """What is not there any more, or not as it was."""
        self.forgotten = False
        """Whether the ids of the planned rows are wanted, and were not kept."""
        self.unsure: list[str] = []
        """Fragments whose rows are there by their ids, and of which no more is known."""

    def plan(self) -> Plan:
        """The plan with one generation more, which may have no rows. Raises PlanError."""
        moved = self._moved()
        if self.wrong:
            more = f" and {len(self.wrong) - SHOWN} more" if len(self.wrong) > SHOWN else ""
            more += f" ({IDS_FOLDER} doesn't say which rows there were)" if self.forgotten else ""
            raise PlanError(
                f"{self.store.url} can't grow, since what it was made from has changed: {'; '.join(self.wrong[:SHOWN])}{more}. "
                "Put that back, with new rows in files of their own, or choose another output"
            )
        if self.unsure:
            more = f" and {len(self.unsure) - 1} more" if self.unsure[1:] else ""
            logger.warning(
                f"--grow: the rows of {self.unsure[0]}{more} are there by their ids; whether they are as they were was not compared"
            )
        places: list[Run] = []
        starts = {at: [0, *accumulate(rows for _, _, rows in runs)] for at, runs in moved.items()}
        for at, first, rows in self.there.runs:
            _join(places, _between(moved[at], starts[at], first, rows))
        new = _rest([fragment.rows for fragment in self.now], moved)
        return plan_files.grown(self.there, self.now, [*places, *new], sum(rows for _, _, rows in new))

    def _moved(self) -> dict[int, list[Run]]:
        """Where the rows of each fragment that was planned are now."""
        moved, others = dict[int, list[Run]](), list[int]()
        for at, fragment in enumerate(self.there.fragments):
            number = self.numbers.get(fragment.name)
            if number is not None and (self.now[number] == fragment or self._is_longer(fragment, number)):
                moved[at] = [(number, 0, fragment.rows)]
            elif fragment.rows:
                others.append(at)
            else:
                moved[at] = []
        if not others:
            return moved
        ids = _kept_ids(self.there, self.store) if _knows_rows(self.source) else None
        if ids is None:
            self.forgotten = _knows_rows(self.source)
            return moved | {at: self._by_name(self.there.fragments[at]) for at in others}
        taken = {runs[0][0] for runs in moved.values() if runs and runs[0][2] == self.now[runs[0][0]].rows}
        return moved | self._by_id(ids, others, [number for number in range(len(self.now)) if number not in taken])

    def _is_longer(self, fragment: Fragment, number: int) -> bool:
        """Whether its rows are the first of what has its name now: then nobody need ask for their ids, which they may lack."""
        rows = fragment.rows
        return self.now[number].rows > rows and self.source.still(fragment, [(fragment.name, 0, rows)]) is True

    def _by_name(self, fragment: Fragment) -> list[Run]:
        """Its rows are the first of what has its name now, or else it is wrong."""
        number, name = self.numbers.get(fragment.name), escaped(fragment.name)
        if number is None:
            self.wrong.append(f"{name} is gone")
            return []
        if self.now[number].rows < fragment.rows or not self.source.still(
            fragment, [(fragment.name, 0, fragment.rows)]
        ):
            self.wrong.append(f"{name} is not what it was, with more rows at its end")
        return [(number, 0, fragment.rows)]

    def _by_id(self, ids: Iterator[str | None], others: Sequence[int], free: Sequence[int]) -> dict[int, list[Run]]:
        before: dict[int, list[str | None]] = {at: [None] * self.there.fragments[at].rows for at in others}
        for at, first, rows in self.there.runs:
            some = list(islice(ids, rows))
            if at in before:
                before[at][first : first + rows] = some
        next(ids, None)  # this is where a file that is cut off, or has too many, is found out
        here = {
            id: (number, at)
            for number in free
            for at, id in enumerate(_ids(self.source, self.now, [(number, 0, self.now[number].rows)]))
            if id is not None
        }
        return {at: self._found(self.there.fragments[at], some, here) for at, some in before.items()}

    def _found(self, fragment: Fragment, ids: Sequence[str | None], here: Mapping[str, tuple[int, int]]) -> list[Run]:
        runs, lost = list[Run](), 0
        for number, id in enumerate(ids):
            place = here.get(id) if id is not None else None
            if place is None:
                lost += 1
                what = f"row {number} of {escaped(fragment.name)}, which had no id," if id is None else f"{escaped(id)}"
                self.wrong.append(f"{what} is gone")
            else:
                _join(runs, [(*place, 1)])
        if not lost:
            still = self.source.still(fragment, [(self.now[at].name, first, rows) for at, first, rows in runs])
            if still is False:
                self.wrong.append(f"a row of {escaped(fragment.name)} is not what it was")
            elif still is None:
                self.unsure.append(escaped(fragment.name))
        return runs


def _join(runs: list[Run], more: Iterable[Run]) -> None:
    """Add runs, as one with the last where they go on with it."""
    for at, first, rows in more:
        if runs and runs[-1][0] == at and sum(runs[-1][1:]) == first:
            runs[-1] = at, runs[-1][1], runs[-1][2] + rows
        elif rows:
            runs.append((at, first, rows))


def _between(runs: Sequence[Run], starts: Sequence[int], first: int, rows: int) -> Iterator[Run]:
    """Of rows that lie in ``runs``, with their ``starts``, those from ``first`` on."""
    at = bisect_right(starts, first) - 1
    while rows and at < len(runs):
        fragment, start, length = runs[at]
        into = first - starts[at]
        taken = min(rows, length - into)
        yield fragment, start + into, taken
        first, rows, at = first + taken, rows - taken, at + 1


def _cut(runs: Sequence[Run], first: int) -> Sequence[Run]:
    """The runs without their first so many rows."""
    return list(
        _between(runs, [0, *accumulate(rows for _, _, rows in runs)], first, sum(rows for _, _, rows in runs) - first)
    )


def _rest(rows: Sequence[int], moved: Mapping[int, list[Run]]) -> list[Run]:
    """The rows of fragments, which have so many each, that are in no run."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for at, first, count in (run for runs in moved.values() for run in runs):
        taken.setdefault(at, []).append((first, first + count))
    new: list[Run] = []
    for at, count in enumerate(rows):
        end = 0
        for first, stop in sorted(taken.get(at, [])):
            _join(new, [(at, end, first - end)])
            end = stop
        _join(new, [(at, end, count - end)])
    return new

"""Read a dataset back whole, against its plan: every planned row once, nothing damaged, nothing that doesn't belong."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field

from latentmill import dataset
from latentmill.dataset import Dataset
from latentmill.plan import Plan
from latentmill.shard_index import INDEX_FOLDER, Inventory, Summary, summary
from latentmill.shards import (
    COPIES,
    FOLDER,
    PLAN_KEY,
    copy_lines,
    copy_name,
    data_name,
    error_rows,
    filtered_rows,
    rows_not_needed,
)
from latentmill.storage import Storage
from latentmill.text import one_line


@dataclass
class Findings:
    """What a dataset is found to be."""

    plan: Plan
    ok: int = 0
    """Rows in shards that are right."""
    failed: int = 0
    """Rows in their error tables."""
    filtered: int = 0
    """Rows in them that were filtered."""
    not_needed: int = 0
    """Rows that they lack, since enough were accepted before."""
    missing: list[int] = field(default_factory=list)
    """Shards that are not done yet."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Shards that are not what was planned, with the reason."""
    copies: dict[int, list[str]] = field(default_factory=dict)
    """Shards that are right, each with its copies of errors, and of what was filtered, that aren't, or are not there."""
    misremembered: list[int] = field(default_factory=list)
    """Shards that are right, of which the index says something else."""
    foreign: list[str] = field(default_factory=list)
    """Names in ``data/`` that are no shard's."""
    stray: list[str] = field(default_factory=list)
    """Names in ``files/`` that no shard names."""
    stray_copies: list[str] = field(default_factory=list)
    """Names in ``errors/`` and ``filtered/`` that are no shard's."""
    strange: list[str] = field(default_factory=list)
    """What else is wrong, a line each."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; a dataset that isn't complete yet may be sound."""
        return not (self.damaged or self.foreign or self.stray or self.stray_copies or self.strange)


def verify(store: Storage) -> Findings:
    """Re-read every shard of a dataset: checksums, each planned row exactly once. Raises PlanError if there is no plan."""
    there = dataset.load(store)
    found = Findings(there.plan, foreign=there.foreign())
    ended = store.exists("_SUCCESS")  # then each shard has its copies; before, a driver may be about to make one
    copies = there.copies()
    beside = store.names(FOLDER)  # what comes later is not looked at
    tags, said = there.tags(), dict[int, Summary]()
    shards = sorted(tags)
    found.missing = [shard for shard in range(there.plan.shards) if shard not in tags]
    for shard, wrong in zip(shards, store.each(lambda shard: _check(there, shard, copies, ended), shards, in_flight=8)):
        if isinstance(wrong, str):
            if not store.exists(data_name(shard, there.sink)):  # taken out since it was listed, to be made again
                found.missing.append(shard)
                continue
            found.damaged[shard] = wrong
            continue
        about, not_copied = wrong
        failed, filtered = len(error_rows(about)), len(filtered_rows(about))
        not_needed = rows_not_needed(about)
        found.ok += len(there.plan.shard_rows(shard)) - failed - filtered - not_needed
        found.not_needed += not_needed
        found.failed += failed
        found.filtered += filtered
        if not_copied:
            found.copies[shard] = not_copied
            for name in not_copied:
                wrong = "is not what" if name in copies else "is not there, to hold what"
                found.strange.append(f"{name} {wrong} {data_name(shard, there.sink)} says")
        said[shard] = summary(about)
    if not found.missing and not found.damaged:
        what = f"its rows don't end where accept.rows={there.plan.accept_rows} are accepted"
        found.damaged |= dict.fromkeys(Inventory(there.plan, said, []).out_of_step(), what)
    found.stray = there.unnamed(beside, said)
    found.stray_copies = there.stray_copies(copies)
    still = dict(tags.items() & there.tags().items())  # that were these files all the time
    found.misremembered = sorted({shard for shard, entry in there.remembered(still) if entry != said.get(shard, entry)})
    if found.misremembered:
        found.strange.append(
            f"{INDEX_FOLDER} says of {len(found.misremembered)} shards what they don't, and status, too"
        )
    if store.exists("_SUCCESS") and (found.missing or found.damaged):
        found.strange.append("_SUCCESS is there, and not all rows are")
    return found


def repair(store: Storage, found: Findings) -> Iterator[str]:
    """Take out of the dataset, into ``quarantine/``, what doesn't belong in it; the next run does damaged shards again.

    And make files of errors, and of what was filtered, what their shards say. Tells what it does.
    """
    there = dataset.load(store)
    if found.damaged or found.missing:
        store.delete("_SUCCESS")
    for shard in found.damaged:
        to = there.take_out(shard, uuid.uuid4().hex[:8])
        yield f"moved {data_name(shard, there.sink)} -> {to}; the next run does it again"
    if found.misremembered:  # first: who looks for what is foreign asks it
        there.forget()
        yield f"deleted what is in {INDEX_FOLDER}; the next run makes it again"
    for name, to in there.take_out_foreign():
        yield f"moved {name} -> {to}; it is no {'shard' if name.startswith('data/') else 'file'} of this dataset"
    for shard, names in found.copies.items():
        there.make_copies(shard)
        for name in names:
            yield f"made {name} again"


def _check(there: Dataset, shard: int, copies: Set[str], ended: bool) -> str | tuple[Mapping[str, str], list[str]]:
    """A shard's metadata, and which of its copies say something else, or are not there though all has ``ended``; or what is wrong with the shard."""
    plan = there.plan
    try:
        about, ids = there.shard(shard).read_whole()
    except Exception as error:  # whatever a damaged file makes a reader say
        return f"can't be read: {type(error).__name__}: {one_line(error, 200)}"
    if about.get(PLAN_KEY) != plan.hash_of(shard):
        return f"was made by another plan, {about.get(PLAN_KEY)}"
    try:
        left_out = [row["row_id"] for row in (*error_rows(about), *filtered_rows(about))]
        summary(about)
    except (ValueError, KeyError, TypeError):
        return "has errors in it that can't be read"
    rows = plan.shard_rows(shard)
    planned = [plan.row_id(row) for row in rows[: len(rows) - rows_not_needed(about)]]
    if sorted([*ids, *left_out]) != sorted(planned):
        missing, foreign = set(planned) - {*ids, *left_out}, {*ids, *left_out} - set(planned)
        twice = len(ids) + len(left_out) - len({*ids, *left_out})
        return f"has not the planned rows: {len(missing)} missing, {twice} twice, {len(foreign)} foreign"
    there_ids = set(ids)
    if ids != [row_id for row_id in planned if row_id in there_ids]:
        return "has its rows in another order"
    said = {copy_name(shard, folder): copy_lines(about, folder) for folder in COPIES}
    return about, [
        name for name, lines in said.items() if (not _says(there, name, lines) if name in copies else ended and lines)
    ]


def _says(there: Dataset, name: str, lines: bytes) -> bool:
    """Whether a copy is what it should be, if it is still there."""
    with suppress(FileNotFoundError):
        return there.store.read(name) == lines
    return True

"""The dataset: which names in its folder are ours, which shards are there, whose they are, what they hold, how far it is.

Whoever asks about the folder asks here: a run before it starts and before it says that all is done, ``plan``, ``status``,
``verify``, the report, and a job that reads the dataset. A name in ``data/`` is one of three:

- *planned*: the name of a shard of the plan, ``00007.parquet``;
- *hidden*: it begins with a dot or an underscore, so that Arrow, Hugging Face ``datasets`` and we pass over it;
- *foreign*: all others. One with a shard's suffix would be read as rows of the dataset by anyone who reads ``data/``.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from latentmill import half_done, plan_files, registry, storage
from latentmill.errors import PlanError, StorageError
from latentmill.plan import Plan
from latentmill.plugin import Sink, StoredShard
from latentmill.shard_index import WORTH, Index, Inventory, Summary, summary
from latentmill.shards import (
    COPIES,
    FOLDER,
    PLAN_KEY,
    ShardFile,
    ToldRows,
    copy_name,
    data_name,
    error_rows,
    make_copies,
    shard_numbers,
    side_file_shard,
    side_files,
)
from latentmill.storage import Storage
from latentmill.text import one_line

RETRIED = "retried"
"""In the names of shards that were taken out so that their failed rows are done again."""
OUT_OF_THE_WAY = "choose another output, or move it away (latentmill verify OUT --repair does)"


@dataclass
class Dataset:
    """A plan's dataset where it lies. Which files are there is looked up each time; what they say of themselves is read once."""

    store: Storage
    plan: Plan
    sink: Sink
    _seen: dict[int, tuple[str, Summary | PlanError]] = field(init=False, repr=False, default_factory=dict)
    """Of each shard the tag of the file that was read, and what it says or what is wrong with it."""
    _unsaved: set[int] = field(init=False, repr=False, default_factory=set)
    """Shards that were read, and are not in the index with what they say."""
    _looking: threading.RLock = field(init=False, repr=False, default_factory=threading.RLock)
    _taken_out: set[str] = field(init=False, repr=False, default_factory=set)
    """Names of shards that were taken out, as far as ``newly_taken_out`` has told."""
    _being_taken_out: frozenset[str] = field(init=False, repr=False, default=frozenset())
    """Those whose shards were there still when that was asked last."""

    # ------------------------------------------------------------------------------------------------ which are there

    def done(self) -> set[int]:
        """The plan's shards that are there."""
        return {*self._shards(self.store.names("data")).values()}

    def missing(self) -> list[int]:
        """The plan's shards that are not there."""
        done = self.done()
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def foreign(self) -> list[str]:
        """Names in ``data/`` that are no shard of this plan's, the hidden left out."""
        names = self.store.names("data")
        return self._foreign(names, self._shards(names))

    def stray_side_files(self) -> list[str]:
        """Names in ``files/`` that no shard names, and none will: its shard is there, or will never be."""
        names = self.store.names(FOLDER)  # before the shards are looked at: one that comes later names later files
        if not names:
            return []
        shards = self.look().readable
        found = self.unnamed(names, shards)
        of = sorted({shard for name in found if (shard := side_file_shard(name)) in shards})
        anew = zip(of, self.store.each(self._read, of))  # what is stray is deleted
        return self.unnamed(found, {shard: about for shard, about in anew if isinstance(about, Summary)})

    def unnamed(self, names: Iterable[str], shards: Mapping[int, Summary]) -> list[str]:
        """Of names in ``files/`` those that none of ``shards`` names, and no other will: one that isn't among them may."""
        named = {name for found in shards.values() for name in found.side_files}

        def is_nobodys(name: str) -> bool:
            shard = side_file_shard(name)
            return shard is None or shard >= self.plan.shards or shard in shards

        return self._less_later(
            sorted(name for name in names if name not in named and is_nobodys(name)), side_file_shard
        )

    def copies(self) -> set[str]:
        """Names of what is in ``errors/`` and ``filtered/``, the hidden left out."""
        found = ((folder, name) for folder in COPIES for name in self.store.names(folder))
        return {f"{folder}/{name}" for folder, name in found if not name.startswith((".", "_"))}

    def stray_copies(self, names: Iterable[str]) -> list[str]:
        """Of ``copies`` those of no shard of this plan's. One of a shard that is not there is made right with the shard."""

        def shard_of(name: str) -> int | None:
            file = name.partition("/")[2]
            return shard_numbers([file], ".jsonl").get(file)

        planned = range(self.plan.shards)
        return self._less_later([name for name in sorted(names) if shard_of(name) not in planned], shard_of)

    def _shards(self, names: Iterable[str]) -> dict[str, int]:
        found, planned = shard_numbers(names, self.sink.suffix), self.plan.shards
        return {name: shard for name, shard in found.items() if shard < planned}

    def outgrown(self) -> bool:
        """Whether it has grown beyond this plan, by another driver."""
        return self.store.exists(plan_files.next_name(self.plan))

    def _foreign(self, names: Iterable[str], planned: Mapping[str, int]) -> list[str]:
        found = sorted(name for name in names if name not in planned and not name.startswith((".", "_")))
        return self._less_later(found, shard_numbers(found, self.sink.suffix).get)

    def _less_later(self, names: list[str], shard_of: Callable[[str], int | None]) -> list[str]:
        """Names that were listed just now, less those of shards by which it has grown since the plan was read."""
        later = {name for name in names if (shard := shard_of(name)) is not None and shard >= self.plan.shards}
        return [name for name in names if name not in later] if later and self.outgrown() else names

    # ---------------------------------------------------------------------------------------- what they say of themselves

    def shard(self, shard: int) -> ShardFile:
        """A shard's file, to read."""
        return ShardFile(self.store, self.sink, data_name(shard, self.sink))

    def about(self, shard: int) -> dict[str, str]:
        """A shard's metadata, read anew. Raises PlanError unless the shard is this plan's, FileNotFoundError if there is none."""
        return self._asked(shard)[0]

    def _asked(self, shard: int) -> tuple[dict[str, str], Summary]:
        name = data_name(shard, self.sink)
        try:
            about = self.shard(shard).metadata()
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:  # whatever a damaged or foreign file makes a reader say
            if isinstance(error, OSError) and error.errno is not None:
                raise
            said = one_line(error, 200)
            raise PlanError(f"{self._at(name)} can't be read as a shard of ours ({said}): {OUT_OF_THE_WAY}") from error
        if (made_by := about.get(PLAN_KEY)) != self.plan.hash_of(shard):
            what = "is no shard of ours" if made_by is None else f"is a shard of another plan, {made_by}"
            raise PlanError(f"{self._at(name)} {what}: {OUT_OF_THE_WAY}")
        try:
            return about, summary(about)
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(f"{self._at(name)} has errors in it that can't be read: {OUT_OF_THE_WAY}") from error

    def look(self, until: threading.Event | None = None) -> Inventory:
        """What is there now. Reads the shards that neither it nor the index knows. Raises InterruptedError if ``until`` is set."""
        with self._looking:
            tags = self.store.tags("data")
            shards = self._shards(tags)
            there = {shard: tags[name] for name, shard in shards.items()}
            known, nothing = self._seen, ("",)
            unread = {shard: tag for shard, tag in there.items() if not tag or known.get(shard, nothing)[0] != tag}
            if len(unread) >= WORTH:
                for shard, found in self._index.load(unread):
                    self._seen[shard] = unread.pop(shard, there[shard]), found
            for shard, said in zip(sorted(unread), self.store.each(partial(self._read, until=until), sorted(unread))):
                if said is None:
                    del there[shard]
                else:
                    self._seen[shard] = there[shard], said
                    self._unsaved.add(shard)
            self._seen = {shard: self._seen[shard] for shard in sorted(there)}
            return Inventory(
                self.plan, {shard: found for shard, (_, found) in self._seen.items()}, self._foreign(tags, shards)
            )

    def _read(self, shard: int, until: threading.Event | None = None) -> Summary | PlanError | None:
        if until and until.is_set():
            raise InterruptedError
        try:
            return self._asked(shard)[1]
        except FileNotFoundError:  # another driver has taken it out since it was listed
            return None
        except PlanError as error:
            return error

    @cached_property
    def _index(self) -> Index:
        return Index(self.store, self.plan.first_hash)

    def remember(self, all_there: bool = False) -> None:
        """Add to the index what was read since, if it is much; ``all_there``: put its pieces together. It is a help, and may fail."""
        with self._looking, suppress(OSError):
            known = [(shard, tag, found) for shard, (tag, found) in self._seen.items() if isinstance(found, Summary)]
            if len(self._unsaved) >= WORTH:
                self._index.save(entry for entry in known if entry[0] in self._unsaved)
                self._unsaved.clear()
            if all_there:
                self._index.replace(known)

    def tags(self) -> dict[int, str]:
        """The plan's shards that are there, each with what the store says of its file."""
        tags = self.store.tags("data")
        return {shard: tags[name] for name, shard in self._shards(tags).items()}

    def remembered(self, tags: Mapping[int, str]) -> Iterator[tuple[int, Summary]]:
        """All that the index says of these files; of one it may say several things."""
        return Index(self.store, self.plan.first_hash).load(tags)

    def forget(self) -> None:
        """Delete the index."""
        self._index.forget()

    # --------------------------------------------------------------------------------------------- what is in them

    def told(self, shards: Iterable[int], rows: ToldRows = error_rows) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Of those shards that are there and can be read the ``error_rows``, or the ``filtered_rows``, out of their files."""

        def read(shard: int) -> tuple[int, list[dict[str, Any]]]:
            with suppress(FileNotFoundError, PlanError):
                return shard, rows(self.about(shard))
            return shard, []

        yield from self.store.each(read, shards)

    def has_worked(self, stage: int) -> bool:
        """Whether a stage, by its place in the flow, has done a row that is there: one that is ok, or was filtered there or later."""
        seen, later = self.look(), {each.name for each in self.plan.stages[stage:]}
        return any(seen.rows().values()) or not later.isdisjoint(seen.filtered_in())

    def stored_in(self, shards: Set[int]) -> dict[int, int]:
        """How many rows each of these shards stores; one that is there no more, none. Raises PlanError if one can't be read."""
        seen = self.look()
        seen.ours()
        rows = seen.rows()
        return {shard: rows.get(shard, 0) for shard in shards}

    def status(self, seen: Inventory | None = None) -> dict[str, Any]:
        """How far it is, or was when ``seen`` was.

        Keys: ``name``, ``planned``, ``ok``, ``failed`` (rows), ``filtered``, ``not_needed`` (if there are any), ``shards``, ``shards_done``, ``success`` (all
        shards are there, and a run has said so), ``lost`` (a run had said so, and so many shards are there no more), ``foreign``
        (names in ``data/`` that are no shard's), ``warnings`` (rows by what is to be known of them, the most frequent first).
        """
        seen = seen or self.look()
        failed, filtered = seen.failed_in().total(), seen.filtered_in().total()
        not_needed = seen.not_needed()
        missing, ended = self.plan.shards - len(seen.shards), self.store.exists("_SUCCESS")
        return {
            "name": self.plan.name,
            "planned": self.plan.rows,
            "ok": self.plan.rows_in(seen.shards.keys()) - failed - filtered - not_needed,
            "failed": failed,
            **({"filtered": filtered} if filtered else {}),
            **({"not_needed": not_needed} if not_needed else {}),
            "shards": self.plan.shards,
            "shards_done": len(seen.shards),
            "success": ended and not missing,
            "lost": missing if ended else 0,
            "foreign": seen.foreign,
            "warnings": seen.warnings(),
        }

    # ------------------------------------------------------------------------------------------ begin and end of a run

    def adopt(self) -> set[int]:
        """The shards that a run of this plan finds done. Raises PlanError, and changes nothing, if what is there is another's."""
        plan_files.compare(self.plan, self.store)
        self.newly_taken_out()  # before the shards are listed: what is taken out from here on is new
        seen = self.look()
        alien = [name for name in seen.foreign if name.endswith(self.sink.suffix)]
        if alien:
            more = f" and {len(alien) - 3} more" if len(alien) > 3 else ""
            raise PlanError(
                f"{self._at('data')} holds what is no shard of this plan, and would be read as its rows: "
                f"{', '.join(alien[:3])}{more}. Move it away, or choose another output"
            )
        return {*seen.ours()}

    def settle(self) -> frozenset[int]:
        """Compare what is in ``data/`` with the plan, and bring ``errors/``, ``filtered/`` and ``files/`` in line with it.

        Returns the shards that another driver has taken out since ``newly_taken_out`` was asked, to do failed rows again, or that
        were taken out now, since they end elsewhere than the dataset is to: it is not complete then. Raises StorageError if one is not there for any other reason, PlanError if one is not this plan's.
        """
        seen = self.look()
        shards = seen.ours()
        if lost := [shard for shard in range(self.plan.shards) if shard not in shards]:
            if (taken := self.newly_taken_out()) >= {*lost}:
                return taken
            raise StorageError(
                f"{len(lost)} of {self.plan.shards} shards were committed and are not to be seen from here, "
                f"{self._at(data_name(lost[0], self.sink))} first: is this the same folder on every node? "
                "The same command goes on with them"
            )
        if again := seen.out_of_step():
            for shard in again:
                self.take_out(shard, f"{RETRIED}-{uuid.uuid4().hex[:8]}")
            return frozenset(again)
        copies = self.copies()
        told = [
            shard
            for shard, found in shards.items()
            if found.not_stored or any(copy_name(shard, folder) in copies for folder in COPIES)
        ]
        list(self.store.each(self.make_copies, told))
        for name in self.stray_side_files():
            self.store.delete(f"{FOLDER}/{name}")
        return frozenset()

    def finish(self) -> None:
        """Have the sink make what it stores for the whole dataset. Raises ValueError if it has no name that is free for it."""
        for name, content in self.made_for_all().items():
            if name in OURS or plan_files.is_name(name) or "/" in name or name.startswith((".", "_")):
                raise ValueError(f"finish made a file {name!r}: not a name that is free at the top of a dataset")
            self.store.put(name, content)

    def made_for_all(self) -> Mapping[str, bytes]:
        """What the sink stores for the whole dataset, by name."""
        if type(self.sink).finish is Sink.finish:  # then it is not to be told of a hundred thousand shards
            return {}

        def read(shard: int) -> StoredShard | None:
            with suppress(FileNotFoundError):  # another driver has taken it out, and finishes anew
                return StoredShard(data_name(shard, self.sink), rows[shard], self.about(shard))
            return None

        rows = self.look().rows()
        return self.sink.finish([found for found in self.store.each(read, rows) if found])

    def make_copies(self, shard: int) -> None:
        """Make ``errors/NNNNN.jsonl`` and ``filtered/NNNNN.jsonl`` of a committed shard what its data file says.

        A driver may have died between the two, so it is done for each shard before a dataset is called complete.
        Drivers that do so at the same time write the same.
        """
        with suppress(FileNotFoundError):  # another driver has taken it out
            make_copies(self.store, shard, self.about(shard))

    # ------------------------------------------------------------------------------------------------ taking shards out

    def take_out(self, shard: int, why: str) -> str:
        """Move a shard out of the dataset, into ``quarantine/``, so that a run does it again. Returns its new name.

        ``_SUCCESS`` goes too. A shard that another driver has just taken out is left to it, and the name is "".
        """
        name = data_name(shard, self.sink)
        to = f"quarantine/{name.removeprefix('data/')}-{why}"
        self.store.delete("_SUCCESS")
        for folder in COPIES:
            self.store.delete(copy_name(shard, folder))
        half_done.sweep(self.store, {shard})
        beside = self._side_files(shard)
        try:
            self.store.move(name, to)
        except FileNotFoundError:
            to, beside = "", []
        for side in beside:
            with suppress(FileNotFoundError):
                self.store.move(f"{FOLDER}/{side}", f"quarantine/{side}-{why}")
        self.store.delete("_SUCCESS")  # a driver may have looked just before
        return to

    def take_out_foreign(self) -> Iterator[tuple[str, str]]:
        """Move what is no file of the dataset into ``quarantine/``. Gives old and new names."""
        found = {f"data/{name}": name for name in self.foreign()}
        found |= {f"{FOLDER}/{name}": name for name in self.stray_side_files()}
        found |= {name: name.replace("/", "-") for name in self.stray_copies(self.copies())}
        for name, plain in found.items():
            to = f"quarantine/foreign-{plain}"
            self.store.move(name, to)
            yield name, to

    def taken_out(self) -> dict[str, int]:
        """Names of what ``take_out`` took, by whatever driver, each with the shard that it was."""
        pattern = re.compile(rf"(\d{{5,}}){re.escape(self.sink.suffix)}-", re.ASCII)
        found = {f"quarantine/{name}": pattern.match(name) for name in self.store.names("quarantine")}
        return {name: int(match[1]) for name, match in found.items() if match}

    def newly_taken_out(self) -> frozenset[int]:
        """Shards that are missing since another driver took them out, after the last time that this was asked."""
        names = self.taken_out()
        new = names.keys() - self._taken_out
        missing = {*self.missing()} if new else set[int]()
        told = {name for name in new if names[name] in missing}
        # A store copies before it deletes: a shard that is there still may go at once, and is looked for once more.
        self._taken_out |= told | (new & self._being_taken_out)
        self._being_taken_out = frozenset(new - told)
        return frozenset(names[name] for name in told)

    def forget_retried(self) -> None:
        """Delete what was taken out so that its failed rows are done again, of the shards that are there again."""
        names = [name for name in self.store.names("quarantine") if f"-{RETRIED}-" in name]
        done = self.done() if names else ()
        for name in names:
            number = re.match(r"\d{5,}", name, re.ASCII)
            if number and int(number[0]) in done:
                self.store.delete(f"quarantine/{name}")

    def _side_files(self, shard: int) -> list[str]:
        """A shard's side files in ``files/``; of one that can't be read, all that have its number."""
        if not (names := self.store.names(FOLDER)):
            return []
        try:
            return [side.stored_as for side in side_files(self.about(shard))]
        except FileNotFoundError:
            return []
        except PlanError:
            return [name for name in names if side_file_shard(name) == shard]

    def _at(self, name: str) -> str:
        return f"{self.store.url.rstrip('/')}/{name}"


_AT_THE_TOP = "README.md contact_sheet.png report.html data half_done leases quarantine weights logs live"
OURS = {*_AT_THE_TOP.split(), *COPIES, FOLDER}
"""Names at the top of a dataset, beside the plans', that no sink may give to a file of its own."""


def load(store: Storage) -> Dataset:
    """The dataset that lies in ``store``. Raises PlanError if there is none, PluginError if its sink isn't installed."""
    plan = plan_files.load(store)
    return Dataset(store, plan, registry.build("sink", plan.config["sink"]))


def status(output: str) -> dict[str, Any]:
    """How far a dataset is, from its folder alone: ``output``, and what ``Dataset.status`` says.

    Raises PlanError if the folder holds none.
    """
    return {"output": output, **load(storage.at(output)).status()}

"""An export: one pass over a finished dataset's shards, many at a time, for all formats that are asked for."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentmill import dataset, failpoints, storage
from latentmill.errors import ExportError
from latentmill.exports import table
from latentmill.exports.formats import ExportFormat, ExportRow, Finish, ShardWriter
from latentmill.exports.ledger import Ledger, ShardMark
from latentmill.exports.rows import NAMED_BY, ExportSource, require_short
from latentmill.plan import Plan
from latentmill.shards import COPIES, NOT_NEEDED_KEY
from latentmill.text import escaped, plural

SHARDS_AT_ONCE = min(16, 2 * (os.cpu_count() or 1))
WHOLE = "all"
"""The key of what a format writes for the whole export."""


@dataclass
class Exported:
    """What an export did, by format, in the order in which they were asked for."""

    written: Counter[str]
    """Files that were made."""
    there: Counter[str]
    """Files that were there, and right."""

    def lines(self) -> Iterator[str]:
        """For people, one a format."""
        for name, count in self.written.items():
            there = f", {self.there[name]:,} were there" if self.there[name] else ""
            yield f"{name}: {plural(count, 'file')} written{there}"


def export(
    output: str,
    formats: Sequence[str],
    folder: str,
    names: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the dataset at ``output`` in these formats into ``folder``, a path or a URL; of several trainers' each in a folder of its name,
    with what belongs beside its files.

    ``names``: the column with the pictures' names; None: ``file`` or ``id``. ``tell`` is given lines for people.
    Raises ExportError before anything is written if the dataset is not finished, or not for one of the formats.
    """
    if not folder:
        raise ExportError("the folder of the export is empty: name one")
    source = ExportSource(dataset.load(storage.at(output)), names)
    spec = source.there.plan.spec
    require_whole(source.columns, output)
    chosen = table.chosen(formats, source.columns, spec, output)
    if any(each.texts for each in chosen):
        for line in table.require_texts(chosen, source.text, output):
            tell(line)
    # Whoever writes there writes the same, so that a file is whole is all that is asked of the store.
    target = storage.at(folder, single_writer=True)
    require_apart(source.there.store.url, target.url)
    require_names(source.names, chosen, source.there.store.url)
    require_crops(source.there.plan, chosen)
    _require_paths(source, chosen, "://" not in target.url)
    if by_size := [each.name for each in chosen if each.sized and "original_size" not in source.of_size]:
        tell(
            f"{output} doesn't say how large the pictures themselves are, so files of {', '.join(by_size)} are named by the size "
            "that was encoded; a job with size says it (size.buckets)"
        )
    written = [_Writing(*each) for each in zip(chosen, ledgers(chosen, target))]
    for writing in written:
        plan = source.there.plan
        writing.ledger.begin(about_export(plan, source.names), [each.hash for each in plan.generations[1:]])
    with ThreadPoolExecutor(target.in_flight) as storing:
        job = _Export(source, written, storing)
        _at_once(job.shard, range(source.there.plan.shards), tell)
        for writing in written:
            job.finish(writing)
    target.sweep()
    return job.exported


def ledgers(formats: Sequence[ExportFormat], target: storage.Storage) -> list[Ledger]:
    """Of each format what is there; of several trainers' each has a folder."""
    several = len({each.folder for each in formats}) > 1
    return [Ledger(target, each.name, f"{each.folder}/" * several) for each in formats]


def about_export(plan: Plan, names: str | None) -> dict[str, Any]:
    """What an export is of: another's is not mixed with it."""
    return {"dataset": plan.first_hash, "names": names}


@dataclass(frozen=True)
class _Writing:
    format: ExportFormat
    ledger: Ledger


@dataclass
class _OfShard:
    """A shard's files of one format, on their way."""

    writing: _Writing
    state: str
    before: ShardMark | None
    repeated: frozenset[int] = frozenset()
    """Numbers of rows that have no file, as an earlier row has their prompt."""
    writer: ShardWriter | None = None
    files: dict[str, int] = field(default_factory=dict)
    notes: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Notes:
    """Those of a format that has done all its shards, read anew each time."""

    ledger: Ledger
    shards: int

    def __iter__(self) -> Iterator[Any]:
        for shard in range(self.shards):
            mark = self.ledger.mark(f"{shard:05d}")
            assert mark is not None, "all shards are done"
            yield from mark.notes


class _Export:
    def __init__(self, source: ExportSource, written: Sequence[_Writing], storing: ThreadPoolExecutor) -> None:
        self.source, self.written, self.storing = source, written, storing
        self.exported = Exported(*(Counter({each.format.name: 0 for each in written}) for _ in range(2)))
        self._counting = threading.Lock()
        self._dropping: dict[str, dict[str, ShardMark]] = {each.format.name: {} for each in written}
        """By format, the marks that have dropped files, by key."""
        self._repeated = _repeated(source) if any(each.format.of_prompts for each in written) else []

    def shard(self, shard: int, stop: threading.Event) -> None:
        """See that all files of a shard are there."""
        failpoints.reach(f"exporting {shard}")
        key, todo = f"{shard:05d}", []
        for writing in self.written:
            repeated = self._repeated[shard] if writing.format.of_prompts else frozenset[int]()
            state, mark = self._state(shard, repeated), writing.ledger.mark(key)
            if mark is not None and writing.ledger.is_right(mark, state, SHARDS_AT_ONCE):
                self._closed(writing, key, mark)
                self._count(writing, 0, len(mark.files))
            else:
                todo.append(_OfShard(writing, state, mark, repeated))
        if not todo:
            return
        wanted = {name for each in todo for name in each.writing.format.tensors}
        with ExitStack() as stack:
            for each in todo:
                if (begin := each.writing.format.shard) is not None:
                    folder = stack.enter_context(each.writing.ledger.store.aside(f"{each.writing.format.name}-{key}"))
                    os.mkdir(folder)
                    each.writer = begin(shard, Path(folder))
            begun = deque[Future[None]]()
            for row in self.source.rows(shard, [*wanted]):
                if stop.is_set():
                    return
                for each in todo:
                    self._add(each, row, begun)
            for future in begun:
                future.result()
            for each in todo:
                if each.writer is not None:
                    made = each.writer.close()
                    each.before = each.writing.ledger.claim(key, made, each.before)
                    for name, path in made.items():
                        self._settle(each, name, path)
                    each.notes = each.writer.notes
                    failpoints.reach(f"{each.writing.format.name} settled")
                self._close(each, key)
        failpoints.reach(f"exported {shard}")

    def _add(self, each: _OfShard, row: ExportRow, begun: deque[Future[None]]) -> None:
        """Begin to store a row's files, or give it to the shard's writer. Of ``begun`` no more are on their way than fit."""
        if each.writing.format.one_size and row.bucket != self._first.bucket:
            sizes = " and ".join(f"row {of.row_id} is of {of.bucket[0]}x{of.bucket[1]}" for of in (self._first, row))
            raise ExportError(
                f"{each.writing.format.name} takes pictures of one size, and {sizes} pixels: encode them with one bucket, "
                "as size.buckets=[[256,256]]"
            )
        if each.writer is not None:
            each.writer.add(row)
            return
        if row.number in each.repeated:
            return
        format = each.writing.format
        assert format.files is not None
        for name, content in format.files(row).items():
            if len(begun) >= max(1, each.writing.ledger.store.in_flight // SHARDS_AT_ONCE):
                begun.popleft().result()
            begun.append(self.storing.submit(self._settle, each, format.below(row) + name, content))
        if format.note is not None:
            each.notes.append(format.note(row))

    def finish(self, writing: _Writing) -> None:
        """The files for the whole export; and what is no more of it goes."""
        if writing.format.finish is not None:
            self._finish(writing, writing.format.finish)
        shards = (f"{shard:05d}" for shard in range(self.source.there.plan.shards))
        writing.ledger.sweep(self._dropping[writing.format.name], (*shards, WHOLE))

    def _finish(self, writing: _Writing, finish: Finish) -> None:
        of_all = _OfShard(writing, "", writing.ledger.mark(WHOLE))
        notes = _Notes(writing.ledger, self.source.there.plan.shards)
        for name, text in finish(notes, writing.ledger.folder):
            of_all.before = writing.ledger.claim(WHOLE, [name], of_all.before)
            with writing.ledger.store.aside(name) as path:
                with open(path, "w", encoding="utf-8") as file:
                    file.writelines(text)
                self._settle(of_all, name, Path(path))
        self._close(of_all, WHOLE)

    def _close(self, each: _OfShard, key: str) -> None:
        mark = each.writing.ledger.close(key, ShardMark(each.state, each.files, each.notes), each.before)
        self._closed(each.writing, key, mark)

    def _closed(self, writing: _Writing, key: str, mark: ShardMark) -> None:
        if mark.dropped:
            self._dropping[writing.format.name][key] = mark

    @cached_property
    def _first(self) -> ExportRow:
        """The dataset's first row, whichever shards are there already."""
        return next(row for shard in range(self.source.there.plan.shards) for row in self.source.rows(shard))

    def _state(self, shard: int, repeated: frozenset[int]) -> str:
        """Names which of a shard's rows are not stored or have no file, and of a job with ``accept`` which sample is: all else the plan says."""
        about = self.source.there.about(shard)
        said = "".join(about.get(key, "") for key in (*COPIES.values(), NOT_NEEDED_KEY))
        if "attempt" in self.source.columns:
            said += "".join(f"/{attempt}" for attempt in self.source.column(shard, "attempt"))
        said += "".join(f"={number}" for number in sorted(repeated))
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def _settle(self, each: _OfShard, name: str, content: bytes | Path) -> None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        made = each.writing.ledger.settle(name, content, each.before)
        each.files[name] = size
        self._count(each.writing, int(made), int(not made))

    def _count(self, writing: _Writing, written: int, there: int) -> None:
        with self._counting:
            self.exported.written[writing.format.name] += written
            self.exported.there[writing.format.name] += there


def _at_once(work: Callable[[int, threading.Event], None], shards: Iterable[int], tell: Callable[[str], None]) -> None:
    """Do the shards, several at a time; each holds some of its rows."""
    stop, numbers = threading.Event(), list(shards)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
        try:
            pending = {threads.submit(work, shard, stop) for shard in numbers}
            while pending:
                done, pending = wait(pending, timeout=10, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if pending:
                    tell(f"{len(numbers) - len(pending):,} of {len(numbers):,} shards")
        except BaseException:  # Ctrl-C too: what is begun ends at its next row, and nothing else begins
            stop.set()
            threads.shutdown(cancel_futures=True)
            raise


def require_whole(columns: Sequence[str], output: str) -> None:
    """Raise ExportError for latents that are half-way."""
    if "time" in columns:
        raise ExportError(f"the latents of {output} are half-way (sampling.until): denoise them to their end first")


def require_apart(output: str, folder: str) -> None:
    """Raise ExportError if the export would be written into the dataset."""
    if "://" in output + folder:
        inside = f"{folder.rstrip('/')}/".startswith(f"{output.rstrip('/')}/")
    else:
        inside = Path(folder).resolve().is_relative_to(Path(output).resolve())
    if inside:
        raise ExportError(f"{folder} lies in the dataset, which is to stay as it is: choose another folder")


def require_names(names: str | None, chosen: Sequence[ExportFormat], output: str) -> None:
    """Raise ExportError if a trainer would look for files by names that the dataset doesn't know."""
    for each in chosen:
        if each.names == "needed" and names is None:
            raise ExportError(
                f"{each.name} is found by the pictures' names, and {output} doesn't say them (it has no column "
                f"{' or '.join(NAMED_BY)}): make it with source.keep=[file], or name a column with --names"
            )


def require_crops(plan: Plan, chosen: Sequence[ExportFormat]) -> None:
    """Raise ExportError if a trainer is to be told where pictures were cut, and the dataset has kohya's ``crop_ltrb``, which doesn't say it."""
    size = plan.config.get("size") or {}
    if told := [
        each.name for each in chosen if each.crops and (size.get("pixels"), size.get("crop")) == ("kohya", "random")
    ]:
        raise ExportError(
            f"{told[0]} is told where each picture was cut, and with size.pixels=kohya size.crop=random no dataset says it: "
            "make it with size.pixels=musubi, or size.crop=center"
        )


def _require_paths(source: ExportSource, chosen: Sequence[ExportFormat], on_disk: bool) -> None:
    """Raise ExportError if two rows would be one file, or one's name is too long. Rows that are called by their row_id are not looked at."""
    asked = [each.whole_path for each in chosen if each.names and each.path is not None]
    if source.names in (None, "row_id") or not asked:
        return
    shards = range(source.there.plan.shards)
    hashes: list[list[np.ndarray[Any, Any]]] = [[] for _ in asked]

    def look(shard: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in asked]
        for row in source.rows(shard):
            for path, some in zip(asked, found):
                some.append(hash(name := path(row)))
                if on_disk:
                    require_short(name, f"row {row.row_id}")
        return found

    for found in source.there.store.each(look, shards, SHARDS_AT_ONCE):
        for every, some in zip(hashes, found):
            every.append(np.array(some, np.int64))
    for path, every in zip(asked, hashes):
        values, counts = np.unique(np.concatenate(every), return_counts=True)
        if len(twice := {*values[counts > 1].tolist()}):
            _tell_twice(source, path, twice)


def _repeated(source: ExportSource) -> list[frozenset[int]]:
    """Of each shard the numbers of rows whose prompt an earlier row has."""

    def look(shard: int) -> list[tuple[int, bytes]]:
        return [(row.number, hashlib.blake2b(row.prompt.encode()).digest()) for row in source.rows(shard)]

    seen, found = set[bytes](), list[frozenset[int]]()
    for rows in source.there.store.each(look, range(source.there.plan.shards), SHARDS_AT_ONCE):
        repeated = set[int]()
        for number, prompt in rows:
            if prompt in seen:
                repeated.add(number)
            seen.add(prompt)
        found.append(frozenset(repeated))
    return found


def _tell_twice(source: ExportSource, path: Callable[[ExportRow], str], hashes: set[int]) -> None:
    seen: dict[str, str] = {}
    for shard in range(source.there.plan.shards):
        for row in source.rows(shard):
            name = path(row)
            if hash(name) in hashes and (first := seen.setdefault(name, row.row_id)) != row.row_id:
                raise ExportError(
                    f"rows {first} and {row.row_id} would both be {escaped(name)}: --names row_id, or another column, "
                    "tells them apart"
                )

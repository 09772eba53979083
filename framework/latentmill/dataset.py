"""The dataset's folder: which names in it are ours, which shards are there, whose they are, and how far it is.

Whoever asks about the folder asks here: a run before it starts and before it says that all is done, ``plan``, ``status``,
``verify``, the report, and a job that reads the dataset. A name in ``data/`` is one of three:

- *planned*: the name of a shard of the plan, ``00007.parquet``;
- *hidden*: it begins with a dot or an underscore, so that Arrow, Hugging Face ``datasets`` and we pass over it;
- *foreign*: all others. One with a shard's suffix would be read as rows of the dataset by anyone who reads ``data/``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from latentmill import plan as planning
from latentmill import registry
from latentmill.errors import PlanError, StorageError
from latentmill.plan import Plan
from latentmill.plugin import Sink
from latentmill.storage import Storage
from latentmill.text import one_line

T = TypeVar("T")

ERRORS_KEY = "latentmill.errors"
"""Metadata key of a shard's error rows, JSON."""
WARNINGS_KEY = "latentmill.warnings"
"""Metadata key of how many of a shard's rows have which warning, JSON; not there if none has any."""
PLAN_KEY = "latentmill.plan"
"""Metadata key of the hash of the plan that a shard is of."""
RETRIED = "retried"
"""In the names of shards that were taken out so that their failed rows are done again."""


def data_name(shard: int, sink: Sink) -> str:
    """Where a shard's data is, or will be."""
    return f"data/{shard:05d}{sink.suffix}"


def errors_name(shard: int) -> str:
    """Where a shard's errors are, if it has any."""
    return f"errors/{shard:05d}.jsonl"


def done_shards(store: Storage, suffix: str) -> set[int]:
    """The shards that are committed: what is in ``data/`` is the progress, and nothing else is."""
    return _numbers(store.names("data"), suffix)


def _numbers(names: list[str], suffix: str) -> set[int]:
    # Just as we write them: 00007.parquet.partial, 7.parquet and 00007 (1).parquet are somebody else's.
    found = (re.fullmatch(rf"(\d{{5,}}){re.escape(suffix)}", name, re.ASCII) for name in names)
    return {int(match[1]) for match in found if match and match[1] == f"{int(match[1]):05d}"}


@dataclass(frozen=True)
class Dataset:
    """A plan's dataset where it lies. It remembers nothing: each answer is looked up in the store."""

    store: Storage
    plan: Plan
    sink: Sink

    def done(self) -> set[int]:
        """The plan's shards that are there."""
        return {shard for shard in done_shards(self.store, self.sink.suffix) if shard < self.plan.shards}

    def missing(self) -> list[int]:
        """The plan's shards that are not there."""
        done = self.done()
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def foreign(self) -> list[str]:
        """Names in ``data/`` that are no shard of this plan's, the hidden left out."""
        names = self.store.names("data")
        planned = {data_name(shard, self.sink).removeprefix("data/") for shard in self.done()}
        return sorted(name for name in names if name not in planned and not name.startswith((".", "_")))

    def about(self, shard: int) -> dict[str, str]:
        """A shard's metadata. Raises PlanError unless the shard is this plan's."""
        name = data_name(shard, self.sink)
        try:
            with self.store.open(name) as file:
                about = dict(self.sink.metadata(file))
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a damaged or foreign file makes a reader say
            if isinstance(error, OSError) and error.errno is not None:
                raise
            said = one_line(error, 200)
            raise PlanError(f"{self._at(name)} can't be read as a shard of ours ({said}): {OUT_OF_THE_WAY}") from error
        if (made_by := about.get(PLAN_KEY)) != self.plan.hash:
            what = "is no shard of ours" if made_by is None else f"is a shard of another plan, {made_by}"
            raise PlanError(f"{self._at(name)} {what}: {OUT_OF_THE_WAY}")
        return about

    def adopt(self) -> set[int]:
        """The shards that a run of this plan finds done. Raises PlanError, and changes nothing, if what is there is another's."""
        planning.compare(self.plan, self.store)
        alien = [name for name in self.foreign() if name.endswith(self.sink.suffix)]
        if alien:
            more = f" and {len(alien) - 3} more" if len(alien) > 3 else ""
            raise PlanError(
                f"{self._at('data')} holds what is no shard of this plan, and would be read as its rows: "
                f"{', '.join(alien[:3])}{more}. Move it away, or choose another output"
            )
        done = self.done()
        for _ in self._each(self.about, done):
            pass
        return done

    def settle(self) -> None:
        """Compare what is in ``data/`` with the plan, and bring ``errors/`` in line with it.

        Raises StorageError if a shard is not there, PlanError if one is not this plan's.
        """
        if lost := self.missing():
            raise StorageError(
                f"{len(lost)} of {self.plan.shards} shards were committed and are not to be seen from here, "
                f"{self._at(data_name(lost[0], self.sink))} first: is this the same folder on every node? "
                "The same command goes on with them"
            )
        for _ in self._each(self.copy_errors, self.done()):
            pass

    def counts(self) -> tuple[int, int]:
        """Rows in the shards that are there: those that are ok, and those that failed."""
        failed = sum(self.store.read(errors_name(shard)).count(b"\n") for shard in self.failed_shards())
        return sum(len(self.plan.shard_rows(shard)) for shard in self.done()) - failed, failed

    def warnings(self) -> dict[str, int]:
        """How many rows of the shards that are there have which warning, the most frequent first. Reads metadata alone."""

        def of(shard: int) -> dict[str, int]:
            try:
                found: dict[str, int] = json.loads(self.about(shard).get(WARNINGS_KEY, "{}"))
            except (PlanError, FileNotFoundError):  # of which a run and verify tell
                return {}
            return found

        total: Counter[str] = Counter()
        for found in self._each(of, self.done()):
            total.update(found)
        return dict(total.most_common())

    def holds_ok(self) -> bool:
        """Whether a row that is ok is there. Reads no further than to the first."""
        return any(len(self.errors(shard)) < len(self.plan.shard_rows(shard)) for shard in sorted(self.done()))

    def failed_shards(self) -> list[int]:
        """The shards that are there and have an error file."""
        return sorted(_numbers(self.store.names("errors"), ".jsonl") & self.done())

    def errors(self, shard: int) -> list[dict[str, Any]]:
        """The error rows of a shard that is there."""
        return list(json.loads(self.about(shard).get(ERRORS_KEY, "[]")))

    def copy_errors(self, shard: int) -> None:
        """Make ``errors/NNNNN.jsonl`` of a committed shard what its data file says; no file, if no row failed.

        A driver may have died between the two, so it is done for each shard before a dataset is called complete.
        Drivers that do so at the same time write the same.
        """
        copy_errors(self.store, shard, error_lines(self.about(shard)))

    def take_out(self, shard: int, why: str) -> str:
        """Move a shard out of the dataset, into ``quarantine/``, so that a run does it again. Returns its new name.

        ``_SUCCESS`` goes too. A shard that another driver has just taken out is left to it, and the name is "".
        """
        name = data_name(shard, self.sink)
        to = f"quarantine/{name.removeprefix('data/')}-{why}"
        self.store.delete("_SUCCESS")
        self.store.delete(errors_name(shard))
        try:
            self.store.move(name, to)
        except FileNotFoundError:
            to = ""
        self.store.delete("_SUCCESS")  # a driver may have looked just before
        return to

    def taken_out(self) -> dict[str, int]:
        """Names of what ``take_out`` took, by whatever driver, each with the shard that it was."""
        pattern = re.compile(rf"quarantine/(\d{{5,}}){re.escape(self.sink.suffix)}-", re.ASCII)
        names = [f"quarantine/{name}" for name in self.store.names("quarantine")]
        return {name: int(match[1]) for name in names if (match := pattern.match(name))}

    def forget_retried(self) -> None:
        """Delete what was taken out so that its failed rows are done again, of the shards that are there again."""
        done = self.done()
        for name, shard in self.taken_out().items():
            if f"-{RETRIED}-" in name and shard in done:
                self.store.delete(name)

    def _each(self, what: Callable[[int], T], shards: set[int]) -> Iterator[T]:
        with ThreadPoolExecutor(16) as threads:  # a store answers in its own time; all at once is one time
            yield from threads.map(what, sorted(shards))

    def _at(self, name: str) -> str:
        return f"{self.store.url.rstrip('/')}/{name}"


OUT_OF_THE_WAY = "choose another output, or move it away (latentmill verify OUT --repair does)"


def load(store: Storage) -> Dataset:
    """The dataset that lies in ``store``. Raises PlanError if there is none, PluginError if its sink isn't installed."""
    plan = planning.load(store)
    return Dataset(store, plan, registry.build("sink", plan.config["sink"]))


def error_lines(about: dict[str, str]) -> bytes:
    """The error rows in a shard's metadata, a line of JSON each."""
    errors = json.loads(about.get(ERRORS_KEY, "[]"))
    lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
    return lines.encode("utf-8", "backslashreplace")  # JSON's own escape, of half a surrogate


def copy_errors(store: Storage, shard: int, content: bytes) -> None:
    """Make a shard's error file say ``content``; no file, where that is empty."""
    name = errors_name(shard)
    if not content:
        store.delete(name)
    elif not store.create(name, content) and store.read(name) != content:  # of a file that was there before
        store.put(name, content)

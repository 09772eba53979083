"""What a job means: which rows there are, how they part into shards, and a hash that says it all.

Rows are numbered by arithmetic: ``row = source_row * samples_per_row + sample``; shard k holds the rows from
``k * rows_per_shard``. So nothing grows with the number of rows, and every driver that reads the plan knows every shard. Where a dataset has
grown, each generation of rows begins with a shard of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from latentmill import columns, registry
from latentmill import identity as identities
from latentmill.columns import Columns
from latentmill.errors import PlanError
from latentmill.libraries import LIBRARIES, versions
from latentmill.models import Pin
from latentmill.parts import Parts, discreet, identity
from latentmill.plugin import Declaration, Fragment, LatentSpec, Plugin, Scheduler

if TYPE_CHECKING:  # a plan is read without torch and without Hydra
    from latentmill.config import Job


UNLESS_SAID = {"cuts": False, "takes_floats": False, "multiple_of": 1}
"""What holds of a stage of which a plan doesn't say it, as older ones."""


@dataclass(frozen=True)
class Generation:
    """Rows that came to a dataset at a time: those that it was begun with, or by which it grew."""

    hash: str
    rows: int
    """Of the source."""


@dataclass(frozen=True)
class Plan:
    """A job's identity: whatever would change one row of the dataset is in it, and nothing else."""

    name: str
    config: Mapping[str, Any]
    """The part of the job's config that means something: no replicas, no addresses, no output folder."""
    plugins: Mapping[str, Any]
    """For each kind: name, distribution, version, fingerprint."""
    fragments: Sequence[Fragment]
    samples_per_row: int
    rows_per_shard: int
    seed: int
    spec: LatentSpec | None = None
    stages: Sequence[Declaration] = ()
    """What each stage of the flow says that it is. Not hashed: it follows from the plugins."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of what the numbers come from: our own and the plugins' libraries. Part of the hash if the job is deterministic."""
    columns: Columns = field(default_factory=Columns)
    """What the rows have beside our fields."""
    models: Mapping[str, Pin] = field(default_factory=dict)
    """What the URLs of weights were found to be. Not hashed: the fingerprints stand for what is there."""
    fingerprinted: Sequence[str] = ()
    """Keys of the config, as ``vae.path``, that the fingerprints stand for: they are shown, and not hashed."""

    generations: Sequence[Generation] = ()
    """Of a dataset that has grown: all of them, the first among them. Not hashed: each has a hash of its own."""
    places: Sequence[tuple[int, int, int]] = ()
    """Where the rows of a source that has grown lie in ``fragments`` now, in the order of their numbers: runs of fragment, first row,
    rows. None: one fragment after another."""

    @property
    def accept_rows(self) -> int | None:
        """How many accepted rows the dataset ends with; None: with the last that is planned."""
        return (self.config.get("accept") or {}).get("rows")

    @cached_property
    def rows(self) -> int:
        """Rows planned."""
        return sum(rows for _, _, rows in self._spans)

    @cached_property
    def shards(self) -> int:
        """Shards planned."""
        first, _, rows = self._spans[-1]
        return first + -(-rows // self.rows_per_shard)

    @cached_property
    def end(self) -> int:
        """The number behind the last row's. Of a dataset that has grown there are fewer rows: each generation begins with a shard."""
        first, _, rows = self._spans[-1]
        return first * self.rows_per_shard + rows

    @cached_property
    def short(self) -> Mapping[int, int]:
        """Shards with fewer rows than the others, the last of generations, each with how many it has."""
        rest = ((first + rows // self.rows_per_shard, rows % self.rows_per_shard) for first, _, rows in self._spans)
        return {shard: rows for shard, rows in rest if rows}

    def shard_rows(self, shard: int) -> range:
        """The row numbers of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.short.get(shard, self.rows_per_shard), self.end))

    def rows_in(self, shards: Set[int]) -> int:
        """How many rows some shards have."""
        lacking = sum(self.rows_per_shard - rows for shard, rows in self.short.items() if shard in shards)
        return len(shards) * self.rows_per_shard - lacking

    def locate(self, row: int) -> tuple[str, int, int]:
        """Where a row comes from: the fragment's name, the source row's index in it, and which sample of it."""
        source_row, sample = self._source_row(row)
        at = bisect_right(self._ends, source_row)
        fragment, first, _ = self.runs[at]
        return self.fragments[fragment].name, first + source_row - (self._ends[at - 1] if at else 0), sample

    def row_id(self, row: int) -> str:
        """A row's name for ever; safe as a file name."""
        return identities.row_id(*self._source_row(row))

    def _source_row(self, row: int) -> tuple[int, int]:
        """Its number among all rows of the source, and which sample of it. Shards leave gaps between generations, rows of the source don't."""
        at = bisect_right(self._spans, row // self.rows_per_shard, key=lambda span: span[0]) - 1
        first, source_rows, _ = self._spans[at]
        source_row, sample = divmod(row - first * self.rows_per_shard, self.samples_per_row)
        return source_rows + source_row, sample

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        """Of each generation the first shard, the rows of the source before it, and its rows."""
        spans, shard, before = [], 0, 0
        for source_rows in [each.rows for each in self.generations] or [sum(f.rows for f in self.fragments)]:
            rows = source_rows * self.samples_per_row
            spans.append((shard, before, rows))
            shard, before = shard - (-rows // self.rows_per_shard), before + source_rows
        return spans

    @cached_property
    def runs(self) -> Sequence[tuple[int, int, int]]:
        """``places``, of a source that has not grown too."""
        return self.places or [(at, 0, fragment.rows) for at, fragment in enumerate(self.fragments)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(rows for _, _, rows in self.runs))

    @cached_property
    def hash(self) -> str:
        """32 hex digits over everything but the name. Of a dataset that has grown the last generation's, which names the one before."""
        return self.generations[-1].hash if self.generations else digest(hashed(self._content()))

    @property
    def first_hash(self) -> str:
        """The hash of what it was begun with, which stands in ``plan.json`` whatever comes later."""
        return self.generations[0].hash if self.generations else self.hash

    def hash_of(self, shard: int) -> str:
        """The hash of the generation that a shard is of: the shard holds it."""
        if not self.generations:
            return self.hash
        return self.generations[bisect_right(self._spans, shard, key=lambda span: span[0]) - 1].hash

    def to_json(self) -> str:
        """The text of ``plan.json``; of a dataset that has grown, of what would be in it, and its generations."""
        totals = {"hash": self.hash, "rows": self.rows, "shards": self.shards}
        grown = {"generations": [vars(each) for each in self.generations]} if self.generations else {}
        return json.dumps({**totals, **self._content(), **grown}, indent=1) + "\n"

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Plan:
        """Out of what ``plan.json`` says. Raises KeyError, TypeError or ValueError if it can't be."""
        return Plan(
            name=found["name"],
            config=found["config"],
            plugins=found["plugins"],
            fragments=tuple(Fragment(*fragment) for fragment in found["fragments"]),
            samples_per_row=found["samples_per_row"],
            rows_per_shard=found["rows_per_shard"],
            seed=found["seed"],
            spec=LatentSpec(**found["latents"]) if found["latents"] else None,
            stages=tuple(map(_stage_from_json, found["stages"])),
            libraries=found["libraries"],
            fingerprinted=found["fingerprinted"],
            columns=Columns.from_json(found),
            models={url: Pin.from_json(pin) for url, pin in found.get("models", {}).items()},
        )

    def _content(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "config": self.config,
            "fingerprinted": list(self.fingerprinted),
            "plugins": self.plugins,
            "libraries": self.libraries,
            "samples_per_row": self.samples_per_row,
            "rows_per_shard": self.rows_per_shard,
            "seed": self.seed,
            "latents": self.spec.about() if self.spec else None,
            "stages": [_stage_to_json(stage) for stage in self.stages],
            "fragments": [[f.name, f.rows, f.fingerprint] for f in self.fragments],
            **self.columns.to_json(),
            **({"models": {url: pin.to_json() for url, pin in self.models.items()}} if self.models else {}),
        }


@discreet
def plan(job: Job, built: Parts) -> Plan:
    """The plan of a job. Raises PlanError if the source is missing, empty, unreadable, or has an id twice."""
    from latentmill import ids
    from latentmill.schedulers import grids

    plugins = built.plugins()
    found = _columns(job, built, plugins)
    with registry.asking(built.source):
        fragments = tuple(built.source.fragments())
        _check_fragments(fragments)
        twice = ids.find_twice(built.source, fragments) if built.source.id_column is not None else None
        inside = built.source.reads_from(job.output)
    if inside:
        raise PlanError(
            f"output {job.output} lies in what the source reads, so that it would read what is made: choose another"
        )
    if not sum(fragment.rows for fragment in fragments):
        raise PlanError(f"source {job.source['name']} has no rows")
    planned = sum(fragment.rows for fragment in fragments) * job.samples_per_row
    if (wanted := (job.accept or {}).get("rows")) and wanted > planned:
        raise PlanError(
            f"accept.rows is {wanted}, and {planned} rows are planned: a larger samples_per_row draws more of each prompt"
        )
    if twice is not None:
        raise PlanError(f"source {job.source['name']}: {twice}")
    config = job.meaning()
    schedulers = [job.choice(place) or {} for place, plugin in plugins.items() if isinstance(plugin, Scheduler)]
    of_grid = {name for choice in schedulers for name in grids.libraries(choice.get("grid", "trailing"))}
    return Plan(
        name=job.name,
        config=config,
        plugins={kind: identity(job, kind, plugin) for kind, plugin in plugins.items()},
        libraries=versions({*LIBRARIES, *of_grid, *(name for plugin in plugins.values() for name in plugin.libraries)}),
        fingerprinted=_fingerprinted(config, plugins),
        fragments=fragments,
        samples_per_row=job.samples_per_row,
        rows_per_shard=job.rows_per_shard,
        seed=job.seed,
        spec=built.spec(),
        stages=built.flow,
        columns=found,
        models=built.models.for_plan(),
    )


def _columns(job: Job, built: Parts, plugins: Mapping[str, Plugin]) -> Columns:
    """What the rows have beside our fields; the source is told. Raises PlanError."""
    try:
        source = built.source
        first = built.flow[0]
        beside = dict.fromkeys(first.added(), f"a column that stage {first.name} adds")
        theirs = {place: plugin for place, plugin in plugins.items() if place not in built.own}
        source.job_fields = columns.of_plugins(theirs, job.sampling, beside)
        for stage in (stage for stage in built.flow if job.stages[stage.name].own_fields):
            own = job.stages[stage.name]
            works_with = {kind: built.at(job.place(kind, stage.name)) for kind in stage.needs}
            of_stage = columns.of_stage(
                stage,
                own.sampling,
                job.sampling_of(stage.name),
                works_with,
                own.scheduler.get("name"),
                source.job_fields,
            )
            source.job_fields = (*source.job_fields, *of_stage)
        keep = columns.wanted(job.source["keep"]) if job.source.get("keep") else {}
    except ValueError as error:
        raise PlanError(f"{job.name}: {error}") from error
    if keep:
        with registry.asking(source):
            source.kept = columns.kept(source, keep, built.taken())
    return Columns(tuple(source.job_fields), source.kept)


def _check_fragments(fragments: Sequence[Fragment]) -> None:
    """Raise ValueError if a source's fragments are none, or one is there twice: its rows would be, too."""
    names = set()
    for fragment in fragments:
        if not isinstance(fragment, Fragment) or not isinstance(fragment.rows, int) or fragment.rows < 0:
            raise ValueError(
                f"fragments must be a list of Fragment, with rows from 0 on, and there is {fragment!r:.200}"
            )
        if fragment.name in names:
            raise ValueError(f"fragment {fragment.name!r} is there twice, and its rows would be")
        names.add(fragment.name)


def _fingerprinted(config: Mapping[str, Any], plugins: Mapping[str, Plugin]) -> list[str]:
    """The keys of a config that the plugins' fingerprints stand for, and those of ``model`` that none but those refer to."""
    keys = []
    for kind, plugin in plugins.items():
        at = f"stages.{kind.removeprefix('stage ')}.settings" if kind.startswith("stage ") else kind
        at = f"stages.{kind}" if "." in kind and at == kind else at
        keys += [f"{at}.{name}" for name in plugin.fingerprinted]
    rest = _without(config, keys)
    for name in config.get("model", {}):
        if not re.search(rf"\bmodel\.{re.escape(name)}\b", json.dumps(_without(rest, [f"model.{name}"]))):
            keys.append(f"model.{name}")
    return keys


def _without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A config less some of its keys."""
    here = {key for key in keys if "." not in key}
    below = [key.partition(".") for key in keys if "." in key]
    kept = {}
    for name, value in config.items():
        if name not in here:
            inside = [rest for top, _, rest in below if top == name]
            kept[name] = _without(value, inside) if inside and isinstance(value, Mapping) else value
    return kept


def digest(content: Mapping[str, Any]) -> str:
    """A hash of what JSON can say, 32 hex digits."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def hashed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan's content the hash is over."""
    shown = {"hash", "rows", "shards", "name", "fingerprinted", "arrow_schema", "stages", "models"}
    if not content["config"].get("deterministic"):
        shown.add("libraries")
    kept = {key: value for key, value in content.items() if key not in shown}
    if kept.get("latents"):  # what it says of statistics follows from its fingerprint, and older plans don't say it
        kept["latents"] = {name: value for name, value in kept["latents"].items() if name != "statistics"}
    return {**kept, "config": _without(content["config"], content["fingerprinted"])}


def _stage_to_json(stage: Declaration) -> dict[str, Any]:
    own = pa.schema([column for column in stage.adds if isinstance(column, pa.Field)])
    types = {"columns": base64.b64encode(own.serialize()).decode()} if own.names else {}
    said = {key: value for key, value in vars(stage).items() if value != UNLESS_SAID.get(key)}
    return {**said, "adds": stage.added(), **types}


def _stage_from_json(found: Mapping[str, Any]) -> Declaration:
    own = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found["columns"]))) if "columns" in found else pa.schema([])
    said: dict[str, Any] = {key: tuple(found.get(key, ())) for key in ("needs", "takes", "drops", "ignores")}
    adds = tuple(own.field(name) if name in own.names else name for name in found["adds"])
    said |= {key: found[key] for key in ("name", "position", "continuous")}
    said |= {key: found.get(key, value) for key, value in UNLESS_SAID.items()}
    return Declaration(**said, adds=adds)

"""What a job means: which rows there are, how they part into shards, and a hash that says it all.

Rows are numbered by arithmetic: ``row = source_row * samples_per_row + sample``; shard k holds the rows from
``k * rows_per_shard``. So nothing grows with the number of rows, and every driver that reads the plan knows every shard.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import metadata
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from latentmill import columns, registry
from latentmill import identity as identities
from latentmill.columns import Columns
from latentmill.errors import PlanError
from latentmill.parts import Parts, discreet, identity
from latentmill.plugin import Declaration, Fragment, LatentSpec, Plugin
from latentmill.storage import Storage

if TYPE_CHECKING:  # a plan is read without torch and without Hydra
    from latentmill.config import Job


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
    fingerprinted: Sequence[str] = ()
    """Keys of the config, as ``vae.path``, that the fingerprints stand for: they are shown, and not hashed."""

    @cached_property
    def rows(self) -> int:
        """Rows planned."""
        return self._ends[-1] * self.samples_per_row if self.fragments else 0

    @property
    def shards(self) -> int:
        """Shards planned."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The row numbers of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def locate(self, row: int) -> tuple[str, int, int]:
        """Where a row comes from: the fragment's name, the source row's index in it, and which sample of it."""
        source_row, sample = divmod(row, self.samples_per_row)
        at = bisect_right(self._ends, source_row)
        return self.fragments[at].name, source_row - (self._ends[at - 1] if at else 0), sample

    def row_id(self, row: int) -> str:
        """A row's name for ever; safe as a file name."""
        return identities.row_id(*divmod(row, self.samples_per_row))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(fragment.rows for fragment in self.fragments))

    @cached_property
    def hash(self) -> str:
        """32 hex digits over everything but the name."""
        text = json.dumps(_hashed(self._content()), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        totals = {"hash": self.hash, "rows": self.rows, "shards": self.shards}
        return json.dumps({**totals, **self._content()}, indent=1) + "\n"

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
        inside = "://" not in job.output and built.source.reads_from(job.output)
    if inside:
        raise PlanError(
            f"output {job.output} lies in what the source reads, so that it would read what is made: choose another"
        )
    if not sum(fragment.rows for fragment in fragments):
        raise PlanError(f"source {job.source['name']} has no rows")
    if twice is not None:
        raise PlanError(f"source {job.source['name']}: {twice}")
    config = job.meaning()
    of_grid = grids.libraries(job.scheduler.get("grid", "trailing")) if job.scheduler and built.scheduler else set()
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
        spec=built.vae.spec if built.vae else built.source.latent_spec(),
        stages=built.flow,
        columns=found,
    )


def _columns(job: Job, built: Parts, plugins: Mapping[str, Plugin]) -> Columns:
    """What the rows have beside our fields; the source is told. Raises PlanError."""
    try:
        source = built.source
        source.job_fields = columns.of_plugins(plugins, job.sampling)
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


NOT_THERE = "not installed"
LIBRARIES = ("latentmill", "numpy", "pillow", "scipy", "torch")
"""Whose versions change our own numbers."""


def _fingerprinted(config: Mapping[str, Any], plugins: Mapping[str, Plugin]) -> list[str]:
    """The keys of a config that the plugins' fingerprints stand for, and those of ``model`` that none but those refer to."""
    keys = []
    for kind, plugin in plugins.items():
        at = f"stages.{kind.removeprefix('stage ')}.settings" if kind.startswith("stage ") else kind
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


def _hashed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan's content the hash is over."""
    shown = {"hash", "rows", "shards", "name", "fingerprinted", "arrow_schema", "stages"}
    if not content["config"].get("deterministic"):
        shown.add("libraries")
    kept = {key: value for key, value in content.items() if key not in shown}
    if kept.get("latents"):  # what it says of statistics follows from its fingerprint, and older plans don't say it
        kept["latents"] = {name: value for name, value in kept["latents"].items() if name != "statistics"}
    return {**kept, "config": _without(content["config"], content["fingerprinted"])}


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of installed distributions, by name. What was built of one for which hardware (``+cu128``) is left out."""
    path = tuple((folder, _changed(folder)) for folder in sys.path)
    return {name: _version(name, path) for name in sorted(distributions)}


def _changed(folder: str) -> int:
    """When something came into a folder or left it, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(1024)
def _version(name: str, path: tuple[tuple[str, int], ...]) -> str:
    """What is installed on this path, as long as nothing is installed anew; each answer is a file to parse, and often asked for."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return NOT_THERE


def changed_libraries(plan: Plan, store: Storage) -> list[str]:
    """In which libraries' versions a dataset goes on that was begun with others, a line each."""
    if not store.exists("plan.json"):
        return []
    begun = read(store).get("libraries", {})
    return [
        f"begun with {name} {begun[name]}, going on with {version}: its rows may differ a little from those that are there"
        for name, version in plan.libraries.items()
        if begun.get(name, version) != version
    ]


def publish(plan: Plan, store: Storage) -> None:
    """Write ``plan.json`` if there is none; raise PlanError, with the differences, if another plan's is there."""
    if not store.create("plan.json", plan.to_json().encode()):
        compare(plan, store)


def compare(plan: Plan, store: Storage) -> None:
    """Raise PlanError if another plan's dataset is there. Writes nothing."""
    if not store.exists("plan.json"):
        return
    there = read(store)
    if there.get("hash") != plan.hash:
        try:
            shown = list(dict.fromkeys(differences(_hashed(there), _hashed(json.loads(plan.to_json())))))
        except (KeyError, TypeError, AttributeError):
            raise PlanError(f"{store.url}/plan.json can't be read as a plan: move the folder away") from None
        more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
        raise PlanError(
            f"{store.url} holds another job's dataset: {'; '.join(shown[:6])}{more}. Choose another output; --fork begins one."
        )


def read(store: Storage) -> dict[str, Any]:
    """What ``plan.json`` says. Raises PlanError if there is none or it can't be read."""
    path = f"{store.url.rstrip('/')}/plan.json"
    try:
        found = json.loads(store.read("plan.json").decode())
    except (FileNotFoundError, NotADirectoryError):
        shards = [name for name in store.names("data") if name[:5].isdecimal()]
        lost = (
            f"; data/{min(shards)} may be a shard of ours: the job that it is of, run again, puts plan.json back"
            if shards
            else ""
        )
        raise PlanError(f"{store.url} holds no dataset of ours: it has no plan.json{lost}") from None
    except ValueError as error:
        raise PlanError(f"{path} can't be read as a plan ({error}): move the folder away or choose another") from error
    if not isinstance(found, dict) or not {"hash", "name", "rows", "shards", "rows_per_shard"} <= found.keys():
        raise PlanError(f"{path} can't be read as a plan: move the folder away or choose another")
    return found


def load(store: Storage) -> Plan:
    """The plan of a dataset, without its job. Raises PlanError if there is none or it can't be read."""
    found = read(store)
    try:
        plan = Plan(
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
        )
    except (KeyError, TypeError) as error:
        raise PlanError(f"{store.url}/plan.json can't be read as a plan: {error}") from error
    if plan.hash != found["hash"]:
        raise PlanError(
            f"{store.url}/plan.json was changed: its hash is {found['hash']}, and its contents' {plan.hash}"
        )
    return plan


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """``key: old -> new`` for every leaf of two plans in which they differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in ("hash", "name"):
                yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif old != new:
        if isinstance(old, list) and isinstance(new, list) and len(str(old)) > 80:
            old, new = _unlike(old, new)
        yield f"{at.removeprefix('config.')}: {old} -> {new}"


def _unlike(old: list[Any], new: list[Any]) -> tuple[Any, Any]:
    for a, b in zip(old, new):
        if a != b:
            return a, b
    return f"{len(old)} items", f"{len(new)} items"


def _stage_to_json(stage: Declaration) -> dict[str, Any]:
    own = pa.schema([column for column in stage.adds if isinstance(column, pa.Field)])
    types = {"columns": base64.b64encode(own.serialize()).decode()} if own.names else {}
    return {**vars(stage), "adds": stage.added(), **types}


def _stage_from_json(found: Mapping[str, Any]) -> Declaration:
    own = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found["columns"]))) if "columns" in found else pa.schema([])
    lists = {key: tuple(found.get(key, ())) for key in ("needs", "takes", "drops", "ignores")}
    adds = tuple(own.field(name) if name in own.names else name for name in found["adds"])
    return Declaration(found["name"], **lists, adds=adds, position=found["position"], continuous=found["continuous"])

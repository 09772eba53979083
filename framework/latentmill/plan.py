"""What a job means: which rows there are, how they part into shards, and a hash that says it all.

Rows are numbered by arithmetic: ``row = source_row * samples_per_row + sample``; shard k holds the rows from
``k * rows_per_shard``. So nothing grows with the number of rows, and every driver that reads the plan knows every shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from importlib import metadata
from itertools import accumulate, chain, islice
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

from latentmill import columns, ids, registry, syntax
from latentmill import identity as identities
from latentmill.columns import Columns
from latentmill.config import Job
from latentmill.errors import PlanError, PluginError
from latentmill.plugin import (
    VAE,
    Denoiser,
    FollowsAuthors,
    Fragment,
    LatentSpec,
    Plugin,
    Prediction,
    Scheduler,
    Sink,
    Source,
    Stage,
    TextEncoder,
)
from latentmill.schedulers import grids
from latentmill.storage import Storage
from latentmill.text import redacted
from latentmill.weights import Reading

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = ("float32", "float16", "bfloat16")
"""What stored latents may be of."""


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
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of what the numbers come from: our own and the plugins' libraries. Part of the hash if the job is deterministic."""
    columns: Columns = field(default_factory=Columns)
    """What the rows have beside our fields."""
    fingerprinted: Sequence[str] = ()
    """Keys of the config, as ``vae.path``, that the fingerprints stand for: they are shown, and not hashed."""

    @property
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
            "fragments": [[f.name, f.rows, f.fingerprint] for f in self.fragments],
            **self.columns.to_json(),
        }


@dataclass
class Parts:
    """The plugins of a job, built and not yet loaded."""

    source: Source
    sink: Sink
    vae: VAE | None = None
    text_encoder: TextEncoder | None = None
    denoiser: Denoiser | None = None
    scheduler: Scheduler | None = None
    stages: list[Stage] = field(default_factory=list)
    """Those of plugins, as ``plan`` built them to know what they are."""


def _discreet(function: Callable[Concatenate[Job, P], T]) -> Callable[Concatenate[Job, P], T]:
    """Its errors without the secrets that the job takes from the environment."""

    @wraps(function)
    def wrapped(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with redacted(job.config):
            return function(job, *args, **kwargs)

    return wrapped


@_discreet
def parts(job: Job) -> Parts:
    """Build what the job's flow needs, and check that the pieces fit together. Loads no weights onto a device."""
    built = Parts(source=plugin_of(job, "source"), sink=plugin_of(job, "sink"))
    if job.vae and set(job.flow) & {"encode", "denoise", "decode"}:
        built.vae = plugin_of(job, "vae")
        _check_spec(built.vae)
    if "denoise" in job.flow:
        for kind in ("vae", "denoiser", "text_encoder", "scheduler"):
            if not getattr(job, kind):
                raise PlanError(f"{job.name}: denoise is in the flow, so the job needs {kind}.name")
        built.denoiser = plugin_of(job, "denoiser")
        built.text_encoder = plugin_of(job, "text_encoder")
        assert job.scheduler is not None
        built.scheduler = plugin_of(job, "scheduler")
        assert built.vae is not None and built.denoiser is not None
        with registry.asking(built.denoiser):
            try:
                built.denoiser.check(built.vae.spec)
            except ValueError as error:
                raise PluginError(
                    f"denoiser {job.denoiser['name']} and VAE {job.vae['name']} don't fit: {error}"  # type: ignore[index]
                ) from error
        _check_grid(job, built)
    elif set(job.flow) & {"encode", "decode"} and built.vae is None:
        raise PlanError(
            f"{job.name}: {'encode' if 'encode' in job.flow else 'decode'} is in the flow, so it needs vae.name"
        )
    with registry.asking(built.source):
        stored = built.source.latent_spec()
    if stored is not None and built.vae is not None and stored != built.vae.spec:
        ours = built.vae.spec
        wrong = ", ".join(f"{k} {v!r} and not {vars(ours)[k]!r}" for k, v in vars(stored).items() if v != vars(ours)[k])
        raise PlanError(f"the source's latents are of another space than VAE {job.vae['name']}'s: {wrong}")  # type: ignore[index]
    if job.flow[1] == "decode" and stored is None:
        raise PlanError(f"{job.name}: decode needs a source of latents; source {job.source['name']} has none")
    return built


def _check_grid(job: Job, built: Parts) -> None:
    assert job.scheduler is not None and built.scheduler is not None
    assert built.denoiser is not None and built.vae is not None
    name, grid = job.scheduler["name"], job.scheduler.get("grid", "trailing")
    with registry.asking(built.denoiser):
        schedule, steps = built.denoiser.noise_schedule, job.sampling["steps"]
        if built.denoiser.prediction not in get_args(Prediction):
            raise ValueError(f"prediction {built.denoiser.prediction!r}: expected {', '.join(get_args(Prediction))}")
    shape = example_shape(built.vae.spec)
    with registry.asking(built.scheduler):
        try:
            own = built.scheduler.start(schedule, steps, steps, shape)
        except ValueError as error:
            raise PluginError(f"{job.name}: scheduler {name}: {error}") from error
    if own is not None and grid not in ("trailing", own.grid):
        raise PlanError(f"{job.name}: scheduler {name} has a grid of its own: leave scheduler.grid out")
    with registry.asking(built.denoiser):
        try:
            if own is None:
                grids.times(grid, schedule, steps, 1.0, shape, FollowsAuthors.of(built.denoiser).times)
        except ValueError as error:
            raise PluginError(f"{job.name}: scheduler.grid: {error}") from error


def example_shape(spec: LatentSpec) -> tuple[int, ...]:
    """Of some latents of a space, to ask a scheduler whether it can begin with."""
    return spec.shape(64 * spec.downscale, 64 * spec.downscale, 1 if spec.time_downscale else None)


def _check_spec(vae: VAE) -> None:
    """Raise PluginError unless the VAE says of which space its latents are."""
    with registry.asking(vae):
        spec = vae.spec
        sides = (spec.channels, spec.downscale, spec.time_downscale + 1) if isinstance(spec, LatentSpec) else (0,)
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"its spec must be a LatentSpec with channels and downscale from 1 on, not {spec!r}")
        if spec.dtype not in DTYPES:
            raise ValueError(f"its spec's dtype must be {' or '.join(DTYPES)}, not {spec.dtype!r}")


@_discreet
def plan(job: Job, built: Parts) -> Plan:
    """The plan of a job. Raises PlanError if the source is missing, empty, unreadable, or has an id twice."""
    kinds = [kind for kind in KINDS if getattr(built, kind) is not None]
    plugins: dict[str, Plugin] = {kind: getattr(built, kind) for kind in kinds}
    stages = {f"stage {name}": plugin_of(job, f"stage {name}") for name in job.flow if name not in BUILT_IN}
    plugins |= stages
    built.stages = [*stages.values()]
    found = _columns(job, built.source, plugins)
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
        columns=found,
    )


def _columns(job: Job, source: Source, plugins: Mapping[str, Plugin]) -> Columns:
    """What the rows have beside our fields; the source is told. Raises PlanError."""
    try:
        source.job_fields = columns.of_plugins(plugins, job.sampling)
        keep = columns.wanted(job.source["keep"]) if job.source.get("keep") else {}
    except ValueError as error:
        raise PlanError(f"{job.name}: {error}") from error
    if keep:
        with registry.asking(source):
            source.kept = columns.kept(source, keep, [field.name for field in source.job_fields])
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


KINDS = ("source", "sink", "vae", "text_encoder", "denoiser", "scheduler")
"""The plugins of a job, by what they are called in it and in a plan; a stage's is called ``stage NAME``."""
NOT_THEIRS = ("scheduler", "grid"), ("source", "keep")
"""Keys of a plugin's choice that are the framework's, and no settings."""
LIBRARIES = ("latentmill", "numpy", "pillow", "scipy", "torch")
"""Whose versions change our own numbers."""
BUILT_IN = ("read", "encode", "denoise", "decode", "write")
"""The stages that we write; any other name in a flow is a plugin's."""


def notices(built: Parts) -> list[str]:
    """What a job's plugins have to say before it starts, a line each; of a source, once ``plan`` has asked for its fragments."""
    plugins = [getattr(built, kind) for kind in KINDS]
    lines: list[str] = []
    for plugin in (*plugins, *built.stages):
        if plugin is not None:
            with registry.asking(plugin):
                lines += plugin.notices()
    return list(dict.fromkeys(lines))


READ_BY_PLAN = 1_000_000
"""Prompts that ``plan`` looks into, at most."""


def foreign_prompts(job: Job, built: Parts, plan: Plan) -> list[str]:
    """How many rows of the source hold prompts in another tool's language, a line for each kind. Reads their texts alone."""
    readers = [built.text_encoder] if built.text_encoder is not None else built.stages
    reads = next((reader.reads for reader in readers if reader.reads is not None), None)
    if reads is None:
        return []
    default = job.sampling["prompt"], job.sampling["negative_prompt"]
    texts = chain.from_iterable(built.source.texts(fragment) for fragment in plan.fragments)
    found: Counter[str] = Counter()
    looked_at = 0
    with registry.asking(built.source):
        for both in islice(texts, READ_BY_PLAN):
            looked_at += 1
            prompt, negative = (default[k] if text is None else text for k, text in enumerate(both))
            found.update(syntax.told(prompt or "", reads))
            found.update(f"negative_prompt: {line}" for line in syntax.told(negative or "", reads))
    first = "first " * (looked_at == READ_BY_PLAN)
    return [f"{rows:,} of the {first}{looked_at:,} rows: {line}" for line, rows in found.most_common()]


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
    shown = {"hash", "rows", "shards", "name", "fingerprinted", "arrow_schema"}
    if not content["config"].get("deterministic"):
        shown.add("libraries")
    kept = {key: value for key, value in content.items() if key not in shown}
    return {**kept, "config": _without(content["config"], content["fingerprinted"])}


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of installed distributions, by name. What was built of one for which hardware (``+cu128``) is left out."""
    found = {}
    for name in sorted(distributions):
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


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


NOT_THERE = "not installed"


def of_row(name: str) -> str:
    """What is known of a scheduler that a row names, and a plan doesn't: distribution, version and fingerprint."""
    try:
        found: Scheduler = registry.build("scheduler", {"name": name})
        return " ".join([*registry.provenance("scheduler", name).values(), found.fingerprint()]).strip()
    except PluginError:
        return NOT_THERE


class WeightsRead:
    """What the workers of a dataset have read, in all its runs, in ``weights/``: the first that reads for a plugin says what is right."""

    def __init__(self, plan: Plan, store: Storage) -> None:
        self.plan, self.store = plan, store
        self.known: dict[str, list[tuple[str, str]]] = {}

    def __call__(self, node: str, read: Reading) -> str:
        """Why rows of a worker that has read so would not be the dataset's, in a line; "" if they would."""
        for unit, files in read.items():
            if unit.startswith("scheduler "):  # that a row names
                (name, there), *_ = files
                if (here := of_row(name)) != there:
                    return f"{node}: scheduler {name}, which a row names, is {there}, and the driver's {here}. Install the same"
                if here == NOT_THERE:  # the row's own mistake
                    continue
            if unit not in self.known:
                self.known[unit] = self._settled(unit, files)
            if files != self.known[unit]:
                return self._unlike(node, unit, files, self.known[unit])
        return ""

    def _settled(self, unit: str, files: list[tuple[str, str]]) -> list[tuple[str, str]]:
        name = self._name(unit)
        if self.store.create(name, (json.dumps({"read_for": unit, "files": files}, indent=1) + "\n").encode()):
            return files
        try:
            return [(str(file), str(content)) for file, content in json.loads(self.store.read(name))["files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{self.store.url.rstrip('/')}/{name} can't be read: {error}") from error

    def _name(self, unit: str) -> str:
        return f"weights/{re.sub(r'[^A-Za-z0-9_.-]+', '-', unit)}.json"

    def _unlike(self, node: str, unit: str, files: list[tuple[str, str]], known: list[tuple[str, str]]) -> str:

        def shown(content: str) -> str:
            return content[:16] if re.fullmatch("[0-9a-f]{64}", content) else content or "not there"

        plugin = f"{unit} {self.plan.plugins[unit]['name']}" if unit in self.plan.plugins else unit.partition(",")[0]
        (name, here), *_ = [entry for entry in files if entry not in known] or [(known[0][0], "")]
        before = ", ".join(shown(content) for file, content in known if file == name) or "no such file"
        return (
            f"{node}: {plugin} reads {name} ({shown(here)}), and this dataset's rows were begun with another "
            f"({before}; {self._name(unit)}). Put the file that was there back, or begin another dataset (--fork)"
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


@_discreet
def plugin_of(job: Job, kind: str) -> Any:
    """One of a job's plugins, by its place in the plan, built and not yet loaded."""
    if kind.startswith("stage "):
        name = kind.removeprefix("stage ")
        return registry.build("stage", {"name": name, **job.stages[name].settings})
    choice: Mapping[str, Any] = getattr(job, kind)
    return registry.build(kind, {key: value for key, value in choice.items() if (kind, key) not in NOT_THEIRS})


def identity(job: Job, kind: str, plugin: Plugin | None = None) -> dict[str, str]:
    """What a plan says of a plugin: name, distribution, version, and, once it is built, fingerprint."""
    name = kind.removeprefix("stage ") if kind.startswith("stage ") else getattr(job, kind)["name"]
    about = {"name": name, **registry.provenance(kind.partition(" ")[0], name)}
    if plugin is None:
        return about
    with registry.asking(plugin):
        fingerprint = plugin.fingerprint()
        if not isinstance(fingerprint, str):
            raise ValueError(f"its fingerprint must be text, not {fingerprint!r:.80}")
    return {**about, "fingerprint": fingerprint}

"""A job's plugins, built in the driver, and whether they fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_args

from latentmill import registry, syntax
from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX
from latentmill.buckets import Size
from latentmill.errors import PlanError, PluginError
from latentmill.models import Pins, with_local_paths
from latentmill.plugin import (
    VAE,
    Declaration,
    Denoiser,
    FollowsAuthors,
    Fragment,
    LatentSpec,
    Plugin,
    Prediction,
    RowError,
    Scheduler,
    Sink,
    Source,
    Stage,
    StageContext,
    TextEncoder,
)
from latentmill.plugin.stage import named
from latentmill.text import redacted

if TYPE_CHECKING:
    from latentmill.config import Job

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = ("float32", "float16", "bfloat16")
"""What stored latents may be of."""

PARTS = ("source", "sink", "vae", "text_encoder", "denoiser", "scheduler")
"""The plugins of a job, by what they are called in it and in a plan; a stage is called ``stage NAME``."""


NOT_THEIRS = ("scheduler", "grid"), ("source", "keep")
"""Keys of a plugin's choice that are the framework's, and no settings."""


@dataclass
class Parts:
    """The plugins of a job, built and not yet loaded."""

    source: Source
    sink: Sink
    vae: VAE | None = None
    text_encoder: TextEncoder | None = None
    denoiser: Denoiser | None = None
    scheduler: Scheduler | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    """By their names in the job, in the order of its flow."""
    flow: tuple[Declaration, ...] = ()
    """What each of them says that it is."""
    models: Pins = field(default_factory=lambda: Pins(""))
    """What the URLs of their weights mean."""

    def plugins(self) -> dict[str, Plugin]:
        """All of them, by their places in the plan."""
        found: dict[str, Plugin] = {kind: getattr(self, kind) for kind in PARTS if getattr(self, kind) is not None}
        return found | {f"stage {name}": stage for name, stage in self.stages.items()}

    def taken(self) -> dict[str, str]:
        """Names that no column of the source may have in the dataset: those of plugins, each with what it is."""
        added = {name: f"a column that stage {stage.name} adds" for stage in self.flow for name in stage.added()}
        return added | {field.name: "a field of a plugin" for field in self.source.job_fields}


def discreet(function: Callable[Concatenate[Job, P], T]) -> Callable[Concatenate[Job, P], T]:
    """Its errors without the secrets that the job takes from the environment."""

    @wraps(function)
    def wrapped(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with redacted(job.config):
            return function(job, *args, **kwargs)

    return wrapped


@discreet
def parts(job: Job) -> Parts:
    """Build what the job's stages need, and check that the pieces fit together. Loads no weights onto a device."""
    models = Pins(job.config, job.output)
    built = Parts(source=plugin_of(job, "source", models), sink=plugin_of(job, "sink", models), models=models)
    built.stages = {name: plugin_of(job, f"stage {name}", models) for name in job.flow}

    def build(kind: str) -> Any:
        if getattr(built, kind) is None:
            if not getattr(job, kind, None):
                asks = next((name for name, stage in built.stages.items() if kind in stage.needs), "a stage")
                raise PluginError(f"{job.name}: {asks} is in the flow, so the job needs {kind}.name")
            setattr(built, kind, plugin_of(job, kind, models))
            if kind == "vae":  # stages' declarations go by its spec
                _check_spec(getattr(built, kind))
        return getattr(built, kind)

    choices = {kind: getattr(job, kind) for kind in PARTS if getattr(job, kind) is not None}
    built.flow = declarations(built.stages, build, job.sampling, job.latents_std, choices, job.size, job.attempts)
    for wrong in _wrong_flow(job, built):
        raise PlanError(f"{job.name}: {wrong}")
    for stage in built.flow:
        for kind in stage.needs:
            if not getattr(job, kind, None):
                raise PlanError(f"{job.name}: {stage.name} is in the flow, so the job needs {kind}.name")
    for kind in PARTS:
        if any(kind in stage.needs for stage in built.flow):
            build(kind)
    with registry.asking(built.source):
        stored = built.source.latent_spec()
    spec = stored if built.vae is None else built.vae.spec
    if job.size is not None:
        _check_size(job, Size.of(job.size), built.source, stored, spec)
    if built.denoiser is not None and spec is not None:
        with registry.asking(built.denoiser):
            try:
                built.denoiser.check(spec)
            except ValueError as error:
                of = f"VAE {job.vae['name']}" if job.vae else f"source {job.source['name']}"
                raise PluginError(f"denoiser {job.denoiser['name']} and {of} don't fit: {error}") from error  # type: ignore[index]
    if built.denoiser is not None and built.scheduler is not None and spec is not None:
        _check_grid(job, built.denoiser, built.scheduler, spec)
    _check_conditioning(job, built)
    if stored is not None and built.vae is not None and stored != built.vae.spec:
        ours = built.vae.spec
        said = {
            each.name: (getattr(stored, each.name), getattr(ours, each.name)) for each in fields(ours) if each.compare
        }
        wrong = ", ".join(f"{name} {there!r} and not {here!r}" for name, (there, here) in said.items() if there != here)
        raise PlanError(f"the source's latents are of another space than VAE {job.vae['name']}'s: {wrong}")  # type: ignore[index]
    return built


def declarations(
    stages: Mapping[str, Stage],
    build: Callable[[str], Any],
    sampling: Mapping[str, Any],
    latents_std: bool = False,
    choices: Mapping[str, Mapping[str, Any]] | None = None,
    size: Mapping[str, Any] | None = None,
    attempts: int | None = None,
) -> tuple[Declaration, ...]:
    """What each stage, by its name in the job, says that it is in this flow: asked from the last to the first, and once more from the first to the last.

    So a stage that depends on a later one sees it the first time, and one that depends on an earlier one the second.
    """
    names = list(stages)
    found = [Declaration(name) for name in names]
    for at in (*reversed(range(len(names))), *range(len(names))):
        stage = stages[names[at]]
        context = StageContext(
            Declaration(names[at], needs=PARTS),
            before=found[:at],
            after=found[at + 1 :],
            sampling=dict(sampling),
            latents_std=latents_std,
            size=size,
            attempts=attempts,
            choices=choices or {},
            build=build,
        )
        with registry.asking(stage):
            found[at] = stage.declare(context)
    return tuple(found)


def _wrong_flow(job: Job, built: Parts) -> Iterator[str]:
    """What is wrong with the order of the stages, one line each."""
    flow, names = built.flow, list(job.flow)
    positions = [stage.position for stage in flow]
    if positions != ["first", *["between"] * (len(flow) - 2), "last"]:
        yield f"flow must begin with read and end with write, or stages that do the same, and have no other of them, not {names}"
    there: list[str] = []
    for stage in flow:
        for column in stage.takes:
            if not any(named(name, column) for name in there):
                if column.endswith(":"):
                    yield f"flow needs a stage before {stage.name} that adds {column}*, as encode does, and is {names}"
                yield (
                    f"{stage.name} needs a source of {column}; source {job.source['name']} has none, "
                    "and no stage before it adds them"
                )
        there = [name for name in there if not any(named(name, column) for column in stage.drops)] + stage.added()
    last = flow[-2].added()
    if job.sampling["until"] and "time" not in last:
        yield f"sampling.until leaves latents half-way, so flow must end with denoise, write, not {names}"
    if job.accept and not any("denoiser" in stage.needs for stage in flow):
        yield f"accept draws noise anew for rows that are filtered, and no stage of flow makes any, as denoise does: {names}"
    if job.accept and "attempt" not in flow[0].added():
        yield (
            f"accept draws rows again, and {flow[0].name} would read the same: a stage that stands first must declare attempt, "
            "and go by it"
        )
    if job.latents_std and "latents_std" not in last:
        yield f"latents_std is of latents as they were encoded, so flow must end with encode, write, not {names}"
    if job.size and job.size.get("flip") and "latents_flipped" not in last:
        yield f"size.flip is of latents as they were encoded, so flow must end with encode, write, not {names}"


def _check_size(job: Job, size: Size, source: Source, stored: LatentSpec | None, spec: LatentSpec | None) -> None:
    """Tell the source how to open pictures. Raises PlanError if they can't be brought to these sizes."""
    name = job.source["name"]
    if stored is not None:
        raise PlanError(f"{job.name}: size is for pictures, and source {name} gives latents")
    if size.pixels not in source.pixel_ways:
        raise PlanError(
            f"{job.name}: source {name} opens pictures as {' or '.join(source.pixel_ways)}, so size.pixels can't be {size.pixels}"
        )
    source.pixels = size.pixels
    of = spec.downscale if spec is not None else 1
    if wrong := next((bucket for bucket in size.sides() if bucket[0] % of or bucket[1] % of), None):
        raise PlanError(
            f"{job.name}: size: buckets of {wrong[0]}x{wrong[1]} are no multiples of {of}, as the VAE needs"
        )


def _check_conditioning(job: Job, built: Parts) -> None:
    """Raise PlanError if stored conditioning is taken that another text encoder made than the job names, or that lacks something."""
    built.source.wants_conditioning = PROMPT_PREFIX in built.flow[0].added()
    if not built.source.wants_conditioning:
        return
    if job.sampling["negative_prompt"] is not None:
        raise PlanError(
            f"{job.name}: sampling.negative_prompt is of no use: the source's prompts and negative prompts are encoded"
        )
    with registry.asking(built.source):
        stored = built.source.conditioning()
    names = [name.removeprefix(PROMPT_PREFIX) for name in stored if name.startswith(PROMPT_PREFIX)]
    reads = [stage.name for stage in built.flow if "denoiser" in stage.needs and NEGATIVE_PREFIX not in stage.ignores]
    for name in names if reads else ():
        if NEGATIVE_PREFIX + name not in stored:
            raise PlanError(f"{job.name}: the source has no {NEGATIVE_PREFIX}{name}, which {reads[0]} reads")
    if job.text_encoder is None:
        return
    encoder: TextEncoder = plugin_of(job, "text_encoder", built.models)
    with registry.asking(encoder):
        ours = encoder.fingerprint()
    for name, theirs in stored.items():
        if ours and theirs and ours != theirs:
            raise PlanError(
                f"{job.name}: the source's {name} are of another text encoder than {job.text_encoder['name']}: its "
                f"fingerprint is {ours}, and theirs {theirs}"
            )


def _check_grid(job: Job, denoiser: Denoiser, scheduler: Scheduler, spec: LatentSpec) -> None:
    from latentmill.schedulers import grids

    assert job.scheduler is not None
    name, grid = job.scheduler["name"], job.scheduler.get("grid", "trailing")
    with registry.asking(denoiser):
        schedule, steps = denoiser.noise_schedule, job.sampling["steps"]
        if denoiser.prediction not in get_args(Prediction):
            raise ValueError(f"prediction {denoiser.prediction!r}: expected {', '.join(get_args(Prediction))}")
    shape = example_shape(spec)
    with registry.asking(scheduler):
        try:
            own = scheduler.start(schedule, steps, steps, shape)
        except ValueError as error:
            raise PluginError(f"{job.name}: scheduler {name}: {error}") from error
    if own is not None and grid not in ("trailing", own.grid):
        raise PlanError(f"{job.name}: scheduler {name} has a grid of its own: leave scheduler.grid out")
    with registry.asking(denoiser):
        try:
            if own is None:
                grids.times(grid, schedule, steps, 1.0, shape, FollowsAuthors.of(denoiser).times)
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


def notices(built: Parts) -> list[str]:
    """What a job's plugins have to say before it starts, a line each; of a source, once ``plan`` has asked for its fragments."""
    lines: list[str] = []
    for plugin in built.plugins().values():
        with registry.asking(plugin):
            lines += plugin.notices()
    return list(dict.fromkeys(lines))


READ_BY_PLAN = 1_000_000
"""Prompts that ``plan`` looks into, at most."""


def foreign_prompts(job: Job, built: Parts, fragments: Sequence[Fragment]) -> list[str]:
    """How many rows of the source hold prompts in another tool's language, a line for each kind. Reads their texts alone."""
    readers = [built.text_encoder] if built.text_encoder is not None else built.stages.values()
    reads = next((reader.reads for reader in readers if reader.reads is not None), None)
    if reads is None:
        return []
    default = job.sampling["prompt"], job.sampling["negative_prompt"]
    texts = chain.from_iterable(built.source.texts(fragment) for fragment in fragments)
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


SIZES_READ = 10_000
"""Pictures whose size ``plan`` looks at, at most."""


def bucket_counts(job: Job, built: Parts, fragments: Sequence[Fragment]) -> tuple[Counter[str], str]:
    """How many pictures of the source get which bucket, as ``832x1216``, and of how many in words. Reads their headers alone.

    Of a source of more than SIZES_READ rows an even share of each fragment's first. Of several areas each picture has a bucket.
    """
    assert job.size is not None
    size, total = Size.of(job.size), sum(fragment.rows for fragment in fragments)
    found: Counter[str] = Counter()
    looked_at = pictures = reached = told = 0
    with registry.asking(built.source):
        for fragment in fragments:
            reached += fragment.rows
            share = min(fragment.rows, reached * min(total, SIZES_READ) // total - looked_at)
            looked_at += share
            for row in built.source.sizes(fragment.name, 0, share):
                told += 1
                if isinstance(row, RowError) or row.get("image") is None:
                    continue
                sides, own = row["image"], (row.get("width"), row.get("height"))
                if None in own and own != (None, None):
                    continue  # an error row
                pictures += 1
                for sample in range(len(size.area)):
                    try:
                        width, height = size.fit(sides[0], sides[1], sample).bucket if own == (None, None) else own
                        found[f"{width}x{height}"] += 1
                    except RowError:
                        found["too small"] += 1
    if not told:
        return found, f"source {job.source['name']} doesn't say how large its pictures are"
    areas = f", each at {len(size.area)} areas" if len(size.area) > 1 else ""
    among = f" of the {looked_at:,} rows looked at" if looked_at < total else f" of {total:,} rows"
    return found, f"{pictures:,} pictures{among}{areas}"


@discreet
def plugin_of(job: Job, kind: str, models: Pins) -> Any:
    """One of a job's plugins, by its place in the plan, built and not yet loaded."""
    if kind.startswith("stage "):
        kind, name = kind.split(" ", 1)
        choice: Mapping[str, Any] = {"name": job.stages[name].name or name, **job.stages[name].settings}
    else:
        choice = {key: value for key, value in getattr(job, kind).items() if (kind, key) not in NOT_THEIRS}
    return registry.build(kind, with_local_paths(kind, choice, models))


def identity(job: Job, kind: str, plugin: Plugin | None = None) -> dict[str, str]:
    """What a plan says of a plugin: name, distribution, version, and, once it is built, fingerprint."""
    at = kind.removeprefix("stage ")
    name = job.stages[at].name or at if kind.startswith("stage ") else getattr(job, kind)["name"]
    about = {"name": name, **registry.provenance(kind.partition(" ")[0], name)}
    if plugin is None:
        return about
    with registry.asking(plugin):
        fingerprint = plugin.fingerprint()
        if not isinstance(fingerprint, str):
            raise ValueError(f"its fingerprint must be text, not {fingerprint!r:.80}")
    return {**about, "fingerprint": fingerprint}

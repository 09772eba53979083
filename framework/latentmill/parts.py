"""A job's plugins, built in the driver, and whether they fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_args

from latentmill import registry
from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX
from latentmill.buckets import Size
from latentmill.errors import PlanError, PluginError
from latentmill.flow import wrong_in
from latentmill.models import Pins, with_local_paths
from latentmill.plugin import (
    VAE,
    Declaration,
    Denoiser,
    FollowsAuthors,
    LatentSpec,
    Plugin,
    Prediction,
    Scheduler,
    Sink,
    Source,
    Stage,
    StageContext,
    TextEncoder,
)
from latentmill.text import redacted

if TYPE_CHECKING:
    from latentmill.config import Job

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = ("float32", "float16", "bfloat16")
"""What stored latents may be of."""

PARTS = ("source", "sink", "vae", "text_encoder", "denoiser", "scheduler")
"""The plugins of a job, by what they are called in it and in a plan; a stage is called ``stage NAME``, its own denoiser ``NAME.denoiser``."""


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
    own: dict[str, Plugin] = field(default_factory=dict)
    """Those that a stage has for itself, by their places in the plan: ``refine.denoiser``."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """By their names in the job, in the order of its flow."""
    flow: tuple[Declaration, ...] = ()
    """What each of them says that it is."""
    models: Pins = field(default_factory=lambda: Pins(""))
    """What the URLs of their weights mean."""
    spaces: list[LatentSpec | None] = field(default_factory=list)
    """Of what space latents are that come to each stage."""

    def plugins(self) -> dict[str, Plugin]:
        """All of them, by their places in the plan."""
        found: dict[str, Plugin] = {kind: getattr(self, kind) for kind in PARTS if getattr(self, kind) is not None}
        return found | self.own | {f"stage {name}": stage for name, stage in self.stages.items()}

    def at(self, place: str) -> Any:
        """The plugin at a place; None if none is built."""
        return self.own.get(place) if "." in place else getattr(self, place)

    def spec(self) -> LatentSpec | None:
        """The space of the job's latents, or of those that it ends with; None if it has none."""
        return next((space for space in reversed(self.spaces) if space is not None), None)

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

    def build(place: str) -> Any:
        if built.at(place) is None:
            if not job.choice(place):
                asks = next((name for name, stage in built.stages.items() if place in stage.needs), "a stage")
                raise PluginError(f"{job.name}: {asks} is in the flow, so the job needs {place}.name")
            plugin = plugin_of(job, place, models)
            if isinstance(plugin, VAE):  # stages' declarations go by its spec
                _check_spec(plugin)
            if "." in place:
                built.own[place] = plugin
            else:
                setattr(built, place, plugin)
        return built.at(place)

    built.flow = declarations(
        built.stages,
        lambda name: of_stage(job, name, build),
        latents_std=job.latents_std,
        float_pictures=job.float_pictures,
        size=job.size,
        attempts=job.attempts,
    )
    for wrong in wrong_in(built.flow, job):
        raise PlanError(f"{job.name}: {wrong}")
    for stage in built.flow:
        for kind in sorted(job.stages[stage.name].own_parts.keys() - stage.needs):
            raise PlanError(
                f"{job.name}: there is no key stages.{stage.name}.{kind}: {stage.name} works with no {kind}"
            )
        for kind in stage.needs:
            if not job.choice(job.place(kind, stage.name)):
                raise PlanError(f"{job.name}: {stage.name} is in the flow, so the job needs {kind}.name")
    for kind in PARTS:
        for stage in built.flow:
            if kind in stage.needs:
                build(job.place(kind, stage.name))
    with registry.asking(built.source):
        stored = built.source.latent_spec()
    built.spaces, other_space = _spaces(job, built, stored)
    if job.size is not None:
        _check_size(job, Size.of(job.size), built.source, stored, built.spaces[0])
    for stage, spec in zip(built.flow, built.spaces):
        if "denoiser" in stage.needs:
            _check_denoiser(job, built, stage.name, spec)
    _check_conditioning(job, built)
    if other_space:
        raise PlanError(other_space)
    return built


def of_stage(job: Job, stage: str, build: Callable[[str], Any]) -> dict[str, Any]:
    """What a stage's context says of the job: ``sampling``, and of each kind of plugin its choice, its place, and the plugin, by ``build``."""
    places = {kind: job.place(kind, stage) for kind in PARTS}
    return {
        "sampling": job.sampling_of(stage),
        "choices": {kind: choice for kind, place in places.items() if (choice := job.choice(place)) is not None},
        "places": places,
        "build": lambda kind: build(places[kind]),
    }


def declarations(
    stages: Mapping[str, Stage],
    about: Callable[[str], Mapping[str, Any]],
    **of_job: Any,
) -> tuple[Declaration, ...]:
    """What each stage, by its name in the job, says that it is in this flow: asked from the last to the first, and once more from the first to the last.

    So a stage that depends on a later one sees it the first time, and one that depends on an earlier one the second. ``about``: ``of_stage``;
    ``of_job``: what else of the job its context has.
    """
    names = list(stages)
    found = [Declaration(name) for name in names]
    for at in (*reversed(range(len(names))), *range(len(names))):
        stage = stages[names[at]]
        context = StageContext(
            Declaration(names[at], needs=PARTS),
            before=found[:at],
            after=found[at + 1 :],
            **of_job,
            **about(names[at]),
        )
        with registry.asking(stage):
            found[at] = stage.declare(context)
    return tuple(found)


def _check_size(job: Job, size: Size, source: Source, stored: LatentSpec | None, spec: LatentSpec | None) -> None:
    """Tell the source how to open pictures. Raises PlanError if they can't be brought to these sizes."""
    name = job.source["name"]
    if stored is not None:
        raise PlanError(f"{job.name}: size is for pictures, and source {name} gives latents")
    if size.pixels not in source.pixel_ways:
        raise PlanError(
            f"{job.name}: source {name} opens pictures as {' or '.join(source.pixel_ways)}, so size.pixels can't be {size.pixels}"
        )
    if source.pixels not in ("ours", size.pixels):
        raise PlanError(
            f"{job.name}: source {name} opens pictures as {source.pixels} (source.opened), and size as {size.pixels}: leave one of them out"
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


def _spaces(job: Job, built: Parts, stored: LatentSpec | None) -> tuple[list[LatentSpec | None], str]:
    """Of what space latents are that come to each stage: as they are stored, or as a VAE makes them, or the next one expects them.

    And in what they are not of the space of a VAE that they come to, in a line; "" if they are.
    """
    vaes: list[VAE | None] = [
        built.at(job.place("vae", stage.name)) if "vae" in stage.needs else None for stage in built.flow
    ]
    came, found, wrong = stored, list[LatentSpec | None](), ""
    for at, (stage, vae) in enumerate(zip(built.flow, vaes)):
        coming = next((each.spec for each in vaes[at:] if each is not None), None)
        found.append(vae.spec if vae is not None else came or coming)
        if vae is not None and came is not None and came != vae.spec:
            said = [
                (each.name, getattr(came, each.name), getattr(vae.spec, each.name))
                for each in fields(came)
                if each.compare
            ]
            whose = "the source's latents" if came is stored else f"the latents that come to {stage.name}"
            name = (job.choice(job.place("vae", stage.name)) or {})["name"]
            other = ", ".join(f"{key} {there!r} and not {here!r}" for key, there, here in said if there != here)
            wrong = wrong or f"{whose} are of another space than VAE {name}'s: {other}"
        if vae is not None:
            came = vae.spec if "latents" in stage.added() or "latents" not in stage.drops else None
        elif "latents" in stage.drops and "latents" not in stage.added():
            came = None
    return found, wrong


def _check_denoiser(job: Job, built: Parts, stage: str, spec: LatentSpec | None) -> None:
    place = job.place("denoiser", stage)
    denoiser: Denoiser = built.at(place)
    if spec is None:
        return
    with registry.asking(denoiser):
        if not isinstance(denoiser.multiple_of, int) or denoiser.multiple_of < 1:
            raise ValueError(f"its multiple_of must be a whole number from 1 on, not {denoiser.multiple_of!r}")
        try:
            denoiser.check(spec)
        except ValueError as error:
            vae = job.vae or next((own for each in job.flow if (own := job.stages[each].vae)), None)
            of = f"VAE {vae['name']}" if vae else f"source {job.source['name']}"
            raise PluginError(f"denoiser {(job.choice(place) or {})['name']} and {of} don't fit: {error}") from error
    scheduler = built.at(job.place("scheduler", stage))
    if scheduler is not None:
        _check_grid(job, stage, denoiser, scheduler, spec)


def _check_grid(job: Job, stage: str, denoiser: Denoiser, scheduler: Scheduler, spec: LatentSpec) -> None:
    from latentmill.schedulers import grids

    place = job.place("scheduler", stage)
    choice = job.choice(place)
    assert choice is not None
    name, grid = choice["name"], choice.get("grid", "trailing")
    with registry.asking(denoiser):
        schedule, steps = denoiser.noise_schedule, job.sampling_of(stage)["steps"]
        if denoiser.prediction not in get_args(Prediction):
            raise ValueError(f"prediction {denoiser.prediction!r}: expected {', '.join(get_args(Prediction))}")
    shape = example_shape(spec)
    at = f"stages.{place}" if "." in place else place
    with registry.asking(scheduler):
        try:
            own = scheduler.start(schedule, steps, steps, shape)
        except ValueError as error:
            raise PluginError(f"{job.name}: scheduler {name}: {error}") from error
    if own is not None and grid not in ("trailing", own.grid):
        raise PlanError(f"{job.name}: scheduler {name} has a grid of its own: leave {at}.grid out")
    with registry.asking(denoiser):
        try:
            if own is None:
                grids.times(grid, schedule, steps, 1.0, shape, FollowsAuthors.of(denoiser).times)
        except ValueError as error:
            raise PluginError(f"{job.name}: {at}.grid: {error}") from error


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


@discreet
def plugin_of(job: Job, kind: str, models: Pins) -> Any:
    """One of a job's plugins, by its place in the plan, built and not yet loaded."""
    choice: Mapping[str, Any]
    if kind.startswith("stage "):
        kind, name = kind.split(" ", 1)
        choice = {"name": job.stages[name].name or name, **job.stages[name].settings}
    else:
        said, kind = job.choice(kind) or {}, kind.rpartition(".")[2]
        choice = {key: value for key, value in said.items() if (kind, key) not in NOT_THEIRS}
    return registry.build(kind, with_local_paths(kind, choice, models))


def identity(job: Job, kind: str, plugin: Plugin | None = None) -> dict[str, str]:
    """What a plan says of a plugin: name, distribution, version, and, once it is built, fingerprint."""
    if kind.startswith("stage "):
        at = kind.removeprefix("stage ")
        kind, name = "stage", job.stages[at].name or at
    else:
        kind, name = kind.rpartition(".")[2], (job.choice(kind) or {})["name"]
    about = {"name": name, **registry.provenance(kind, name)}
    if plugin is None:
        return about
    with registry.asking(plugin):
        fingerprint = plugin.fingerprint()
        if not isinstance(fingerprint, str):
            raise ValueError(f"its fingerprint must be text, not {fingerprint!r:.80}")
    return {**about, "fingerprint": fingerprint}

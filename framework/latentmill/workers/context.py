"""A stage's worker, by the plan: the stage that the job names, with its own plugins and no others, each held against the plan."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from latentmill import registry, storage, weights
from latentmill.config import Job
from latentmill.errors import PluginError, WrongWorker
from latentmill.libraries import LIBRARIES, versions
from latentmill.models import Pins
from latentmill.parts import identity, of_stage, plugin_of
from latentmill.plan import Plan
from latentmill.plan_files import read as read_plan
from latentmill.plugin import (
    FixedShape,
    Plugin,
    RowError,
    Scheduler,
    Source,
    Stage,
    StageContext,
)
from latentmill.storage import Storage
from latentmill.workers.node_setup import set_up_once
from latentmill.workers.shared_parts import SharedParts, part_key
from latentmill.workers.weights_read import of_row

MANY = 1000
"""Names of schedulers in rows of which a worker tells: nobody has so many, and rows may hold anything."""

STORE_VARIABLES = ("AWS_", "GOOGLE_", "GCS_", "AZURE_", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
"""How the names of environment variables begin that a store's address and keys stand in."""


def make_stage(
    job: Job, plan: Plan, name: str, fixed_size: bool = False, run: str = "", shared: SharedParts | None = None
) -> Stage:
    """Build a stage by its name in the job's flow, with its own plugins and no others. Loads nothing onto a device.

    ``fixed_size``: it looks for no larger batch size than its first. ``run``: names the run, in which each node sets a plugin up once; if it is none,
    nothing is set up. ``shared``: what other stages of its worker have built.

    Raises WrongWorker if what is installed here, or the plugins find, is not what the plan says.
    """
    for other in other_libraries(plan, LIBRARIES):
        raise WrongWorker(f"{this_node()} {other}")
    stage: Stage = as_planned(job, plan, f"stage {name}", run)
    gpu = job.stages[name].num_gpus > 0
    parts = shared or SharedParts()
    build = cache(
        lambda place: parts.of(part_key(job, plan, place, gpu), partial(as_planned, job, plan, place, run=run))
    )
    about = of_stage(job, name, build)
    own = about["choices"].get("scheduler", {"name": ""})["name"]
    at = job.flow.index(name)
    settings = job.stages[name]
    batch_size = settings.first_batch_size
    stage.prepare(
        StageContext(
            plan.stages[at],
            before=plan.stages[:at],
            after=plan.stages[at + 1 :],
            batch_size=batch_size,
            finds_batch_size=settings.batch_size == "auto" and not job.deterministic and not fixed_size,
            fixed=FixedShape(batch_size, job.rows_per_shard) if job.deterministic else None,
            latents_std=job.latents_std,
            float_pictures=job.float_pictures,
            size=job.size,
            attempts=job.attempts,
            plan=plan,
            scheduler_of=_Schedulers(own, about["build"]),
            require_fragment=SameFragments(job, plan, build),
            open_output=partial(_output, job, plan),
            open_prompt_cache=partial(storage.at, job.prompt_cache) if job.prompt_cache else None,
            **about,
        )
    )
    return stage


def as_planned(job: Job, plan: Plan, kind: str, run: str = "") -> Any:
    """One of the job's plugins, built and this node set up for it, if it is the plan's; else raises WrongWorker."""
    compared = compare(job, plan, kind)
    try:
        raise WrongWorker(f"{this_node()} {next(compared)}")
    except StopIteration as same:
        if run:
            set_up_once(run, kind, same.value)
        return same.value


def compare(job: Job, plan: Plan, kind: str, without_weights: bool = False) -> Generator[str, None, Plugin | None]:
    """In what one of the job's plugins is not the plan's here, a line each; at the end the plugin, if it can be built.

    ``without_weights``: what a URL stands for is fetched only as far as building it needs, as in the driver.
    """
    planned = plan.plugins[kind]
    what = kind if kind == f"stage {planned['name']}" else f"{kind} {planned['name']}"
    same = "Install the same version on every node"
    try:
        here = identity(job, kind)
    except PluginError as error:
        yield f"lacks {what}, which the plan has of {planned['distribution']} {planned['version']}: {error}. {same}"
        return None
    for key in ("distribution", "version"):
        if here[key] != planned[key]:
            yield (
                f"has {what} of {here['distribution']} {here['version']}, "
                f"and the plan of {planned['distribution']} {planned['version']}. {same}"
            )
            break
    try:
        plugin: Plugin = plugin_of(job, kind, Pins(job.config, planned=plan.models, without_weights=without_weights))
    except PluginError as error:
        if isinstance(error.__cause__, OSError):  # the storage's, and may be gone at the next attempt
            raise
        yield f"can't build what the driver could: {error}"
        return None
    yield from other_libraries(plan, plugin.libraries)
    if isinstance(plugin, Source) and plan.fragments:
        plugin.expect(plan.fragments[0])
    if (found := plugin.fingerprint()) != planned["fingerprint"]:
        yield (
            f"has other weights or files for {what}: its fingerprint is {found or 'empty'} there, and "
            f"{planned['fingerprint'] or 'empty'} in the plan. Put the same files on every node"
        )
    return plugin


def other_libraries(plan: Plan, names: Sequence[str]) -> Iterator[str]:
    """Which of these distributions are of another version here than the plan says, a line each."""
    for name, here in versions(names).items():
        if here != plan.libraries.get(name, here):
            yield f"has {name} {here}, and the driver {plan.libraries[name]}. Install the same version on every node"


def store_environment() -> dict[str, str]:
    """The environment variables of the driver that say where an object store is and who may enter.

    They go to the workers as an argument, not in Ray's runtime environment, which everybody who may look at the cluster can read.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(STORE_VARIABLES)}


def enter(folder: str, environment: Mapping[str, str]) -> None:
    """Be in the driver's folder, if it is here, with the driver's variables: what the node says for itself holds."""
    for key, value in environment.items():
        os.environ.setdefault(key, value)
    if os.path.isdir(folder):  # on a cluster that others started, workers begin elsewhere than the driver
        os.chdir(folder)


def this_node() -> str:
    """Names the machine that this process runs on."""
    ray = sys.modules.get("ray")
    address = f" ({ray.util.get_node_ip_address()})" if ray and ray.is_initialized() else ""
    return f"node {socket.gethostname()}{address}"


class _Schedulers:
    """Schedulers by the names that rows give: the stage's with the job's settings, any other with its defaults."""

    def __init__(self, own: str, build: Callable[[str], Any]) -> None:
        self.own, self.build = own, build
        self.built: dict[str, Scheduler] = {}
        self.noted: set[str] = set()

    def __call__(self, name: str) -> Scheduler:
        if name == self.own:
            own: Scheduler = self.build("scheduler")
            return own
        if name not in self.built:
            if name not in self.noted and len(self.noted) < MANY:
                self.noted.add(name)  # the plan doesn't know of it, and it must be the same on all nodes
                weights.note(f"scheduler {name}", name, of_row(name))
            try:
                self.built[name] = registry.build("scheduler", {"name": name})
            except PluginError as error:
                raise RowError(str(error)) from error
        return self.built[name]


class SameFragments:
    """Raises WrongWorker if a fragment of the source is not what was planned when it is first read, or is no more later.

    One that has only got longer since it was first read still holds what was planned.
    """

    def __init__(self, job: Job, plan: Plan, build: Callable[[str], Any]) -> None:
        self.name, self.build = job.source["name"], build
        self.planned = {fragment.name: fragment for fragment in plan.fragments}
        self.stamps: dict[str, str] = {}
        """By fragment, as it was when it was last looked at."""

    def __call__(self, name: str) -> None:
        source, planned = self.build("source"), self.planned[name]
        now, before = source.stamp(planned), self.stamps.get(name)
        if before == now:
            return
        other = self.other(name)
        if other and (before is None or not source.still(planned, [(name, 0, planned.rows)])):
            raise WrongWorker(f"{this_node()} {other}")
        self.stamps[name] = now

    def other(self, name: str) -> str:
        """What is wrong with a fragment here, in a line; "" if nothing is."""
        if not self.build("source").changed(self.planned[name]):
            return ""
        return (
            f"has another {name} for source {self.name} than was planned: "
            "a source must be the same on every node, and stay so until the job is done"
        )


def _output(job: Job, plan: Plan) -> Storage:
    store = storage.at(job.output, job.single_writer)
    if not store.exists("plan.json") or read_plan(store)["hash"] != plan.first_hash:
        raise RuntimeError(
            f"{this_node()} doesn't see the plan.json that the driver wrote in {job.output}: "
            "the output must be one folder or store for all nodes, by its whole path"
        )
    return store

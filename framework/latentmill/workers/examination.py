"""What a node says of itself before a job begins, by the code that its workers would run: no model is loaded, and nothing stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch

from latentmill import storage
from latentmill.config import Job
from latentmill.errors import LatentmillError, WrongWorker
from latentmill.libraries import LIBRARIES
from latentmill.models import lacking
from latentmill.plan import Plan
from latentmill.plugin import Reason
from latentmill.text import in_units, one_line
from latentmill.workers.context import SameFragments, as_planned, compare, make_stage, other_libraries

GiB = 1 << 30
LITTLE_DISK = GiB
"""Free bytes below which a disk is as good as full: a shard is written aside before it is published."""
FULL_DISK = 0.95
"""Share of the disk of its temporary files from which on Ray spills nothing."""
LITTLE_SHARED_MEMORY = GiB
"""Bytes of /dev/shm that a Ray of our own would find too few; Docker gives 64 MiB unless told otherwise."""
FRAGMENTS = 64
"""Of a source's fragments, as many are compared, evenly over all."""
CREDENTIAL_FILES = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
"""Variables of stores that name a file."""


class Remark(NamedTuple):
    """What is to be said of a node."""

    what: str
    """What was looked at: a line of the table."""
    said: str
    """With the node before it a sentence: what is wrong, and what to do."""
    wrong: bool = True
    """False: it harms nobody, and is good to know."""


class Amounts(NamedTuple):
    """What a node has."""

    gpus: int | None
    """GPUs that a worker could see; None if nobody wants one."""
    disks: Mapping[str, int]
    """Free bytes, by folder."""
    shared_memory: int | None
    """Bytes of /dev/shm; None if nothing needs it."""


@dataclass(frozen=True)
class Claims:
    """What a node is thought to have."""

    gpus: float
    object_store: float | None
    """Bytes of Ray's object store there; None if Ray isn't started yet, 0 if it isn't wanted."""


def packages(job: Job, plan: Plan, kinds: Sequence[str]) -> list[Remark]:
    """In what libraries, plugins and weights are not the plan's; ``kinds``: the plugins that are wanted here. Of models that lie elsewhere
    small files are fetched, without which a plugin can't be built.
    """
    libraries = list(other_libraries(plan, LIBRARIES))
    remarks = [Remark("libraries", line) for line in libraries]
    others = {*other_libraries(plan, list(plan.libraries))}
    for kind in kinds:
        try:
            for line in compare(job, plan, kind, without_weights=True):
                if line not in libraries:
                    remarks.append(Remark("libraries" if line in others else "plugins", line))
                    libraries += [line] * (line in others)
        except Exception as error:
            remarks.append(Remark("plugins", f"can't look at {kind} {plan.plugins[kind]['name']}: {said(error)}"))
    return remarks + models(plan)


def models(plan: Plan) -> list[Remark]:
    """Which models this node would fetch, and whether there is room for them. Asks no store."""
    remarks = []
    for model in lacking(plan.models):
        if model.bytes > model.free:
            what = f"lacks {in_units(model.bytes)} of {model.url}, and has {in_units(model.free)} free in {model.into}. Make room"
            remarks.append(Remark("models", what))
        elif model.bytes:
            remarks.append(
                Remark("models", f"will fetch {in_units(model.bytes)} of {model.url} into {model.into}", wrong=False)
            )
    return remarks


def machine(environment: Mapping[str, str], output: str, claims: Claims) -> tuple[Amounts, list[Remark]]:
    """GPUs, disks, shared memory, and whose credentials a worker has; ``environment``: the driver's."""
    remarks = [
        Remark("credentials", f"has {name} of its own, another than the driver's, and its own holds there", wrong=False)
        for name, value in environment.items()
        if os.environ.get(name, value) != value
    ]
    remarks += [
        Remark("credentials", f"has no file at {path}, which {name} names. Put it there, or set the variable there")
        for name in CREDENTIAL_FILES
        if (path := os.environ.get(name)) and not Path(path).exists()
    ]
    gpus = _visible_gpus() if claims.gpus else None
    if gpus is not None and gpus < claims.gpus:
        remarks.append(
            Remark(
                "GPUs",
                f"claims {claims.gpus:g}, and torch sees {gpus}: see to the driver, to CUDA_VISIBLE_DEVICES where Ray was "
                "started, and that torch was built for CUDA",
            )
        )
    disks = {}
    for place in dict.fromkeys([*([output] if "://" not in output else []), tempfile.gettempdir()]):
        usage = shutil.disk_usage(_nearest(place))
        disks[place] = usage.free
        if usage.free < LITTLE_DISK:
            remarks.append(Remark("disks", f"has {size(usage.free)} free for {place}. Make room"))
        elif claims.object_store and place == tempfile.gettempdir() and usage.used > FULL_DISK * usage.total:
            remarks.append(
                Remark("disks", f"has {usage.used / usage.total:.0%} of {place} in use: Ray spills nothing there")
            )
    shared = shutil.disk_usage("/dev/shm").total if claims.object_store != 0 and os.path.isdir("/dev/shm") else None
    wanted = LITTLE_SHARED_MEMORY if claims.object_store is None else claims.object_store
    if shared is not None and shared < wanted:
        remarks.append(
            Remark(
                "shared memory",
                f"has {size(shared)} of /dev/shm, and Ray's object store wants {size(wanted)}: it would lie on a disk, many "
                "times slower. docker run --shm-size, or in Kubernetes an emptyDir with medium: Memory at /dev/shm",
            )
        )
    return Amounts(gpus, disks, shared), remarks


def source(job: Job, plan: Plan) -> list[Remark]:
    """Whether the source is here what was planned, and can be read: its first row is."""
    same = SameFragments(job, plan, cache(partial(as_planned, job, plan)))
    step = max(1, len(plan.fragments) // FRAGMENTS)
    bad: list[Reason] = []
    try:
        if others := list(filter(None, (same.other(fragment.name) for fragment in plan.fragments[::step]))):
            return [Remark("source", others[0])]
        read = make_stage(job, plan, job.flow[0])
        read.load(torch.device("cpu"))
        list(read(pa.table({"row": pa.array([0], pa.int64())}), lambda i, reason: bad.append(reason)))
    except WrongWorker:  # of a plugin that is not the plan's, and is told of among those
        return []
    except Exception as error:
        return [Remark("source", f"can't read the first row: {said(error)}")]
    return [Remark("source", f"reads the first row as an error: {one_line(reason)}", wrong=False) for reason in bad]


class Created(NamedTuple):
    """What became of a name that all nodes create."""

    sees: bool
    """Whether the driver's file is here."""
    won: bool = False
    there: bytes = b""


def output(job: Job, seen: str, contested: str, mark: bytes) -> Created:
    """Look for the driver's file ``seen``, and if it is here create ``contested``, as all others do. Raises OSError."""
    store = storage.at(job.output, job.single_writer)
    if not store.exists(seen):
        return Created(False)
    if job.single_writer:  # there it needs to be no more than written
        name = f"{contested}-{mark.hex()}"
        try:
            return Created(True, store.create(name, mark), store.read(name))
        finally:
            store.delete(name)
    return Created(True, store.create(contested, mark), store.read(contested))


def _visible_gpus() -> int:
    """In a process that sees what Ray was started with: a task that asks for no GPU sees none."""
    started = _raylet()
    environment = dict(os.environ)
    if started is not None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        environment |= {name: value for name, value in started.items() if name == "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    return int(answer.stdout.split()[-1]) if answer.returncode == 0 and answer.stdout.split() else 0


def _raylet() -> dict[str, str] | None:
    """The variables of the process that started this one, if that is Ray's: what a node's workers begin with, before Ray changes some."""
    process = Path("/proc", os.environ.get("RAY_RAYLET_PID") or str(os.getppid()))
    try:
        if (process / "comm").read_text().strip() != "raylet":
            return None
        lines = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _nearest(place: str) -> Path:
    """The folder, or the nearest above it that is there."""
    path = Path(os.path.abspath(place))
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def size(size: float) -> str:
    """Bytes in words."""
    return f"{size / GiB:.1f} GiB" if size >= GiB else f"{size / (1 << 20):.0f} MiB"


def said(error: Exception) -> str:
    """What was raised, in a line."""
    line = one_line(error, 400)
    return line if isinstance(error, (LatentmillError, OSError)) else f"{type(error).__name__}: {line}"

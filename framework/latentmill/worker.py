"""What a worker does with a dispatch, wherever it runs: gather its pieces, call its stage, account for every row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import pyarrow as pa
import torch

from latentmill import registry, rows
from latentmill.decode import Decode
from latentmill.denoise import Denoise
from latentmill.encode import Encode
from latentmill.job import Job
from latentmill.plan import Plan, parts, stage_choice
from latentmill.plugin import Stage
from latentmill.read import Read
from latentmill.write import Write

Block: TypeAlias = list[pa.Table]
Cut: TypeAlias = tuple[int, int, int, int]
"""A piece as a worker sees it: which of the blocks given, which part of it, from which row to which."""


@dataclass(frozen=True)
class StageWork:
    """What a pool needs to start one of a stage's workers. The resources are Ray's, in Ray's words."""

    name: str
    make: Callable[[], Stage]
    replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    threads: int | None = None
    """torch's threads in a worker; None leaves torch's own choice."""


@dataclass(frozen=True)
class Outcome:
    """What the driver learns of a block without seeing it."""

    parts: list[tuple[str, tuple[int, ...]]]
    rejected: list[tuple[int, str]]


class Worker:
    """A stage, built and loaded, and the few verbs that a pool calls.

    Two calls may come at once: one batch is unpacked or packed while another is computed, one at a time.
    """

    def __init__(self, make: Callable[[], Stage], gpu: bool, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = threads
        self.turn = threading.Lock()
        self.stage = make()
        self.stage.load(torch.device("cuda" if gpu else "cpu"))

    def read(self, numbers: Sequence[int]) -> tuple[Outcome, Block]:
        """Read rows by number."""
        return self._call(pa.table({"row": pa.array(numbers, pa.int64())}))

    def batch(self, cuts: Sequence[Cut], *blocks: Block) -> tuple[Outcome, Block]:
        """Work on one batch."""
        return self._call(rows.concat(_gather(cuts, blocks)))

    def commit(self, shard: int, errors: list[dict[str, Any]], cuts: Sequence[Cut], *blocks: Block) -> bool:
        """Publish a shard; False if another driver had."""
        return cast(Write, self.stage).commit(shard, _gather(cuts, blocks), errors)

    def _call(self, batch: pa.Table) -> tuple[Outcome, Block]:
        numbers = batch.column("row").to_pylist()
        rejected: dict[int, str] = {}

        def reject(i: int, reason: str) -> None:
            rejected.setdefault(numbers[i], reason)

        with self.turn:
            if self.threads is not None and torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)  # each thread has its own, and stages in one process share one
            result = self.stage(batch, reject)
            block = [result] if isinstance(result, pa.Table) else list(result)
        outcome = [(rows.shape_key(table), tuple(table.column("row").to_pylist())) for table in block]
        self._account(numbers, outcome, rejected)
        return Outcome(outcome, list(rejected.items())), block

    def _account(self, given: list[int], outcome: list[tuple[str, tuple[int, ...]]], rejected: dict[int, str]) -> None:
        returned = [number for _, part in outcome for number in part]
        if sorted([*returned, *rejected]) != sorted(given):
            name = type(self.stage).__name__
            raise RuntimeError(
                f"{name} was given {len(given)} rows, returned {len(returned)} and rejected {len(rejected)}: "
                "each row must come back once or be rejected"
            )


def _gather(cuts: Sequence[Cut], blocks: Sequence[Block]) -> list[pa.Table]:
    out = []
    for block, part, start, stop in cuts:
        table = blocks[block][part]
        out.append(table if (start, stop) == (0, len(table)) else table.slice(start, stop - start))
    return out


def make_stage(job: Job, plan: Plan, name: str) -> Stage:
    """Build a stage by its name in the job's flow. Loads nothing onto a device."""
    if name not in MAKERS:
        stage: Stage = registry.build("stage", stage_choice(job, name))
        return stage
    fixed = rows.FixedShape(job.stages[name].batch_size, job.rows_per_shard) if job.deterministic else None
    return MAKERS[name](job, plan, fixed)


def _read(job: Job, plan: Plan, fixed: rows.FixedShape | None) -> Stage:
    built = parts(job)
    scheduler = job.scheduler["name"] if job.scheduler else ""
    return Read(built.source, plan, job.sampling, scheduler, plan.spec.downscale if plan.spec else 1)


def _encode(job: Job, plan: Plan, fixed: rows.FixedShape | None) -> Stage:
    built = parts(job)
    assert built.vae is not None
    keep_image = "decode" in job.flow and "denoise" not in job.flow
    return Encode(built.vae, built.text_encoder, fixed, keep_image)


def _denoise(job: Job, plan: Plan, fixed: rows.FixedShape | None) -> Stage:
    built = parts(job)
    assert built.denoiser is not None and job.scheduler is not None
    return Denoise(
        built.denoiser, built.scheduler, job.scheduler.get("grid", "trailing"), fixed, job.sampling.first_noise
    )


def _decode(job: Job, plan: Plan, fixed: rows.FixedShape | None) -> Stage:
    built = parts(job)
    assert built.vae is not None
    return Decode(built.vae, fixed)


def _write(job: Job, plan: Plan, fixed: rows.FixedShape | None) -> Stage:
    metadata = {"latentmill.plan": plan.hash}
    return Write(parts(job).sink, job.output, plan, metadata)


MAKERS: dict[str, Callable[[Job, Plan, rows.FixedShape | None], Stage]] = {
    "read": _read,
    "encode": _encode,
    "denoise": _denoise,
    "decode": _decode,
    "write": _write,
}

"""Our own way: rows through the driver and the inline pool, with the stages that a job has between its first and its last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from latentmill.batch import from_dicts
from latentmill.driver.apply import apply
from latentmill.driver.decide import decide
from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec, Started, WorkerType
from latentmill.driver.state import DriverState
from latentmill.plugin import CommittingStage, Declaration, FixedShape, Reject, Stage, StageContext
from latentmill.stages.decode import Decode
from latentmill.stages.denoise import Denoise
from latentmill.stages.encode import Encode
from latentmill.workers.inline import InlinePool
from latentmill.workers.pools import RUNNING_BATCHES
from latentmill.workers.worker import StageWork, WorkerSetup

DECODED = 8
"""Pictures that are decoded at a time: 32 of 1024x1024 pixels would take 50 GB."""
NAMES = ("read", "encode", "denoise", "decode", "write")


def rows(count: int, size: int, steps: int, guidance: float) -> list[dict[str, Any]]:
    """Rows that are alike but for prompt and seed."""
    return [
        {
            "row": n, "row_id": str(n), "prompt": f"a photograph of thing number {n}", "negative_prompt": None, "seed": n,
            "steps": steps, "guidance_scale": guidance, "strength": 1.0, "width": size, "height": size, "scheduler": "model",
        }
        for n in range(count)
    ]  # fmt: skip


class Read(Stage):
    """Rows by number."""

    contract = 2

    def __init__(self, given: Sequence[Mapping[str, Any]]) -> None:
        self.given = given

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        return from_dicts([self.given[number] for number in batch.column("row").to_pylist()])


class Write(CommittingStage):
    """Counts pictures, and keeps them where somebody wants them."""

    contract = 2

    def __init__(self) -> None:
        self.pictures = 0
        self.kept: list[pa.Table] | None = None

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        self.pictures += len(batch) if "image" in batch.column_names else 0
        if self.kept is not None:
            self.kept.append(batch)
        return batch.select(["row", "row_id"])

    def commit(self, shard: int, packed: Sequence[pa.Table], errors: Sequence[Mapping[str, Any]]) -> bool:
        if errors:
            raise RuntimeError(f"row {errors[0]['row']} failed in {errors[0]['stage']}: {errors[0]['reason']}")
        return True

    def probe(self) -> str:
        return ""


class Parts:
    """A model's parts as our plugins, each loaded once, however many stages are made of them."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = str(folder), dtype

    @cached_property
    def text_encoder(self) -> Any:
        from latentmill_diffusers.text_encoder import DiffusersTextEncoder

        return _once(DiffusersTextEncoder)(self.folder, dtype=self.dtype)

    @cached_property
    def denoiser(self) -> Any:
        from latentmill_diffusers.denoiser import DiffusersDenoiser

        return _once(DiffusersDenoiser)(self.folder, dtype=self.dtype)

    @cached_property
    def vae(self) -> Any:
        from latentmill_diffusers.vae import DiffusersVAE

        return _once(DiffusersVAE)(self.folder, dtype=self.dtype)

    @cached_property
    def scheduler(self) -> Any:
        from latentmill_diffusers.scheduler import ModelScheduler

        return ModelScheduler(self.folder)

    def stage(self, name: str, evaluations: int = 1000, fixed: FixedShape | None = None) -> Stage:
        """``encode``, ``denoise`` or ``decode``, prepared as a worker does it; ``evaluations`` are those of a call of the network."""
        more: dict[str, Any] = {
            "fixed": fixed,
            "batch_size": evaluations,
            "sampling": {"until": 0.0, "first_noise": "diffusers"},
            "choices": {"denoiser": {}, "scheduler": {"grid": "model"}},
            "scheduler_of": lambda name: self.scheduler,
        }
        if name == "encode":
            given = {"vae": self.vae, "text_encoder": self.text_encoder}
        elif name == "denoise":
            given = {"denoiser": self.denoiser, "scheduler": self.scheduler}
        else:
            given = {"vae": self.vae}
        after = [Denoise().declare(StageContext.of({"denoiser": self.denoiser}, **more))] if name == "encode" else []
        stage: Stage = {"encode": Encode, "denoise": Denoise, "decode": Decode}[name]()
        declared = Declaration(name, needs=tuple(given), adds=("latents",))
        stage.prepare(StageContext(declared, after=after, build=given.__getitem__, **more))
        return stage


def _once(cls: Any) -> Any:
    """The class, loading onto its device but once."""

    def load(self: Any, device: torch.device) -> None:
        if getattr(self, "_loaded_onto", None) != device:
            cls.load(self, device)
            self._loaded_onto = device

    return type(cls.__name__, (cls,), {"load": load, "__module__": cls.__module__, "contract": cls.contract})


class Mill:
    """A driver and its pool, which goes from one run to the next: ``fused``, or each stage in a process of its own."""

    def __init__(self, middle: Mapping[str, Callable[[], Stage]], gpu: bool, apart: bool = False) -> None:
        self.given: list[dict[str, Any]] = []
        self.write = Write()
        here = {"read": lambda: Read(self.given), **middle, "write": lambda: self.write}
        work = {name: StageWork(name, make, gpu=gpu and name in middle) for name, make in here.items()}
        hosted = [["read"], *([name] for name in middle), ["write"]] if apart else [["read"], [*middle], ["write"]]
        # What computes elsewhere has a thread here that waits for it.
        self.pool = InlinePool(
            [
                WorkerSetup(tuple(work[name] for name in names), computes=names[0] in middle and not apart)
                for names in hosted
            ]
        )
        self.names = [*here]
        self.types = tuple(WorkerType(tuple(self.names.index(name) for name in names)) for names in hosted)
        self.apart = apart

    def run(self, given: list[dict[str, Any]], batch: int, decoded: int = DECODED) -> float:
        """Seconds for all of these rows, in batches of so many."""
        sizes = {"decode": min(decoded, batch)}
        specs = [
            StageSpec(
                name,
                sizes.get(name, batch),
                running_batches=RUNNING_BATCHES if name == "denoise" and not self.apart else 1,
            )
            for name in self.names
        ]
        self.given[:] = given
        state = DriverState(tuple(specs), len(given), rows_per_shard=len(given), worker_types=self.types)
        if self.pool.workers:
            there(state)
        self.write.pictures = 0
        started = time.perf_counter()
        drive(state, self.pool, lambda: None)
        seconds = time.perf_counter() - started
        if self.write.pictures != len(given):
            raise RuntimeError(f"{self.write.pictures} of {len(given)} pictures came out")
        return seconds

    def close(self) -> None:
        self.pool.close()


def there(state: DriverState) -> None:
    """Tell a new driver that the workers of the one before are there."""
    decide(state)
    for worker_type, worker in list(state.starting):
        apply(state, Started(worker_type, worker))


def fused(parts: Parts, evaluations: int, gpu: bool) -> Mill:
    """One worker for the three stages, as ``cluster=inline`` has it."""
    return Mill({name: partial(parts.stage, name, evaluations) for name in NAMES[1:-1]}, gpu)


class Elsewhere(Stage):
    """A stage in a process of its own, as ``placement: split`` has it; batches go through a pipe, Ray not being there."""

    contract = 2
    shares_tensors = True  # type: ignore[misc]

    def __init__(self, name: str, make: Callable[[], Stage], device: torch.device) -> None:
        """Before this process has anything to do with the device."""
        context = get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, device), daemon=True)
        self.process.start()
        self.drops = ("image", "latents", "prompt:", "negative:", "from_noise") if name != "encode" else ()
        self.expands = name == "decode"

    def load(self, device: torch.device) -> None:
        self._answer()

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterable[pa.Table]:
        self.pipe.send(batch)
        block, rejected = self._answer()
        for i, reason in rejected.items():
            reject(i, reason)
        return block  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        self.process.kill()


def _serve(pipe: Any, make: Callable[[], Stage], device: torch.device) -> None:
    stage = None
    try:
        stage = make()
        stage.load(device)
        pipe.send(([], {}))
        while True:
            batch, rejected = pipe.recv(), dict[int, str]()
            found = stage(batch, rejected.__setitem__)
            pipe.send(([found] if isinstance(found, pa.Table) else list(found), rejected))
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))

"""Pictures a second: our fused worker, a plain loop over the model's pipeline, and the roofline.

*Ours* is the driver, the inline pool and the real stages (``mill``), with prompts read and pictures counted as a job does, but no
files. The *loop* calls the pipeline of diffusers, of the very same modules, on batches of as many prompts, and brings bytes to
the host as we do. Both are timed after a run of a single step in the same shape. *Compiled* is ``compile_repeated_blocks`` of
diffusers, which is ``torch.compile`` of what most of the time is spent in; it is the same network for both.

The *roofline* is what the device would need if it did nothing but the network's, the VAE's and the text encoders' matrix products
and convolutions, counted by ``torch.utils.flop_counter`` on one picture, at the rate of a large product measured in the same run.
*Idle* is 1 - busy / time: busy is the union of the kernels' times, out of a profiled run; time is that of the run without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from gpu_parts import models
from gpu_parts.correctness import ROUNDINGS
from gpu_parts.mill import DECODED, Elsewhere, Mill, Parts, Read, fused, rows
from gpu_parts.notes import Notes
from torch import Tensor

from latentmill.plugin import tensors

EFFICIENCY = 0.25
"""Of the roofline, what is counted on when it is asked whether there is time."""
COMPILING = 60.0
"""Seconds that compiling is reckoned with."""


class Case:
    """A model on a device, and what is asked of it."""

    def __init__(self, notes: Notes, device: torch.device, folder: Path, model: models.Model, toy: bool) -> None:
        self.notes, self.device, self.model, self.toy = notes, device, model, toy
        self.dtype, self.steps = ("float32", 2) if toy else ("bfloat16", 4)
        self.sizes, self.batches = ((32,), (1, 2)) if toy else ((512, 1024), (1, 8, 32))
        self.compiled_at = self.batches[1]
        self.path = folder / model.pipeline
        logical: torch.dtype = getattr(torch, self.dtype)
        if not (self.path / "model_index.json").is_file():
            models.build(model, self.path, not toy, logical, device)
        _free(device)
        self.rate = matmul_rate(device, logical, 256 if toy else 8192)
        notes.add("rate", model=model.name, dtype=self.dtype, flops=self.rate)

    def rows(self, count: int, size: int, steps: int | None = None) -> list[dict[str, Any]]:
        return rows(count, size, steps or self.steps, self.model.guidance)

    def seconds(self, counted: Mapping[str, float], batch: int) -> float:
        """Of a batch, by the roofline."""
        network = self.steps * self.model.evaluations * counted["network"]
        return batch * (network + counted["decode"] + counted["encode"]) / self.rate


def speed(notes: Notes, device: torch.device, folder: Path, model: models.Model, toy: bool) -> None:
    """All cells of a model, the compiled ones last, and what each stage holds in memory."""
    case = Case(notes, device, folder, model, toy)
    parts = Parts(case.path, case.dtype)
    for part in (parts.text_encoder, parts.denoiser, parts.vae):
        part.load(device)
    plain, counted = Plain(parts, case), {}
    with notes.attempt(f"{model.name}: our pictures and the pipeline's"):
        _same_pictures(case, parts, plain)
    for size in case.sizes:
        with notes.attempt(f"{model.name}: operations at {size}"):
            counted[size] = operations(parts, device, size)
            notes.add("operations", model=model.name, size=size, **counted[size])
    for size in counted:
        for batch in case.batches:
            with notes.attempt(f"{model.name} at {size}, batches of {batch}"):
                _cell(case, parts, plain, size, batch, counted[size], "eager")
    for batch in case.batches[1:]:
        with notes.attempt(f"{model.name}: memory at {case.sizes[-1]}, batches of {batch}"):
            _memory(case, parts, case.sizes[-1], batch)
    network = parts.denoiser._network.model
    with notes.attempt(f"{model.name}, compiled"):
        if toy:
            notes.add("left out", what=f"{model.name}, compiled", why="it takes longer than all else of a toy")
        elif notes.has(COMPILING, f"{model.name}, compiled"):
            if hasattr(torch._dynamo.config, "recompile_limit"):
                torch._dynamo.config.recompile_limit = 64
            network.compile_repeated_blocks()
            for size in counted:
                _cell(case, parts, plain, size, case.compiled_at, counted[size], "compiled")


def _cell(
    case: Case, parts: Parts, plain: Plain, size: int, batch: int, counted: Mapping[str, float], how: str
) -> None:
    bound = case.seconds(counted, batch)
    rounds = 2 if case.toy else max(2, min(8, math.ceil(1.0 / (bound / EFFICIENCY))))
    name = f"{case.model.name} at {size}, batches of {batch}, {how}"
    profiled = how == "eager" and batch <= (1 if case.toy else DECODED)
    if not case.notes.has((2 * (rounds + 1) + 2 * profiled) * bound / EFFICIENCY, name):
        return
    count, gpu = rounds * batch, case.device.type == "cuda"
    mill = fused(parts, case.model.evaluations * batch, gpu)
    line: dict[str, Any] = {"model": case.model.name, "size": size, "batch": batch, "how": how, "steps": case.steps}
    line["roofline"] = batch / bound
    ways: dict[str, Callable[[list[dict[str, Any]]], float]] = {
        "ours": lambda given: mill.run(given, batch),
        "loop": lambda given: plain.run(given, batch),
    }
    for way, run in ways.items():
        with case.notes.attempt(f"{name}: {way}"):
            run(case.rows(batch, size, steps=1))
            _reset(case.device)
            seconds = run(case.rows(count, size))
            line[way] = count / seconds
            line[f"{way}_peak"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
            if profiled:
                line[f"{way}_idle"] = 1 - busy(case.device, partial(run, case.rows(batch, size))) * rounds / seconds
    mill.close()
    case.notes.add("speed", **line)


class Plain:
    """What one writes without us: the pipeline, on one batch after another."""

    def __init__(self, parts: Parts, case: Case) -> None:
        import diffusers

        scheduler = parts.denoiser.scheduler
        given = {
            **parts.text_encoder._pipeline.components,
            parts.denoiser.family.network: parts.denoiser._network.model,
            "vae": parts.vae._model,
            "scheduler": type(scheduler).from_config(scheduler.config),
        }
        self.pipeline = getattr(diffusers, case.model.pipeline)(**given)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def pictures(self, given: Sequence[Mapping[str, Any]]) -> Tensor:
        """``[B, H, W, 3]``, bytes, on the host."""
        first = given[0]
        made: Tensor = self.pipeline(
            prompt=[row["prompt"] for row in given],
            num_inference_steps=first["steps"],
            guidance_scale=first["guidance_scale"],
            height=first["height"],
            width=first["width"],
            generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in given],
            output_type="pt",
        ).images
        return (made * 255).round().to(torch.uint8).movedim(1, -1).contiguous().cpu()

    def run(self, given: list[dict[str, Any]], batch: int) -> float:
        """Seconds for all of these rows. Of large batches the VAE decodes picture by picture, as it has to."""
        vae = self.pipeline.vae
        vae.enable_slicing() if batch > DECODED else vae.disable_slicing()
        started = time.perf_counter()
        for start in range(0, len(given), batch):
            self.pictures(given[start : start + batch])
        seconds = time.perf_counter() - started
        vae.disable_slicing()
        return seconds


def _same_pictures(case: Case, parts: Parts, plain: Plain) -> None:
    """The pipeline keeps its latents in the network's dtype, we keep ours in float32: as far apart as roundings of N steps are."""
    size, count = case.sizes[0], 2
    mill = fused(parts, count * case.model.evaluations, case.device.type == "cuda")
    mill.write.kept = kept = list[pa.Table]()
    given = case.rows(count, size)
    mill.run(given, count)
    mill.close()
    order = [number for table in kept for number in table.column("row").to_pylist()]
    ours = torch.cat([tensors.from_arrow(table, "image") for table in kept])[torch.tensor(order).argsort()]
    off = float((ours.float() - plain.pictures(given).float()).abs().mean())
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    bound = 0.5 + 128 * case.steps * ROUNDINGS[case.dtype] * eps
    case.notes.add(
        "correctness", what="our pictures and the pipeline's, mean difference of 255", model=case.model.name,
        dtype=case.dtype, found=off, bound=bound, ok=off <= bound,
    )  # fmt: skip


@torch.no_grad()
def operations(parts: Parts, device: torch.device, size: int) -> dict[str, float]:
    """Floating-point operations of one evaluation, one picture decoded and one prompt encoded."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(work: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    told = parts.text_encoder.encode(["a photograph"])
    if parts.denoiser.guidance_embedded:
        told["guidance_scale"] = torch.ones(1, device=device)
    x = torch.randn(1, *parts.vae.spec.shape(size, size), device=device)
    t = torch.tensor([0.5], dtype=torch.float64)
    return {
        "network": count(lambda: parts.denoiser.predict(x, t, told)),
        "decode": count(lambda: parts.vae.decode(x)),
        "encode": count(lambda: parts.text_encoder.encode(["another photograph"])),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a large matrix product, the median of several; of random numbers, zeros would be quicker."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / sorted(seconds[2:])[5]


def busy(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds in which the device did something, kernels that overlap counted once."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        work()
        _wait(device)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == kind)
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    total, end = 0.0, -math.inf
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


def _memory(case: Case, parts: Parts, size: int, batch: int) -> None:
    """What each stage takes above what is there already, all weights among it."""
    given, megabytes = case.rows(batch, size, steps=1), models.megabytes(case.path)
    table, gpu = Read(given)(pa.table({"row": range(batch)}), lambda i, reason: None), case.device.type == "cuda"
    for name in ("encode", "denoise", "decode"):
        if name == "decode":
            table = table.slice(0, DECODED)
        stage = parts.stage(name, case.model.evaluations * batch)
        stage.load(case.device)
        _reset(case.device)
        before = torch.cuda.memory_allocated() if gpu else 0
        found = stage(table, lambda i, reason: None)
        table = found if isinstance(found, pa.Table) else next(iter(found))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if gpu else None
        rows_here = min(batch, DECODED) if name == "decode" else batch
        case.notes.add(
            "memory", model=case.model.name, size=size, batch=rows_here, stage=name, weights=megabytes[name], working=peak
        )  # fmt: skip


def split(notes: Notes, device: torch.device, folder: Path, model: models.Model, toy: bool) -> None:
    """Each stage in a process of its own on the one device. Only they touch it: this process must not."""
    path, dtype = folder / model.pipeline, "float32" if toy else "bfloat16"
    steps, sizes, batch = (2, (32,), 2) if toy else (4, (512, 1024), 8)

    def make(name: str) -> Callable[[], Any]:
        return lambda: Parts(path, dtype).stage(name, model.evaluations * batch)

    away = {name: Elsewhere(name, make(name), device) for name in ("encode", "denoise", "decode")}
    try:
        mill = Mill(
            {name: (lambda stage=stage: stage) for name, stage in away.items()}, device.type == "cuda", apart=True
        )
        for size in sizes:
            if notes.has(1.0 if toy else 20.0, f"split at {size}"):
                mill.run(rows(batch, size, 1, model.guidance), batch)
                seconds = mill.run(rows(4 * batch, size, steps, model.guidance), batch)
                notes.add("split", model=model.name, size=size, batch=batch, split=4 * batch / seconds)
        mill.close()
    finally:
        for stage in away.values():
            stage.close()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _free(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Whether what is computed on the device is right: small models, with heads as wide as the real ones'.

*Against float64 on the CPU*: the encoders' conditioning, a whole denoise by our stage, pictures encoded and decoded, in float32
(without TF32), bfloat16 and float16. Errors are ``|found - wanted| / |wanted|``, Euclidean norms over all rows. ``eps`` is the
dtype's: to round a number errs by eps / 2 at most. A network rounds at each of its layers, and weights and inputs once more; as
these errors are as good as independent, 64 of them in a row are 8 x eps / 2: one evaluation is off by ``ROUNDINGS x eps``,
ROUNDINGS = 4. In float32 the sums themselves are float32, of up to some thousand products: there it is 64. Guidance by ``g``
makes ``hypot(g, g - 1)`` as much of two evaluations' errors, and those of N steps are independent again: the bound of a denoise
is ``sqrt(N) x hypot(g, g - 1) x ROUNDINGS x eps``. What is wrong (a row in another's place, a time in another unit) is off by 1
or so; and what is wrong by a ten-thousandth only, float32's line shows.

*Alone and in company*: a row by itself and among seven others, by the same stage on the device. Kernels may be others for other
batch sizes, so each of the two may be off by the bound, and they differ by twice that at most. In a deterministic job they are
equal to the bit: that is what it is for.

*Twice*: a whole deterministic job, read to write, run twice; all files of data are equal, byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from gpu_parts import models
from gpu_parts.mill import Parts, Read, rows
from gpu_parts.notes import Notes
from torch import Tensor

from latentmill.plugin import FixedShape, Stage, tensors

CPU = torch.device("cpu")
ROUNDINGS = {"float32": 64, "bfloat16": 4, "float16": 4}
GUIDANCE = 2.0


@dataclass(frozen=True)
class Extent:
    """How much is tried."""

    models: int = 3
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    own: str = "bfloat16"
    """The dtype in which we are compared with ourselves."""
    rows: int = 8
    steps: int = 6
    size: int = 64


TOY = Extent(models=1, dtypes=("float32", "bfloat16"), own="float32", rows=2, steps=2, size=32)
"""CPUs are slow in half precision."""


def correctness(notes: Notes, device: torch.device, folder: Path, extent: Extent = Extent()) -> None:
    """Everything of this module, model by model."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for model in [*models.MODELS.values()][: extent.models]:
        path = folder / model.pipeline
        with notes.attempt(f"correctness of {model.name}"):
            models.build(model, path, False, torch.float32, CPU)
            _against_float64(notes, model, path, device, extent)
        with notes.attempt(f"{model.name}, alone and in company"):
            _company(notes, model, path, device, extent)
    with notes.attempt("a deterministic job, twice"):
        _twice(notes, models.MODELS["SD 1.5"], folder, device, extent)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in float64."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def bound_of(model: models.Model, dtype: str, steps: int) -> float:
    """How far a denoise may be off; without steps, a single evaluation."""
    one = ROUNDINGS[dtype] * torch.finfo(getattr(torch, dtype)).eps
    guided = math.hypot(GUIDANCE, GUIDANCE - 1) if model.evaluations == 2 else 1.0
    return math.sqrt(steps) * guided * one if steps else one


def compared(notes: Notes, what: str, model: str, dtype: str, found: float, bound: float) -> None:
    notes.add(
        "correctness", what=what, model=model, dtype=dtype, found=found, bound=bound, ok=bool(found <= bound)
    )  # NaN is not


def _through(stage: Stage, table: pa.Table, device: torch.device) -> list[pa.Table]:
    """What a stage makes of a table, in order of its rows. Raises if one is rejected."""

    def refuse(i: int, reason: str) -> None:
        raise RuntimeError(f"row {i} was rejected: {reason}")

    stage.load(device)
    found: Any = stage(table, refuse)
    return [found] if isinstance(found, pa.Table) else list(found)


def _given(model: models.Model, extent: Extent) -> pa.Table:
    guidance = GUIDANCE if model.evaluations == 2 else 3.5
    given = rows(extent.rows, extent.size, extent.steps, guidance)
    return Read(given)(pa.table({"row": range(extent.rows)}), lambda i, reason: None)


def _denoised(parts: Parts, table: pa.Table, device: torch.device, fixed: FixedShape | None = None) -> Tensor:
    [found] = _through(parts.stage("denoise", fixed=fixed), table, device)
    order = torch.tensor(found.column("row").to_pylist()).argsort()
    return tensors.from_arrow(found, "latents")[order].clone()


def in_float64(parts: Parts) -> Parts:
    """The same, computing in float64 on the CPU."""
    for part in (parts.denoiser, parts.vae):
        part.load(CPU)
        part.logical = torch.float64
    parts.text_encoder.load(CPU)
    for name in parts.text_encoder.parts:
        getattr(parts.text_encoder._pipeline, name).double()
    parts.denoiser._network.model.double()
    parts.vae._model.double()
    return parts


@torch.inference_mode()
def _against_float64(notes: Notes, model: models.Model, path: Path, device: torch.device, extent: Extent) -> None:
    exact = in_float64(Parts(path, "float32"))
    [table] = _through(exact.stage("encode"), _given(model, extent), CPU)
    prompts = table.column("prompt").to_pylist()
    texts = exact.text_encoder.encode(prompts)
    latents = _denoised(exact, table, CPU)
    pictures = exact.vae.decode(latents)
    for dtype in extent.dtypes:
        with notes.attempt(f"{model.name} in {dtype}"):
            parts, bound = Parts(path, dtype), bound_of(model, dtype, 0)
            for part in (parts.text_encoder, parts.vae):
                part.load(device)
            encoded = parts.text_encoder.encode(prompts)
            off = math.hypot(*(error(encoded[name], wanted) for name, wanted in texts.items()))
            compared(notes, "prompts encoded", model.name, dtype, off, bound)
            off = error(_denoised(parts, table, device), latents)
            compared(
                notes, f"denoised in {extent.steps} steps", model.name, dtype, off, bound_of(model, dtype, extent.steps)
            )
            off = error(parts.vae.decode(latents.to(device)), pictures)
            compared(notes, "decoded", model.name, dtype, off, bound)
            if dtype == "float32":
                off = error(parts.vae.posterior(pictures.float().clamp(-1, 1).to(device))[0], _encoded(exact, pictures))
                compared(notes, "pictures encoded", model.name, dtype, off, bound)


def _encoded(parts: Parts, pictures: Tensor) -> Tensor:
    found: Tensor = parts.vae.posterior(pictures.float().clamp(-1, 1))[0]
    return found


@torch.inference_mode()
def _company(notes: Notes, model: models.Model, path: Path, device: torch.device, extent: Extent) -> None:
    dtype, count = extent.own, extent.rows
    parts, bound = Parts(path, dtype), 2 * bound_of(model, dtype, extent.steps)
    slots = FixedShape(batch_size=count, rows_per_shard=count)
    for what, fixed, most in (
        ("alone and in company", None, bound),
        ("alone and in company, deterministic", slots, 0.0),
    ):
        [table] = _through(parts.stage("encode", fixed=fixed), _given(model, extent), device)
        together = _denoised(parts, table, device, fixed)
        alone = torch.cat([_denoised(parts, table.slice(n, 1), device, fixed) for n in range(count)])
        apart = _pictures(parts, table, together, device, fixed, range(count, count + 1))
        single = _pictures(parts, table, together, device, fixed, range(1, count + 1))
        compared(notes, f"rows {what}", model.name, dtype, error(alone, together), most)
        if fixed is not None:
            compared(notes, f"pictures {what}", model.name, dtype, error(single, apart), most)


def _pictures(
    parts: Parts, table: pa.Table, latents: Tensor, device: torch.device, fixed: FixedShape | None, ends: Iterable[int]
) -> Tensor:
    """Decoded in pieces that end there: of one row each, or all at once."""
    from latentmill.batch import with_latents

    stays = [name for name in table.column_names if ":" not in name and name != "from_noise"]
    table = with_latents(table.select(stays), latents, parts.vae.spec)
    each = [(end - 1 if len([*ends]) > 1 else 0, end) for end in ends]
    stage = parts.stage("decode", fixed=fixed)
    found = [_through(stage, table.slice(start, end - start), device) for start, end in each]
    return torch.cat([tensors.from_arrow(part, "image") for [part] in found])


def _twice(notes: Notes, model: models.Model, folder: Path, device: torch.device, extent: Extent) -> None:
    import latentmill

    (folder / "prompts.txt").write_text("".join(f"a photograph of thing number {n}\n" for n in range(6)))
    settings = [
        "cluster=inline", "deterministic=true", "samples_per_row=1", "rows_per_shard=4", f"model.path={folder / model.pipeline}",
        f"model.dtype={extent.own}", f"sampling={{steps: {extent.steps}, width: {extent.size}, height: {extent.size}}}",
        f"source.path={folder / 'prompts.txt'}",
        f"stages={'gpu' if device.type == 'cuda' else 'cpu'}", "stages.denoise.batch_size=2",
    ]  # fmt: skip
    found = []
    for name in ("one", "two"):
        result = latentmill.run("sd15_txt2img", [*settings, f"output={folder / name}"])
        if result.ok != 6:
            raise RuntimeError(f"{result.ok} of 6 rows came out: {result.text}")
        found.append({file.name: file.read_bytes() for file in sorted((folder / name / "data").iterdir())})
    same = found[0] == found[1] and len(found[0]) == 2
    notes.add(
        "correctness", what="a deterministic job twice, files that differ", model=model.name, dtype=extent.own,
        found=float(sum(found[0][name] != found[1].get(name) for name in found[0])), bound=0.0, ok=same,
    )  # fmt: skip

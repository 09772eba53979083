"""Whether a GPU makes the right pictures with us, and how many a second.

    python benchmarks/gpu.py --output out/gpu

needs torch, the wheels of latentmill and latentmill-diffusers with what they need, a checkout for this file, and no network, no
Ray and no weights: those are random, at the real shapes of Stable Diffusion 1.5 and XL and of a FLUX.1-dev with fewer blocks.
Correctness first (``gpu_parts/correctness.py`` says against what, and with which bounds), then speed and memory
(``gpu_parts/speed.py`` says how). Each part runs in a process of its own: one that fails, hangs or dies is a line in the table,
and the next one begins. ``--minutes`` is the time for all; what there is no time for is left out, and named.

Writes ``gpu.md``, a table, and ``gpu.json``, all lines with the tracebacks of what failed. Its exit code is 1 if something was
wrong, and 0 if all that was done was right. ``--toy`` runs everything on the CPU with models of a few numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_parts.notes import Notes, read
from gpu_parts.table import markdown, verdict
from printed import commit

NEEDED = ("pyarrow", "hydra", "rich", "scipy", "latentmill")
DIFFUSERS = ("diffusers", "transformers", "latentmill_diffusers", "tokenizers")
SHARES = {"machine": 0.1, "split": 0.5, "correctness": 1.0}
"""Of the time that is left, against 2 for each model: what a part doesn't need the next ones have."""
GRACE = 30.0
"""Seconds after its time that a part may take to end by itself."""


def main() -> int:
    """Run all parts, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to see that this file works")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="a part by the begin of its name; several"
    )
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    options.output.mkdir(parents=True, exist_ok=True)
    lines = options.output / "lines.jsonl"
    lines.unlink(missing_ok=True)
    until = time.monotonic() + max(60 * options.minutes - GRACE, GRACE)
    with tempfile.TemporaryDirectory(dir=_room()) as folder:
        todo = _parts(Path(folder), options.toy)
        todo = [(name, work) for name, work in todo if not options.only or name.startswith(tuple(options.only))]
        gc.freeze()  # what was imported: parts collect what they leave, often
        for at, (name, work) in enumerate(todo):
            shares = [SHARES.get(name, 2.0) for name, _ in todo[at:]]
            _run(name, work, lines, until, shares[0] / sum(shares))
    found = read(lines)
    (options.output / "gpu.json").write_text(json.dumps(found, indent=1))
    (options.output / "gpu.md").write_text(markdown(found))
    print(markdown(found))
    return verdict(found)


def _parts(folder: Path, toy: bool) -> list[tuple[str, Callable[[Notes, torch.device], None]]]:
    """Each by its name, in the order of what matters most."""
    # Imported here once, for all processes to come; nothing of CUDA is touched.
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"nothing can be measured without {', '.join(missing)}")
    parts: list[tuple[str, Callable[[Notes, torch.device], None]]] = [("machine", _machine)]
    if missing := [name for name in DIFFUSERS if find_spec(name) is None]:
        why = f"{', '.join(missing)} can't be imported here"
        return [
            *parts,
            ("diffusers", lambda notes, device: notes.add("left out", what="all models of diffusers", why=why)),
        ]
    import diffusers
    import transformers
    from gpu_parts import correctness, models, speed

    wanted = list(models.MODELS.values())[: 1 if toy else None]
    _ = [getattr(diffusers, model.pipeline) for model in wanted], transformers.CLIPTextModel
    real = folder if toy else folder / "real"
    extent = correctness.TOY if toy else correctness.Extent()

    def correct(notes: Notes, device: torch.device) -> None:
        correctness.correctness(notes, device, folder, extent)

    def fast(model: models.Model, notes: Notes, device: torch.device) -> None:
        speed.speed(notes, device, real, model, toy)

    def apart(model: models.Model, notes: Notes, device: torch.device) -> None:
        speed.split(notes, device, real, model, toy)

    parts.append(("correctness", correct))
    for model in wanted:
        parts.append((model.name, partial(fast, model)))
        if model.name == "SD 1.5":  # whose folder is there now
            parts.append(("split", partial(apart, model)))
    return parts


def _machine(notes: Notes, device: torch.device) -> None:
    import platform
    from importlib.metadata import version

    there = device.type == "cuda"
    of = torch.cuda.get_device_properties(0) if there else None
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "pyarrow") if find_spec(name)}
    notes.add(
        "machine",
        device=of.name if of else f"{platform.machine()} CPU",
        memory=of.total_memory / 2**30 if of else None,
        cuda=torch.version.cuda if there else None,
        python=platform.python_version(),
        versions=versions,
        date=time.strftime("%Y-%m-%d"),
        commit=commit(),
    )


def _run(name: str, work: Callable[[Notes, torch.device], None], lines: Path, until: float, share: float) -> None:
    """A part, in a process of its own, for its share of the time that is left."""
    left = until - time.monotonic()
    notes = Notes(lines, name, time.monotonic() + share * left)
    if left <= 0:
        notes.add("left out", what=name, why="the time was spent")
        return
    # Forked before anything here has touched CUDA: the libraries are imported once for all. Some ask at import whether there is a
    # GPU: NVML says so without touching it.
    process = multiprocessing.get_context("fork").Process(target=_part, args=(name, work, notes))
    process.start()
    process.join(max(notes.left, 1.0) + GRACE)
    if process.is_alive():
        process.kill()
        process.join()
        notes.add(
            "failed", what=name, why=f"it was ended: it hung, or was not done after {2 * GRACE:.0f} s more than it had"
        )
    elif process.exitcode:
        notes.add("failed", what=name, why=f"its process ended with {process.exitcode}")


def _part(name: str, work: Callable[[Notes, torch.device], None], notes: Notes) -> None:
    with notes.attempt(name):
        # `split` leaves the device to its children: this asks no driver.
        work(notes, torch.device("cpu" if "--toy" in sys.argv else "cuda"))


def _room() -> str | None:
    """Memory, if it holds the models; else where temporary files go."""
    import shutil

    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 24 * 2**30 else None


if __name__ == "__main__":
    sys.exit(main())

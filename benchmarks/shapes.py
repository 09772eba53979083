"""What a whole job costs over its model alone: rows a second of txt2img with the shapes model, in steady state.

    python benchmarks/shapes.py

The bound is a bare loop over the same modules: encode 32 prompts, 20 steps of DPM++ 2M with guidance, decode; no file is read or
written, and nothing is kept. It is the best of several numbers of rows a batch and threads. A job also reads prompts, encodes
PNG files, and commits shards. Its rate is that of the last three quarters of the rows, by when their files were written, so that
no start is in it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from printed import begin, median, table

import latentmill

STEPS, GUIDANCE = 20, 4.0
ROWS = 960
JOBS = {
    "cluster=inline": ["cluster=inline"],
    "cluster=local": ["cluster=local"],
    "placement=split": ["cluster=local", "placement=split"],
}


@torch.inference_mode()
def bare(batch: int, threads: int, rows: int = 192) -> float:
    """Rows a second of the bare loop."""
    from latentmill import registry

    torch.set_num_threads(threads)
    text_encoder, denoiser, vae = (
        registry.build(kind, {"name": "shapes"}) for kind in ("text_encoder", "denoiser", "vae")
    )
    for part in (text_encoder, denoiser, vae):
        part.load(torch.device("cpu"))
    times = torch.linspace(1.0, 1 / STEPS, STEPS, dtype=torch.float64)
    alphas, sigmas = denoiser.noise_schedule.scale(times)

    def run(count: int) -> None:
        for start in range(0, count, batch):
            rows_here = min(batch, count - start)
            prompt = text_encoder.encode(["a red circle on a blue background"] * rows_here)
            negative = text_encoder.encode([""] * rows_here)
            conditioning = {name: torch.cat([value, negative[name]]) for name, value in prompt.items()}
            x = torch.randn(rows_here, *vae.spec.shape(64, 64))
            before = None
            for step in range(STEPS):
                alpha, sigma = alphas[step].float(), sigmas[step].float()
                v = denoiser.predict(torch.cat([x, x]), times[step].repeat(2 * rows_here), conditioning)
                guided = v[rows_here:] + GUIDANCE * (v[:rows_here] - v[rows_here:])
                clean, noise = alpha * x - sigma * guided, sigma * x + alpha * guided
                clean, before = (clean if before is None else 1.5 * clean - 0.5 * before), clean
                if step + 1 < STEPS:
                    x = alphas[step + 1].float() * clean + sigmas[step + 1].float() * noise
            vae.decode(clean)

    run(batch)
    started = time.perf_counter()
    run(rows)
    return rows / (time.perf_counter() - started)


def job(words: list[str], rows: int) -> float:
    """Rows a second of a job of so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "ring")
        lines = [f"a {colours[i % 4]} {shapes[i // 4 % 4]} on a white background" for i in range(rows // 4)]
        prompts.write_text("\n".join(lines) + "\n")
        shards = f"rows_per_shard={min(32, rows // 4)}"
        result = latentmill.run("txt2img", [*words, shards, f"source.path={prompts}", f"output={folder}/out"])
        written = sorted(path.stat().st_mtime for path in Path(folder, "out", "data").iterdir())
    assert result.ok == rows
    first = len(written) // 4
    return rows * (len(written) - first) / len(written) / (written[-1] - written[first - 1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS, help="of a job")
    parser.add_argument("--loop", type=int, default=192, metavar="ROWS", help="rows of the bare loop")
    parser.add_argument("--bare", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(bare(*options.bare, options.loop))
    elif options.job:
        print(job(JOBS[options.job], options.rows))
    else:
        compare(options.repeats, ["--rows", str(options.rows), "--loop", str(options.loop)])


def compare(repeats: int, told: list[str]) -> None:
    """Each measurement in a process of its own, in turns: a machine that becomes slower does so for all."""
    cores = os.cpu_count() or 1
    loops = [(batch, threads) for batch in (16, 32, 64) for threads in {1, cores}]
    begin(__doc__)
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        best = max(_in_process("--bare", str(batch), str(threads), *told) for batch, threads in loops)
        rates.setdefault("bare loop", []).append(best)
        for name in JOBS:
            rates.setdefault(name, []).append(_in_process("--job", name, *told))
    ratios = {
        name: median(mine / bound for mine, bound in zip(found, rates["bare loop"])) for name, found in rates.items()
    }
    rows = [(name, f"{median(found):.1f}", f"{ratios[name]:.2f}") for name, found in rates.items()]
    table(("", "rows a second", "of the bare loop"), rows)


def _in_process(*words: str) -> float:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()

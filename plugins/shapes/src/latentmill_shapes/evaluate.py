"""Measure the model on the held-out captions, with latentmill's own stages and schedulers.

    python -m latentmill_shapes.evaluate

prints one JSON object: how well the autoencoder returns drawn pictures, and how many of the generated ones show what
was asked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from latentmill import registry
from latentmill.batch import concat, from_dicts
from latentmill.plugin import Declaration, Reason, Scheduler, Stage, StageContext, tensors
from latentmill.stages.decode import Decode
from latentmill.stages.denoise import Denoise
from latentmill.stages.encode import Encode
from latentmill_shapes.draw import Pictures, Scene, draw, held_out_scenes
from latentmill_shapes.judge import compare, read
from latentmill_shapes.plugin import ShapesDenoiser, ShapesTextEncoder, ShapesVAE


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """`count` held-out scenes, drawn without repeating one while there are some left."""
    scenes = held_out_scenes()
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(math.ceil(count / len(scenes)))])
    return [scenes[i] for i in order[:count]]


@torch.inference_mode()
def reconstruct(pictures: Pictures, batch: int = 64) -> Pictures:
    """uint8 [N, 64, 64, 3] through the autoencoder and back."""
    vae = ShapesVAE()
    vae.load(torch.device("cpu"))
    out = []
    for part in torch.from_numpy(pictures).split(batch):
        latents = vae.encode(part.permute(0, 3, 1, 2).float() / 127.5 - 1)
        out.append(((vae.decode(latents).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(out).numpy()


def psnr(pictures: Pictures, references: Pictures) -> float:
    """The mean over pictures of 10 log10(255^2 / mean squared error), in dB."""
    error = (pictures.astype(np.float64) - references).reshape(len(pictures), -1)
    return float(np.mean(10 * np.log10(255**2 / np.mean(error**2, axis=1))))


def generate(
    prompts: Sequence[str],
    *,
    scheduler: str = "dpmpp_2m",
    grid: str = "trailing",
    steps: int = 20,
    guidance: float = 4.0,
    side: int = 64,
    seed: int = 0,
    batch: int = 50,
) -> Pictures:
    """One picture a prompt, uint8 [N, side, side, 3], through latentmill's encode, denoise and decode stages."""
    vae, cpu = ShapesVAE(), torch.device("cpu")

    def build(name: str) -> Scheduler:
        built: Scheduler = registry.build("scheduler", {"name": name})
        return built

    plugins = {"vae": vae, "text_encoder": ShapesTextEncoder(), "denoiser": ShapesDenoiser(), "scheduler": None}
    context = StageContext.of(
        plugins,
        batch_size=batch,
        after=[Declaration("denoise", needs=("denoiser",))],  # of encode
        sampling={"until": 0.0, "first_noise": "latentmill"},
        choices={"scheduler": {"name": scheduler, "grid": grid}},
        scheduler_of=build,
    )
    stages: list[Stage] = [Encode(), Denoise(), Decode()]
    for stage in stages:
        stage.prepare(context)
        stage.load(cpu)

    def reject(i: int, reason: Reason) -> None:
        raise ValueError(reason)

    pictures = []
    for start in range(0, len(prompts), batch):
        table = from_dicts(
            [
                {
                    "row": start + i,
                    "row_id": str(start + i),
                    "prompt": prompt,
                    "negative_prompt": "",
                    "seed": (seed << 32) + start + i,
                    "steps": steps,
                    "guidance_scale": guidance,
                    "strength": 1.0,
                    "scheduler": scheduler,
                    "width": side,
                    "height": side,
                }
                for i, prompt in enumerate(prompts[start : start + batch])
            ]
        )
        for stage in stages:
            result = stage(table, reject)
            table = result if isinstance(result, pa.Table) else concat(list(result))
        pictures.append(tensors.from_arrow(table, "image").numpy())
    return np.concatenate(pictures)


def accuracy(scenes: Sequence[Scene], pictures: Pictures) -> dict[str, float]:
    """Share of the pictures that have each attribute of their scene right, and `all` of them."""
    results = [compare(s, read(p)) for s, p in zip(scenes, pictures, strict=True)]
    return {name: float(np.mean([r[name] for r in results])) for name in results[0]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="held-out captions")
    parser.add_argument("--scheduler", default="dpmpp_2m")
    parser.add_argument("--grid", default="trailing")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a PNG of the first 48 pictures")
    args = parser.parse_args()
    scenes = held_out(args.count, args.seed)
    drawn = draw(scenes, args.seed)
    started = time.monotonic()
    pictures = generate(
        [s.caption for s in scenes],
        scheduler=args.scheduler,
        grid=args.grid,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
    )
    seconds = time.monotonic() - started
    report = {
        "held_out_captions": len(scenes),
        "psnr_db": round(psnr(reconstruct(drawn), drawn), 2),
        "judge_on_drawn_pictures": accuracy(scenes, drawn)["all"],
        "accuracy": {name: round(share, 4) for name, share in accuracy(scenes, pictures).items()},
        "sampling": {"scheduler": args.scheduler, "grid": args.grid, "steps": args.steps, "guidance": args.guidance},
        "seconds": round(seconds, 1),
    }
    json.dump(report, sys.stdout, indent=2)
    print()
    if args.save:
        drawn_first = np.zeros((4 * 12, 64, 64, 3), dtype=np.uint8)
        drawn_first[: len(pictures[:48])] = pictures[:48]
        sheet = drawn_first.reshape(4, 12, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(256, 768, 3)
        Image.fromarray(sheet).save(args.save)


if __name__ == "__main__":
    main()

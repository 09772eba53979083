"""Jobs of random flows, settings and rows, each made twice: one row at a time, and many at a time in other shards.

``python -m tests.random_jobs FIRST LAST`` makes those of so many seeds, and says which rows differ.
"""

import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from latentmill.cli import main

SCHEDULERS = """
    ddim ddpm deis dpm2 dpm2_ancestral dpmpp_2m dpmpp_2m_sde dpmpp_2m_sde_heun dpmpp_2s_ancestral dpmpp_3m_sde dpmpp_sde er_sde euler
    euler_ancestral gradient_estimation heun heunpp2 ipndm lcm lms pndm res_multistep sa_solver seeds_2 seeds_3 tcd trapezoid unipc
""".split()
GRIDS = "beta ddim_uniform exponential karras kl_optimal leading linear_quadratic linspace normal sgm_uniform simple".split()
PROMPTS = ["", "a red circle", "a blue square", "a green star", "a red ring above a blue star"]
UPSCALES = [
    "{name: latent_upscale, method: bislerp, scale: 1.5}, {name: denoise, as: refine}",
    "{name: latent_upscale, method: nearest-exact, scale: 2.0}, {name: denoise, as: refine}",
    "decode, {name: image_upscale, method: bicubic, scale: 1.5}, {name: encode, as: again}, {name: denoise, as: refine}",
]
SIZES = [
    "size={buckets: [[32, 32], [48, 32], [32, 48]], crop: random, flip: true}",
    "size={buckets: kohya, area: 2304, step: 16, crop: center}",
]
KINDS = ["prompts", "pictures", "masks", "two passes", "encode", "accept", "half-way"]
MADE = ["latents", "prompt", "seed", "steps", "scheduler", "width", "height"]
BATCHES = [1, 5]
"""Rows a batch, in the first run and in the second."""


Made: TypeAlias = tuple[dict[str, dict[str, object]], list[tuple[str, str]]]


class RandomJob:
    """What a job of a seed is: ``words`` of its command line."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.folder = random.Random(seed), folder
        self.kind = KINDS[seed % len(KINDS)]
        (folder / "pictures").mkdir()
        for number in range(4):
            self._picture(number)
        self.words = ["encode", f"source.path={folder / 'pictures'}"] if self.kind == "encode" else self._denoising()
        self.words += ["cluster=inline", "max_error_rate=1.0", f"samples_per_row={self.draw.choice([1, 2])}"]
        self.stages = ["read", "encode", "write"] + ["denoise"] * (self.kind != "encode")

    def _picture(self, number: int) -> None:
        size = self.draw.choices([32, 40, 48, 64], k=2)
        noise = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(noise).resize(size).save(self.folder / "pictures" / f"{number}.png")
        mask = np.random.default_rng(number).integers(0, 2, (3, 3), np.uint8) * 255
        Image.fromarray(mask).resize(size).save(self.folder / f"mask{number}.png")

    def _denoising(self) -> list[str]:
        rows = [self._row() for _ in range(self.draw.randint(4, 8))]
        (self.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = [
            "img2img" if self.kind in ("pictures", "masks") else "txt2img",
            f"source.path={self.folder / 'rows.jsonl'}",
        ]
        words += [f"sampling.steps={self.draw.randint(2, 4)}", f"scheduler={self.draw.choice(SCHEDULERS)}"]
        words += [f"sampling.first_noise={self.draw.choice(['latentmill', 'diffusers', 'comfy'])}"]
        if self.draw.random() < 0.5:
            words += [f"scheduler.grid={self.draw.choice(GRIDS)}"]
        if self.kind == "two passes":
            last = self.draw.choice(["write", "{name: decode, as: last}, write"])
            upscale = self.draw.choice(UPSCALES)
            words += [f"flow=[read, encode, denoise, {upscale}, {last}]"]
            words += [f"stages.refine.sampling={{steps: {self.draw.randint(1, 4)}, strength: 0.5}}"]
            floats = self.draw.choice(["true", "false"])
            words += [f"float_pictures={floats}"] * ("image_upscale" in upscale)
        if self.kind == "accept":
            least = self.draw.choice([0.3, 0.5])
            words += ["accept={attempts: 3}"]
            words += [f"flow=[read, encode, denoise, decode, {{name: mean_brightness, least: {least}}}, write]"]
        if self.kind == "half-way":
            words += ["flow=[read, encode, denoise, write]", f"sampling.until={self.draw.choice([0.3, 0.6, 0.9])}"]
        return words

    def _row(self) -> dict[str, object]:
        draw = self.draw
        may = {
            "steps": draw.randint(1, 5),
            "guidance_scale": draw.choice([0.0, 0.5, 1.0, 7.5]),
            "negative_prompt": draw.choice(["", "a ring"]),
            "seed": draw.choice([0, 2**64 - 1, -1, None]),
            "scheduler": draw.choice(SCHEDULERS),
            "guidance_from": draw.choice([0.7, 0.9]),
            "guidance_until": draw.choice([0.1, 0.3]),
            "guidance_rescale": 0.7,
        }
        row = {key: value for key, value in may.items() if draw.random() < 0.35}
        sizes = {"width": draw.choice([32, 48]), "height": draw.choice([32, 48])}
        if self.kind not in ("pictures", "masks"):
            return {"prompt": draw.choice(PROMPTS), **row, **sizes}
        number = draw.randrange(4)
        row |= {"image": f"pictures/{number}.png", "strength": draw.choice([0.0, 0.3, 0.6, 1.0])}
        if self.kind == "masks":
            row["mask"] = f"mask{number}.png"
        return {"prompt": draw.choice(PROMPTS), **row, **(sizes if draw.random() < 0.5 else {})}

    def run(self, batch: int, rows_per_shard: int, *more: str, name: str = "out") -> Made:
        """Its rows, and the reasons of those that failed or were filtered, by id."""
        output = self.folder / f"{name}-{batch}"
        sized = [f"stages.{stage}.batch_size={batch}" for stage in self.stages]
        code = main(["run", *self.words, *sized, f"rows_per_shard={rows_per_shard}", *more, f"output={output}"])
        assert code in (0, 1), self.words
        made = [row for path in sorted(output.glob("data/*")) for row in pq.read_table(path).to_pylist()]
        told = [json.loads(line) for path in output.glob("*/*.jsonl") for line in path.read_text().splitlines()]
        return {row["row_id"]: row for row in made}, sorted((row["row_id"], row["reason"]) for row in told)


def differ(one: object, other: object) -> bool:
    """Whether two values of a row are others by more than what float32 rounds, and pictures by more than a level."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differ(one[key], other[key]) for key in one)
    if isinstance(one, bytes) and isinstance(other, bytes) and one != other:
        first, second = (np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in (one, other))
        return first.shape != second.shape or bool(np.abs(first - second).max() > 1)
    if isinstance(one, list) and isinstance(other, list) and one and isinstance(one[0], dict):
        return len(one) != len(other) or any(map(differ, one, other))
    if one != other and isinstance(one, (list, float)) and isinstance(other, (list, float)):
        first, second = np.asarray(one, float), np.asarray(other, float)
        off = np.linalg.norm(first - second) if first.shape == second.shape else np.inf
        return bool(off > 2e-4 * max(1.0, float(np.linalg.norm(second))))
    return one != other


def differences(seed: int, folder: Path) -> list[str]:
    """What of a seed's job hangs on the company of its rows."""
    job = RandomJob(seed, folder)
    (alone, told_alone), (together, told) = job.run(BATCHES[0], 3), job.run(BATCHES[1], 100)
    if alone.keys() != together.keys() or told_alone != told:
        return [f"other rows: {alone.keys() ^ together.keys()}, {set(told_alone) ^ set(told)}"]
    found = [
        f"row {name}: {key}" for name, row in alone.items() for key in row if differ(row[key], together[name][key])
    ]
    if job.kind != "half-way":
        return found
    whole, _ = job.run(BATCHES[1], 3, "sampling.until=0", name="whole")
    stored = ["source=latents", f"source.path={folder / f'out-{BATCHES[0]}'}", "samples_per_row=1", "sampling.until=0"]
    ended, _ = job.run(BATCHES[0], 100, *stored, name="ended")
    if len(whole) != len(ended):
        return [*found, f"{len(whole)} rows in one job, {len(ended)} in two"]
    pairs = zip(whole.items(), ended.values())
    return found + [
        f"row {name} in two jobs: {key}" for (name, one), two in pairs for key in MADE if differ(one[key], two[key])
    ]


if __name__ == "__main__":
    for number in range(*map(int, sys.argv[1:3])):
        with tempfile.TemporaryDirectory() as place:
            print(number, differences(number, Path(place)), flush=True)

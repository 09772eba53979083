"""A job, and beside it the pipeline of diffusers called directly, with the same seeds."""

import inspect
import json

import diffusers
import numpy as np
import pyarrow.parquet as pq
import torch
from layouts import ordered

import latentmill

PROMPTS = [
    ("a red fox", None),
    (
        "two houses by the sea, at night, and a boat that is longer than both of them, but not as long as this sentence",
        "blurry",
    ),
    ("x", "y"),
]
SIZE = (16, 32)
"""Height and width."""
STEPS, GUIDANCE = 5, 4.0
"""Steps: as few as show all that a solver of order 4 does."""


def rows_of(job, output, *overrides):
    """The rows that a job makes of PROMPTS, or of whatever it reads."""
    result = latentmill.run(job, [f"output={output}", "cluster=inline", *overrides])
    assert (result.ok, result.failed) == (result.planned, 0), (output / "errors/00000.jsonl").read_text()
    return [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def denoised(tmp_path, folder, prompts=PROMPTS, *overrides, size=SIZE):
    rows = [{"prompt": p, "negative_prompt": n, "seed": i} for i, (p, n) in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows_of(
        "denoise",
        tmp_path / "latents",
        "model=diffusers",
        "scheduler=model",
        f"model.path={folder}",
        f"source.path={tmp_path / 'prompts.jsonl'}",
        "sampling.first_noise=diffusers",
        f"sampling.steps={STEPS}",
        f"sampling.guidance_scale={GUIDANCE}",
        f"sampling.height={size[0]}",
        f"sampling.width={size[1]}",
        *overrides,
    )


def theirs(folder, name, prompts, prepare=lambda pipeline: None, decode=True, size=SIZE):
    """What the pipeline makes of prompts, one after another: its last latents, as it has them, and pictures, if they are asked for."""
    pipeline = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True)
    prepare(pipeline)
    return made_by(pipeline, name, prompts, decode, size)


def made_by(pipeline, name, prompts, decode=True, size=SIZE):
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    last = {}
    told = {
        "num_inference_steps": STEPS,
        "true_cfg_scale" if name == "QwenImagePipeline" else "guidance_scale": GUIDANCE,
        "height": size[0],
        "width": size[1],
        "use_resolution_binning": False,
        "callback_on_step_end": lambda pipeline, i, t, found: last.update(found) or {},
        "callback": lambda i, t, latents: last.update(latents=latents),
    }
    if "callback_on_step_end" in known:
        del told["callback"]
    made = []
    for i, (prompt, negative) in enumerate(prompts):
        given = {key: value for key, value in told.items() if key in known}
        if negative is not None:
            given["negative_prompt"] = negative
        given["output_type"] = "pil" if decode else "latent"
        picture = pipeline(prompt=prompt, generator=torch.Generator().manual_seed(i), **given).images[0]
        made.append((last["latents"][0].clone(), np.asarray(picture).astype(int) if decode else None))
    return made


def difference(row, latents, name=""):
    """Of a row's latents from those of the pipeline of that name, relative to their length."""
    latents = ordered(name, latents[None], *row["shape"])
    return float((torch.tensor(np.reshape(row["latents"], row["shape"])) - latents).norm() / latents.norm())

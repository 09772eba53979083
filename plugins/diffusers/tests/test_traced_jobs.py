"""Jobs with the traced schedulers of diffusers: rows of several schedulers and steps, stopped half-way, against pipelines."""

import json

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tracing import error

import latentmill
from latentmill.errors import PlanError

pytestmark = pytest.mark.usefixtures("plain_convolutions")
NAMES = [
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "diffusers:HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]


def test_two_jobs_are_one_trajectory(tmp_path):
    """Rows of several schedulers and steps, denoised in one go, and stopped half-way and gone on with, to the bit."""
    pytest.importorskip("latentmill_shapes")
    lines = [
        {"prompt": "a red star", "scheduler": NAMES[n % 4], "steps": 4 + n // 2, "guidance_scale": [1.0, 4.0][n % 2]}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["cluster=inline", "deterministic=true", "stages.denoise.batch_size=4", "rows_per_shard=8"]
    begin = [*settings, f"source.path={tmp_path / 'rows.jsonl'}", "sampling.width=32", "sampling.height=32"]
    whole, half, clean = (tmp_path / name for name in ("whole", "half", "clean"))
    assert latentmill.run("denoise", [*begin, f"output={whole}"]).ok == 8
    assert latentmill.run("denoise", [*begin, "sampling.until=0.5", f"output={half}"]).ok == 8
    on = ["source=latents", f"source.path={half}", f"output={clean}"]
    assert latentmill.run("denoise", [*settings, *on]).ok == 8
    wanted, found = ({r["row_id"]: r["latents"] for r in latents_of(folder)} for folder in (whole, clean))
    for name, latents in wanted.items():
        assert np.array_equal(found[name], latents), name


def latents_of(folder):
    return [row for path in sorted(folder.glob("data/*")) for row in pq.read_table(path).to_pylist()]


IN_PIPELINES = {
    "DDIMScheduler": {"clip_sample": False},  # ours without being told, since latents have no range
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerDiscreteScheduler": {"timestep_spacing": "trailing"},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler": {"timestep_spacing": "linspace"},
}


@pytest.mark.parametrize("name", IN_PIPELINES)
def test_a_pipeline_with_that_scheduler_makes_the_same_latents(name, model, tmp_path):
    """Rows of several steps and guidance in one batch of ours, against the pipeline, one after another."""
    folder = model("StableDiffusionPipeline")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **IN_PIPELINES[name])
    lines = [{"prompt": "a fox", "seed": n, "steps": 5 + n, "guidance_scale": [4.0, 1.0][n % 2]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"scheduler.{key}={value}" for key, value in IN_PIPELINES[name].items()]
    result = latentmill.run(
        "denoise",
        [
            "model=diffusers",
            f"model.path={folder}",
            f"scheduler=diffusers:{name}",
            f"scheduler.path={folder}",
            *settings,
            "cluster=inline",
            f"source.path={tmp_path / 'rows.jsonl'}",
            "sampling.first_noise=diffusers",
            "sampling.width=32",
            "sampling.height=32",
            f"output={tmp_path / 'out'}",
        ],
    )
    assert result.ok == len(lines)
    for row, line in zip(latents_of(tmp_path / "out"), lines, strict=True):
        wanted = pipeline(
            line["prompt"],
            negative_prompt="",
            num_inference_steps=line["steps"],
            guidance_scale=line["guidance_scale"],
            generator=torch.Generator().manual_seed(line["seed"]),
            height=32,
            width=32,
            output_type="latent",
        ).images[0]
        found = torch.tensor(np.reshape(row["latents"], row["shape"]))
        assert error(found, wanted) <= 1e-4


def test_a_job_that_can_not_be_is_refused_before_it_starts(tmp_path):
    pytest.importorskip("latentmill_shapes")
    on = ["cluster=inline", f"output={tmp_path}"]
    with pytest.raises(PlanError, match="scheduler DDIMScheduler has a grid of its own: leave scheduler.grid out"):
        latentmill.run("txt2img", [*on, "scheduler=DDIMScheduler", "scheduler.grid=karras"])
    with pytest.raises(ValueError, match="another noise schedule than the denoiser: give scheduler.path"):
        latentmill.run("txt2img", [*on, "scheduler=diffusers:FlowMatchEulerDiscreteScheduler"])

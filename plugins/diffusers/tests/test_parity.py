"""Family by family: our job against the diffusers pipeline called directly, with the same seeds."""

import inspect
import io

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import latentmill
from latentmill_diffusers import tiny

PROMPTS = [("a red fox", ""), ("two houses by the sea, at night", "blurry"), ("x", "y")]
SIZE = (32, 64)
STEPS, GUIDANCE = 8, 4.0


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model, by its pipeline's name; built once."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in built:
            built[name] = tiny.build(name, root / name)
        return built[name]

    return folder


def ours(tmp_path, folder, flow, *overrides):
    """The rows of a job over PROMPTS."""
    rows = "\n".join(f'{{"prompt": "{p}", "negative_prompt": "{n}", "seed": {i}}}' for i, (p, n) in enumerate(PROMPTS))
    (tmp_path / "prompts.jsonl").write_text(rows)
    output = tmp_path / flow.replace(",", "-")
    result = latentmill.run(
        "txt2img",
        [
            "model=diffusers",
            "scheduler=model",
            f"model.path={folder}",
            "cluster=inline",
            f"flow=[{flow}]",
            f"output={output}",
            f"source.path={tmp_path / 'prompts.jsonl'}",
            "samples_per_row=1",
            "sampling.first_noise=diffusers",
            f"sampling.steps={STEPS}",
            f"sampling.guidance_scale={GUIDANCE}",
            f"sampling.height={SIZE[0]}",
            f"sampling.width={SIZE[1]}",
            *overrides,
        ],
    )
    assert (result.ok, result.failed) == (len(PROMPTS), 0), (output / "errors/00000.jsonl").read_text()
    return [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def theirs(folder, name, kind):
    """What the pipeline makes of PROMPTS, one after another: latents as a tensor, or pictures."""
    pipeline = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    more = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    made = []
    for i, (prompt, negative) in enumerate(PROMPTS):
        if "negative_prompt" in known and name != "FluxPipeline":
            more["negative_prompt"] = negative or ("" if name != "StableDiffusionXLPipeline" else None)
        made.append(
            pipeline(
                prompt,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=SIZE[0],
                width=SIZE[1],
                generator=torch.Generator().manual_seed(i),
                output_type=kind,
                **more,
            ).images[0]
        )
    return made


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_the_same_latents_and_pictures_as_the_pipeline(name, model, tmp_path):
    rows = ours(tmp_path, model(name), "read,encode,denoise,write")
    for row, wanted in zip(rows, theirs(model(name), name, "latent"), strict=True):
        found = torch.tensor(np.reshape(row["latents"], row["shape"]))
        if wanted.ndim == 2:  # a pipeline that packs its latents returns them so
            wanted = unpatched(wanted[None], found.shape[1] // 2, found.shape[2] // 2)[0]
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-4
    rows = ours(tmp_path, model(name), "read,encode,denoise,decode,write")
    for row, wanted in zip(rows, theirs(model(name), name, "pil"), strict=True):
        found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)
        assert (np.abs(found - np.asarray(wanted).astype(int)) <= 1).mean() >= 0.999

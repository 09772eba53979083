"""Workflows of several nodes by the command line, beside pictures that ComfyUI itself made of them (values/workflows.json)."""

import io
import json
from pathlib import Path

import comfy_tiny
import comfy_words
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentmill.cli import main

FILES = {
    "hires": ("checkpoints/sd15",),
    "pixels": ("checkpoints/sd15",),
    "refiner": ("checkpoints/sdxl",),
    "flux": ("unet/flux", "vae/ae", "clip/clip_l", "clip/t5xxl"),
}


@pytest.mark.parametrize("name", FILES)
def test_pictures_are_comfyui_s_within_a_level(name, comfy_models, comfyui, tmp_path):
    models, said = Path(comfy_models(*FILES[name])), comfyui("workflows")[name]
    comfy_words.build(models, "embeddings/two")
    for of in ("sd15", "flux"):
        comfy_tiny.build_lora(models, of)
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(said["workflow"]))
    given = [f"comfy.models={models}", f"output={tmp_path / 'out'}", "cluster=inline", "stages=cpu", "model.dtype=float32"]  # fmt: skip
    assert main(["run", str(workflow), *given]) == 0
    rows = [row for path in sorted(tmp_path.glob("out/data/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(said["pictures"])
    for row, picture in zip(rows, said["pictures"]):
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert list(pixels.shape) == picture["shape"]
        assert np.abs(pixels.flatten()[::61].astype(int) - picture["some"]).max() <= 1

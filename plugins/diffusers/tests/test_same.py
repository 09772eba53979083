"""A model is known by all that is in its files, and by nothing else: not by where they lie."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.cli import main

JOB = ["txt2img", "model=diffusers", "scheduler=model", "cluster=inline", "samples_per_row=1", "sampling.steps=2"]
JOB += ["sampling.width=32", "sampling.height=32"]


@pytest.fixture
def plan(capsys, tmp_path):
    """``plan(FOLDER, ...)``: what ``latentmill plan --json`` prints."""

    def plan(folder, *settings):
        capsys.readouterr()
        told = [*JOB, f"model.path={folder}", f"output={tmp_path / 'out'}", *settings]
        assert main(["plan", *told, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return plan


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model("StableDiffusionPipeline"), tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_byte_in_the_middle_of_a_large_file_is_another_plan(part, folder, plan):
    path = next((folder / part).glob("*.safetensors"))
    save_file({**load_file(path), "zzz": torch.zeros(1_500_000)}, path, {"format": "pt"})
    first = plan(folder)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 3_000_001)
        file.write(b"\1")
    assert plan(folder)["hash"] != first["hash"]


def test_the_pipeline_that_a_model_names_counts(folder, plan):
    first = plan(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    assert plan(folder)["hash"] != first["hash"]


def test_weights_in_halves_beside_those_that_are_read_don_t_count(folder, plan):
    first = plan(folder)
    shutil.copy(
        next((folder / "unet").glob("*.safetensors")), folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    assert plan(folder)["hash"] == first["hash"]


def test_a_model_that_was_moved_is_the_same(folder, plan, tmp_path):
    first = plan(folder)
    moved = plan(shutil.move(folder, tmp_path / "elsewhere"))
    assert moved["hash"] == first["hash"] and moved["config"]["model"]["path"] == str(tmp_path / "elsewhere")
    assert plan(tmp_path / "elsewhere", "denoiser.dtype=bfloat16")["hash"] != first["hash"]


def test_libraries_whose_versions_change_numbers_are_in_the_plan(folder, plan):
    assert {"diffusers", "transformers", "tokenizers", "torch", "latentmill"} <= plan(folder)["libraries"].keys()


def test_what_was_read_is_recorded_for_each_part(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat")
    told = [*JOB, f"model.path={folder}", f"output={tmp_path / 'out'}", f"source.path={tmp_path / 'p.txt'}"]
    assert main(["run", *told]) == 0, capsys.readouterr().err
    found = {
        path.stem: {name for name, _ in json.loads(path.read_text())["files"]}
        for path in (tmp_path / "out" / "weights").iterdir()
    }
    assert found["denoiser"] == {"config.json", "diffusion_pytorch_model.safetensors"} == found["vae"]
    assert found["text_encoder"] > {"model.safetensors", "tokenizer_config.json", "scheduler_config.json"}
    assert found.keys() == {"denoiser", "vae", "text_encoder"}
    assert str(tmp_path) not in (tmp_path / "out" / "weights" / "vae.json").read_text()

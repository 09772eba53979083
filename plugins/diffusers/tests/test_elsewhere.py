"""Models of diffusers that lie elsewhere: the rows, the plan and the files are those of the same model in a folder."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tests.outside.model_parts import REPOSITORY, ModelHub

import latentmill
from latentmill_diffusers.hub import weights_of

URL = f"hf://{REPOSITORY}"
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SMALL = [
    "cluster=inline",
    "stages=cpu",
    "samples_per_row=1",
    "model.dtype=float32",
    "max_error_rate=0",
    "sampling.steps=2",
]
SIZE = ["sampling.width=32", "sampling.height=32"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    for variable in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


@pytest.fixture
def hub(monkeypatch, here):
    server = ModelHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


def made(output, *told):
    result = latentmill.run("sd15_txt2img", [f"output={output}", *SMALL, *SIZE, *told])
    assert result.failed == 0 and result.ok
    plan = json.loads((output / "plan.json").read_text())
    return pq.read_table(output / "data").to_pylist(), plan["hash"], plan.get("models", {})


def test_a_model_of_the_hub_makes_the_rows_of_its_folder(model, hub, here, tmp_path):
    folder = Path(model("StableDiffusionPipeline"))
    save_file(
        {f"unet.{LAYER}.lora_A.weight": torch.ones(4, 16), f"unet.{LAYER}.lora_B.weight": torch.ones(16, 4)},
        tmp_path / "lora.safetensors",
    )
    copy = tmp_path / "copy"
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    (copy / "loras").mkdir()
    (copy / "loras" / "strong.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes())
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"halves")
    (copy / "whole.safetensors").write_bytes(b"all in one file")
    commit = hub.commit(copy)
    rows, hash, _ = made(
        tmp_path / "a", f"model.path={folder}", f"model.loras=[{{path:{tmp_path}/lora.safetensors,weight:0.5}}]"
    )
    lora = f"{{path:'{URL}/loras/strong.safetensors',revision:{commit},weight:0.5}}"
    remote = made(tmp_path / "b", f"model.path={URL}", f"model.loras=[{lora}]")
    assert remote[:2] == (rows, hash)
    assert set(remote[2]) == {f"{URL}@main", f"{URL}@{commit}/loras/strong.safetensors"}
    weights = [name for name in hub.sent_files("[.]safetensors|[.]bin")]
    assert weights == ["loras/strong.safetensors", *sorted(_weights(folder))]


def _weights(folder):
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors") if "safety" not in str(path)]


def test_a_pipeline_of_the_hub_makes_the_rows_of_its_folder(model, hub, tmp_path):
    folder = Path(model("StableDiffusionPipeline"))
    hub.commit(folder)
    told = ["model=pipeline", "sampling.steps=2", *SIZE, "cluster=inline", "samples_per_row=1", "stages=cpu"]
    found = []
    for name, path in (("a", folder), ("b", URL)):
        result = latentmill.run("txt2img", [*told, f"model.path={path}", f"output={tmp_path / name}"])
        assert result.failed == 0 and result.ok
        found.append(pq.read_table(tmp_path / name / "data").to_pylist())
    assert found[0] == found[1]


def test_a_part_reads_its_own_weights(model):
    names = [
        *("model_index.json", "README.md", "whole.safetensors", "unet/config.json", "unet/a.safetensors"),
        *("unet/a.fp16.safetensors", "unet/a.non_ema.safetensors", "vae/b.fp16.safetensors", "vae/b.bin"),
        *("text_encoder_2/c-00001-of-00002.safetensors", "tokenizer/merges.txt", "safety_checker/d.safetensors"),
    ]
    small = ["model_index.json", "unet/config.json", "tokenizer/merges.txt"]
    assert weights_of("unet").files(names) == [*small, "unet/a.safetensors"]
    assert weights_of("vae").files(names) == [*small, "vae/b.fp16.safetensors"]
    assert weights_of("text_encoder").files(names) == [*small, "text_encoder_2/c-00001-of-00002.safetensors"]
    assert weights_of().files(names) == small
    everything = ["unet/a.safetensors", "vae/b.fp16.safetensors", "text_encoder_2/c-00001-of-00002.safetensors"]
    assert weights_of("").files(names) == [*small, *everything]
    alone = ["config.json", "model.safetensors", "model.fp16.safetensors"]
    assert weights_of("vae").files(alone) == ["config.json", "model.safetensors"]

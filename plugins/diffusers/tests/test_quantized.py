"""Weights that are quantised while they are loaded, by settings of a job."""

import json
import math
import shutil
import sys

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import latentmill
from latentmill.config import load_job
from latentmill.errors import PlanError, PluginError
from latentmill.parts import parts
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.text_encoder import DiffusersTextEncoder

CPU = torch.device("cpu")
INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
KINDS = {
    "Int8Tensor": (INT8, 0.01),
    "Float8Tensor": ({**INT8, "quant_type": "Float8WeightOnlyConfig"}, 0.05),
}
"""By torchao's class of the weights: the settings, and how far predictions may be from those of plain weights."""


def error(found, expected):
    return float((found - expected).abs().mean() / expected.abs().mean())


def kept(model):
    """``(bytes that linear layers' weights take, in float32, class of each)``."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    packed = [weight.qdata.nbytes + weight.scale.nbytes for weight in weights if hasattr(weight, "qdata")]
    return sum(packed), 4 * sum(weight.numel() for weight in weights), {type(weight).__name__ for weight in weights}


@pytest.fixture
def predict(model):
    """The prediction of a denoiser for two rows, and its network."""

    def predicted(pipeline, *where, **settings):
        folder = str(model(pipeline))
        encoder = DiffusersTextEncoder(folder)
        encoder.load(CPU)
        denoiser = DiffusersDenoiser(*(where or [folder]), **settings)
        denoiser.load(CPU)
        x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0.9, 0.3], dtype=torch.float64)
        with torch.inference_mode():
            told = {**encoder.encode(["a red fox", "two houses"]), "guidance_scale": torch.full((2,), 3.5)}
            return denoiser.predict(x, t, told), denoiser._network.model

    return predicted


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_eight_bits_predicts_nearly_the_same(kind, pipeline, predict):
    settings, tolerance = KINDS[kind]
    expected, _ = predict(pipeline)
    found, network = predict(pipeline, quantization=settings)
    assert 1e-4 < error(found, expected) <= tolerance
    packed, plain, classes = kept(network)
    assert (
        classes == {kind} and packed < 0.45 * plain
    )  # a scale for each row of weights, of which the tiny ones have 8 to 160
    assert torch.equal(predict(pipeline, quantization=settings, offload=True)[0], found)
    some, network = predict(pipeline, quantization={**settings, "modules_to_not_convert": ["ff"]})
    assert kept(network)[2] == {kind, "Parameter"}
    assert 1e-4 < error(some, expected) <= tolerance


@pytest.mark.parametrize("cls", [DiffusersDenoiser, DiffusersTextEncoder])
def test_a_single_file_is_refused(cls, model, tmp_path):
    """diffusers would take its weights for quantised, and leave them plain."""
    file = tmp_path / "x.safetensors"
    save_file({"cond_stage_model.x": torch.zeros(1), "x": torch.zeros(1)}, file)
    with pytest.raises(ValueError) as caught:
        cls(str(file), None, str(model("StableDiffusionPipeline")), quantization=INT8)
    assert str(caught.value) == f"quantization is for the weights of a folder, and {file} is a single file"


@torch.inference_mode()
def test_text_encoders_in_eight_bits_encode_nearly_the_same(model):
    folder, encoded = str(model("FluxPipeline")), {}
    for settings in (None, INT8):
        encoder = DiffusersTextEncoder(folder, quantization=settings)
        encoder.load(CPU)
        encoded[settings is None] = encoder.encode(["a red fox", "two houses"])
    assert all(kept(getattr(encoder._pipeline, part))[2] == {"Int8Tensor"} for part in encoder.parts)
    for name, expected in encoded[True].items():
        assert 1e-4 < error(encoded[False][name], expected) <= 0.02


def test_a_job_says_so_in_its_settings(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a red fox", "width": 32, "height": 32, "steps": 2}))
    setting = "{quant_method: torchao, quant_type: Int8WeightOnlyConfig, modules_to_not_convert: [proj_out]}"
    latents = {}
    for name, told in {
        "plain": [],
        "int8": [f"{part}.quantization={setting}" for part in ("denoiser", "text_encoder")],
    }.items():
        job = ["model=diffusers", "scheduler=model", "cluster=inline", f"model.path={model('FluxPipeline')}"]
        output = tmp_path / name
        result = latentmill.run("denoise", [*job, *told, f"source.path={tmp_path}/rows.jsonl", f"output={output}"])
        assert (result.ok, result.failed) == (1, 0)
        latents[name] = torch.tensor(pq.read_table(output / "data").column("latents").to_pylist())
    assert 1e-4 < error(latents["int8"], latents["plain"]) <= 0.02


def test_a_lora_goes_into_a_quantised_network_and_into_no_quantised_text_encoder(predict, model, tmp_path):
    file, generator = tmp_path / "x.safetensors", torch.Generator().manual_seed(0)
    network, text = "transformer.transformer_blocks.0.ff.net.0.proj", "text_encoder.encoder.layers.0.self_attn.q_proj"
    state = {}
    for name, rows in ((network, 128), (text, 32)):
        for matrix, shape in (("lora_A", (4, 32)), ("lora_B", (rows, 4))):
            state[f"{name}.{matrix}.weight"] = torch.randn(shape, generator=generator)
    save_file(state, file)
    told = {"loras": [{"path": str(file)}]}
    without, (expected, _) = predict("FluxPipeline")[0], predict("FluxPipeline", **told)
    found, network = predict("FluxPipeline", quantization=INT8, **told)
    assert kept(network)[2] == {"Int8Tensor"}
    assert error(found, expected) <= 0.03 and error(without, expected) > 0.3
    with pytest.raises(
        ValueError, match=r"no LoRA can be added to text_encoder\.encoder\..*q_proj, which is quantised"
    ):
        DiffusersTextEncoder(str(model("FluxPipeline")), quantization=INT8, **told).load(CPU)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize("how", ["missing", "nan"])
def test_damaged_weights_are_noticed_when_they_are_quantised_too(how, part, model, tmp_path):
    folder = shutil.copytree(model("FluxPipeline"), tmp_path / "model")
    [file] = (folder / part).glob("*.safetensors")
    state = load_file(file)
    chosen = max(name for name, tensor in state.items() if tensor.ndim == 2 and "block" in name)
    if how == "missing":
        del state[chosen]
    else:
        state[chosen][0, 0] = math.nan
    save_file(state, file, {"format": "pt"})
    cls = DiffusersDenoiser if part == "transformer" else DiffusersTextEncoder
    said = {"missing": "it has no", "nan": f"{chosen} is not finite"}[how]
    with pytest.raises(ValueError, match=rf"{part} can't be loaded: {said}"):
        cls(str(folder), quantization=INT8).load(CPU)


def test_settings_that_are_wrong_are_one_line_before_anything_starts(model, monkeypatch):
    def refused(setting, part="denoiser"):
        told = ["model=diffusers", "scheduler=model", f"model.path={model('StableDiffusionPipeline')}"]
        with pytest.raises((PluginError, PlanError)) as caught:
            parts(load_job("txt2img", [*told, *(f"{part}.{each}" for each in setting)]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for part in ("denoiser", "text_encoder"):
        assert "quantization: " in refused(["quantization={quant_method: torchoa}"], part)
        said = refused(["quantization={quant_method: torchao, quant_type: int8}"], part)
        assert "torchao's quant_type must be one of " in said and said.endswith(", not 'int8'")
        wrong = "quantization={quant_method: torchao, quant_type: Int8WeightOnlyConfig, group: 3}"
        assert "unexpected keyword argument 'group'" in refused([wrong], part)
        for package, setting in {"torchao": "quant_method: torchao", "bitsandbytes": "load_in_4bit: true"}.items():
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, package, None)
                said = refused([f"quantization={{{setting}}}"], part)
                assert said.endswith(f"quantization by {package} needs the package {package}: pip install {package}")
    int8 = "quantization={quant_method: torchao, quant_type: Int8WeightOnlyConfig}"
    assert "storage and quantization exclude each other" in refused([int8, "storage=float8_e4m3fn"])


def test_a_network_of_which_nothing_could_be_quantised_is_refused(model):
    """Its layers are too small for groups of 128 weights, and torchao passes over them."""
    four = {"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig", "group_size": 128}
    with pytest.raises(ValueError, match=r"unet can't be loaded: quantization: no layer of it could be quantised"):
        DiffusersDenoiser(str(model("StableDiffusionPipeline")), quantization=four).load(CPU)

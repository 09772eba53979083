"""Single files in the names of those who trained the models: whole checkpoints, and networks alone."""

import io
import itertools
import math
import shutil
import sys

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.quantizers.gguf.utils import GGUFParameter
from original_names import WHOLE, flux, sd3, stable_diffusion_1, unet
from PIL import Image
from safetensors.torch import load_file, save_file

import latentmill
from latentmill.config import load_job
from latentmill.errors import PlanError, PluginError
from latentmill.parts import parts
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.text_encoder import DiffusersTextEncoder
from latentmill_diffusers.vae import DiffusersVAE

CPU = torch.device("cpu")


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' converter for FLUX, which knows one width alone, 3072, told of the tiny model's."""
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = convert.__code__
    narrower = code.replace(co_consts=tuple(32 if value == 3072 else value for value in code.co_consts))
    monkeypatch.setattr(convert, "__code__", narrower)


@pytest.fixture(params=WHOLE)
def whole(request, model, tmp_path):
    """A model's folder, its weights as a whole checkpoint, and a copy of the folder without any."""
    original, pipeline = WHOLE[request.param]
    folder = shutil.copytree(model(pipeline), tmp_path / "model")
    if request.param == "stable_diffusion_3":  # such files have no projection of the first encoder: it is none
        [file] = (folder / "text_encoder").glob("*.safetensors")
        save_file({**load_file(file), "text_projection.weight": torch.eye(16)}, file, {"format": "pt"})
    save_file(original(folder), tmp_path / "x.safetensors")
    configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder, tmp_path / "x.safetensors", configs


def loaded(*where):
    """The tensors of all parts of a model, each loaded by the plugin whose it is."""
    denoiser, vae, encoder = (cls(*map(str, where)) for cls in (DiffusersDenoiser, DiffusersVAE, DiffusersTextEncoder))
    for plugin in (denoiser, vae, encoder):
        plugin.load(CPU)
    parts = {name: part for name, part in encoder._pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert set(parts) == set(encoder.parts)  # and nothing else of the file
    models = {"network": denoiser._network.model, "vae": vae._model, **parts}
    return {f"{part} {name}": tensor for part, m in models.items() for name, tensor in m.state_dict().items()}


def pictures(output, *told):
    """The pictures of a job, ``[rows, 16, 16, 3]``."""
    job = ["model=diffusers", "scheduler=model", "cluster=inline", "samples_per_row=1", "sampling.steps=2"]
    job += [f"source.path={output.parent / 'prompts.txt'}", "sampling.width=16", "sampling.height=16"]
    (output.parent / "prompts.txt").write_text("".join(f"a picture of {n} foxes by the sea\n" for n in range(8)))
    assert latentmill.run("txt2img", [*job, *told, f"output={output}"]).failed == 0
    found = pq.read_table(output / "data").column("image").to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in found]).astype(int)


@pytest.mark.usefixtures("plain_convolutions")
def test_a_whole_checkpoint_is_the_folder_that_it_was_made_of(whole, narrow, tmp_path):
    """Every tensor of every part, and the pictures but for the last bit: it hangs on how weights lie in their file."""
    folder, file, configs = whole
    expected, found = loaded(folder), loaded(file, None, configs)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    everything = sorted(part.name for part in folder.iterdir() if part.is_dir())
    fingerprints = {Folder(str(file), None, str(each)).fingerprint(*everything) for each in (configs, folder)}
    assert len(fingerprints) == 1  # the weights beside the configs are none of its
    expected = pictures(tmp_path / "of_folder", f"model.path={folder}")
    found = pictures(tmp_path / "of_file", f"model.path={file}", f"model.config={configs}")
    assert abs(expected - found).max() <= 1 and (expected != found).mean() < 1e-3


def refused(*told):
    """The one line that the driver says before it starts anything."""
    with pytest.raises((PluginError, PlanError)) as caught:
        parts(load_job("txt2img", ["model=diffusers", "scheduler=model", *told]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


PARTS = {"vae": "first_stage_model.", "denoiser": "model.diffusion_model.", "text_encoder": "cond_stage_model."}


@pytest.fixture
def checkpoint(model, tmp_path):
    """Stable Diffusion's whole checkpoint and its folder, and how to write another in its place."""
    folder, file = model("StableDiffusionPipeline"), tmp_path / "x.safetensors"
    return stable_diffusion_1(folder), file, folder


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_a_single_file_does_not_hold_is_named_before_anything_starts(part, checkpoint):
    state, file, folder = checkpoint
    save_file({name: tensor for name, tensor in state.items() if name.startswith(PARTS[part])}, file)
    told = [f"model.path={file}", f"model.config={folder}"]
    others = [other for other in PARTS if other != part]
    said = refused(*told, f"{others[0]}.path={folder}")
    assert said.startswith(f"{others[1]} diffusers: {file} holds no ")
    assert said.endswith(f" that is known there: give {others[1]}.path, a folder")
    parts(load_job("txt2img", ["model=diffusers", "scheduler=model", *told, *(f"{o}.path={folder}" for o in others)]))


BUILT = {"vae": DiffusersVAE, "denoiser": DiffusersDenoiser, "text_encoder": DiffusersTextEncoder}


@pytest.mark.parametrize("how", ["missing", "nan"])
@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_of_a_whole_checkpoint_are_one_line_when_they_are_loaded(part, how, checkpoint):
    state, file, folder = checkpoint
    chosen = max(name for name in state if name.startswith(PARTS[part]))
    if how == "missing":
        del state[chosen]
    else:
        state[chosen] = state[chosen].clone().fill_(math.nan)
    save_file(state, file)
    for name, cls in BUILT.items():
        plugin = cls(str(file), None, str(folder))
        if name != part:
            plugin.load(CPU)  # what is not its own doesn't matter to it
            continue
        with pytest.raises(ValueError, match=r"can't be loaded: ") as caught:
            plugin.load(CPU)
        said = str(caught.value)
        assert "\n" not in said and said.startswith(str(file))
        assert {"missing": ": it has no ", "nan": " is not finite: "}[how] in said


def test_a_single_file_that_was_cut_short(checkpoint):
    state, file, folder = checkpoint
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:-100])
    assert f"vae diffusers: {file} can't be loaded: " in refused(f"model.path={file}", f"model.config={folder}")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux_s_network_alone_under_its_authors_names(prefix, narrow, model, tmp_path):
    folder, file = model("FluxPipeline"), tmp_path / "x.safetensors"
    save_file({prefix + name: tensor for name, tensor in flux(folder).items()}, file)
    expected, found = DiffusersDenoiser(str(folder)), DiffusersDenoiser(str(file), None, str(folder))
    expected.load(CPU)
    found.load(CPU)
    expected, found = (plugin._network.model.state_dict() for plugin in (expected, found))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    save_file({prefix + name: tensor for name, tensor in flux(folder).items() if name != "img_in.weight"}, file)
    with pytest.raises(ValueError, match=r"x\.safetensors can't be loaded: it has no img_in\.weight$"):
        DiffusersDenoiser(str(file), None, str(folder)).load(CPU)
    told = f"model.path={file}", f"model.config={folder}"
    assert refused(*told).startswith(f"vae diffusers: {file} holds no vae that is known there")
    assert refused(*told, f"vae.path={folder}").startswith(f"text_encoder diffusers: {file} holds no text_encoder that")


def test_a_network_of_another_kind_is_one_line(model, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(unet(model("StableDiffusionPipeline")), file)
    with pytest.raises(ValueError, match=r"x\.safetensors can't be loaded: ") as caught:
        DiffusersDenoiser(str(file), None, str(model("FluxPipeline"))).load(CPU)
    assert "FluxTransformer2DModel" in str(caught.value)


def write_gguf(file, state):
    """A .gguf as they are made: matrices of 32 columns or a multiple in 8 or 4 bits, what is small or not a matrix in more.

    Returns what it holds, as float32.
    """
    writer, kinds, plain = gguf.GGUFWriter(str(file), "flux"), itertools.cycle(["Q8_0", "Q4_0", "Q5_1"]), {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = next(kinds)
        else:
            kind = "BF16" if name.endswith("mod.lin.bias") else "F16" if tensor.ndim > 1 else "F32"
        kind = gguf.GGMLQuantizationType[kind]
        packed = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        plain[name] = torch.from_numpy(gguf.dequantize(packed, kind).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


ORIGINALS = {"FluxPipeline": flux, "StableDiffusion3Pipeline": sd3, "StableDiffusionPipeline": unet}


@torch.inference_mode()
@pytest.mark.parametrize("pipeline", ORIGINALS)
def test_a_gguf_predicts_what_its_dequantised_weights_do(pipeline, narrow, model, tmp_path):
    folder = model(pipeline)
    plain = write_gguf(tmp_path / "x.gguf", ORIGINALS[pipeline](folder))
    save_file(plain, tmp_path / "plain.safetensors")
    encoder = DiffusersTextEncoder(str(folder))
    encoder.load(CPU)
    told = {**encoder.encode(["a red fox", "two houses"]), "guidance_scale": torch.full((2,), 3.5)}
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))

    def predict(*where, **settings):
        denoiser = DiffusersDenoiser(*map(str, where), **settings)
        denoiser.load(CPU)
        return denoiser.predict(x, torch.tensor([0.9, 0.3], dtype=torch.float64), told), denoiser._network.model

    expected, whole = predict(tmp_path / "plain.safetensors", "", folder)
    unquantised, _ = predict(folder)
    found, network = predict(tmp_path / "x.gguf", "", folder)

    def error(other):
        return float((other - expected).abs().mean() / expected.abs().mean())

    assert error(found) <= 1e-3 < error(unquantised)
    packed = {name for name, parameter in network.named_parameters() if isinstance(parameter, GGUFParameter)}
    linear = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert packed and packed <= linear
    sizes = [sum(p.nbytes for name, p in each.named_parameters() if name in packed) for each in (network, whole)]
    assert sizes[0] < 0.3 * sizes[1]
    assert error(predict(tmp_path / "x.gguf", "", folder, dtype="bfloat16")[0]) <= 0.05
    assert torch.equal(predict(tmp_path / "x.gguf", "", folder, offload=True)[0], found)


def test_a_gguf_that_can_t_be_used_is_one_line(model, tmp_path, monkeypatch):
    folder, file = model("StableDiffusionPipeline"), tmp_path / "x.gguf"
    write_gguf(file, unet(folder))
    save_file({"x": torch.zeros(1)}, lora := tmp_path / "lora.safetensors")
    told = [f"denoiser.path={file}", f"denoiser.config={folder}", f"model.path={folder}"]
    parts(load_job("txt2img", ["model=diffusers", "scheduler=model", *told]))
    assert refused(*told[:2], f"model.path={file}", f"model.config={folder}").endswith(
        f"{file}: a .gguf is taken for a network alone: give vae.path, a folder"
    )
    assert f"text_encoder diffusers: {file}: a .gguf is" in refused(
        *told, f"text_encoder.path={file}", f"text_encoder.config={folder}"
    )
    assert "holds weights alone: give model.config too" in refused(told[0], told[2])
    for setting in ("denoiser.storage=float8_e4m3fn", "denoiser.loras=[{path: LORA}]".replace("LORA", str(lora))):
        assert f"{file} is quantised as it is: storage and loras are for plain weights" in refused(*told, setting)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert refused(*told) == f"denoiser diffusers: {file} needs the package gguf: pip install gguf"
    state = unet(folder)
    del state["model.diffusion_model.time_embed.0.weight"]
    write_gguf(tmp_path / "less.gguf", state)
    with pytest.raises(ValueError, match=r"less\.gguf can't be loaded: it has no time_embedding\.linear_1\.weight$"):
        DiffusersDenoiser(str(tmp_path / "less.gguf"), None, str(folder)).load(CPU)
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"denoiser diffusers: {file} can't be loaded: " in refused(*told)

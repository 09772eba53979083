"""Single files in the names of those who trained the models: whole checkpoints, and networks alone."""

import io
import itertools
import math
import re
import shutil
import sys

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.quantizers.gguf.utils import GGUFParameter
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

# What diffusers calls a module, as a pattern, and what its authors do, one after the other as sed would. Modules that end up
# with one name are fused there, in the order of the rules. The UNets and VAEs have two blocks, and UNets one layer in each.
UNET = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.0"),
    (r"^down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.1"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.conv1", r"\1.in_layers.2"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.conv2", r"\1.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
)
VAE = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid\.attn_1\.group_norm", "mid.attn_1.norm"),
    (r"mid\.attn_1\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid\.attn_1\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
OPEN_CLIP = (
    (r"^(text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^(text_model\.)?embeddings\.token_embedding", "token_embedding"),
    (r"^(text_model\.)?final_layer_norm", "ln_final"),
    (r"^(text_model\.)?encoder\.layers", "transformer.resblocks"),
    (r"^text_projection\.weight", "text_projection"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    *((rf"self_attn\.{each}_proj\.", "attn.in_proj_") for each in "qkv"),
)
CLIP = ((r"^(text_model\.)?(?!text_projection)", "text_model."),)
FLUX = (
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    *((rf"^double(.*)attn\.to_{each}\.", r"double\1img_attn.qkv.") for each in "qkv"),
    *((rf"attn\.add_{each}_proj\.", "txt_attn.qkv.") for each in "qkv"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"ff\.net\.(\d)(\.proj)?", r"img_mlp.\1"),
    (r"ff_context\.net\.(\d)(\.proj)?", r"txt_mlp.\1"),
    *((rf"^single(.*)attn\.to_{each}\.", r"single\1linear1.") for each in "qkv"),
    (r"^single(.*)proj_mlp", r"single\1linear1"),
    (r"^single(.*)proj_out", r"single\1linear2"),
    (r"^single(.*)norm\.linear", r"single\1modulation.lin"),
    (r"^single(.*)attn\.norm_q\.weight", r"single\1norm.query_norm.scale"),
    (r"^single(.*)attn\.norm_k\.weight", r"single\1norm.key_norm.scale"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
)
SD3 = (
    (r"time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks\.(\d)", r"joint_blocks.\1"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    *((rf"(attn2?)\.to_{each}\.", r"x_block.\1.qkv.") for each in "qkv"),
    *((rf"attn\.add_{each}_proj\.", "context_block.attn.qkv.") for each in "qkv"),
    (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"(attn2?)\.norm_([qk])", r"x_block.\1.ln_\2"),
    (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
)


def renamed(part, rules, prefix):
    """The weights of a part's folder under its authors' names."""
    found = {}
    for name, tensor in load_file(next(part.glob("*.safetensors"))).items():
        last = 0  # rule that matched
        for i, (pattern, there) in enumerate(rules):
            name, matched = re.subn(pattern, there, name)
            last = i if matched else last
        found.setdefault(prefix + name, []).append((last, tensor))
    fused = {name: [tensor for _, tensor in sorted(each, key=lambda e: e[0])] for name, each in found.items()}
    return {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in fused.items()}


def unet(folder):
    return renamed(folder / "unet", UNET, "model.diffusion_model.")


def vae(folder, prefix="first_stage_model."):
    """With attention as convolutions."""
    state = renamed(folder / "vae", VAE, prefix)
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in state.items()}


def swapped(state, name):
    """Shift and scale of a last normalisation, which diffusers has the other way round."""
    for each in ("weight", "bias"):
        state[f"{name}.{each}"] = torch.cat(state[f"{name}.{each}"].chunk(2)[::-1])


def open_clip(part, prefix):
    state = renamed(part, OPEN_CLIP, prefix)
    if f"{prefix}text_projection" in state:
        state[f"{prefix}text_projection"] = state[f"{prefix}text_projection"].T.contiguous()
    return state


def flux(folder):
    state = renamed(folder / "transformer", FLUX, "")
    swapped(state, "final_layer.adaLN_modulation.1")
    return state


def sd3(folder):
    state = renamed(folder / "transformer", SD3, "model.diffusion_model.")
    swapped(state, "model.diffusion_model.final_layer.adaLN_modulation.1")
    swapped(state, "model.diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1")
    return state


def stable_diffusion_1(folder):
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    text = renamed(folder / "text_encoder", CLIP, "cond_stage_model.transformer.")
    return {**unet(folder), **vae(folder), **text, **positions, "alphas_cumprod": torch.zeros(1000)}


def stable_diffusion_2(folder):
    return {**unet(folder), **vae(folder), **open_clip(folder / "text_encoder", "cond_stage_model.model.")}


def stable_diffusion_xl(folder):
    first = renamed(folder / "text_encoder", CLIP, "conditioner.embedders.0.transformer.")
    return {
        **unet(folder),
        **vae(folder),
        **first,
        **open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model."),
    }


def stable_diffusion_3(folder):
    return {
        **sd3(folder),
        **vae(folder),
        **renamed(folder / "text_encoder", CLIP, "text_encoders.clip_l.transformer."),
        **renamed(folder / "text_encoder_2", CLIP, "text_encoders.clip_g.transformer."),
        **renamed(folder / "text_encoder_3", (), "text_encoders.t5xxl.transformer."),
    }


def refiner(folder):
    return {**unet(folder), **vae(folder), **open_clip(folder / "text_encoder_2", "conditioner.embedders.0.model.")}


def flux_with_all(folder):
    return {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in flux(folder).items()},
        **vae(folder, "vae."),
        **renamed(folder / "text_encoder", CLIP, "text_encoders.clip_l.transformer."),
        **renamed(folder / "text_encoder_2", (), "text_encoders.t5xxl.transformer."),
    }


WHOLE = {
    "stable_diffusion_1": (stable_diffusion_1, "StableDiffusionPipeline"),
    "stable_diffusion_2": (stable_diffusion_2, "StableDiffusionPipeline"),
    "stable_diffusion_xl": (stable_diffusion_xl, "StableDiffusionXLPipeline"),
    "refiner": (refiner, "StableDiffusionXLImg2ImgPipeline"),
    "stable_diffusion_3": (stable_diffusion_3, "StableDiffusion3Pipeline"),
    "flux_with_all": (flux_with_all, "FluxPipeline"),
}


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
    job += ["source.path=pkg://latentmill.jobs/data/prompts.txt", "sampling.width=16", "sampling.height=16"]
    assert latentmill.run("txt2img", [*job, *told, f"output={output}"]).failed == 0
    found = pq.read_table(output / "data").column("image").to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in found]).astype(int)


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

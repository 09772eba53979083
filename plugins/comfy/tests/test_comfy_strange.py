"""Files as people have them: of the real widths, of other names and ends, with more in them than is wanted, or with less."""

import json

import comfy_tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill_comfy.denoiser import ComfyDenoiser
from latentmill_comfy.folders import find
from latentmill_comfy.text_encoder import ComfyTextEncoder
from latentmill_comfy.text_names import parts_of
from latentmill_comfy.vae import ComfyVAE


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A models folder with FLUX.1's network and two VAEs, to be changed."""
    return comfy_tiny.build(tmp_path_factory.mktemp("own"), "unet/flux", "vae/ae", "vae/sd15", "checkpoints/sd15")


def hollow(path, shapes, dtype="F16", size=2):
    """A file of tensors of these shapes, all zeros, that takes no room on disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + size * torch.Size(shape).numel()
        header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def unet(widths, depths, context, linear, told=None):
    """What of a UNet its sizes are told by; three blocks a level where it goes up."""
    shapes = {"input_blocks.0.0.weight": [widths[0], 4, 3, 3], "out.2.weight": [4, widths[0], 3, 3]}
    shapes |= {"label_emb.0.0.weight": [1280, told]} if told else {}
    blocks = [kind for k in range(len(widths)) for kind in ([k, k, "down"] if k < len(widths) - 1 else [k, k])]
    for i, kind in enumerate(blocks, 1):
        if kind == "down":
            shapes[f"input_blocks.{i}.0.op.weight"] = [1]
            continue
        shapes[f"input_blocks.{i}.0.out_layers.3.weight"] = [widths[kind], 1]
        shapes |= {
            f"input_blocks.{i}.1.transformer_blocks.{n}.attn2.to_k.weight": [widths[kind], context]
            for n in range(depths[kind])
        }
    middle = depths[-1] or depths[-2]
    shapes |= {f"middle_block.1.transformer_blocks.{n}.x": [1] for n in range(middle)}
    shapes["middle_block.1.proj_in.weight"] = [widths[-1], widths[-1], *([] if linear else [1, 1])]
    up = [depth for depth in reversed(depths) for _ in range(3)]
    for i, depth in enumerate(up):
        shapes[f"output_blocks.{i}.0.x"] = [1]
        shapes |= {f"output_blocks.{i}.1.transformer_blocks.{n}.x": [1] for n in range(depth)}
    return shapes


def mmdit(width, depth, places, dual=0, normed=False):
    shapes = {"x_embedder.proj.weight": [width, 16, 2, 2], "final_layer.linear.weight": [64, width]}
    shapes |= {"context_embedder.weight": [width, 4096], "y_embedder.mlp.0.weight": [width, 2048]}
    shapes |= {"pos_embed": [1, places**2, width]}
    shapes |= {f"joint_blocks.{n}.context_block.attn.qkv.weight": [1] for n in range(depth)}
    shapes |= {f"joint_blocks.{n}.x_block.attn2.qkv.weight": [1] for n in range(dual)}
    return shapes | ({"joint_blocks.0.context_block.attn.ln_q.weight": [64]} if normed else {})


def flux(guided):
    shapes = {"img_in.weight": [3072, 64], "txt_in.weight": [3072, 4096], "vector_in.in_layer.weight": [3072, 768]}
    shapes |= {"double_blocks.0.img_attn.norm.key_norm.scale": [128]}
    shapes |= {f"double_blocks.{n}.x": [1] for n in range(19)} | {f"single_blocks.{n}.x": [1] for n in range(38)}
    return shapes | ({"guidance_in.in_layer.weight": [3072, 256]} if guided else {})


REAL = {
    # As their authors' files have them: what is told of sizes, and what diffusers' configs of the same models say.
    "SD 1.5": (
        unet([320, 640, 1280, 1280], [1, 1, 1, 0], 768, False),
        "Stable Diffusion 1",
        {"attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
    ),
    "SD 2.1": (
        unet([320, 640, 1280, 1280], [1, 1, 1, 0], 1024, True),
        "Stable Diffusion 2",
        {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    ),
    "SDXL": (
        unet([320, 640, 1280], [0, 2, 10], 2048, True, 2816),
        "Stable Diffusion XL",
        {"attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [10, 2, 10]},
    ),
    "refiner": (
        unet([384, 768, 1536, 1536], [0, 4, 4, 0], 1280, True, 2560),
        "the refiner of Stable Diffusion XL",
        {"attention_head_dim": [6, 12, 24, 24], "projection_class_embeddings_input_dim": 2560},
    ),
    "SD 3 medium": (
        mmdit(1536, 24, 192),
        "Stable Diffusion 3",
        {"num_attention_heads": 24, "pos_embed_max_size": 192, "qk_norm": None},
    ),
    "SD 3.5 medium": (
        mmdit(1536, 24, 384, 13, True),
        "Stable Diffusion 3",
        {"dual_attention_layers": [*range(13)], "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
    ),
    "SD 3.5 large": (
        mmdit(2432, 38, 192, 0, True),
        "Stable Diffusion 3",
        {"num_attention_heads": 38, "num_layers": 38, "dual_attention_layers": []},
    ),
    "FLUX.1 dev": (
        flux(True),
        "FLUX.1",
        {"num_attention_heads": 24, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True},
    ),
    "FLUX.1 schnell": (flux(False), "FLUX.1", {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["alone", "checkpoint"])
@pytest.mark.parametrize("name", REAL)
def test_real_widths_are_recognised(name, prefix, tmp_path):
    shapes, family, config = REAL[name]
    path = hollow(tmp_path / "x.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    found = ComfyDenoiser(unet=str(path))
    assert found.found.family == family
    assert {key: found.config[key] for key in config} == config
    assert [field.name for field in found.row_fields] == (["guidance"] if family == "FLUX.1" else [])


def test_real_text_encoders_are_recognised(tmp_path):
    """T5-XXL, of eight bits with scales, and CLIPs by their layers."""
    block = "encoder.block.0.layer.1.DenseReluDense.wi_1"
    t5 = {"shared.weight": [32128, 4096], f"{block}.weight": [10240, 4096], "scaled_fp8": [2]}
    assert [*parts_of(hollow(tmp_path / "t5xxl.sft", t5, "F8_E4M3", 1), whole=False)] == ["t5xxl"]
    for part, layers in {"clip_l": 12, "clip_g": 32, "clip_h": 24}.items():
        names = {f"text_model.encoder.layers.{n}.mlp.fc1.weight": [4, 4] for n in range(layers)}
        assert [*parts_of(hollow(tmp_path / f"{part}.safetensors", names), whole=False)] == [part]


def lacking(own, *names):
    state = load_file(own / "unet/flux.safetensors")
    save_file({key: tensor for key, tensor in state.items() if key not in names}, own / "unet/lacking.safetensors")
    return "lacking.safetensors"


@pytest.mark.parametrize("name", ["vector_in.in_layer.weight", "txt_in.weight"])
def test_a_network_without_what_tells_its_sizes(name, own):
    with pytest.raises(ValueError, match=f"no whole network that is known here: it has no {name}"):
        ComfyDenoiser(models=str(own), unet=lacking(own, name))


def test_what_no_layer_takes_is_told(own):
    state = load_file(own / "unet/flux.safetensors")
    save_file(state | {"double_blocks.1.extra.scale": torch.zeros(3)}, own / "unet/more.safetensors")
    assert ComfyDenoiser(models=str(own), unet="flux.safetensors").notices() == []
    [said] = ComfyDenoiser(models=str(own), unet="more.safetensors").notices()
    assert said == "more.safetensors has 1 tensors that no layer takes: double_blocks.1.extra.scale, ..."


def test_scales_of_other_quantisers_are_refused(own):
    state = load_file(own / "unet/flux.safetensors")
    name = "double_blocks.0.img_attn.qkv.weight_scale"
    save_file(state | {name: torch.ones(1)}, own / "unet/other.safetensors")
    with pytest.raises(ValueError, match=f"has {name}: weights that are quantised in this way aren't known here"):
        ComfyDenoiser(models=str(own), unet="other.safetensors")


def test_a_file_may_end_in_sft(own):
    for name in ("unet/flux", "vae/ae"):
        (own / f"{name}.sft").write_bytes((own / f"{name}.safetensors").read_bytes())
    networks = [ComfyDenoiser(models=str(own), unet=f"flux.{end}") for end in ("sft", "safetensors")]
    assert networks[0].fingerprint() == networks[1].fingerprint()
    vae = ComfyVAE(models=str(own), unet="flux.sft", vae="ae.sft")
    vae.load(torch.device("cpu"))
    assert vae.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 16, 16)


def test_a_vae_s_file_may_have_the_rest_of_its_training(own):
    state = load_file(own / "vae/sd15.safetensors")
    rest = {"model_ema.num_updates": torch.tensor(3, dtype=torch.int32), "loss.logvar": torch.zeros(1)}
    save_file(state | rest, own / "vae/trained.safetensors")
    made = []
    for name in ("sd15", "trained"):
        vae = ComfyVAE(models=str(own), checkpoint="sd15.safetensors", vae=f"{name}.safetensors")
        vae.load(torch.device("cpu"))
        made.append(vae.decode(torch.ones(1, 4, 2, 2)))
    assert torch.equal(*made)


@pytest.mark.parametrize("tiling", [{"tile_size": 8}, {"overlap": -1}, {"tile_size": "512"}])
def test_tiles_that_can_not_be(tiling, own):
    with pytest.raises(ValueError, match=r"vae\.tiling: tile_size must be 64 or more, and overlap 0 or more"):
        ComfyVAE(models=str(own), checkpoint="sd15.safetensors", tiling=tiling)


def test_a_name_that_is_too_long(own):
    with pytest.raises(ValueError, match="holds no checkpoints/aaa"):
        find(str(own), "checkpoints", "a" * 300)
    with pytest.raises(ValueError, match="there is no file /aaa"):
        find("", "checkpoints", "/" + "a" * 300)


def test_a_text_encoder_has_no_embeddings_but_those_of_its_models(own, tmp_path, monkeypatch):
    """Not those of the folder that a job is run in."""
    (tmp_path / "embeddings").mkdir()
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "embeddings/here.safetensors")
    monkeypatch.chdir(tmp_path)
    made = ComfyTextEncoder(checkpoint=str(own / "checkpoints/sd15.safetensors"))
    assert not made.embeddings.exists("here")

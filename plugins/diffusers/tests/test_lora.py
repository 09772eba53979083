"""LoRA files that fit a model in part, and DoRA: added whole, or refused with the names of what would be left out."""

import shutil

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import CLIPTextModel

from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.text_encoder import DiffusersTextEncoder

CPU = torch.device("cpu")
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(model):
    return model("StableDiffusionPipeline")


def plain(layer, out=16, into=16, names=("lora_A", "lora_B")):
    """A LoRA of rank 4 for one layer."""
    down, up = names
    return {f"{layer}.{down}.weight": torch.ones(4, into), f"{layer}.{up}.weight": torch.ones(out, 4)}


FITS = plain(f"unet.{LAYER}")
FITS_KOHYA = plain(KOHYA, names=("lora_down", "lora_up")) | {f"{KOHYA}.alpha": torch.tensor(2.0)}


def refused(folder, tmp_path, tensors, plugin=DiffusersDenoiser):
    """The one line with which a plugin refuses to load."""
    save_file(tensors, file := tmp_path / "lora.safetensors")
    with pytest.raises(ValueError) as error:
        plugin(str(folder), loras=[{"path": str(file)}]).load(CPU)
    said = str(error.value)
    assert said.startswith(f"the LoRA {file}: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("tensors", [FITS, FITS_KOHYA, FITS | {f"unet.{LAYER}.diff_b": torch.zeros(16)}])
def test_a_lora_that_fits_is_added(folder, tmp_path, tensors):
    save_file(tensors, file := tmp_path / "lora.safetensors")
    DiffusersDenoiser(str(folder), loras=[{"path": str(file)}]).load(CPU)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            plain("unet.mid_block.no_such"),
            "2 of its 4 tensors fit no layer of the unet: mid_block.no_such.lora_A.weight, ",
        ),
        (plain("vae.decoder.conv_in"), "2 of its 4 tensors fit neither the unet nor a text encoder of the model: vae."),
        (plain("text_encoder_2.x"), "2 of its 4 tensors fit neither the unet nor a text encoder of the model: text_"),
        ({f"unet.{LAYER}.diff_b": torch.ones(16)}, f"1 of its 3 tensors fit no layer of the unet: {LAYER}.diff_b;"),
        ({"unet.conv_in.lora_A.weight": torch.ones(4, 4, 3, 3)}, "it has no conv_in.lora_B.weight, which belongs to"),
        (plain("unet.time_embedding.linear_1", out=3), "size mismatch for time_embedding.linear_1.lora_B"),
    ],
)
def test_a_lora_of_which_a_tensor_would_be_left_out_is_refused(folder, tmp_path, more, expected):
    assert expected in refused(folder, tmp_path, FITS | more)
    assert expected in refused(folder, tmp_path, more | FITS)


def test_so_is_one_of_another_format(folder, tmp_path):
    more = plain("lora_unet_mid_block_no_such", names=("lora_down", "lora_up"))
    assert "2 of its 4 tensors fit no layer of the unet: mid_block.no.such" in refused(
        folder, tmp_path, FITS_KOHYA | more
    )
    said = refused(folder, tmp_path, FITS_KOHYA | {f"{KOHYA}.dora_scale": torch.ones(1, 16)})
    assert f"it is a DoRA, and diffusers leaves out its 1 dora_scale ({KOHYA}.dora_scale)" in said


def test_and_one_that_a_text_encoder_takes_in_part(folder, tmp_path):
    fits = plain(TEXT, 32, 32)
    save_file(fits, file := tmp_path / "lora.safetensors")
    DiffusersTextEncoder(str(folder), loras=[{"path": str(file)}]).load(CPU)
    for more, expected in (
        (plain("text_encoder.text_model.no_such"), "2 of its 4 tensors fit no layer of the text_encoder: "),
        ({f"{TEXT[:-6]}k_proj.lora_B.weight": torch.ones(32, 4)}, "k_proj.lora_A.weight, which belongs to its other"),
    ):
        assert expected in refused(folder, tmp_path, fits | more, DiffusersTextEncoder)


def test_flux_s_converter_drops_no_tensor_in_silence(model, tmp_path):
    folder = model("FluxPipeline")
    name = "lora_unet_single_blocks_0_modulation_lin"
    network = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    out, into = network.single_transformer_blocks[0].norm.linear.weight.shape
    fits = plain(name, out, into, ("lora_down", "lora_up"))
    save_file(fits, file := tmp_path / "fits.safetensors")
    DiffusersDenoiser(str(folder), loras=[{"path": str(file)}]).load(CPU)
    said = refused(folder, tmp_path, fits | {f"{name}.diff_b": torch.ones(out)})
    assert f"1 of its 3 tensors fit no name that diffusers knows: {name}.diff_b;" in said


def test_a_dora_of_peft_s_is_added_with_its_magnitudes(folder, tmp_path):
    """``W' = m (W + s B A) / |W + s B A|``, the length being that of each output (Liu et al. 2024, arXiv:2402.09353, eq. 5)."""
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=[LAYER], init_lora_weights=False))
    layer = network.get_submodule(LAYER)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= torch.rand(len(magnitude)) + 0.5
    about = network.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(network)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, layers, weight_name="dora.safetensors", unet_lora_adapter_metadata=about)  # fmt: skip

    merged = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    weight = merged.get_submodule(LAYER).weight
    direction = weight + 0.5 * (4 / 2) * layers[f"{LAYER}.lora_B.weight"] @ layers[f"{LAYER}.lora_A.weight"]
    weight.data = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)

    denoiser = DiffusersDenoiser(str(folder), loras=[{"path": str(tmp_path / "dora.safetensors"), "weight": 0.5}])
    denoiser.load(CPU)
    x, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.inference_mode():
        found = denoiser.predict(x, torch.tensor([0.5, 0.2], dtype=torch.float64), {"embeds": embeds})
        timestep = torch.tensor([499.0, 199.0])  # of times t the steps 1000 t - 1
        wanted = merged.eval()(x, timestep, embeds, return_dict=False)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def kohya(prefix, layers, alphas):
    """A LoRA of rank 4 in kohya's format for layers of a model, and what it adds to each one's weight."""
    tensors, added = {}, {}
    for (name, layer), alpha in zip(layers.items(), alphas):
        down, up = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        added[name] = alpha / 4 * up @ down
    return tensors, added


def with_added(model, added, weight):
    for name, more in added.items():
        model.get_submodule(name).weight.data += weight * more
    return model


def test_each_layer_of_the_network_has_its_own_alpha(folder, tmp_path):
    """diffusers alone gives all of attention the file's most frequent one."""
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    names = [LAYER, LAYER.replace("to_q", "to_v"), LAYER.replace("attn1.to_q", "ff.net.2")]
    tensors, added = kohya("lora_unet", {name: network.get_submodule(name) for name in names}, [1.0, 8.0, 2.0])
    save_file(tensors, file := tmp_path / "lora.safetensors")
    denoiser = DiffusersDenoiser(str(folder), loras=[{"path": str(file), "weight": 0.5}])
    denoiser.load(CPU)
    x, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.inference_mode():
        found = denoiser.predict(x, torch.tensor([0.5, 0.2], dtype=torch.float64), {"embeds": embeds})
        merged = with_added(network, added, 0.5).eval()
        wanted = merged(x, torch.tensor([499.0, 199.0]), embeds, return_dict=False)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_each_layer_of_a_text_encoder_has_its_own_alpha(folder, tmp_path, format):
    torch.manual_seed(0)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    ends = "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"
    layers = {name: layer for name, layer in encoder.named_modules() if "layers.0." in name and name.endswith(ends)}
    file = tmp_path / "lora.safetensors"
    if format == "kohya":
        named = {f"text_model.{name.removeprefix('text_model.')}": layer for name, layer in layers.items()}
        tensors, added = kohya("lora_te", named, [1.0, 8.0, 2.0])
        added = dict(zip(layers, added.values()))
        save_file(tensors, file)
    else:
        config = LoraConfig(r=4, lora_alpha=2, alpha_pattern={"q_proj": 16}, target_modules=[*layers], init_lora_weights=False)  # fmt: skip
        given = inject_adapter_in_model(config, CLIPTextModel.from_pretrained(folder / "text_encoder"))
        state = {name.replace(".default", ""): value for name, value in given.state_dict().items() if "lora_" in name}
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=state, weight_name=file.name, text_encoder_lora_adapter_metadata=config.to_dict())  # fmt: skip
        added = {name: given.get_submodule(name).get_delta_weight("default") for name in layers}
    merged = shutil.copytree(folder, tmp_path / "merged")
    with_added(encoder, added, 0.5).save_pretrained(merged / "text_encoder")
    found = []
    for where, loras in ((folder, [{"path": str(file), "weight": 0.5}]), (merged, [])):
        plugin = DiffusersTextEncoder(str(where), loras=loras)
        plugin.load(CPU)
        with torch.inference_mode():
            found.append(plugin.encode(["a red fox"])["embeds"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)

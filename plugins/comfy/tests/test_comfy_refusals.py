"""What of ComfyUI's files is refused, in a line that says what was found; and what a file may be called, and be kept in."""

import json

import comfy_tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

import latentmill
from latentmill.errors import PluginError
from latentmill_comfy.denoiser import ComfyDenoiser
from latentmill_comfy.folders import find
from latentmill_comfy.vae import ComfyVAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A models folder with FLUX.1's network and its VAE, to be changed."""
    return comfy_tiny.build(tmp_path_factory.mktemp("own"), "unet/flux", "vae/ae")


def put(folder, name, state):
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path.name


def refused(cls, **settings):
    with pytest.raises(ValueError) as caught:
        cls(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_found_by_the_names_that_workflows_have(tmp_path):
    for name in (
        "checkpoints/SD/x.safetensors",
        "unet/u.safetensors",
        "diffusion_models/d.safetensors",
        "clip/c.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    models = str(tmp_path)
    assert find(models, "checkpoints", "SD\\x.safetensors") == find(models, "checkpoints", "SD/x.safetensors")
    assert [find(models, "unet", f"{n}.safetensors").parent.name for n in "ud"] == ["unet", "diffusion_models"]
    assert find(models, "text_encoders", "c.safetensors") == tmp_path / "clip/c.safetensors"
    assert find("", "loras", str(tmp_path / "clip/c.safetensors")) == tmp_path / "clip/c.safetensors"
    for name, said in {
        "SD/y.safetensors": "holds no checkpoints/SD/y.safetensors (did you mean 'SD/x.safetensors'?)",
        "../unet/u.safetensors": "leads out of ComfyUI's folder of checkpoints",
    }.items():
        with pytest.raises(ValueError) as caught:
            find(models, "checkpoints", name)
        assert said in str(caught.value)
    with pytest.raises(ValueError, match="holds no folder loras: ComfyUI's models folder is expected"):
        find(models, "loras", "z.safetensors")
    with pytest.raises(ValueError, match=r"give model\.models"):
        find("", "loras", "z.safetensors")


OTHERS = {
    "AuraFlow": "double_layers.0.attn.w1q.weight",
    "Chroma": "distilled_guidance_layer.norms.0.scale",
    "Qwen-Image": "txt_norm.weight",
    "Lumina 2 or Z-Image": "cap_embedder.1.weight",
    "a network under diffusers' names": "down_blocks.0.resnets.0.conv1.weight",
    "no network that is recognised": "x",
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_network_of_another_family_is_named(family, own):
    name = put(own, "unet/other", {OTHERS[family]: torch.zeros(2, 2)})
    assert f"holds {family}; known here are Stable Diffusion 1, 2, XL" in refused(
        ComfyDenoiser, models=str(own), unet=name
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give checkpoint or unet"),
        (
            {"unet": "flux.safetensors", "weight_dtype": "fp8_e4m3fn_fast"},
            "weight_dtype must be default, fp8_e4m3fn, fp8_e5m2",
        ),
        (
            {"unet": "flux.safetensors", "prediction": "eps"},
            "prediction and zsnr are for models of betas, and FLUX.1 is a flow model",
        ),
        ({"unet": "flux.safetensors", "shift": 3.0, "max_shift": 1.0}, "shift and max_shift exclude each other"),
        ({"unet": "flux.safetensors", "loras": [{"path": "x"}]}, "expected {file: its name, weight: a number}"),
        ({"unet": "flux.safetensor"}, "holds no diffusion_models/flux.safetensor (did you mean 'flux.safetensors'?)"),
    ],
)
def test_settings_that_do_not_fit(settings, said, own):
    assert said in refused(ComfyDenoiser, models=str(own), **settings)


def test_a_vae_wants_to_know_whose_latents(own):
    models = str(own)
    assert "give checkpoint, or unet and vae" in refused(ComfyVAE, models=models, vae="ae.safetensors")
    assert "give vae, the file of its VAE, too" in refused(ComfyVAE, models=models, unet="flux.safetensors")
    four = put(own, "vae/four", comfy_tiny.vae())
    said = refused(ComfyVAE, models=models, unet="flux.safetensors", vae=four)
    assert "holds a VAE of 4 channels" in said and said.endswith("flux.safetensors wants 16")
    wrong = refused(ComfyVAE, models=models, unet="flux.safetensors", vae="ae.safetensors", tiling={"tile": 3})
    assert wrong == "vae.tiling has no tile: tile_size and overlap, in pixels, are expected"


def test_a_lora_of_another_model_is_refused_and_what_fits_nothing_is_told(own):
    other = comfy_tiny.build_lora(own, "sdxl")
    network = ComfyDenoiser(models=str(own), unet="flux.safetensors", loras=[{"file": other}])
    with pytest.raises(
        ValueError, match=r"has nothing for this FLUX\.1: lora_unet_input_blocks_3_1_\S+ names no layer of it"
    ):
        network.notices()
    state = comfy_tiny.lora("flux") | {"transformer.nowhere.lora_A.weight": torch.ones(2, 2)}
    state |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}
    mixed = put(own, "loras/mixed", state)
    network = ComfyDenoiser(models=str(own), unet="flux.safetensors", loras=[{"file": mixed}])
    said = "of the LoRA mixed.safetensors 1 tensors name no layer of the FLUX.1: transformer.nowhere.lora_A.weight, ..."
    assert network.notices() == [said]
    oft = put(own, "loras/oft", {"diffusion_model.img_in.oft_blocks": torch.ones(2, 2)})
    network = ComfyDenoiser(models=str(own), unet="flux.safetensors", loras=[{"file": oft}])
    with pytest.raises(ValueError, match="a kind .* that isn't known here"):
        network.notices()


def weights(own, name, **settings):
    network = ComfyDenoiser(models=str(own), unet=name, **settings)
    network.load(CPU)
    return network, {key: tensor.float() for key, tensor in network._network.model.state_dict().items()}


def test_weights_of_eight_bits(own):
    plain = load_file(own / "unet/flux.safetensors")
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in plain.items()}
    _, wanted = weights(own, put(own, "unet/rounded", {key: tensor.float() for key, tensor in small.items()}))
    for name, settings in ((put(own, "unet/fp8", small), {}), ("flux.safetensors", {"weight_dtype": "fp8_e4m3fn"})):
        network, found = weights(own, name, **settings)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert network.storage is torch.float8_e4m3fn  # and so takes a quarter of the memory
        kept = network._network.model.transformer_blocks[0].attn.to_q.weight
        assert kept.dtype is torch.float8_e4m3fn
    key = "double_blocks.0.img_attn.proj"
    scaled = {**plain, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    scaled |= {f"{key}.weight": small[f"{key}.weight"], f"{key}.scale_weight": torch.tensor(3.0)}
    network, found = weights(own, put(own, "unet/scaled", scaled))
    layer = "transformer_blocks.0.attn.to_out.0.weight"
    assert torch.equal(found[layer], wanted[layer] * 3) and network.storage is None
    matrices = {name: small[name] for name, tensor in plain.items() if tensor.ndim > 1}
    network, found = weights(own, put(own, "unet/mostly", scaled | matrices))
    bias = "transformer_blocks.0.attn.to_out.0.bias"  # what has no eight bits in such a file is not rounded to them
    assert torch.equal(found[bias], plain[f"{key}.bias"]) and network.storage is None
    packed = put(own, "unet/packed", plain | {f"{key}.weight": torch.ones(64, 64, dtype=torch.int8)})
    with pytest.raises(
        ValueError, match=f"{key}.weight is torch.int8: weights that are quantised in this way aren't known"
    ):
        weights(own, packed)


def test_a_file_that_lacks_a_tensor_is_refused(own):
    state = load_file(own / "unet/flux.safetensors")
    del state["double_blocks.1.txt_mlp.0.bias"]
    with pytest.raises(
        ValueError, match=r"short.safetensors can't be loaded: it has no double_blocks\.1\.txt_mlp\.0\.bias"
    ):
        weights(own, put(own, "unet/short", state))


def test_fingerprints_are_of_files_and_not_of_where_they_lie(own, tmp_path):
    name = comfy_tiny.build_lora(own, "flux")
    there = comfy_tiny.build(tmp_path / "moved", "unet/flux")
    comfy_tiny.build_lora(there, "flux")

    def of(folder, *loras):
        return ComfyDenoiser(models=str(folder), unet="flux.safetensors", loras=loras).fingerprint()

    with_lora = of(own, {"file": name, "weight": 0.5})
    assert of(own) == of(there) and with_lora == of(there, {"file": name, "weight": 0.5})
    assert len({of(own), with_lora, of(own, {"file": name}), of(own, {"file": name}, {"file": name})}) == 4


def test_entries_are_averaged_where_their_windows_are(own):
    network, _ = weights(own, "flux.safetensors")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 4, 4, generator=generator)
    entries, pooled = torch.randn(3, 2, 6, 256, generator=generator), torch.randn(3, 2, 64, generator=generator)
    t = torch.tensor([0.9, 0.9, 0.2], dtype=torch.float64)
    told = {"entries": entries, "pooled": pooled, "guidance": torch.full((3,), 3.5)}
    told |= {"length": torch.tensor([[4, 6], [4, 6], [4, 0]])}
    told |= {"window": torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.9, 1.0]], [[0.0, 0.1], [0.0, 1.0]]])}
    found = network.predict(x, t, told)

    def alone(row, entry, length):
        one = {
            "embeds": entries[row, entry, :length][None],
            "pooled": pooled[row, entry][None],
            "guidance": torch.tensor([3.5]),
        }
        return network.predict(x[row][None], t[row][None], one)[0]

    assert torch.allclose(found[0], (alone(0, 0, 4) + alone(0, 1, 6)) / 2, atol=1e-6)
    assert torch.allclose(found[1], alone(1, 0, 4), atol=1e-6)
    assert torch.allclose(
        x[2] - 0.2 * found[2], torch.zeros(16, 4, 4), atol=1e-6
    )  # nothing says so, and so the clean latents are 0


def test_a_window_is_from_the_sigma_of_its_start_to_that_of_its_end(own):
    network, _ = weights(own, "flux.safetensors")
    x, entries = torch.ones(1, 16, 4, 4), torch.ones(1, 1, 4, 256)

    def active(t, start, end):
        told = {"entries": entries, "pooled": torch.ones(1, 1, 64), "guidance": torch.tensor([3.5])}
        told |= {"length": torch.tensor([[4]]), "window": torch.tensor([[[start, end]]])}
        time = torch.tensor([t], dtype=torch.float64)
        found = network.predict(x, time, told)
        return not torch.allclose(t * found, x, atol=1e-5)

    first, last = network.sampling.percent(0.25), network.sampling.percent(0.5)
    assert [active(t, 0.25, 0.5) for t in (first + 0.01, first - 0.01, last + 0.01, last - 0.01)] == [
        False,
        True,
        True,
        False,
    ]
    assert active(1.0, 0.0, 0.5) and not active(1.0, 0.25, 1.0)


def test_guided_at_every_scale_but_one(own):
    network = ComfyDenoiser(models=str(own), unet="flux.safetensors")
    assert [network.guides(scale, None) for scale in (0.5, 1.0, 1.5)] == [True, False, True]


def test_pictures_go_through_a_job_with_the_vae(own, tmp_path):
    told = [
        "vae.name=comfy",
        f"vae.models={own}",
        "vae.unet=flux.safetensors",
        "vae.vae=ae.safetensors",
        "cluster=inline",
    ]
    done = latentmill.run(
        "encode", [*told, "source.path=pkg://latentmill.jobs/data/pictures", f"output={tmp_path / 'out'}"]
    )
    assert done.failed == 0
    [plan] = (tmp_path / "out").glob("plan.json")
    assert '"channels": 16' in json.dumps(json.loads(plan.read_text()))
    with pytest.raises(PluginError, match="holds no vae/none.safetensors"):
        latentmill.run(
            "encode", [*told[:-2], "vae.vae=none.safetensors", "cluster=inline", f"output={tmp_path / 'none'}"]
        )

"""Networks, VAEs and LoRAs out of ComfyUI's files, beside ComfyUI itself run on the same ones (values/files.json says which and when)."""

import base64

import comfy_tiny
import numpy as np
import pytest
import torch

from latentmill.schedulers.comfy_sampling import sampling_of
from latentmill_comfy.denoiser import ComfyDenoiser
from latentmill_comfy.vae import ComfyVAE

CPU = torch.device("cpu")
FILES = {
    "sd15": {"checkpoint": "sd15.safetensors"},
    "sdxl": {"checkpoint": "sdxl.safetensors"},
    "sd3": {"checkpoint": "sd3.safetensors"},
    "flux": {"unet": "flux.safetensors"},
}
SHAPES = {"sd15": (4, 64, 0), "sdxl": (4, 192, 128), "sd3": (16, 256, 192), "flux": (16, 256, 64)}
"""Channels of latents, widths of the prompt's tokens and of its pooled vector."""
SIZE = torch.tensor([[900.0, 1000, 16, 8, 512, 640]])
"""Height, width, crop and target."""


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def values(comfyui):
    return comfyui("files")


def denoiser(models, name, **settings):
    folder = models(*(f"{'unet' if kind == 'unet' else 'checkpoints'}/{name}" for kind in FILES[name]))
    return ComfyDenoiser(models=folder, **FILES[name], **settings)


def predicted(network, name, sigma, entries=False, sides=(4, 8), **more):
    """What the network says, as ``(x - x0) / sigma`` in ComfyUI's scale: of a first of two rows."""
    channels, width, pooled = SHAPES[name]
    x, flow = drawn(1, 2, channels, *sides), channels == 16
    told = {"embeds": drawn(2, 1, 7, width).expand(2, -1, -1)}
    if pooled:
        told["pooled"] = drawn(3, 1, pooled).expand(2, -1)
    told |= more
    if entries:
        told["entries"] = torch.nn.functional.pad(told.pop("embeds"), (0, 0, 0, 3))[:, None]
        told |= {key: told[key][:, None] for key in ("pooled", "size") if key in told}
        told |= {"length": torch.tensor([[7], [7]]), "window": torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])}
    sigma = torch.tensor([sigma, sigma], dtype=torch.float64)
    t = sigma if flow else network.noise_schedule.time(sigma)
    alpha, scale = network.noise_schedule.scale(t)
    given = x if flow else x * (sigma * alpha).float()[:, None, None, None]
    found = network.predict(given, t, told)
    if network.prediction == "epsilon" or flow:
        return found[0]
    clean = found if network.prediction == "sample" else alpha[0] * given - scale[0] * found
    return ((given / alpha[0] - clean) / sigma[0])[0].float()


LEAST = {"sdxl": 3e-5}
"""Float32's own noise in the tiny SDXL: ComfyUI's figures are 1.6e-5 off those in float64, and ours 1.2e-5 to 1.8e-5."""


def near(found, expected, most=1e-5):
    expected = torch.tensor(expected).reshape(found.shape)
    assert float((found - expected).norm() / expected.norm()) <= most


@pytest.mark.parametrize("entries", [False, True], ids=["dense", "entries"])
@pytest.mark.parametrize("name", FILES)
def test_a_network_says_what_comfyui_s_says(name, entries, comfy_models, values):
    network = denoiser(comfy_models, name)
    network.load(CPU)
    more = {"guidance": torch.tensor([2.5, 2.5])} if name == "flux" else {}
    for said in values["networks"][name]:
        near(predicted(network, name, said["sigma"], entries, **more), said["x0_of_noise"], LEAST.get(name, 1e-5))
    if name == "sdxl":
        near(
            predicted(network, name, 7.7, entries, size=SIZE.expand(2, -1)),
            values["networks"]["sdxl_size"][0]["x0_of_noise"],
            LEAST[name],
        )


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_sides_that_are_no_whole_patches(name, comfy_models, values):
    network = denoiser(comfy_models, name)
    network.load(CPU)
    more = {"guidance": torch.tensor([2.5, 2.5])} if name == "flux" else {}
    [said] = values["networks"][f"{name}_odd"]
    found = predicted(network, name, said["sigma"], sides=(5, 7), **more)
    assert found.shape[1:] == (5, 7)
    near(found.flatten()[: len(said["x0_of_noise"])], said["x0_of_noise"])


@pytest.mark.parametrize("case", ["zsnr", "x0", "lcm"])
def test_predictions_of_a_node(case, comfy_models, values):
    settings = {"prediction": "v_prediction", "zsnr": True} if case == "zsnr" else {"prediction": case}
    network = denoiser(comfy_models, "sd15", **settings)
    network.load(CPU)
    for said in values["networks"][case]:
        near(predicted(network, "sd15", said["sigma"]), said["x0_of_noise"])


NODES = {
    "default": ("flux", {}),
    "flux_node": ("flux", {"max_shift": 1.2, "base_shift": 0.4, "shift_size": [768, 512]}),
    "sd3": ("sd3", {}),
    "sd3_node": ("sd3", {"shift": 2.5}),
    "aura_node": ("sd3", {"shift": 1.73, "multiplier": 1.0}),
    "sd15": ("sd15", {}),
    "zsnr": ("sd15", {"prediction": "v_prediction", "zsnr": True}),
    "lcm": ("sd15", {"prediction": "lcm"}),
}


@pytest.mark.parametrize("case", NODES)
def test_sigmas_and_what_is_told_of_them(case, comfy_models, values):
    name, settings = NODES[case]
    network = denoiser(comfy_models, name, **settings)
    sampling, said = sampling_of(network.noise_schedule), values["sampling"][case]
    count = len(sampling.sigmas)
    assert count == said["count"]
    found = sampling.sigmas[[0, count // 7, count // 2, count - 2, count - 1]]
    assert torch.allclose(found, torch.tensor(said["sigmas"]), rtol=1e-6, atol=0)
    assert [sampling.percent(share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == pytest.approx(said["percent"], rel=1e-6)
    sigmas = torch.tensor([0.0123, 0.3, 0.77], dtype=torch.float64)
    flow = name != "sd15"
    times = sigmas if flow else network.noise_schedule.time(sigmas)
    told = network._times_told(times)[1] / (1000 if name == "flux" else 1)
    assert torch.allclose(told, torch.tensor(said["told"]), rtol=1e-6)


@pytest.mark.parametrize("case", ["sd15", "sd15_loha", "sd15_lokr", "sd15_dora", "sdxl", "sd3", "flux", "flux_dora"])
def test_loras_are_merged_as_comfyui_merges_them(case, comfy_models, values):
    said, name = values["loras"][case], case.split("_")[0]
    loras = []
    for file, weight in said["files"]:
        *base, kind, seed = file.removesuffix(".safetensors").split("_")
        comfy_models()
        comfy_tiny.build_lora(comfy_models.folder, "_".join(base), kind, int(seed))
        loras.append({"file": file, "weight": weight})
    plain, network = denoiser(comfy_models, name)._state(), denoiser(comfy_models, name, loras=loras)
    assert network.notices() == []
    state = network._state()
    changed = {key.removeprefix("model.diffusion_model.") for key in plain if not torch.equal(plain[key], state[key])}
    assert changed == set(said["weights"])
    for key, expected in said["weights"].items():
        weight = state[f"model.diffusion_model.{key}"].double().flatten()
        found = [float(weight.norm()), float((weight * torch.arange(len(weight), dtype=torch.float64).cos()).sum())]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * expected[0])


def vae(models, name, **settings):
    if name == "flux":
        return ComfyVAE(models=models("unet/flux", "vae/ae"), unet="flux.safetensors", vae="ae.safetensors", **settings)
    return ComfyVAE(models=models(f"checkpoints/{name}"), **FILES[name], **settings)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_vae_makes_what_comfyui_s_makes(name, comfy_models, values):
    said, model = values["vaes"][name], vae(comfy_models, name)
    model.load(CPU)
    pixels = torch.rand(2, 32, 64, 3, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        near(model.encode(pixels.permute(0, 3, 1, 2) * 2 - 1)[0], said["encoded"])
        decoded = model.decode(drawn(6, 1, model.spec.channels, 2, 3))[0]
    made = (255 * (decoded.clamp(-1, 1) + 1) / 2).byte().permute(1, 2, 0).numpy().astype(int)
    theirs = np.frombuffer(base64.b64decode(said["decoded"]), np.uint8).reshape(made.shape)
    assert (abs(made - theirs) <= 1).mean() >= 0.999


def test_tiles_are_comfyui_s(comfy_models, values):
    said, model = values["vaes"]["tiled"], vae(comfy_models, "sd15", tiling={"tile_size": 64, "overlap": 16})
    model.load(CPU)
    with torch.inference_mode():
        made = (model.decode(drawn(7, 1, 4, 20, 12))[0].clamp(-1, 1) + 1) / 2
    made = made.permute(1, 2, 0)
    near(made[40:44, 30:33].flatten(), said["some"])
    assert float(made.double().norm()) == pytest.approx(said["sums"][0], rel=1e-6)

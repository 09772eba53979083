"""VAEs: latents and pictures against diffusers' own encode and decode, and the suite that every VAE passes."""

import json
from functools import partial

import diffusers
import pytest
import tiny
import tiny.autoencoders
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.exports.spaces import family_of
from latentmill.plugin import RowError
from latentmill.testing import VAESuite
from latentmill_diffusers.vae import DiffusersVAE

pytestmark = pytest.mark.usefixtures("plain_convolutions")
CPU = torch.device("cpu")
PICTURES = torch.rand(3, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A VAE's folder by its name in tiny.autoencoders.VAES; built once."""
    root, built = tmp_path_factory.mktemp("vaes"), {}

    def folder(name):
        if name not in built:
            built[name] = tiny.build_vae(name, root / name.replace(" ", "-"))
        return built[name]

    return folder


def loaded(folder, **settings):
    vae = DiffusersVAE(str(folder), **settings)
    vae.load(CPU)
    return vae


def affine(model, config):
    """What the pipelines do to latents before ``decode``, as each of them writes it: ``z = x * gain + offset``."""
    if "batch_norm_eps" in config:
        std = torch.sqrt(model.bn.running_var + config["batch_norm_eps"])
        return std.reshape(1, -1, 1, 1), model.bn.running_mean.reshape(1, -1, 1, 1)
    scale = config.get("scaling_factor", 1.0)
    if config.get("latents_mean"):
        std, mean = (torch.tensor(config[name]).reshape(1, -1, 1, 1) for name in ("latents_std", "latents_mean"))
        return std / scale, mean
    return 1 / scale, config.get("shift_factor") or 0.0


@pytest.mark.parametrize("name", tiny.autoencoders.VAES)
@torch.inference_mode()
def test_latents_their_spread_and_pictures_are_diffusers(name, vae):
    ours = loaded(vae(name))
    config = json.loads((vae(name) / "config.json").read_text())
    model = getattr(diffusers, config["_class_name"]).from_pretrained(vae(name)).eval()
    video, patched = "temperal_downsample" in config, "batch_norm_eps" in config
    transparent = config.get("out_channels") == 4
    pictures = torch.cat([PICTURES, torch.ones(3, 1, 32, 64)], 1) if transparent else PICTURES
    encoded = model.encode(pictures[:, :, None] if video else pictures)
    if "latent_dist" in encoded:
        mean, std = encoded.latent_dist.mode(), encoded.latent_dist.std
    else:
        mean = encoded[0]
        std = torch.zeros_like(mean)
    if video:
        mean, std = mean[:, :, 0], std[:, :, 0]
    if patched:
        mean, std = pixel_unshuffle(mean, 2), pixel_unshuffle(std, 2)
    gain, offset = affine(model, config)
    found_mean, found_std = ours.posterior(PICTURES)
    torch.testing.assert_close(found_mean, (mean - offset) / gain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_std, std / gain, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.encode(PICTURES), found_mean)
    assert bool(found_std.any()) == ("latent_dist" in encoded)
    assert tuple(found_mean.shape[1:]) == ours.spec.shape(32, 64)

    latents = torch.randn(found_mean.shape, generator=torch.Generator().manual_seed(2))
    z = latents * gain + offset
    if patched:
        z = pixel_shuffle(z, 2)
    if config["_class_name"] == "ConsistencyDecoderVAE":
        wanted = torch.cat([model.decode(one[None], torch.Generator().manual_seed(0)).sample for one in z])
    else:
        wanted = model.decode(z[:, :, None] if video else z).sample
    wanted = wanted[:, :, 0] if video else wanted
    if transparent:  # laid on white
        colours, opacity = wanted[:, :3].clamp(-1, 1), wanted[:, 3:].clamp(-1, 1) / 2 + 0.5
        wanted = colours * opacity + 1 - opacity
    torch.testing.assert_close(ours.decode(latents), wanted, rtol=1e-5, atol=1e-5)


def test_the_spec_says_scale_and_shift_where_they_are_numbers(vae):
    plain, shifted, folded = (
        DiffusersVAE(str(vae(f"AutoencoderKL{more}"))).spec for more in ("", " with a shift", " with statistics")
    )
    assert (plain.channels, plain.downscale, plain.scale, plain.shift, plain.dtype) == (4, 2, 0.18215, 0.0, "float32")
    assert (shifted.scale, shifted.shift) == (0.18215, 0.1159)
    assert (folded.scale, folded.shift) == (1.0, 0.0)
    assert len({plain.fingerprint, shifted.fingerprint, folded.fingerprint}) == 3
    flux_2 = DiffusersVAE(str(vae("AutoencoderKLFlux2"))).spec
    assert (flux_2.channels, flux_2.downscale) == (16, 4)
    with pytest.raises(RowError, match="not a multiple of 4"):
        flux_2.shape(34, 64)


def sixteen(name, **settings):
    """A VAE of 16 channels at an eighth of the sides, as Qwen-Image's and Wan's are; its class's own statistics, if it has some."""
    if name == "AutoencoderTiny":
        blocks = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
        counts = {f"num_{half}_blocks": (1,) * 4 for half in ("encoder", "decoder")}
        return diffusers.AutoencoderTiny(latent_channels=16, **blocks, **counts)
    if name == "AutoencoderKL":
        return tiny.autoencoders.autoencoder(16, 4, **settings)
    sizes = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return getattr(diffusers, name)(**sizes, **settings)


OTHERS = {"latents_mean": [0.1] * 16, "latents_std": [1.5] * 16}


@pytest.mark.parametrize(
    ("name", "settings", "family"),
    [
        ("AutoencoderKLWan", {}, "wan"),
        ("AutoencoderKLQwenImage", {}, "wan"),
        ("AutoencoderKLWan", OTHERS, None),
        ("AutoencoderKL", {"scaling_factor": 1.0}, None),  # CogView 4
        ("AutoencoderKL", OTHERS, None),  # GLM-Image
        ("AutoencoderTiny", {}, None),
    ],
)
def test_of_vaes_alike_in_size_and_scale_the_statistics_say_whose_latents_they_are(name, settings, family, tmp_path):
    sixteen(name, **settings).save_pretrained(tmp_path)
    spec = DiffusersVAE(str(tmp_path)).spec
    assert (spec.channels, spec.downscale, spec.shift) == (16, 8, 0.0)
    found = family_of(spec)
    assert (found and found.name) == family
    assert bool(spec.statistics) == ("KLWan" in name or "Qwen" in name or settings is OTHERS)


def test_a_scale_beside_statistics_counts_as_part_of_them(tmp_path):
    specs = []
    for scale in (1.0, 0.5):
        sixteen("AutoencoderKL", scaling_factor=scale, **OTHERS).save_pretrained(tmp_path / str(scale))
        specs.append(DiffusersVAE(str(tmp_path / str(scale))).spec)
    assert specs[0].statistics != specs[1].statistics and specs[0].scale == specs[1].scale == 1.0


def test_an_old_config_gets_its_class_s_defaults(vae, tmp_path):
    """Stable Diffusion's first VAEs don't say their scaling factor."""
    model = diffusers.AutoencoderKL.from_pretrained(vae("AutoencoderKL"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DiffusersVAE(str(tmp_path)).spec.scale == 0.18215


@torch.inference_mode()
def test_slices_and_tiles_make_the_same_of_what_fits_one_tile(vae):
    folder = vae("AutoencoderKL")
    plain, sliced = loaded(folder), loaded(folder, slicing=True, tiling=True)
    assert sliced._model.use_slicing and sliced._model.use_tiling
    latents = plain.encode(PICTURES[:, :, :32, :32])
    torch.testing.assert_close(sliced.encode(PICTURES[:, :, :32, :32]), latents)
    torch.testing.assert_close(sliced.decode(latents), plain.decode(latents))


@torch.inference_mode()
def test_half_precision_stays_in_float32_where_the_config_says_it_is_unsafe(vae, tmp_path):
    model = tiny.autoencoders.autoencoder(force_upcast=False)
    model.save_pretrained(tmp_path)
    unsafe, safe = loaded(vae("AutoencoderKL"), dtype="float16"), loaded(tmp_path, dtype="float16")
    assert (unsafe._model.dtype, safe._model.dtype) == (torch.float32, torch.float16)
    assert unsafe.spec.dtype == "float16" and unsafe.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32
    assert loaded(tmp_path, dtype="bfloat16").decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


def test_the_weights_are_hashed_unread_and_every_one_counts(vae, tmp_path):
    """A file of weights is identified by its header and pieces: by another shape, and by another value of some size."""
    first = DiffusersVAE(str(vae("AutoencoderKL"))).spec.fingerprint
    assert DiffusersVAE(str(vae("AutoencoderKL"))).spec.fingerprint == first
    again = DiffusersVAE(str(tiny.build_vae("AutoencoderKL", tmp_path / "again"))).spec.fingerprint
    other = DiffusersVAE(str(tiny.build_vae("AutoencoderKL", tmp_path / "other", seed=1))).spec.fingerprint
    assert again == first != other


class TestSuite(VAESuite):
    """A random VAE brings nothing back, so what it must come back with is nothing."""

    size = (32, 32)
    min_psnr = 0.0

    @pytest.fixture(autouse=True, params=tiny.autoencoders.VAES)
    def _of(self, request, vae):
        type(self).vae = staticmethod(partial(DiffusersVAE, str(vae(request.param))))

"""Stage upscale_model: a network makes pictures larger, whole or in tiles. Where spandrel is missing its tests are skipped."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from latentmill.plugin import Declaration, LatentSpec, StageContext, tensors
from latentmill.testing import StageSuite, batches
from latentmill_comfy.upscale_model import UpscaleByModel

there = pytest.mark.skipif(find_spec("spandrel") is None, reason="spandrel is not installed: latentmill-comfy[upscale]")
SCALE = 2


def repeats(path, scale=SCALE, **more):
    """A network (SRVGGNetCompact, of Real-ESRGAN) that adds nothing to what it begins with: each pixel, scale times as high and wide."""
    channels = 8
    state = {
        "body.0.weight": torch.zeros(channels, 3, 3, 3),
        "body.0.bias": torch.zeros(channels),
        "body.1.weight": torch.ones(channels),
        "body.2.weight": torch.zeros(channels, channels, 3, 3),
        "body.2.bias": torch.zeros(channels),
        "body.3.weight": torch.ones(channels),
        "body.4.weight": torch.zeros(3 * scale**2, channels, 3, 3),
        "body.4.bias": torch.zeros(3 * scale**2),
    } | more
    path.parent.mkdir(parents=True, exist_ok=True)
    (torch.save if path.suffix == ".pth" else save_file)(state, path)
    return str(path)


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    return (
        repeats(tmp_path_factory.mktemp("models") / "upscale_models" / "2x.safetensors")
        if find_spec("spandrel")
        else ""
    )


def upscaled(stage, batch):
    stage.prepare(StageContext.of({}))
    stage.load(torch.device("cpu"))
    rejected = []
    return stage(batch, lambda row, reason: rejected.append((row, reason))), rejected


@there
@pytest.mark.parametrize("tile_size", [512, 4], ids=["whole", "tiles"])
def test_each_pixel_becomes_four(network, tile_size):
    batch = batches.with_pictures()
    found, rejected = upscaled(UpscaleByModel(network, tile_size=tile_size, overlap=2), batch)
    given = tensors.from_arrow(batch, "image")
    assert torch.equal(
        tensors.from_arrow(found, "image"), given.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    )
    assert not rejected
    assert found["width"].to_pylist() == [SCALE * given.shape[2]] * len(batch)
    assert found["height"].to_pylist() == [SCALE * given.shape[1]] * len(batch)


@there
def test_a_picture_of_floats_stays_one_within_black_and_white(network):
    given = torch.linspace(-0.1, 1.2, 2 * 5 * 7 * 3).reshape(2, 5, 7, 3)
    after = [Declaration("encode", drops=("image",), takes_floats=True)]
    stage, batch = UpscaleByModel(network), tensors.with_tensor(batches.rows(2, 5, 7), "image", given)
    stage.prepare(StageContext(Declaration("upscale_model"), after=after, float_pictures=True))
    stage.load(torch.device("cpu"))
    found = tensors.from_arrow(stage(batch, pytest.fail), "image")
    assert torch.equal(found, given.clamp(0, 1).repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2))


@there
def test_before_an_encoder_its_multiple_is_cut_out_of_the_middle(network):
    spec = SimpleNamespace(spec=LatentSpec(4, 4, 1.0, 0.0, "float32", "f"))
    after = [Declaration("encode", needs=("vae",), adds=("latents",))]
    stage, batch = UpscaleByModel(network), batches.with_pictures()
    stage.prepare(StageContext(Declaration("upscale_model"), after=after, plan=spec))
    stage.load(torch.device("cpu"))
    found = tensors.from_arrow(stage(batch, pytest.fail), "image")
    whole = tensors.from_arrow(batch, "image").repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    assert whole.shape[1:3] == (14, 10)
    assert torch.equal(found, whole[:, 1:13, 1:9])
    assert stage.declare(StageContext(Declaration("upscale_model"))).cuts  # so that read gives it all of a picture


@there
def test_the_file_lies_in_comfyuis_folder_and_may_be_a_pickle_of_weights(tmp_path):
    repeats(tmp_path / "upscale_models" / "2x.pth")
    found, _ = upscaled(UpscaleByModel("2x.pth", models=str(tmp_path)), batches.with_pictures())
    assert tensors.shape_of(found.schema.field("image")) == (14, 10, 3)


@there
def test_a_file_of_something_else_is_one_line(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds no network that spandrel knows"):
        upscaled(UpscaleByModel(str(tmp_path / "x.safetensors")), batches.with_pictures())


@pytest.mark.skipif(find_spec("spandrel") is not None, reason="spandrel is installed")
def test_without_spandrel_it_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'latentmill-comfy\[upscale\]'"):
        UpscaleByModel("2x.pth")


@there
class TestUpscaleModel(StageSuite):
    stage = UpscaleByModel

    @pytest.fixture(autouse=True)
    def model(self, network, monkeypatch):
        from functools import partial

        monkeypatch.setattr(type(self), "stage", partial(UpscaleByModel, network))

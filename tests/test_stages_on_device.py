"""Pictures to latents and back on a device that is pretended: its tensors never meet the CPU's, and the host waits once a batch."""

import pytest
import torch

from latentmill.batch import FixedShape, from_dicts, with_latents
from latentmill.plugin import VAE, Declaration, LatentSpec, StageContext, TextEncoder, tensors
from latentmill.registry import build
from latentmill.stages.decode import Decode
from latentmill.stages.encode import Encode
from latentmill.testing.pretend import DEVICE, pretended

CPU = torch.device("cpu")
FIXED = FixedShape(batch_size=4, rows_per_shard=8)
PICTURES = torch.randint(0, 256, (3, 4, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Depth(VAE):
    """Space to depth; of a picture whose first pixel is black the latents are not finite, nor is the picture of latents above 1."""

    contract = 2

    spec = LatentSpec(channels=12, downscale=2, scale=1.0, shift=0.0, dtype="float32", fingerprint="depth")

    def load(self, device):
        self.black = torch.full((1, 3), -1.0).to(device)

    def encode(self, images):
        broken = (images[:, :, 0, 0] == self.black).all(1)[:, None, None, None]
        return torch.where(broken, torch.nan, torch.nn.functional.pixel_unshuffle(images, 2))

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(torch.where(latents > 1, torch.inf, latents), 2)


class Lengths(TextEncoder):
    contract = 2

    def load(self, device):
        self.device = device

    def encode(self, prompts):
        return {"length": torch.tensor([[float(len(p))] for p in prompts]).to(self.device)}


def batch(images=PICTURES, mask=False):
    about = {
        "negative_prompt": "", "steps": 1, "width": 6, "height": 4, "guidance_scale": 4.0, "strength": 1.0, "scheduler": "euler",
    }  # fmt: skip
    table = from_dicts(
        [{"row": n, "row_id": str(n), "prompt": "a" * n, "seed": n, **about} for n in range(len(images))]
    )
    table = tensors.with_tensor(table, "image", images)
    masks = torch.arange(24, dtype=torch.uint8).reshape(4, 6).repeat(len(images), 1, 1) % 2
    return tensors.with_tensor(table, "mask", masks) if mask else table


def encode(device, table, fixed=None, std=False, denoises=True):
    """Its tables, by column, what was rejected, and what was waited for."""
    stage, rejected = Encode(), {}
    after = [Declaration("denoise", needs=("denoiser",), takes=("masked", "negative:"))] if denoises else []
    plugins = {"vae": Depth(), **({"text_encoder": Lengths()} if denoises else {})}
    adds = ["latents", *["latents_std"] * std]
    with pretended() as counted:
        stage.prepare(StageContext.of(plugins, adds, fixed=fixed, after=after))
        stage.load(device)
        list(stage(table, rejected.__setitem__))  # its VAE is loaded with the first picture
        counted.clear()
        found = list(stage(table, rejected.__setitem__))
    columns = [
        {n: tensors.from_arrow(t, n) for n in t.column_names if tensors.is_tensor(t.schema.field(n))} for t in found
    ]
    return columns, [t.column("row").to_pylist() for t in found], rejected, list(counted.waits)


def same(found, wanted):
    for columns, others in zip(found, wanted, strict=True):
        assert columns.keys() == others.keys()
        assert all(torch.equal(values, others[name]) for name, values in columns.items())


@pytest.mark.parametrize("fixed", [None, FIXED], ids=["any shape", "fixed"])
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
def test_pictures_become_the_latents_that_the_cpu_makes_of_them(fixed, mask):
    wanted, rows, _, _ = encode(CPU, batch(mask=mask), fixed)
    found, there, rejected, waits = encode(DEVICE, batch(mask=mask), fixed)
    assert there == rows == [[0, 1, 2]] and not rejected
    assert {*wanted[0]} == {"latents", "prompt:length", "negative:length", *(["mask", "masked"] if mask else [])}
    same(found, wanted)
    assert waits == ["_to_copy back"] * (2 if mask else 1)  # prompts are kept


@pytest.mark.parametrize("fixed", [None, FIXED], ids=["any shape", "fixed"])
def test_a_picture_that_breaks_is_rejected_on_a_device_too(fixed):
    images = PICTURES.clone()
    images[1, 0, 0] = 0
    for device in (CPU, DEVICE):
        found, rows, rejected, _ = encode(device, batch(images, mask=True), fixed)
        assert rows == [[0, 2]] and list(rejected) == [1]
        assert found[0]["prompt:length"].tolist() == [[0.0], [2.0]] and len(found[0]["masked"]) == 2


def test_the_spread_of_latents_comes_back_beside_them():
    wanted, found = (encode(device, batch(), std=True, denoises=False)[0] for device in (CPU, DEVICE))
    same(found, wanted)
    assert found[0]["latents_std"].shape == found[0]["latents"].shape


@pytest.mark.parametrize("fixed", [None, FIXED], ids=["any shape", "fixed"])
def test_latents_become_bytes_where_they_were_decoded(fixed):
    """What comes back is a byte for each colour of each pixel, with one look at which pictures are finite."""
    latents = torch.randn(3, 12, 2, 3, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    latents[1, 0, 0, 0] = 2.0
    pictures = []
    for device in (CPU, DEVICE):
        vae, stage, rejected = Depth(), Decode(), {}
        table = with_latents(batch().drop_columns(["image"]), latents, vae.spec)
        with pretended() as counted:
            stage.prepare(StageContext.of({"vae": vae}, fixed=fixed))
            stage.load(device)
            counted.clear()
            found = stage(table, rejected.__setitem__)
        assert found.column("row").to_pylist() == [0, 2] and list(rejected) == [1]
        pictures.append(tensors.from_arrow(found, "image"))
    assert torch.equal(*pictures)
    assert counted.waits == ["_to_copy back"] * 2
    # Bytes are made there: of floats the host would be sent four times as much.
    assert [name for name in ("clamp", "round", "isfinite") if counted.operations[name]] == ["clamp", "round"]


def test_the_shapes_model_s_network_is_told_its_times_without_a_wait():
    """And says on the device what it says on the CPU."""
    pytest.importorskip("latentmill_shapes")
    found, x = [], torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.9, 0.2], dtype=torch.float64)
    with torch.inference_mode(), pretended() as counted:
        for device in (CPU, DEVICE):
            encoder, denoiser = build("text_encoder", {"name": "shapes"}), build("denoiser", {"name": "shapes"})
            encoder.load(device)
            denoiser.load(device)
            prompts = encoder.encode(["a red star on a blue background"] * 2)
            counted.clear()
            found.append(denoiser.predict(x.to(device, non_blocking=True), t, prompts))
            assert counted.waits == []
        torch.testing.assert_close(found[0], found[1].cpu(), rtol=0, atol=1e-5)

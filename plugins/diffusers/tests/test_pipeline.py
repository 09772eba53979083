"""Pipelines run by their parts against the pipelines called directly, on tiny models of the real classes.

``python plugins/diffusers/tests/test_pipeline.py`` writes the README's table of pipelines anew.
"""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from pipelines import SIZES, TESTED, WITH_TORCHVISION, directly, ours, prompts_of, stages, table_of, theirs

from latentmill_diffusers.pipeline import known
from latentmill_diffusers.pipeline.absent import Absent
from latentmill_diffusers.vae import DiffusersVAE

pytestmark = pytest.mark.usefixtures("plain_convolutions")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- pipelines, by tests/test_pipeline.py -->\n", "<!-- end of pipelines -->\n"


class Loaded:
    """A pipeline's two stages, and itself, whole: loaded once for the tests below."""

    def __init__(self, name, folder):
        self.name, self.folder, self.made = name, folder, {}
        self.encode, self.denoise = stages(folder, name)
        self.spec, self.whole = self.denoise.spec, directly(folder, name)

    def table(self, guidance, size=None):
        return table_of(prompts_of(self.name), guidance=guidance, size=size or SIZES.get(self.name, (16, 32)))

    def ours(self, guidance):
        """The latents of its table."""
        if guidance not in self.made:
            self.made[guidance] = ours(self.encode, self.denoise, self.table(guidance))
        return self.made[guidance]


@pytest.fixture(scope="module", params=TESTED)
def loaded(request, model):
    return Loaded(request.param, model(request.param))


def test_the_same_latents_as_the_pipeline(loaded):
    low = 1.0 if loaded.name == "PRXPipeline" else 0.5  # it refuses less
    for guidance in (3.0, low):
        wanted = theirs(loaded.whole, loaded.name, loaded.spec, loaded.table(guidance))
        for found, each in zip(loaded.ours(guidance), wanted, strict=True):
            assert float((found - each).norm() / each.norm()) <= 2e-6
    assert not torch.allclose(loaded.ours(3.0)[1], loaded.ours(low)[1], atol=1e-4)


@pytest.mark.parametrize("size", ["oblong", "cube"])
def test_the_same_picture_as_the_pipeline(loaded, size):
    """Latents of the VAE's shape may still be in an order that it doesn't know; where all sides are equal no shape tells."""
    side = loaded.spec.channels * loaded.spec.downscale
    if size == "cube" and SIZES.get(loaded.name, (0, 0))[0] > side:
        pytest.skip(f"its sizes are multiples of {SIZES[loaded.name][0]}, or those of a list")
    if size == "cube":
        table = loaded.table(3.0, (side, side)).slice(1, 1)
        [latents] = ours(loaded.encode, loaded.denoise, table)
    else:
        table, latents = loaded.table(3.0).slice(1, 1), loaded.ours(3.0)[1]
    vae = DiffusersVAE(str(loaded.folder))
    vae.load(torch.device("cpu"))
    with torch.inference_mode():
        found = vae.decode(latents[None])[0].permute(1, 2, 0).clamp(-1, 1)
    [wanted] = theirs(loaded.whole, loaded.name, loaded.spec, table, "np")
    if wanted.shape[2] == 4:  # transparent, on white
        wanted = 1 + (wanted[..., :3] - 1) * wanted[..., 3:]
    assert np.abs((found.numpy() + 1) / 2 - wanted).max() <= 1e-4


@pytest.mark.parametrize("name", ["Ideogram4Pipeline", "Kandinsky3Pipeline"])
@torch.inference_mode()
def test_pictures_become_the_latents_that_its_pictures_are_made_of(name, model):
    vae = DiffusersVAE(str(model(name)))
    vae.load(torch.device("cpu"))
    pictures = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = vae._model.encode(pictures)
    z = encoded.latents if name == "Kandinsky3Pipeline" else encoded.latent_dist.mode()
    plain = {"force_not_quantize": True} if name == "Kandinsky3Pipeline" else {}
    wanted = vae._model.decode(z, **plain).sample
    torch.testing.assert_close(vae.decode(vae.encode(pictures)), wanted, rtol=1e-5, atol=1e-5)
    assert (vae.spec.scale, vae.spec.shift) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["ChromaPipeline", "LongCatImagePipeline", "ZImagePipeline"])
def test_each_stage_has_only_its_own_parts(name, model):
    encode, denoise = stages(model(name), name)
    assert isinstance(encode.pipeline.transformer, Absent) and isinstance(encode.pipeline.vae, Absent)
    assert isinstance(denoise.pipeline.text_encoder, Absent) and isinstance(denoise.pipeline.vae, Absent)
    assert isinstance(encode.pipeline.text_encoder, torch.nn.Module) and encode.pipeline.tokenizer is not None
    assert isinstance(denoise.pipeline.transformer, torch.nn.Module) and denoise.pipeline.tokenizer is None
    assert encode.fingerprint() != denoise.fingerprint()


# ------------------------------------------------------------------------------------------------------- the list

ALSO = """
    BriaFiboPipeline BriaFibo2Pipeline BriaPipeline Cosmos2TextToImagePipeline DreamLitePipeline ErnieImagePipeline
    HiDreamImagePipeline HunyuanImagePipeline Kandinsky5T2IPipeline LongCatImagePipeline OmniGenPipeline PRXPixelPipeline
    SanaSprintPipeline
""".split()
"""Text-to-image pipelines that diffusers' own list of them leaves out."""
OF_OTHER_INPUTS = ("Control", "PAG", "Kontext", "Inpaint", "Helios", "Omni", "Combined")


def table():
    """The README's table."""
    names = {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    names = {name for name in names if not any(word in name for word in OF_OTHER_INPUTS)} | set(ALSO)
    lines = ["| pipeline of diffusers | |\n", "|---|---|\n"]
    for name in sorted(names | set(TESTED)):
        reason = known.refused(getattr(diffusers, name))
        verdict = "works" if name in TESTED else f"no: {reason}" if reason else "not tried"
        verdict = "works; asks for torchvision" if name in WITH_TORCHVISION else verdict
        lines.append(f"| {name} | {verdict} |\n")
    return "".join(lines)


def test_the_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), f"python {Path(__file__).name} writes it anew"


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")

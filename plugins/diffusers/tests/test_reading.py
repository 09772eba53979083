"""Models that tests read: each has its own, and it is that of the files."""

import shutil

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file


def test_who_reads_again_gets_what_is_in_the_file_whatever_became_of_the_first(model):
    read = diffusers.AutoencoderKL.from_pretrained
    folder = model("StableDiffusionPipeline") / "vae"
    wanted = load_file(next(folder.glob("*.safetensors")))
    first, second = read(folder), read(folder)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    first.decoder.mid_block = None
    for found in (second, read(folder)):
        assert found.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    assert read(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_are_one_stay_one(model):
    for _ in range(2):
        encoder = transformers.T5EncoderModel.from_pretrained(model("FluxPipeline") / "text_encoder_2")
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_a_file_that_has_changed_is_read_anew(model, tmp_path):
    folder = shutil.copytree(model("StableDiffusionPipeline") / "vae", tmp_path / "vae")
    diffusers.AutoencoderKL.from_pretrained(folder)
    path = next(folder.glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    found, wanted = diffusers.AutoencoderKL.from_pretrained(folder).state_dict(), load_file(path)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())

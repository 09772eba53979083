"""``latentmill export`` of what text encoders made of prompts: each read as its trainer's loader reads it, with its numbers worked out by hand."""

import glob
import os

import numpy as np
import pytest
import safetensors
import torch
from tests.outside.test_export_caches import automodel
from tests.outside.trainer_parts import PICTURES, files

POINTS = "[latentmill.text_encoders]\nletters = acme_letters:Letters\n"
CODE = '''
import torch
from latentmill.plugin import TextEncoder

SHAPES = {"sdxl": (77, 2048, 1280), "flux": (512, 4096, 768), "z-image": (512, 2560, 0), "qwen-image": (1024, 3584, 0)}


class Letters(TextEncoder):
    """Of a prompt's token t, each a letter, every number is ``letters + t / 1024``, and those from 768 on are minus that; the pooled ones
    are the letters. Of models that are told the length zeros are behind it."""

    contract = 2

    def __init__(self, model: str = "sdxl", max_length: int | None = None, dtype: str = "float32", clip_skip: int | None = None):
        self.tokens, self.width, self.pooled = SHAPES[model]
        self.tokens, self.dtype = max_length or self.tokens, getattr(torch, dtype)

    def encode(self, prompts):
        letters = torch.tensor([len(prompt) for prompt in prompts])
        place = torch.arange(self.tokens)
        sign = torch.where(torch.arange(self.width) < 768, 1, -1)
        embeds = ((letters[:, None] + place / 1024)[..., None] * sign).to(self.dtype)
        if self.pooled:
            return {"embeds": embeds, "pooled": letters[:, None].repeat(1, self.pooled).to(self.dtype)}
        inside = place < letters[:, None]
        return {"embeds": embeds * inside[..., None], "length": letters}
'''
TOM = 'a cat, ünder "quotes"'
"""21 letters, of which there are more bytes."""
BOTH = "flow=[read, encode_images, encode_text, write]"


@pytest.fixture
def texts(trainers, install):
    """``texts(MODEL, *settings)``: a dataset of the pictures' prompts, made once."""
    install("letters", POINTS, acme_letters=CODE)

    def texts(model, *settings, family="sd"):
        flow = [] if any(each.startswith("flow=") for each in settings) else ["flow=[read, encode_text, write]"]
        return trainers.encode(family, "text_encoder.name=letters", f"+text_encoder.model={model}", *flow, *settings)

    return texts


# ------------------------------------------------------------------------------------------------------- sd-scripts


def kohya(folder, picture):
    """What the trainer loads for a picture: by its name alone."""
    found = np.load(os.path.splitext(folder / picture)[0] + "_te_outputs.npz")
    assert {*found} == {"hidden_state1", "hidden_state2", "pool2"}
    return found["hidden_state1"], found["hidden_state2"], found["pool2"]


@pytest.mark.parametrize(
    ("dtype", "stored", "last"),
    [
        ("float32", np.float32, 21 + 76 / 1024),
        ("float16", np.float16, 21.078125),  # of steps of 1 / 64 the nearest to 21.0742
        ("bfloat16", np.float32, 21.125),  # of steps of 1 / 8; numpy has none, and the trainer makes it float32
    ],
)
def test_sd_scripts_loads_sdxl_s_two_text_encoders_apart(texts, trainers, dtype, stored, last):
    folder = trainers.export(texts("sdxl", f"+text_encoder.dtype={dtype}"), "kohya-sdxl-text")
    assert [*files(folder)] == ["a b_te_outputs.npz", "cats/dog.v2_te_outputs.npz", "cats/tom_te_outputs.npz"]
    first, second, pooled = kohya(folder, "cats/tom.png")
    assert (first.shape, second.shape, pooled.shape) == ((77, 768), (77, 1280), (1280,))
    assert {each.dtype for each in (first, second, pooled)} == {np.dtype(stored)}
    assert np.unique(first[0]).tolist() == [21] and np.unique(second[0]).tolist() == [-21]
    assert np.unique(first[76]).tolist() == [last] and np.unique(second[76]).tolist() == [-last]
    assert np.unique(pooled).tolist() == [21]
    assert kohya(folder, "a b.png")[0][0, 0] == len("two blocks") and kohya(folder, "cats/dog.v2.png")[0][0, 0] == 0


def test_latents_and_text_of_a_picture_lie_in_one_folder_where_the_trainer_looks(texts, trainers, latentmill):
    output = texts("sdxl", BOTH, family="sdxl")
    folder = trainers.export(output, "kohya,kohya-sdxl-text,comfyui")
    assert "kohya-sdxl-text: 3 files written" in latentmill.out
    assert {*files(folder / "kohya-sdxl")} == {
        f"{os.path.splitext(name)[0]}{end}"
        for name, size in zip(PICTURES, ("0016x0008", "0008x0024", "0024x0016"))
        for end in (f"_{size}_sdxl.npz", "_te_outputs.npz")
    }
    trainers.export(trainers.encode("sdxl"), "kohya", folder="of-two")
    of_two = trainers.export(texts("sdxl"), "kohya-sdxl-text", folder="of-two")
    assert files(of_two) == files(folder / "kohya-sdxl")


# ----------------------------------------------------------------------------------------------------- musubi-tuner


def musubi(folder, short):
    """What the trainer has of each item: by content key, as it cuts it out of the file's, and the metadata."""
    found = {}
    for path in glob.glob(os.path.join(folder, f"*_{short}_te.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            content = {}
            for key in [*file.keys()]:
                name, dtype = key.removeprefix("varlen_").rsplit("_", 1)
                content[name] = file.get_tensor(key)
                assert str(content[name].dtype) == f"torch.{dtype}" and key.startswith("varlen_") == (short != "fk")
            found[os.path.basename(path).removesuffix(f"_{short}_te.safetensors")] = content, file.metadata()
    return found


@pytest.mark.parametrize(
    ("model", "short", "architecture", "key", "width"),
    [("qwen-image", "qi", "qwen_image", "vl_embed", 3584), ("z-image", "zi", "z_image", "llm_embed", 2560)],
)
def test_musubi_has_of_each_prompt_its_own_tokens(texts, trainers, model, short, architecture, key, width):
    folder = trainers.export(texts(model, "+text_encoder.dtype=bfloat16"), f"musubi-{model}-text")
    found = musubi(folder, short)
    assert {*found} == {"a b", "dog.v2", "tom"} and len(files(folder)) == 3
    content, about = found["tom"]
    assert about == {"architecture": architecture, "caption1": TOM, "format_version": "1.0.1"}
    assert {*content} == {key} and content[key].shape == (21, width) and content[key].dtype == torch.bfloat16
    assert content[key][0].unique().tolist() == [-21, 21] and content[key][0, 767:769].tolist() == [21, -21]
    assert found["a b"][0][key].shape == (10, width) and found["dog.v2"][0][key].shape == (0, width)


def test_each_resolution_of_a_picture_has_its_text_beside_it(texts, trainers):
    areas = ["size.buckets=musubi", "size.area=[1024, 4096]", "samples_per_row=2"]
    folder = trainers.export(texts("z-image", BOTH, *areas, family="flux"), "musubi-z-image,musubi-z-image-text")
    found = [musubi(folder / "musubi-z-image" / side, "zi") for side in ("32", "64")]
    assert [len(each) for each in found] == [3, 3] and len(files(folder)) == 12
    assert [each["tom"][0]["llm_embed"].shape[0] for each in found] == [21, 21]


def test_musubi_has_flux_kontext_s_with_padding(texts, trainers):
    content, about = musubi(trainers.export(texts("flux"), "musubi-flux-kontext-text"), "fk")["tom"]
    assert about["architecture"] == "flux_kontext"
    assert {name: (*value.shape, value.dtype) for name, value in content.items()} == {
        "t5_vec": (512, 4096, torch.float32),
        "clip_l_pooler": (768, torch.float32),
    }
    assert content["t5_vec"][511, :2].tolist() == [21 + 511 / 1024] * 2 and content["clip_l_pooler"][5] == 21


# --------------------------------------------------------------------------------------------------------- AutoModel


@pytest.mark.parametrize(("model", "family", "tokens"), [("flux", "flux", 512), ("qwen-image", "wan", 21)])
def test_automodel_has_text_beside_latents(texts, trainers, model, family, tokens):
    folder = trainers.export(texts(model, BOTH, family=family), "automodel")
    [data] = [data for item, data in automodel(folder) if item["image_path"] == "cats/tom.png"]
    embeds = data["prompt_embeds"].squeeze(0)  # as its loader takes it
    assert embeds.dtype == torch.bfloat16 and embeds.shape[0] == tokens and embeds[0, 767:769].tolist() == [21, -21]
    if model == "flux":
        assert data["pooled_prompt_embeds"].squeeze(0).tolist() == [21] * 768
    else:
        assert "pooled_prompt_embeds" not in data
        path = folder / "8x24" / "000000002-000.pt"
        assert path.stat().st_size < 21 * 3584 * 2 + 10_000, "without the padding that is stored no more"


def test_automodel_leaves_out_text_of_another_model_and_says_so(texts, trainers, latentmill):
    folder = trainers.export(texts("z-image", BOTH, family="flux"), "automodel")
    [line] = [line for line in latentmill.err.splitlines() if "automodel" in line]
    assert line.endswith("are embeds [512, 2560], length: they are left out")
    assert all("prompt_embeds" not in data for _, data in automodel(folder))


# ------------------------------------------------------------------------------------------------------------- all


def test_encodings_of_another_model_or_made_otherwise_are_refused(texts, trainers):
    output = texts("flux")
    assert trainers.refused(output, "kohya-sdxl-text") == (
        "kohya-sdxl-text takes encodings of prompts of Stable Diffusion XL (embeds [77, 2048], pooled [1280]), "
        f"and those of {output} are embeds [512, 4096], pooled [768]"
    )
    short = texts("qwen-image", "+text_encoder.max_length=512")
    said = trainers.refused(short, "musubi-qwen-image-text")
    assert said.endswith("are embeds [512, 3584], length: make them with text_encoder.max_length=1024")
    skipped = texts("sdxl", "+text_encoder.clip_skip=1")
    assert trainers.refused(skipped, "kohya-sdxl-text").endswith("pooled [1280], made with text_encoder.clip_skip")
    encoded = trainers.encode("sdxl")
    assert trainers.refused(encoded, "kohya-sdxl-text") == (
        f"kohya-sdxl-text needs prompt:embeds, and {encoded} has none: a job with encode_text in its flow stores what "
        "a model's text encoders make (latentmill run encode_text)"
    )


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("kohya-flux-text", "T5's attention mask"), ("kohya-sd3-text", "masks"), ("kohya-lumina-text", "token ids")],
)
def test_what_would_have_to_be_guessed_is_not_made(texts, trainers, name, lacks):
    said = trainers.refused(texts("flux"), name)
    assert said.startswith(f"{name} is not made: sd-scripts caches ") and lacks in said


def test_two_pictures_of_one_name_are_refused(texts, trainers):
    """sd-scripts has one file for a.png and a.jpg, and musubi one for a.png of all folders."""
    (trainers.pictures / "cats/tom.png").rename(trainers.pictures / "cats" / "a b.png")
    output = trainers.own("sd", "text_encoder.name=letters", "+text_encoder.model=z-image", "flow=[read, encode_text, write]")  # fmt: skip
    assert "would both be a b_zi_te.safetensors" in trainers.refused(output, "musubi-z-image-text")


@pytest.mark.parametrize("sink", ["parquet", "webdataset"])
def test_an_export_that_goes_on_is_equal(texts, trainers, latentmill, sink):
    output = texts("sdxl", f"sink={sink}")
    folder = trainers.export(output, "kohya-sdxl-text")
    before = files(folder)
    (folder / "cats" / "tom_te_outputs.npz").unlink()
    (folder / "a b_te_outputs.npz").write_bytes(b"cut short")
    trainers.export(output, "kohya-sdxl-text")
    assert "kohya-sdxl-text: 2 files written, 1 were there" in latentmill.out
    assert files(folder) == before
    assert before == files(trainers.export(texts("sdxl"), "kohya-sdxl-text", folder="of-parquet"))


def test_formats_without_text_pass_it_by(texts, trainers):
    output = texts("sdxl", BOTH, family="sdxl")
    plain = files(trainers.export(trainers.encode("sdxl"), "comfyui", folder="plain"))
    assert files(trainers.export(output, "comfyui", folder="with-text")) == plain

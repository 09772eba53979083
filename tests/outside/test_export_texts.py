"""``latentmill export`` of what text encoders made of prompts: each read as its trainer's loader reads it, with its numbers worked out by hand."""

import glob
import hashlib
import os

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from tests.outside.test_export_caches import automodel
from tests.outside.trainer_parts import PICTURES, files

POINTS = "[latentmill.text_encoders]\nletters = acme_letters:Letters\n"
CODE = '''
import torch
from latentmill.plugin import TensorSpec, TextEncoder

SHAPES = {
    "sdxl": (77, 2048, 1280),
    "sd3": (333, 4096, 2048),
    "flux": (512, 4096, 768),
    "lumina": (256, 2304, 0),
    "z-image": (512, 2560, 0),
    "qwen-image": (1024, 3584, 0),
}


class Letters(TextEncoder):
    """Of a prompt's token t, each a letter, every number is ``letters + t / 1024``, and those from 768 on are minus that; the pooled ones
    are the letters. Of models that are told the length zeros are behind it; Lumina is told a mask."""

    contract = 2

    def __init__(self, model: str = "sdxl", max_length: int | None = None, dtype: str = "float32", clip_skip: int | None = None):
        self.tokens, self.width, self.pooled = SHAPES[model]
        self.masks = model == "lumina"
        self.tokens, self.dtype = max_length or self.tokens, getattr(torch, dtype)

    def conditioning_spec(self):
        return {name: TensorSpec.of(value[0]) for name, value in self.encode([""]).items()}

    def encode(self, prompts):
        letters = torch.tensor([len(prompt) for prompt in prompts])
        place = torch.arange(self.tokens)
        sign = torch.where(torch.arange(self.width) < 768, 1, -1)
        embeds = ((letters[:, None] + place / 1024)[..., None] * sign).to(self.dtype)
        if self.pooled:
            return {"embeds": embeds, "pooled": letters[:, None].repeat(1, self.pooled).to(self.dtype)}
        inside = place < letters[:, None]
        if self.masks:
            return {"embeds": embeds, "mask": inside.long()}
        return {"embeds": embeds * inside[..., None], "length": letters}
'''
TOM = 'a cat, ünder "quotes"'
"""21 letters, of which there are more bytes."""
BOTH = "flow=[read, encode_images, encode_text, write]"


@pytest.fixture
def texts(trainers, install):
    """``texts(MODEL, *settings)``: a dataset of the pictures' prompts, made once."""
    install("letters", POINTS, acme_letters=CODE)

    def texts(model, *settings, family="sd", own=False):
        flow = [] if any(each.startswith("flow=") for each in settings) else ["flow=[read, encode_text, write]"]
        made = trainers.own if own else trainers.encode
        return made(family, "text_encoder.name=letters", f"+text_encoder.model={model}", *flow, *settings)

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


def loaded(folder, picture, suffix, wanted, flags):
    """What the trainer loads for a picture, by name, if the file is valid where ``flags`` are off."""
    path = os.path.splitext(folder / picture)[0] + suffix
    found = np.load(path)
    assert {*found} == {*wanted, *flags}
    assert not any(found[flag] for flag in flags)
    return [torch.FloatTensor(found[name]) for name in wanted]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sd_scripts_loads_sd3_s_clip_and_t5_apart(texts, trainers, dtype):
    folder = trainers.export(texts("sd3", f"+text_encoder.dtype={dtype}"), "kohya-sd3-text")
    assert [*files(folder)] == ["a b_sd3_te.npz", "cats/dog.v2_sd3_te.npz", "cats/tom_sd3_te.npz"]
    names = ["lg_out", "t5_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"]
    flags = ["apply_lg_attn_mask", "apply_t5_attn_mask"]
    clip, t5, pooled, *masks = loaded(folder, "cats/tom.png", "_sd3_te.npz", names, flags)
    assert (clip.shape, t5.shape, pooled.shape) == ((77, 2048), (256, 4096), (2048,))
    assert clip[0].unique().tolist() == [-21, 21] and clip[0, 767:769].tolist() == [21, -21]
    first = 21 + 77 / 1024 if dtype == "float32" else 21.125
    assert t5[0].unique().tolist() == [-first, first] and pooled.unique().tolist() == [21]
    assert [(len(mask), mask.unique().tolist()) for mask in masks] == [(77, [1]), (77, [1]), (256, [1])]


def test_sd_scripts_loads_flux_s_two(texts, trainers):
    folder = trainers.export(texts("flux", "+text_encoder.dtype=float16"), "kohya-flux-text")
    names = ["l_pooled", "t5_out", "txt_ids", "t5_attn_mask"]
    pooled, t5, ids, mask = loaded(folder, "a b.png", "_flux_te.npz", names, ["apply_t5_attn_mask"])
    assert (pooled.shape, t5.shape, ids.shape, mask.shape) == ((768,), (512, 4096), (512, 3), (512,))
    assert np.load(folder / "a b_flux_te.npz")["t5_out"].dtype == np.float16
    assert pooled.unique().tolist() == [10] and t5[511, 767:769].tolist() == [10.5, -10.5]
    assert not ids.any() and mask.all()


def test_sd_scripts_loads_lumina_s_with_its_mask(texts, trainers):
    folder = trainers.export(texts("lumina", "+text_encoder.dtype=bfloat16"), "kohya-lumina-text")
    names = ["hidden_state", "input_ids", "attention_mask"]
    states, ids, mask = loaded(folder, "cats/tom.png", "_lumina_te.npz", names, [])
    assert (states.shape, ids.shape, mask.shape) == ((256, 2304), (256,), (256,))
    stored = np.load(folder / "cats/tom_lumina_te.npz")
    assert [stored[name].dtype for name in names] == [np.float32, np.int64, np.int64]
    assert states[0, 767:769].tolist() == [21, -21] and mask.tolist() == [1.0] * 21 + [0.0] * 235 and not ids.any()
    assert not loaded(folder, "cats/dog.v2.png", "_lumina_te.npz", names, [])[2].any()


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
    found = [musubi(folder / side, "zi") for side in ("32", "64")]
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


# ------------------------------------------------------------------------------------------------------- SimpleTuner


@pytest.mark.parametrize("rows", [1, 4])
def test_simpletuner_has_a_file_for_each_caption(texts, trainers, latentmill, rows):
    """Twice the same pictures: a file is the first row's of its caption, though each of them would have written it."""
    output = texts("sdxl", "+text_encoder.dtype=bfloat16", "samples_per_row=2", f"rows_per_shard={rows}")
    folder = trainers.export(output, "simpletuner-sdxl-text")
    assert "simpletuner-sdxl-text: 3 files written\n" in latentmill.out
    captions = {hashlib.md5(caption.encode()).hexdigest(): len(caption) for caption in (TOM, "two blocks", "")}
    assert {*files(folder)} == {f"{name}-sdxl.pt" for name in captions}
    for name, letters in captions.items():
        found = torch.load(folder / f"{name}-sdxl.pt", weights_only=True)
        assert {key: (*value.shape, value.dtype) for key, value in found.items()} == {
            "prompt_embeds": (1, 77, 2048, torch.bfloat16),
            "pooled_prompt_embeds": (1280, torch.bfloat16),
        }
        assert found["prompt_embeds"][0, 0, 767:769].tolist() == [letters, -letters]
        assert found["pooled_prompt_embeds"].unique().tolist() == [letters]
    trainers.export(output, "simpletuner-sdxl-text")
    assert "simpletuner-sdxl-text: 0 files written, 3 were there" in latentmill.out


def test_a_caption_s_file_goes_from_shard_to_shard_and_stays(texts, trainers, latentmill):
    """Which rows there are in other shards decides whose file it is; it is the same whoever writes it, and goes with the last."""
    table = trainers.root / "list.csv"
    table.write_text("prompt,image\na cat,1.png\na dog,2.png\na cat,3.png\nan owl,4.png\n")

    def picture(*numbers):
        for number in numbers:
            Image.new("RGB", (8, 8)).save(trainers.root / f"{number}.png")

    def export(*settings):
        output = texts("sdxl", BOTH, "source=prompts", f"source.path={table}", "max_error_rate=1", *settings, own=True)
        folder = trainers.export(output, "simpletuner-sdxl-text")
        there = {path.partition("-")[0] for path in files(folder)}
        return [prompt for prompt in ("a cat", "a dog", "an owl") if hashlib.md5(prompt.encode()).hexdigest() in there]

    picture(2, 3)
    assert export() == ["a cat", "a dog"], "a cat's is of the second shard"
    picture(1, 4)
    assert export("--retry-failed") == ["a cat", "a dog", "an owl"], "and now of the first"
    (trainers.root / "1.png").unlink()
    (trainers.root / "encoded" / "data" / "00000.parquet").write_bytes(b"damaged")
    latentmill("verify", trainers.root / "encoded", "--repair")
    assert export() == ["a cat", "a dog", "an owl"], "and of the second again"


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


def test_what_would_have_to_be_guessed_is_not_made(texts, trainers):
    said = trainers.refused(texts("flux"), "musubi-wan-text")
    assert said == "musubi-wan-text is not made: no text encoder of ours makes what Wan's does"


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

"""The text encoder ``comfy``: conditioning against ComfyUI's own, and what becomes of rows."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy_words
import pytest
import torch
from safetensors.torch import save_file

from latentmill.plugin import RowError, TensorSpec
from latentmill.testing import TextEncoderSuite
from latentmill_comfy.text_encoder import ComfyTextEncoder

VALUES = Path(__file__).parent / "values"
PROMPTS: dict[str, str] = json.loads((VALUES / "prompts.json").read_text(encoding="utf-8"))
EXPECTED: dict[str, Any] = json.loads((VALUES / "conditioning.json").read_text(encoding="utf-8"))
COMFYUI = EXPECTED.pop("made by")


def files(*names, **settings):
    return {"files": [f"{name}.safetensors" for name in names], **settings}


def checkpoint(name, **settings):
    return {"checkpoint": f"{name}.safetensors", **settings}


def words(name):
    return {"words": PROMPTS.get(name, "")}


def sd3(clip_l, clip_g, t5xxl, empty_padding="none"):
    texts = {"clip_l": words(clip_l), "clip_g": words(clip_g), "t5xxl": words(t5xxl)}
    return checkpoint("sd3", positive={"sd3": {**texts, "empty_padding": empty_padding}})


SIZES = {"width": 1024, "height": 768, "crop_w": 8, "crop_h": 16, "target_width": 512, "target_height": 640}
FLUX = files("t5xxl", "clip_l", type="flux")
EMPTY = ""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"sd1/{name}": (name, checkpoint("sd1")) for name in PROMPTS},
    **{
        f"{m}/{name}": (name, checkpoint(m))
        for m in ("sd2", "sdxl", "sd3")
        for name in ("plain", "weights", "long", "two")
    },
    "sdxl/both": ("both", checkpoint("sdxl")),
    "refiner/weights": ("weights", checkpoint("refiner")),
    **{f"sd1/skip-{n}": ("weights", checkpoint("sd1", clip_skip=n - 1)) for n in (1, 2, 3, 24)},
    **{f"sdxl/skip-{n}": ("weights", checkpoint("sdxl", clip_skip=n - 1)) for n in (1, 3)},
    **{f"sd3/skip-{n}": ("plain", checkpoint("sd3", clip_skip=n - 1)) for n in (1, 2)},
    "files/sd1": ("weights", files("clip_l")),
    "files/refiner": ("weights", files("clip_g")),
    "files/sdxl": ("weights", files("clip_l", "clip_g")),
    **{f"flux/{name}": (name, FLUX) for name in ("plain", "weights", "very_long")},
    "flux/skip-2": ("plain", {**FLUX, "clip_skip": 1}),
    "flux/fp8": ("weights", files("clip_l", "t5xxl_fp8_e4m3fn", type="flux")),
    "flux/scaled": ("weights", files("clip_l", "t5xxl_scaled", type="flux")),
    "flux/two_texts": (EMPTY, {**FLUX, "positive": {"flux": {"clip_l": words("plain"), "t5xxl": words("weights")}}}),
    **{
        f"sd3/{'+'.join(names)}": ("weights", files(*names, type="sd3"))
        for names in (
            ("clip_l", "clip_g"),
            ("clip_g", "t5xxl"),
            ("clip_l", "t5xxl"),
            ("clip_l",),
            ("clip_g",),
            ("t5xxl",),
            ("clip_l", "clip_g", "t5xxl"),
        )
    },
    "nodes/sdxl": (EMPTY, checkpoint("sdxl", positive={"sdxl": {"g": words("long"), "l": words("plain"), **SIZES}})),
    "nodes/refiner": (
        EMPTY,
        checkpoint(
            "refiner", positive={"sdxl_refiner": {"text": words("plain"), "ascore": 7.5, "width": 1024, "height": 768}}
        ),
    ),
    "nodes/sd3": (EMPTY, sd3("plain", "long", "weights")),
    "nodes/sd3_none": (EMPTY, sd3(EMPTY, EMPTY, "plain")),
    "nodes/sd3_no_t5": (EMPTY, sd3("plain", EMPTY, EMPTY)),
    "nodes/sd3_nothing": (EMPTY, sd3(EMPTY, EMPTY, EMPTY)),
    "nodes/sd3_padded": (EMPTY, sd3(EMPTY, EMPTY, "plain", "empty_prompt")),
    "tree/concat": (EMPTY, checkpoint("sdxl", positive={"concat": [words("plain"), words("long")]})),
    "tree/average": (
        EMPTY,
        checkpoint("sdxl", positive={"average": [words("plain"), words("weights")], "strength": 0.7}),
    ),
    "tree/average_short": (
        EMPTY,
        checkpoint("sdxl", positive={"average": [words("long"), words("plain")], "strength": 0.25}),
    ),
    "tree/average_long": (
        EMPTY,
        checkpoint("sdxl", positive={"average": [words("plain"), words("long")], "strength": 0.25}),
    ),
    "tree/sd35": (
        EMPTY,
        checkpoint(
            "sd3",
            positive={
                "combine": [
                    {"timestep_range": {"zero_out": words("plain")}, "start": 0.1, "end": 1.0},
                    {"timestep_range": words("plain"), "start": 0.0, "end": 0.1},
                ]
            },
        ),
    ),
    "sdxl/lora": ("plain", checkpoint("sdxl", loras=[{"file": "words.safetensors", "weight": 0.8}])),
}

OF_TRAINED_WIDTHS = "nodes/sd3_none", "nodes/sd3_no_t5", "nodes/sd3_nothing", "nodes/sd3_padded"
"""What stands for a CLIP that reads nothing is as wide as Stable Diffusion 3's own, and these models are narrower."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return comfy_words.build(tmp_path_factory.mktemp("ComfyUI") / "models")


@pytest.fixture(scope="module")
def encoder(models):
    """A loaded one of these settings."""

    networks: dict[str, Any] = {}

    @cache
    def loaded(settings):
        told = json.loads(settings)
        found = ComfyTextEncoder(models=str(models), **told)
        of = json.dumps([told.get(name) for name in ("checkpoint", "files", "type", "loras")])
        if of not in networks:  # what a file is loaded to is the same for all that is made of it
            found.load(torch.device("cpu"))
            networks[of] = found._networks
        found._networks = networks[of]
        return found

    return lambda **settings: loaded(json.dumps(settings))


def entries(conditioning, row=0):
    """What a row has, as ComfyUI's list of pairs."""
    c = {name: values[row] for name, values in conditioning.items()}
    if "embeds" in c:
        return [{"hidden": c["embeds"], **({"pooled": c["pooled"]} if "pooled" in c else {})}]
    lengths = [length for length in c.pop("length").tolist() if length]
    hidden = c.pop("entries")
    return [
        {"hidden": hidden[k, :length], **{name: value[k] for name, value in c.items()}}
        for k, length in enumerate(lengths)
    ]


def test_all_of_comfyui_s_values_have_a_case():
    assert CASES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", CASES)
def test_conditioning_is_comfyui_s(name, encoder):
    prompt, settings = CASES[name]
    encoded = encoder(**settings).encode([PROMPTS.get(prompt, "")])
    if name not in OF_TRAINED_WIDTHS:
        said = encoder(**settings).conditioning_spec()
        assert said == {name: TensorSpec.of(each[0]) for name, each in encoded.items()}
    found = entries(encoded)
    for mine, theirs in zip(found, EXPECTED[name], strict=True):
        assert list(mine["hidden"].shape) == theirs["shape"]
        assert comfy_words.summary(mine["hidden"]) == pytest.approx(theirs["hidden"], abs=1e-5), COMFYUI
        if "pooled" in mine:  # the networks of Stable Diffusion 1 and 2 read none
            assert comfy_words.summary(mine["pooled"][None]) == pytest.approx(theirs["pooled"], abs=1e-5)
        start, end = (theirs.get(name, default) for name, default in (("start_percent", 0.0), ("end_percent", 1.0)))
        assert "window" not in mine or mine["window"].tolist() == pytest.approx([start, end])


def test_sizes_and_scores_are_what_the_nodes_say(encoder):
    """In the order in which ComfyUI's networks of SDXL are told: height, width, crop (top, left), target height and width."""
    _, settings = CASES["nodes/sdxl"]
    made = encoder(**settings)
    assert made.encode([""])["size"].tolist() == [[[768, 1024, 16, 8, 640, 512]]]
    assert made.encode_negative([None])["size"].tolist() == [[[-1] * 6]]
    _, settings = CASES["nodes/refiner"]
    made = encoder(**settings)
    assert made.encode([""])["score"].tolist() == [[7.5]]
    assert made.encode_negative([""])["score"].tolist() == [[2.5]]
    assert encoder(**checkpoint("refiner")).encode([""])["score"].tolist() == [[6.0]]


def test_official_graph_of_sd35(encoder):
    """The negative prompt counts for the first tenth alone, then zeros; the prompt is one entry, for all of the time."""
    negative = {
        "combine": [
            {"timestep_range": {"zero_out": {"text": "negative_prompt"}}, "start": 0.1, "end": 1.0},
            {"timestep_range": {"text": "negative_prompt"}, "start": 0.0, "end": 0.1},
        ]
    }
    made, plain = encoder(**checkpoint("sd3", negative=negative)), encoder(**checkpoint("sd3"))
    [prompt] = entries(made.encode([PROMPTS["plain"]]))
    assert torch.equal(prompt["hidden"], entries(plain.encode([PROMPTS["plain"]]))[0]["hidden"])
    assert made.encode([PROMPTS["plain"]])["length"].tolist() == [[154, 0]]
    zeros, words = entries(made.encode_negative([PROMPTS["weights"]]))
    assert not zeros["hidden"].any() and not zeros["pooled"].any() and zeros["hidden"].shape == words["hidden"].shape
    assert torch.equal(words["hidden"], entries(plain.encode_negative([PROMPTS["weights"]]))[0]["hidden"])
    assert zeros["window"].tolist() == pytest.approx([0.1, 1.0]) and words["window"].tolist() == pytest.approx(
        [0.0, 0.1]
    )


def test_prompts_of_different_lengths_share_a_call(encoder):
    """Each as long as it is, and the same bits alone and in company."""
    made = encoder(**checkpoint("sdxl"))
    prompts = [PROMPTS["plain"], PROMPTS["long"], PROMPTS["weights"]]
    together = made.encode(prompts)
    assert together["length"].tolist() == [[77], [154], [77]]
    for row, prompt in enumerate(prompts):
        [one], [alone] = entries(together, row), entries(made.encode([prompt]))
        assert torch.equal(one["hidden"], alone["hidden"]) and torch.equal(one["pooled"], alone["pooled"])
        length = len(one["hidden"])
        assert not together["entries"][row, 0, length:].any()


@pytest.mark.parametrize("settings", [checkpoint("sdxl", max_length=77), {**FLUX, "max_length": 256}])
def test_of_one_length_it_is_what_other_denoisers_read(settings, encoder):
    made = encoder(**settings)
    found = made.encode([PROMPTS["plain"]])
    name = "sdxl/plain" if "checkpoint" in settings else "flux/plain"
    assert found.keys() == {"embeds", "pooled"}
    assert comfy_words.summary(found["embeds"][0]) == pytest.approx(EXPECTED[name][0]["hidden"], abs=1e-5)
    with pytest.raises(
        RowError, match=r"prompt of \d+ tokens, in whole chunks, and text_encoder.max_length is (77|256)"
    ):
        made.check(" ".join([PROMPTS["long"]] * 3))


def test_a_missing_embedding_is_the_row_s_error(encoder):
    """ComfyUI says so in its log, and goes on without."""
    made = encoder(**checkpoint("sd1"))
    for prompt in ("a fox, embedding:nobody", "a (fox embedding:nobody, in:1.2) the snow"):
        with pytest.raises(RowError, match="asks for embedding:nobody, and there is no such file"):
            made.check(prompt)
    with pytest.raises(RowError, match="there is no such file"):
        made.check("embedding:../checkpoints/sd1.safetensors")
    made.check("an embedding:two and an embedding:one")  # `one` lies in a folder of its own


def test_words_of_the_job_are_read_before_it_starts(models):
    made = ComfyTextEncoder(models=str(models), **checkpoint("sd1", negative={"words": "embedding:nobody"}))
    with pytest.raises(ValueError, match="embedding:nobody, and there is no such file"):
        made.notices()


def test_an_embedding_of_another_model(encoder):
    """SDXL's CLIP-L may read one of Stable Diffusion 1's alone, and says so; a text encoder that can't is an error of the row."""
    sdxl = encoder(**checkpoint("sdxl"))
    sdxl.check(PROMPTS["two"])
    assert sdxl.warn(PROMPTS["two"]) == "an embedding in the prompt is read by clip_l alone"
    assert sdxl.warn("a fox, embedding:both") == sdxl.warn("a fox") == ""
    with pytest.raises(RowError, match="embedding:two is of another model"):
        encoder(**checkpoint("refiner")).check(PROMPTS["two"])


def test_a_pickle_that_runs_code_is_an_error(encoder, models):
    bad = models / "embeddings/bad.pt"
    torch.save({"string_to_param": {"*": Path("x")}}, bad)
    try:
        with pytest.raises(RowError, match=r"the embedding bad.pt can't be read"):
            ComfyTextEncoder(models=str(models), **checkpoint("sd1")).check("a fox embedding:bad")
    finally:
        bad.unlink()


@pytest.mark.parametrize(
    "content", [[1, 2], {"clip_l": "no"}, {"string_to_param": 3}, {"x": torch.tensor(3.0)}, b"\x80\x04junk"]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_embedding_that_is_none_is_the_row_s_error(content, models):
    bad = models / "embeddings/none.pt"
    bad.write_bytes(content) if isinstance(content, bytes) else torch.save(content, bad)
    try:
        with pytest.raises(RowError, match=r"the embedding none.pt (holds no vectors|can't be read)"):
            ComfyTextEncoder(models=str(models), **checkpoint("sd1")).check("a fox embedding:none")
    finally:
        bad.unlink()


def test_embeddings_may_be_links(tmp_path):
    models = comfy_words.build(tmp_path / "models", "checkpoints/sd1", "embeddings/two")
    comfy_words.build(tmp_path / "shared", "embeddings/sub/one")
    (models / "embeddings/linked.safetensors").symlink_to(tmp_path / "shared/embeddings/sub/one.safetensors")
    (models / "embeddings/shared").symlink_to(tmp_path / "shared/embeddings")
    (models / "embeddings/shared/sub/round").symlink_to(models / "embeddings")
    made = ComfyTextEncoder(models=str(models), **checkpoint("sd1"))
    made.check("embedding:linked.safetensors embedding:one embedding:shared/sub/one")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("\ud83d fox", "half of a character"),
        ("embedding:a\0b", "there is no such file"),
        ("embedding:" + "a" * 300, "there is no such file"),
        ("(" * 400 + "fox" + ")" * 400, "parentheses in each other, more than 300"),
        ("fox " * 10_000, "a prompt of [0-9]+ tokens"),
    ],
)
def test_a_prompt_that_is_no_prompt(prompt, said, encoder):
    with pytest.raises(RowError, match=said):
        encoder(**checkpoint("sd1")).check(prompt)


def test_strange_prompts_are_encoded(encoder):
    made = encoder(**checkpoint("sd1"))
    for prompt in ("🦊 ẗ 狐狸", "(" * 40, ")" * 40, "(fox:0)", "(fox:-2)", "(fox:1e9)"):
        made.check(prompt)
        assert made.encode([prompt])["entries"].isfinite().all()


def test_weights_are_rounded_to_the_dtype_that_is_said(models):
    state = comfy_words.FILES["checkpoints/sd1"]()
    rounded = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    save_file(rounded, models / "checkpoints/rounded.safetensors")
    made = []
    for name, dtype in (("rounded", "float32"), ("sd1", "bfloat16"), ("sd1", "float32")):
        found = ComfyTextEncoder(models=str(models), **checkpoint(name, dtype=dtype))
        found.load(torch.device("cpu"))
        made.append(found.encode([PROMPTS["plain"]])["entries"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


def test_texts_of_further_columns_are_leaves(encoder):
    tree = {"flux": {"clip_l": {"text": "style"}, "t5xxl": {"text": "prompt"}}}
    made = encoder(**FLUX, positive=tree, texts=["style"])
    assert [field.name for field in made.row_fields] == ["style"]
    found = entries(made.encode([PROMPTS["weights"]], style=PROMPTS["plain"]))
    assert comfy_words.summary(found[0]["hidden"]) == pytest.approx(EXPECTED["flux/two_texts"][0]["hidden"], abs=1e-5)
    assert comfy_words.summary(found[0]["pooled"][None]) == pytest.approx(
        EXPECTED["flux/two_texts"][0]["pooled"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give checkpoint, or files: one of both"),
        (checkpoint("sd1", positive={"blend": []}), "text_encoder.positive: blend: expected one of text, words, sdxl"),
        (checkpoint("sd1", positive={"text": "negative_prompt"}), "there is no text 'negative_prompt' there: prompt"),
        (checkpoint("sd1", positive={"concat": [{"text": "prompt"}]}), "positive.concat: expected a list of two"),
        (checkpoint("sd1", positive={"average": [{"text": "prompt"}] * 2, "share": 1}), "share is unknown there"),
        (CASES["nodes/sdxl"][1] | checkpoint("sd1"), "sdxl is a node of other models than sd1"),
        (checkpoint("sdxl", max_length=50), "max_length: sdxl has 77 tokens at least"),
        (files("clip_l", "clip_g", type="flux"), "clip_l and clip_g of type flux are no model that is known here"),
        (files("t5xxl"), "t5xxl of type none are no model that is known here"),
        (files("clip_l", "../checkpoints/sd1"), "leads out of"),
        (files("clip_l", "clip_l"), "are both clip_l"),
    ],
)
def test_what_is_wrong_is_said(settings, said, models):
    with pytest.raises(ValueError, match=said):
        ComfyTextEncoder(models=str(models), **settings)


def test_tokenizers_are_found_in_a_folder_and_never_fetched(models, tmp_path):
    settings = {"models": str(models), **checkpoint("sd1")}
    folder = comfy_words.clip_tokenizer(tmp_path / "some/tokenizer").parents[0]
    given = ComfyTextEncoder(**settings, tokenizers=str(folder))
    assert given.fingerprint() == ComfyTextEncoder(**settings).fingerprint()
    with pytest.raises(ValueError, match="has no tokenizer of T5's in it"):
        ComfyTextEncoder(models=str(models), **FLUX, tokenizers=str(folder)).fingerprint()


def test_the_fingerprint_follows_what_is_read(tmp_path):
    """Of the embeddings those that the job's own words name; others that lie there are nothing to it, and a prompt's are told of by it."""

    def made(**settings):
        return ComfyTextEncoder(models=str(tmp_path / "models"), **checkpoint("sd1"), **settings)

    named = {"negative": {"words": "embedding:two"}}
    comfy_words.build(tmp_path / "models", "checkpoints/sd1", "embeddings/two")
    before = [made().fingerprint(), made(**named).fingerprint(), made().fingerprint_of("a embedding:two")]
    assert made().fingerprint_of("a fox") == "" and before[2]
    comfy_words.build(tmp_path / "models", "embeddings/sub/one")
    after = [made().fingerprint(), made(**named).fingerprint(), made().fingerprint_of("a embedding:two")]
    assert after == before
    vectors = comfy_words.vectors(3, comfy_words.CLIP_L)
    save_file({"emb_params": vectors}, tmp_path / "models/embeddings/two.safetensors")
    after = [made().fingerprint(), made(**named).fingerprint(), made().fingerprint_of("a embedding:two")]
    assert [a == b for a, b in zip(after, before)] == [True, False, False]
    further = made(texts=["style"])
    assert further.fingerprint_of("a", style="embedding:two") == after[2] != further.fingerprint_of("a", style="")


class TestSuite(TextEncoderSuite):
    """Of Stable Diffusion 1, with prompts of one chunk and of two."""

    name = "comfy"
    prompts = ("a (red:1.2) fox", PROMPTS["long"], "")
    refused = "a fox, embedding:nobody"

    @pytest.fixture(autouse=True)
    def _of(self, models):
        type(self).text_encoder = staticmethod(partial(ComfyTextEncoder, str(models), **checkpoint("sd1")))

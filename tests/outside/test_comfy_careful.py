"""What a conversion could read wrong without a word: each either counts in the job, or is refused."""

from functools import partial

import pytest
from omegaconf import OmegaConf
from tests.outside.comfy_parts import TEXT_TO_IMAGE, job_of, node, with_changes

CUSTOM = with_changes(
    TEXT_TO_IMAGE,
    _5=node(
        "SamplerCustomAdvanced", noise=["11", 0], guider=["12", 0], sampler=["13", 0], sigmas=["14", 0], latent_image=["4", 0]
    ),
    _11=node("RandomNoise", noise_seed=9),
    _12=node("BasicGuider", model=["1", 0], conditioning=["2", 0]),
    _13=node("KSamplerSelect", sampler_name="euler"),
    _14=node("BasicScheduler", model=["1", 0], scheduler="simple", steps=4, denoise=1.0),
)  # fmt: skip


@pytest.fixture
def job(latentmill, tmp_path):
    return partial(job_of, latentmill, tmp_path)


def test_a_value_that_is_linked_to_a_value_is_that_value(job):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _5={"steps": ["20", 0]},
        _20=node("PrimitiveInt", value=["21", 0]),
        _21=node("INTConstant", value=5.0),
    )
    assert job(workflow)["sampling"]["steps"] == 5


def test_sigmas_are_laid_by_the_model_that_is_sampled(job):
    shifted = node("ModelSamplingSD3", model=["1", 0], shift=3.0)
    for changes in ({"_12": {"model": ["20", 0]}}, {"_14": {"model": ["20", 0]}}):
        line = job(with_changes(CUSTOM, _20=shifted, **changes))
        assert "node 5 SamplerCustomAdvanced: its sigmas, node 14 BasicScheduler, are laid by another model" in line
    pp = with_changes(CUSTOM, _13={"sampler_name": "euler_cfg_pp"})
    assert "node 5 SamplerCustomAdvanced: euler_cfg_pp without a negative is not supported" in job(pp)
    both = with_changes(CUSTOM, _20=shifted, _12={"model": ["20", 0]}, _14={"model": ["20", 0]})
    assert job(both)["denoiser"]["shift"] == 3.0
    lora = node("LoraLoaderModelOnly", model=["1", 0], lora_name="a.safetensors", strength_model=1)
    assert job(with_changes(CUSTOM, _20=lora, _12={"model": ["20", 0]}))["denoiser"]["loras"], "a LoRA lays no sigmas"


@pytest.mark.parametrize(("said", "zsnr"), [({}, False), ({"zsnr": False}, False), ({"zsnr": True}, True)])
def test_what_a_node_says_is_off_is_not_left_to_the_checkpoint(job, said, zsnr):
    """ComfyUI asks the checkpoint only where no node says anything."""
    discrete = node("ModelSamplingDiscrete", model=["1", 0], sampling="v_prediction", **said)
    config = job(with_changes(TEXT_TO_IMAGE, _20=discrete, _5={"model": ["20", 0]}))
    assert (config["denoiser"]["prediction"], config["denoiser"]["zsnr"]) == ("v_prediction", zsnr)


def test_a_node_that_two_samplers_have_their_seed_and_steps_from_is_both_s_in_a_row(job):
    shared = {"seed": ["20", 0], "steps": ["21", 0]}
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _20=node("PrimitiveInt", value=5),
        _21=node("PrimitiveInt", value=4),
        _5=shared,
        _15=node("KSampler", **TEXT_TO_IMAGE["5"]["inputs"] | shared | {"latent_image": ["5", 0]}),
        _6={"samples": ["15", 0]},
    )

    def second(*more):
        config = job(workflow, *more)
        own = {key: value for key, value in config["stages"]["refine"]["sampling"].items() if value is not None}
        return {key: own.get(key) for key in ("seed", "steps", "guidance_scale")}, config["source"].get("columns", {})

    assert second() == ({"seed": None, "steps": None, "guidance_scale": 6.5}, {})
    assert job(workflow)["source"]["rows"] == [{"seed": 5, "refine.seed": 5}]
    table = "source.path=a.csv"
    assert second(table)[0]["seed"] == "row"
    assert job(workflow, table, "comfy.seed=workflow")["source"]["defaults"] == {"seed": 5}
    both = {"steps": "n", "refine.steps": "n"}
    assert second(table, "map.21.value=n") == ({"seed": "row", "steps": 4, "guidance_scale": 6.5}, both)
    own, columns = second(table, "map.5.steps=n")
    assert (own["steps"], columns) == (4, {"steps": "n"}), "the first one's alone"
    text = job(workflow, table, "map.5.steps=n", "comfy.metadata=true")["sink"]["picture_text"]["prompt"]
    values = [text["20"]["inputs"]["value"], text["5"]["inputs"]["steps"], text["21"]["inputs"]["value"]]
    assert values == [{"column": "seed"}, {"column": "steps"}, {"column": "refine.steps"}]


def test_texts_that_only_a_later_sampler_has(job):
    """The first one guides by the positive alone; in rows, too, where it is only the length that counts."""
    again = {**TEXT_TO_IMAGE["5"]["inputs"], "latent_image": ["5", 0]}
    config = job(with_changes(CUSTOM, _15=node("KSampler", **again), _6={"samples": ["15", 0]}))
    assert (config["sampling"]["negative_prompt"], config["sampling"]["guidance_scale"]) == ("fog", 1.0)
    assert config["stages"]["refine"]["sampling"]["guidance_scale"] == 6.5


GUIDED = with_changes(
    TEXT_TO_IMAGE,
    _8=node("DualCLIPLoader", clip_name1="t5.safetensors", clip_name2="l.safetensors", type="flux"),
    _9=node("FluxGuidance", conditioning=["2", 0], guidance=1.5),
    _2={"clip": ["8", 0]},
    _3={"clip": ["8", 0]},
    _5={"positive": ["9", 0], "cfg": 1},
    _15=node("KSampler", **{**TEXT_TO_IMAGE["5"]["inputs"], "latent_image": ["5", 0], "cfg": 1}),
    _6={"samples": ["15", 0]},
)
"""The first of two samplers is told a guidance."""


def test_a_later_sampler_that_is_told_no_guidance_has_comfyui_s(job):
    def second(**changes):
        return job(with_changes(GUIDED, **changes))["stages"]["refine"]["sampling"].get("guidance")

    assert job(GUIDED)["sampling"]["guidance"] == 1.5
    assert second() == 3.5
    own = node("FluxGuidance", conditioning=["2", 0], guidance=2)
    assert second(_10=own, _15={"positive": ["10", 0]}) == 2.0
    assert second(_15={"positive": ["9", 0]}) is None, "of the same node: the row's"
    sdxl = node("DualCLIPLoader", clip_name1="g.safetensors", clip_name2="l.safetensors", type="sdxl")
    text, other = (node("CLIPTextEncode", text="a sea", clip=["18", at]) for at in (0, 1))
    both = {"positive": ["19", 0], "negative": ["19", 0], "model": ["18", 0]}
    network = node("UNETLoader", unet_name="xl.safetensors", weight_dtype="default")
    changes = {"_15": {**both, "model": ["17", 0]}, "_17": network}
    assert second(_18=sdxl, _19=text, **changes) is None, "which takes none"
    checkpoint = node("CheckpointLoaderSimple", ckpt_name="b.safetensors")
    line = job(with_changes(GUIDED, _18=checkpoint, _19=other, _15=both))
    assert "node 15 KSampler: the first sampler says a guidance and this one none" in line


def test_a_text_of_three_question_marks_is_that_text(job):
    """Hydra's word for what is not said."""
    config = job(
        with_changes(
            TEXT_TO_IMAGE,
            _3={"text": "???"},
            _15=node("CLIPTextEncode", text="???", clip=["1", 1]),
            _16=node("ConditioningConcat", conditioning_to=["2", 0], conditioning_from=["15", 0]),
            _5={"positive": ["16", 0]},
        ),
    )
    sampling, words = config["sampling"], config["text_encoder"]["positive"]["concat"][1]["words"]
    assert [sampling["negative_prompt"], words] == ["${oc.decode:\"'???'\"}"] * 2, "as OmegaConf is told it"
    assert OmegaConf.to_container(OmegaConf.create(sampling), resolve=True)["negative_prompt"] == "???"


def test_a_row_s_text_on_both_sides(job):
    """An encoder is told the text of one side at a time: the other has it by a second name."""
    map = ("source.path=a.csv", "map.2.text=prompt")
    config = job(with_changes(TEXT_TO_IMAGE, _5={"negative": ["2", 0]}), *map)
    assert config["text_encoder"]["negative"] == {"text": "positive_text"}
    columns = {"prompt": "prompt", "positive_text": "prompt"}
    assert (config["text_encoder"]["texts"], config["source"]["columns"]) == (["positive_text"], columns)
    zeros = with_changes(
        TEXT_TO_IMAGE, _20=node("ConditioningZeroOut", conditioning=["2", 0]), _5={"negative": ["20", 0]}
    )
    config = job(zeros, *map)
    assert config["text_encoder"]["negative"] == {"zero_out": {"text": "positive_text"}}, "as long as the row's"
    assert job(zeros)["text_encoder"]["negative"] == {"zero_out": {"words": "a lighthouse"}}


def test_a_row_without_a_further_text_has_the_workflow_s(job):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _15=node("CLIPTextEncode", text="in oil", clip=["1", 1]),
        _16=node("ConditioningConcat", conditioning_to=["2", 0], conditioning_from=["15", 0]),
        _5={"positive": ["16", 0]},
    )
    source = job(workflow, "source.path=a.csv", "map.2.text=prompt", "map.15.text=style")["source"]
    assert source["defaults"] == {"style": "in oil"}


def test_batches_that_are_repeated_and_chosen_from(job):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _4={"batch_size": 2},
        _20=node("RepeatLatentBatch", samples=["4", 0], amount=3),
        _21=node("LatentFromBatch", samples=["20", 0], batch_index=3, length=2),
        _5={"latent_image": ["21", 0]},
    )
    assert job(workflow)["source"]["rows"] == [{"seed": 7, "noise_index": k} for k in (3, 4)]
    config = job(workflow, "source.path=a.csv", "map.2.text=prompt")
    assert (config["samples_per_row"], config["source"]["defaults"]) == (2, {"noise_index": 3})
    assert config["sampling"]["first_noise"] == "comfy_each"
    again = {
        "_22": node("VAEEncode", pixels=["6", 0], vae=["1", 2]),
        "_23": node("KSampler", **TEXT_TO_IMAGE["5"]["inputs"] | {"latent_image": ["22", 0]}),
        "_24": node("VAEDecode", samples=["23", 0], vae=["1", 2]),
        "_7": {"images": ["24", 0]},
    }
    assert "node 22 VAEEncode: behind LatentFromBatch of other than the first" in job(with_changes(workflow, **again))
    config = job(with_changes(workflow, _21={"batch_index": 0}, **again))
    assert [of["sampling"]["first_noise"] for of in (config, config["stages"]["refine"])] == ["comfy_each", "comfy"]
    behind = with_changes(
        TEXT_TO_IMAGE, _20=node("RepeatLatentBatch", samples=["5", 0], amount=2), _6={"samples": ["20", 0]}
    )
    assert "node 20 RepeatLatentBatch: it is supported before the first sampler" in job(behind)
    chosen = with_changes(behind, _4={"batch_size": 3}, _20=node("LatentFromBatch", samples=["5", 0], batch_index=9, length=4))  # fmt: skip
    assert job(chosen)["source"]["rows"] == [{"seed": 7, "noise_index": 2}], "the last, if there are not so many"


def test_noise_at_a_sigma_without_a_step_is_refused(job):
    """Of sigmas that are split at 0, the first part is one; KSamplerAdvanced that ends at 0 adds none, as in ComfyUI."""

    def split(step, noise):
        first = CUSTOM["5"]["inputs"] | {"sigmas": ["16", 0], "noise": [noise, 0]}
        second = first | {"sigmas": ["16", 1], "noise": ["18", 0], "latent_image": ["17", 0]}
        more = {"_16": node("SplitSigmas", sigmas=["14", 0], step=step), "_18": node("DisableNoise")}
        return job(with_changes(CUSTOM, **more, _17=node("SamplerCustomAdvanced", **first), _5=second))

    line = "node 17 SamplerCustomAdvanced: noise without a step is not supported, and node 14 BasicScheduler leaves it one sigma"
    assert line in split(0, "11")
    assert "flow" in split(0, "18") and "flow" in split(1, "11")


def test_sizes(job):
    config = job(with_changes(TEXT_TO_IMAGE, _4={"width": "70", "height": 33.0}))
    assert [config["sampling"][name] for name in ("width", "height")] == [64, 32], "as many latents as are whole"
    total = {"image": ["6", 0], "upscale_method": "lanczos", "megapixels": 0.5}
    for more in ({}, {"resolution_steps": 1}):  # which newer nodes have
        scaled = node("ImageScaleToTotalPixels", **total, **more)
        config = job(with_changes(TEXT_TO_IMAGE, _20=scaled, _7={"images": ["20", 0]}))
        assert config["stages"]["image_upscale"]["settings"] == {"method": "lanczos", "megapixels": 0.5}
    scaled = node("ImageScaleToTotalPixels", **total, resolution_steps=8)
    line = job(with_changes(TEXT_TO_IMAGE, _20=scaled, _7={"images": ["20", 0]}))
    assert "node 20 ImageScaleToTotalPixels: resolution_steps 8 is not supported; 1 is" in line


def combined(times):
    nodes, last = {}, "2"
    for k in range(times):
        id = f"{100 + k}"
        nodes[f"_{id}"] = node("ConditioningCombine", conditioning_1=[last, 0], conditioning_2=[last, 0])
        last = id
    return {**nodes, "_5": {"positive": [last, 0]}}


def in_line(times, type, name, first, **inputs):
    ids = [first, *(f"{100 + k}" for k in range(times))]
    return {f"_{id}": node(type, **{name: [before, 0]}, **inputs) for before, id in zip(ids, ids[1:])}, ids[-1]


ZEROED, LAST_ZEROED = in_line(3000, "ConditioningZeroOut", "conditioning", "2")
SCALED, LAST_SCALED = in_line(60, "ImageScaleBy", "image", "6", upscale_method="area", scale_by=1)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (combined(40), "node 106 ConditioningCombine: 128 texts are put together, and 100 are supported"),
        ({**ZEROED, "_5": {"positive": [LAST_ZEROED, 0]}}, "its nodes stand in too long a line"),
        ({**SCALED, "_7": {"images": [LAST_SCALED, 0]}}, "a job of more than 50 stages is not supported"),
        ({"_4": {"batch_size": 10**9}}, "node 4 EmptyLatentImage: batch_size must be from 1 to 4096, not 1000000000"),
        (
            {**ZEROED, "_9999": node("ConditioningCombine", conditioning_1=[LAST_ZEROED, 0], conditioning_2=["2", 0]), "_5": {"positive": ["9999", 0]}},
            "node 9999 ConditioningCombine: the nodes before it stand in too long a line",
        ),
        ({"_6": {"samples": ["5", float("nan")]}}, "node 6 VAEDecode: samples is not linked"),
        ({"_6": {"samples": ["5", float("inf")]}}, "node 6 VAEDecode: samples is not linked"),
        ({"_6": {"samples": ["4", 0]}}, "node 6 VAEDecode: it is supported behind a sampler or an encoded picture, and its latents are empty"),
        (
            {"_20": node("LatentUpscaleBy", samples=["4", 0], upscale_method="area", scale_by=2), "_5": {"latent_image": ["20", 0]}},
            "node 20 LatentUpscaleBy: it is supported behind a sampler or an encoded picture",
        ),
        ({"_5": {"cfg": float("nan")}}, "node 5 KSampler: cfg must be a number, not nan"),
        ({"_5": {"seed": 1 << 64}}, "node 5 KSampler: seed must be from 0 to 18446744073709551615"),
        (
            {"_20": node("FluxGuidance", conditioning=["2", 0], guidance=5), "_5": {"positive": ["20", 0]}},
            "positive and negative have different guidance",
        ),
    ],
)  # fmt: skip
def test_what_is_too_much_or_has_no_equal_is_one_line(job, changes, line):
    found = job(with_changes(TEXT_TO_IMAGE, **changes))
    assert line in found and len(found.splitlines()) == 1

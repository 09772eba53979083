"""The job that a workflow of ComfyUI becomes, as ``--cfg job`` prints it."""

import pytest
import yaml
from tests.outside.comfy_parts import TEXT_TO_IMAGE, node, with_changes, written

MODELS = "${model.models}"


@pytest.fixture
def job(latentmill, tmp_path):
    """``job(WORKFLOW, *OVERRIDES)``: the job's config, whole."""

    def job(workflow, *overrides):
        path = written(tmp_path, workflow)
        assert latentmill("run", path, "--cfg", "job", "comfy.models=/comfy/models", *overrides) == 0, latentmill.err
        return yaml.safe_load(latentmill.out)

    return job


def part(**settings):
    return {"name": "comfy", "models": MODELS, **settings}


def said(config, *keys):
    """What a config says under a key, without what is as in every job."""
    found = config
    for key in keys:
        found = found[key]
    return {key: value for key, value in found.items() if value not in (None, "auto", {})}


def test_text_to_image(job):
    config = job(TEXT_TO_IMAGE)
    whole = part(checkpoint="sd15.safetensors")
    assert config["model"] == {"models": "/comfy/models", "dtype": "float16"}
    assert (config["text_encoder"], config["vae"]) == (whole, whole)
    assert config["denoiser"] == {**whole, "dtype": "${model.dtype}"}
    assert config["scheduler"] == {
        "name": "comfy",
        "sampler": "dpmpp_2m",
        "grid": {"name": "comfy", "scheduler": "karras"},
    }
    assert config["flow"] == ["read", "encode", "denoise", "decode", "write"]
    assert config["source"] == {"name": "rows", "rows": [{"seed": 7}]}
    sampling = {key: config["sampling"][key] for key in ("steps", "guidance_scale", "strength", "width", "height")}
    assert sampling == {"steps": 12, "guidance_scale": 6.5, "strength": 1.0, "width": 64, "height": 32}
    texts = {key: config["sampling"][key] for key in ("prompt", "negative_prompt", "first_noise")}
    assert texts == {"prompt": "a lighthouse", "negative_prompt": "fog", "first_noise": "comfy"}
    assert (config["samples_per_row"], config["output"]) == (1, "out/light")


def test_a_batch_is_rows_of_one_seed_that_are_its_pictures(job):
    config = job(with_changes(TEXT_TO_IMAGE, _4={"batch_size": 3}))
    assert config["source"]["rows"] == [{"seed": 7, "noise_index": k} for k in range(3)]


def test_a_table_gives_what_is_mapped_and_the_workflow_the_rest(job, latentmill):
    batch = with_changes(TEXT_TO_IMAGE, _4={"batch_size": 2})
    overrides = ("source.path=a.csv", 'map."Positive prompt".text=caption', "map.5.seed=seed", "map.5.cfg=cfg")
    config = job(batch, *overrides, "sampling.steps=5")
    columns = {"prompt": "caption", "guidance_scale": "cfg"}
    assert config["source"] == {"name": "prompts", "path": "a.csv", "columns": columns}
    assert config["samples_per_row"] == 2
    assert config["sampling"]["steps"] == 5, "what is given beside the file counts, as for any job"
    config = job(batch, "source.path=a.csv", "map.5.steps=steps", "comfy.seed=workflow")
    assert config["source"]["defaults"] == {"seed": 7, "prompt": "a lighthouse"}
    assert job(batch, "source.path=a.csv")["source"] == {"name": "prompts", "path": "a.csv"}


def test_texts_stand_for_themselves(job):
    config = job(with_changes(TEXT_TO_IMAGE, _2={"text": "${oc.env:HOME} \\${x}"}, _3={"text": "1e5"}))
    assert config["sampling"]["prompt"] == "\\${oc.env:HOME} \\\\\\${x}"
    assert config["sampling"]["negative_prompt"] == "1e5"


def test_loaders_of_parts_loras_and_settings_of_the_noise_schedule(job):
    config = job(
        with_changes(
            TEXT_TO_IMAGE,
            _1=node("UNETLoader", unet_name="flux1.safetensors", weight_dtype="fp8_e4m3fn"),
            _11=node("DualCLIPLoader", clip_name1="t5.safetensors", clip_name2="l.safetensors", type="flux"),
            _12=node("VAELoader", vae_name="ae.safetensors"),
            _13=node(
                "LoraLoader",
                model=["1", 0],
                clip=["11", 0],
                lora_name="a.safetensors",
                strength_model=0.5,
                strength_clip=0,
            ),
            _14=node("LoraLoaderModelOnly", model=["13", 0], lora_name="b.safetensors", strength_model=-1),
            _15=node("ModelSamplingFlux", model=["14", 0], max_shift=1.15, base_shift=0.5, width=64, height=32),
            _16=node("CLIPSetLastLayer", clip=["13", 1], stop_at_clip_layer=-2),
            _17=node("FluxGuidance", conditioning=["2", 0], guidance=3.5),
            _2={"clip": ["16", 0]},
            _3={"clip": ["16", 0]},
            _5={"model": ["15", 0], "positive": ["17", 0], "cfg": 1},
            _6=node("VAEDecodeTiled", samples=["5", 0], vae=["12", 0], tile_size=512, overlap=64),
        )
    )
    loras = [{"file": "a.safetensors", "weight": 0.5}, {"file": "b.safetensors", "weight": -1.0}]
    shift = {"max_shift": 1.15, "base_shift": 0.5, "shift_size": [64, 32]}
    network = part(unet="flux1.safetensors", dtype="${model.dtype}", weight_dtype="fp8_e4m3fn", loras=loras, **shift)
    assert config["denoiser"] == network and config["model"]["dtype"] == "bfloat16"
    assert config["text_encoder"] == part(files=["t5.safetensors", "l.safetensors"], type="flux", clip_skip=1)
    assert config["vae"] == part(
        vae="ae.safetensors", unet="flux1.safetensors", tiling={"tile_size": 512, "overlap": 64}
    )
    assert config["sampling"]["guidance"] == 3.5


def test_a_refiner_goes_on_from_half_way_latents_with_parts_of_its_own(job):
    advanced = {"sampler_name": "euler", "scheduler": "normal", "cfg": 8, "steps": 25}
    config = job(
        with_changes(
            TEXT_TO_IMAGE,
            _5=node(
                "KSamplerAdvanced",
                **advanced,
                add_noise="enable",
                noise_seed=5,
                start_at_step=0,
                end_at_step=20,
                return_with_leftover_noise="enable",
                model=["1", 0],
                positive=["2", 0],
                negative=["3", 0],
                latent_image=["4", 0],
            ),
            _11=node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors"),
            _12=node("CLIPTextEncode", text="a lighthouse", clip=["11", 1]),
            _13=node("CLIPTextEncode", text="rain", clip=["11", 1]),
            _15=node(
                "KSamplerAdvanced",
                **advanced,
                add_noise="disable",
                noise_seed=6,
                start_at_step=20,
                end_at_step=10000,
                return_with_leftover_noise="disable",
                model=["11", 0],
                positive=["12", 0],
                negative=["13", 0],
                latent_image=["5", 0],
            ),
            _6={"samples": ["15", 0], "vae": ["11", 2]},
        ),
        "comfy.tokenizers=/tokenizers",
    )
    assert config["flow"] == ["read", "encode", "denoise", "refine_text", "refine", "decode", "write"]
    grid = {"name": "comfy", "scheduler": "normal"}
    assert config["scheduler"]["grid"] == {**grid, "end_at_step": 20, "leftover_noise": True}
    refine = part(checkpoint="refiner.safetensors")
    stage = said(config, "stages", "refine")
    assert (stage["name"], stage["denoiser"]) == ("denoise", {**refine, "dtype": "${model.dtype}"})
    assert stage["scheduler"] == {"name": "comfy", "sampler": "euler", "grid": {**grid, "start_at_step": 20}}
    assert stage["sampling"] == {"first_noise": "none", "steps": 25, "guidance_scale": 8.0, "strength": 1.0}
    text = said(config, "stages", "refine_text")
    assert text["name"] == "encode_text"
    own = {"negative": {"words": "rain"}, "tokenizers": "/tokenizers"}
    assert config["text_encoder"]["tokenizers"] == "/tokenizers"
    assert text["text_encoder"] == {**refine, **own}, "the other text is the row's prompt here, too"
    assert config["vae"] == refine
    assert config["source"]["rows"] == [{"seed": 5, "refine.seed": 6}]


def test_two_passes_over_larger_latents_and_larger_pictures(job):
    again = {**TEXT_TO_IMAGE["5"]["inputs"], "denoise": 0.5, "seed": 8}
    latents = with_changes(
        TEXT_TO_IMAGE,
        _11=node("LatentUpscaleBy", samples=["5", 0], upscale_method="bislerp", scale_by=1.5),
        _12=node("KSampler", **{**again, "latent_image": ["11", 0]}),
        _6={"samples": ["12", 0]},
    )
    config = job(latents)
    assert config["flow"] == ["read", "encode", "denoise", "latent_upscale", "refine", "decode", "write"]
    assert config["stages"]["latent_upscale"]["settings"] == {"method": "bislerp", "scale": 1.5}
    assert "denoiser" not in said(config, "stages", "refine"), "what a stage doesn't say is the job's"
    assert config["stages"]["refine"]["sampling"]["strength"] == 0.5
    assert config["float_pictures"] is False
    pictures = with_changes(
        TEXT_TO_IMAGE,
        _10=node("UpscaleModelLoader", model_name="4x.pth"),
        _11=node("ImageUpscaleWithModel", upscale_model=["10", 0], image=["6", 0]),
        _12=node("ImageScale", image=["11", 0], upscale_method="area", width=96, height=0, crop="disabled"),
        _13=node("VAEEncode", pixels=["12", 0], vae=["1", 2]),
        _14=node("KSampler", **{**again, "latent_image": ["13", 0]}),
        _15=node("VAEDecode", samples=["14", 0], vae=["1", 2]),
        _7={"images": ["15", 0]},
    )
    config = job(pictures)
    assert config["float_pictures"] is True, "no picture is rounded between two nodes"
    upscales = ["upscale_model", "image_upscale"]
    assert config["flow"] == [
        "read",
        "encode",
        "denoise",
        "decode",
        *upscales,
        "encode_images",
        "refine",
        "decode2",
        "write",
    ]
    assert config["stages"]["upscale_model"]["settings"] == {"model": "4x.pth", "models": MODELS}
    sizes = {"method": "area", "width": 96, "crop": "disabled"}
    assert config["stages"]["image_upscale"]["settings"] == sizes


def test_picture_to_picture(job):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _4=node("LoadImage", image="sub/cat.png [input]", upload="image"),
        _11=node("VAEEncode", pixels=["4", 0], vae=["1", 2]),
        _5={"latent_image": ["11", 0], "denoise": 0.6},
    )
    config = job(workflow)
    rows = [{"image": "sub/cat.png", "seed": 7}]
    assert config["source"] == {"name": "rows", "path": "/comfy/input", "opened": "comfy", "rows": rows}
    assert config["flow"] == ["read", "encode", "denoise", "decode", "write"]
    assert (config["sampling"]["strength"], config["sampling"]["width"]) == (0.6, None)
    assert job(workflow, "comfy.input=/pictures")["source"]["path"] == "/pictures"
    source = job(workflow, "source.path=a.csv")["source"]
    assert source["defaults"] == {"image": "/comfy/input/sub/cat.png"}
    source = job(workflow, "source.path=a.csv", "map.4.image=photo", "map.2.text=prompt")["source"]
    assert source == {"name": "prompts", "path": "a.csv", "columns": {"image": "photo"}, "opened": "comfy"}


def test_noise_sampler_sigmas_and_guider_apart(job):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _5=node(
            "SamplerCustomAdvanced",
            noise=["11", 0],
            guider=["12", 0],
            sampler=["13", 0],
            sigmas=["14", 0],
            latent_image=["4", 0],
        ),
        _11=node("RandomNoise", noise_seed=9),
        _12=node("BasicGuider", model=["1", 0], conditioning=["2", 0]),
        _13=node("KSamplerSelect", sampler_name="dpm_2"),
        _14=node("BasicScheduler", model=["1", 0], scheduler="simple", steps=["15", 0], denoise=1.0),
        _15=node("PrimitiveInt", "How many", value=4),
    )
    config = job(workflow)
    assert config["scheduler"]["grid"] == {"name": "comfy", "scheduler": "simple", "exact_steps": True}
    assert (config["sampling"]["steps"], config["sampling"]["guidance_scale"]) == (4, 1.0)
    assert config["sampling"]["negative_prompt"] is None
    config = job(workflow, "source.path=a.csv", "map.How many.value=n", "map.11.noise_seed=seed")
    assert config["source"]["columns"] == {"steps": "n"}
    plain = job(with_changes(TEXT_TO_IMAGE, _5={"sampler_name": "dpm_2"}))
    assert plain["scheduler"]["grid"]["drop_penultimate"] is True, "as KSampler asks of the grid for this one"


def test_what_stands_between_texts_and_a_sampler(job):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _11=node("ConditioningZeroOut", conditioning=["3", 0]),
        _12=node("ConditioningSetTimestepRange", conditioning=["11", 0], start=0.1, end=1.0),
        _13=node("ConditioningSetTimestepRange", conditioning=["3", 0], start=0.0, end=0.1),
        _14=node("ConditioningCombine", conditioning_1=["12", 0], conditioning_2=["13", 0]),
        _15=node("CLIPTextEncode", text="in oil", clip=["1", 1]),
        _16=node("ConditioningConcat", conditioning_to=["2", 0], conditioning_from=["15", 0]),
        _5={"positive": ["16", 0], "negative": ["14", 0]},
    )
    encoder = job(workflow)["text_encoder"]
    assert encoder["positive"] == {"concat": [{"text": "prompt"}, {"words": "in oil"}]}
    text = {"text": "negative_prompt"}
    late = {"timestep_range": {"zero_out": text}, "start": 0.1, "end": 1.0}
    assert encoder["negative"] == {"combine": [late, {"timestep_range": text, "start": 0.0, "end": 0.1}]}
    mapped = job(workflow, "source.path=a.csv", "map.2.text=prompt", "map.15.text=style")["text_encoder"]
    assert mapped["positive"] == {"concat": [{"text": "prompt"}, {"text": "style"}]}
    assert mapped["texts"] == ["style"]


def test_outputs_that_differ_in_rows_are_rows_and_others_are_chosen(job, latentmill, tmp_path):
    second = {
        "15": node("KSampler", **{**TEXT_TO_IMAGE["5"]["inputs"], "seed": 8, "steps": 20}),
        "16": node("VAEDecode", samples=["15", 0], vae=["1", 2]),
        "17": node("SaveImage", "Second", filename_prefix="b", images=["16", 0]),
        "18": node("SaveImage", filename_prefix="again", images=["16", 0]),
    }
    config = job(TEXT_TO_IMAGE | second)
    assert config["source"]["rows"] == [{"seed": 7, "steps": 12}, {"seed": 8, "steps": 20}]
    second["15"]["inputs"]["scheduler"] = "simple"
    other = TEXT_TO_IMAGE | second
    assert latentmill("run", written(tmp_path, other), "comfy.models=m") == 2
    assert "comfy.output=7 makes one of them, and run -m comfy.output=7,17 each as a job of its own" in latentmill.err
    assert job(other, "comfy.output=Second")["source"]["rows"] == [{"seed": 8}]
    both = ["-m", "comfy.models=m", "comfy.output=7,17", "--cfg", "job"]
    assert latentmill("run", written(tmp_path, other), *both) == 0, latentmill.err
    jobs = [yaml.safe_load(text) for text in latentmill.out.split("---\n") if text.strip()]
    assert [each["output"] for each in jobs] == ["out/light/output=7", "out/light/output=17"]
    assert [each["scheduler"]["grid"]["scheduler"] for each in jobs] == ["karras", "simple"]


def test_pictures_may_carry_the_workflow_with_the_row_s_values(job):
    text = job(TEXT_TO_IMAGE, "comfy.metadata=true")["sink"]["picture_text"]["prompt"]
    assert text["2"]["inputs"]["text"] == {"column": "prompt"}
    assert text["5"]["inputs"]["seed"] == {"column": "seed"} and text["5"]["inputs"]["cfg"] == {
        "column": "guidance_scale"
    }
    kept = {key: text["5"]["inputs"][key] for key in ("sampler_name", "model")}
    assert kept == {"sampler_name": "dpmpp_2m", "model": ["1", 0]}


def test_pictures_of_a_column_are_named_in_no_workflow(latentmill, tmp_path):
    """The dataset has no column of them, and the workflow's own would be another."""
    changes = {"_4": node("LoadImage", image="cat.png"), "_5": {"latent_image": ["11", 0]}}
    workflow = with_changes(TEXT_TO_IMAGE, **changes, _11=node("VAEEncode", pixels=["4", 0], vae=["1", 2]))
    words = ["comfy.models=m", "comfy.metadata=true", "source.path=a.csv", "map.2.text=prompt"]
    assert latentmill("run", written(tmp_path, workflow), *words, "map.4.image=photo", "--cfg", "job") == 2
    assert "map.4.image=photo: with comfy.metadata=true each PNG would name the workflow's picture" in latentmill.err
    assert latentmill("run", written(tmp_path, workflow), *words, "--cfg", "job") == 0, latentmill.err


def test_a_workflow_may_be_submitted_like_any_job(latentmill, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = written(tmp_path, TEXT_TO_IMAGE)
    words = ["submit", path, "--to", "local", "--dry-run", "comfy.models=/comfy/models", "map.2.text=prompt"]
    assert latentmill(*words, "source.path=/a.csv", f"output={tmp_path / 'out'}") == 0, latentmill.err
    assert "ckpt_name" not in latentmill.out and "sampler: dpmpp_2m" in latentmill.out

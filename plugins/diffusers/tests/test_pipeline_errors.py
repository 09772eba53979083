"""What a pipeline that is run by its parts can't do is the row's error, or one line when it is built."""

import json
import shutil

import diffusers
import pytest
import torch
from pipelines import PROMPTS, TESTED, WITH_TORCHVISION, directly, ours, stages, table_of, theirs

from latentmill import registry
from latentmill.errors import PluginError
from latentmill.plugin import tensors
from latentmill_diffusers.pipeline import known


def test_a_picture_is_not_passed_over(model):
    encode, _ = stages(model("ChromaPipeline"), "ChromaPipeline")
    pictures = tensors.with_tensor(table_of(PROMPTS), "image", torch.zeros(3, 32, 64, 3, dtype=torch.uint8))
    said = {}
    assert not list(encode(pictures, said.__setitem__))
    assert said == dict.fromkeys(range(3), "ChromaPipeline begins from noise, and takes no image")


def test_a_size_that_the_pipeline_does_not_make_is_the_row_s_error(model):
    name = "Kandinsky5T2IPipeline"
    encode, denoise = stages(model(name), name)
    [part] = encode(table_of([("a red fox", "")], size=(64, 64)), lambda i, reason: pytest.fail(reason))
    said = {}
    assert not list(denoise(part, said.__setitem__))
    assert said == {0: "Kandinsky5T2IPipeline makes no latents of this size: (4, 8, 16), not (4, 8, 8)"}


def test_a_negative_prompt_that_the_pipeline_does_not_take_is_the_row_s_error(model):
    encode, _ = stages(model("Flux2Pipeline"), "Flux2Pipeline")
    said = {}
    [part] = encode(table_of([("a red fox", ""), ("a red fox", "blurry"), ("a red fox", None)]), said.__setitem__)
    assert said == {1: "Flux2Pipeline takes no negative prompt, and the row has one"} and len(part) == 2


def test_a_pipeline_that_nobody_compared_has_no_rows_whose_axes_can_not_be_told(model, tmp_path, monkeypatch):
    """Here of latents 4 x 4 x 4; others it makes as the pipeline that it is made of."""
    monkeypatch.setattr(diffusers, "NewPipeline", type("NewPipeline", (diffusers.StableDiffusionPipeline,), {}), False)
    folder = shutil.copytree(model("StableDiffusionPipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NewPipeline"}))
    encode, denoise = stages(folder, "NewPipeline")
    said = {}
    [part] = encode(table_of(PROMPTS[:1], size=(8, 8)), said.__setitem__)
    assert not list(denoise(part, said.__setitem__))
    reason = "NewPipeline is not known here, and latents (4, 4, 4) don't show their axes: take another size"
    assert said == {0: reason}
    table = table_of(PROMPTS[:1])
    [found] = ours(encode, denoise, table)
    [wanted] = theirs(directly(folder, "NewPipeline"), "NewPipeline", denoise.spec, table)
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-6
    assert {*known.COMPARED} == {*TESTED, *WITH_TORCHVISION}


def test_layers_that_the_text_encoder_has_not_are_refused_when_it_is_built(model, tmp_path):
    folder = shutil.copytree(model("Krea2Pipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_select_layers": [1, 3]}))
    with pytest.raises(PluginError, match="text_encoder has 2 layers, and Krea2Pipeline takes layer 3's output"):
        registry.build("stage", {"name": "pipeline_encode", "path": str(folder)})


def test_steps_that_the_model_s_own_sigmas_do_not_have_are_the_row_s_error(model, tmp_path):
    """With ``sample_sigmas`` the pipeline makes as many steps as there are, whatever it is told."""
    folder = shutil.copytree(model("QwenImage21Pipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": [1.0, 0.7, 0.3]}))
    encode, denoise = stages(folder, "QwenImage21Pipeline")
    assert len(ours(encode, denoise, table_of(PROMPTS[:1], steps=3))) == 1
    said = {}
    assert not list(encode(table_of(PROMPTS[:1]), said.__setitem__))
    assert said == {0: "QwenImage21Pipeline makes the steps of its model's sample_sigmas: 3 is expected, not 2"}


@pytest.mark.parametrize(
    ("index", "settings", "said"),
    [
        ("IFPipeline", {}, "IFPipeline can't be run by its parts: it makes pixels and no latents"),
        ("NobodysPipeline", {}, "the installed diffusers has no NobodysPipeline"),
        (
            "ChromaPipeline",
            {"call": {"max_sequence_lenght": 3}},
            r"ChromaPipeline takes no 'max_sequence_lenght' \(did",
        ),
        ("ChromaPipeline", {"call": {"guidance_scale": 3}}, "call: guidance_scale is told row by row"),
        ("ChromaPipeline", {"call": {"negative_prompt": "x"}}, "call: negative_prompt is told row by row"),
    ],
)
def test_what_can_not_be_run_is_said_when_it_is_built(index, settings, said, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": index}))
    with pytest.raises(PluginError, match=said):
        registry.build("stage", {"name": "pipeline_encode", "path": str(tmp_path), **settings})


@pytest.mark.parametrize(
    ("name", "scheduler", "config"),
    [
        ("StableDiffusionPipeline", "DPMSolverSDEScheduler", {}),
        ("FluxPipeline", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("QwenImagePipeline", "FlowMatchLCMScheduler", {}),
    ],
)
def test_noise_that_a_scheduler_draws_from_torch_s_own_generator_is_of_the_row_alone(
    model, tmp_path, name, scheduler, config
):
    """These schedulers are given no generator by the pipeline's loop, or ask for none: torch has one for all rows."""
    folder = shutil.copytree(model(name), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": scheduler, **config}))
    table = table_of([("a red fox", ""), ("a red fox", ""), ("a blue owl", "")], steps=3)
    encode, denoise = stages(folder, name)
    state = torch.random.get_rng_state()
    together = ours(encode, denoise, table)
    torch.manual_seed(7)
    again = ours(encode, denoise, table.slice(1))
    alone = [row for at in (2, 1) for row in ours(*stages(folder, name), table.slice(at, 1))]
    assert denoise.alone and all(map(torch.equal, together[1:], again))
    assert all(map(torch.equal, together[:0:-1], alone))
    assert not torch.equal(together[0], together[1]), "their seeds differ"
    torch.random.set_rng_state(state)

"""Prompts that are longer than what a text encoder reads: a warning in the row, or an error, and never a library's log alone."""

import json
import logging
import shutil

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import latentmill
from latentmill.plugin import RowError
from latentmill_diffusers.text_encoder import DiffusersTextEncoder

CLIP = "the prompt is longer than the 77 tokens that the text encoder reads: the rest is cut off"
PARTLY = "the prompt is longer than the 77 tokens that one text encoder of the model reads: another of them reads more"
LONG = "a red fox " * 60


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_every_family_says_which_prompts_it_cuts_off(name, model):
    """Without weights. To the shortest of which it is said no word can be added; of the longest without, the last counts."""
    encoder = DiffusersTextEncoder(str(model(name)))
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(26 * 26)]

    def lost(count):
        return encoder.warn(" ".join(words[:count])).endswith("the rest is cut off")

    few, many = 0, len(words)
    assert not lost(few)
    assert lost(many)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if lost(middle) else (middle, many)
    encoder.load(torch.device("cpu"))
    less, whole, cut, longer = (" ".join(words[:count]) for count in (few - 1, few, many, many + 5))

    def same(one, other):
        with torch.inference_mode():
            a, b = encoder.encode([one]), encoder.encode([other])
        return all(a[key].shape == b[key].shape and bool((a[key] == b[key]).all()) for key in a)

    assert not same(less, whole)
    if "with what the pipeline adds" not in encoder.warn(cut):  # of a template the end is cut off first
        assert same(cut, longer)


def run(
    tmp_path, folder, *overrides, prompts=("a red fox", LONG + "at night", LONG + "in snow"), job="denoise", expected=0
):
    tmp_path.mkdir(exist_ok=True)
    rows = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = [f"model.path={folder}", f"source.path={tmp_path}/prompts.jsonl", f"output={tmp_path}/out", "cluster=inline"]
    size = ["samples_per_row=1", "sampling.steps=1", "sampling.width=32", "sampling.height=32"]
    result = latentmill.run(job, [*told, *size, *overrides])
    assert result.failed == expected
    return result, pq.read_table(tmp_path / "out" / "data").to_pylist()


def test_the_row_is_warned_of_and_the_library_is_silent(model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        result, rows = run(tmp_path, model("StableDiffusionPipeline"), "model=diffusers", "scheduler=model")
        logging.getLogger("diffusers").propagate = False
    assert [row["warning"] for row in rows] == ["", CLIP, CLIP]
    assert rows[1]["latents"] != rows[0]["latents"]
    assert f"warning       2 rows: {CLIP}" in result.text
    assert not any("truncated" in record.getMessage() for record in caplog.records)


def test_or_it_is_an_error(model, tmp_path):
    settings = ("model=diffusers", "scheduler=model", "text_encoder.long_prompts=error")
    _, rows = run(tmp_path, model("StableDiffusionPipeline"), *settings, expected=2)
    assert [row["prompt"] for row in rows] == ["a red fox"]
    errors = [json.loads(line) for line in (tmp_path / "out/errors/00000.jsonl").read_text().splitlines()]
    assert [error["reason"] for error in errors] == [CLIP, CLIP]
    with pytest.raises(ValueError, match="long_prompts must be cut or error, not 'warn'"):
        DiffusersTextEncoder(str(model("StableDiffusionPipeline")), long_prompts="warn")


def test_of_a_negative_prompt_it_is_said_and_where_none_is_read_it_is_no_error(model, tmp_path):
    settings = ("model=diffusers", "scheduler=model", "text_encoder.long_prompts=error")
    negative = f"sampling.negative_prompt={LONG}"
    for name, expected in (("StableDiffusionPipeline", 3), ("FluxPipeline", 0)):
        _, rows = run(tmp_path / name, model(name), *settings, negative, prompts=("a", "b", "c"), expected=expected)
        errors = [json.loads(line)["reason"] for path in (tmp_path / name).glob("out/errors/*") for line in path.open()]
        assert errors == [f"negative_prompt: {CLIP}"] * expected
    assert [row["warning"] for row in rows] == ["not read, since the network guides itself: negative_prompt"] * 3


def test_a_network_that_guides_itself_reads_no_other_guidance(model, tmp_path):
    told = ("model=diffusers", "scheduler=model", "sampling.guidance_rescale=0.5", "sampling.guidance_until=0.2")
    _, rows = run(tmp_path, model("FluxPipeline"), *told)
    assert rows[0]["warning"] == "not read, since the network guides itself: guidance_rescale, guidance_until"
    _, rows = run(tmp_path / "guided", model("StableDiffusionPipeline"), *told)
    assert rows[0]["warning"] == ""


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "HunyuanDiTPipeline"])
def test_a_prompt_that_one_of_several_encoders_reads_whole_is_no_error(name, model):
    encoder = DiffusersTextEncoder(str(model(name)), long_prompts="error")
    encoder.check("x " * 60)
    assert encoder.warn("x " * 60) == PARTLY
    with pytest.raises(RowError, match="the rest is cut off"):
        encoder.check(LONG)


def test_model_pipeline_too(model, tmp_path):
    prompts = ("a red fox", LONG + "at night", "a (red:1.2) fox")
    folder = model("StableDiffusionPipeline")
    _, rows = run(
        tmp_path,
        folder,
        "model=pipeline",
        f"sampling.negative_prompt={'so long ' * 40}",
        prompts=prompts,
        job="txt2img",
    )
    weight = "the prompt holds a weight as (word:1.2), which is read as words"
    negative = f"negative_prompt: {CLIP}"
    assert [row["warning"] for row in rows] == [negative, f"{CLIP}; {negative}", f"{weight}; {negative}"]


def test_what_compel_reads_is_not_warned_of(model):
    folder = str(model("StableDiffusionPipeline"))
    without, with_it = DiffusersTextEncoder(folder), DiffusersTextEncoder(folder, compel=True)
    assert without.reads["compel"] == "text_encoder.compel=true reads it"
    assert with_it.reads["compel"] is None
    assert with_it.reads["weight"] == "compel, which is on, has it as (word)1.2"
    assert set(DiffusersTextEncoder(str(model("SanaPipeline"))).reads) == {"lora"}
    with_it.load(torch.device("cpu"))
    assert with_it.warn("(x)1.2") == ""  # longer than 77 tokens is an error of its own there


def test_compel_cuts_prompts_of_flux_off_as_well(model):
    encoder = DiffusersTextEncoder(str(model("FluxPipeline")), compel=True)
    encoder.load(torch.device("cpu"))
    assert encoder.warn("a (red fox)1.3") == ""
    assert encoder.warn("(x)1.2 " * 40 + "x " * 40) == PARTLY
    assert encoder.warn(LONG).endswith("the 512 tokens that the text encoder reads: the rest is cut off")


def test_what_the_libraries_log_while_they_load_reaches_the_driver(model, tmp_path, caplog):
    """Weights that no layer takes: of diffusers and of transformers. And nothing of what isn't worth a line."""
    folder = tmp_path / "model"
    shutil.copytree(model("StableDiffusionPipeline"), folder)
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        state = load_file(file := folder / f"{part}.safetensors")
        save_file(state | {"left.over": torch.zeros(1)}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "latentmill"):
        run(tmp_path, folder, "model=diffusers", "scheduler=model")
    heard = [record.getMessage() for record in caplog.records if record.name == "latentmill"]
    assert sum(line.startswith("denoise: diffusers.") and "left.over" in line for line in heard) == 1
    assert sum(line.startswith("encode: transformers.") and "left.over" in line for line in heard) == 1
    assert len(heard) == 2, heard

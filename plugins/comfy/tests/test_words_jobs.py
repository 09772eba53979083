"""The text encoder ``comfy`` in a job: prompts of every length in one batch, and rows that ComfyUI would have drawn with less than they ask for."""

import json
from pathlib import Path

import comfy_tiny
import comfy_words
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

import latentmill


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Of four prompts, one of them with an embedding that there is not."""
    folder = tmp_path_factory.mktemp("words")
    models = comfy_words.build(folder / "ComfyUI/models", "checkpoints/sdxl", "embeddings/two")
    prompts = [
        "a (red:1.3) fox",
        "a fox embedding:nobody",
        ", ".join(["a red fox in the snow"] * 8),
        "a fox embedding:two",
    ]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    encoder = ["text_encoder.name=comfy", f"+text_encoder.models={models}", "+text_encoder.checkpoint=sdxl.safetensors"]
    job = ["flow=[read, encode_text, write]", f"source.path={folder / 'prompts.txt'}", f"output={folder / 'out'}"]
    found = latentmill.run("encode_text", [*job, *encoder, "cluster=inline"])
    return found, folder / "out"


def test_a_prompt_cache_tells_an_embedding_by_its_content(tmp_path):
    """A changed file is not given the prompts of the old one, and no other prompt is encoded anew."""
    models = comfy_words.build(tmp_path / "ComfyUI/models", "checkpoints/sd1", "embeddings/two")
    (tmp_path / "prompts.txt").write_text("a fox embedding:two\na fox\n", encoding="utf-8")
    encoder = ["text_encoder.name=comfy", f"+text_encoder.models={models}", "+text_encoder.checkpoint=sd1.safetensors"]
    job = ["flow=[read, encode_text, write]", f"source.path={tmp_path / 'prompts.txt'}", "cluster=inline", *encoder]

    def rows(name, *more):
        latentmill.run("encode_text", [*job, f"output={tmp_path / name}", *more])
        table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / name).glob("data/*.parquet"))])
        return {row["prompt"]: row["prompt:entries"] for row in table.to_pylist()}

    cache = f"prompt_cache={tmp_path / 'cache'}"
    first = rows("first", cache)
    comfy_words.build(models, "embeddings/sub/one")  # another file is nothing to them
    vectors = comfy_words.vectors(3, comfy_words.CLIP_L)
    save_file({"emb_params": vectors}, models / "embeddings/two.safetensors")
    second = rows("second", cache)
    assert second == rows("without") and second["a fox"] == first["a fox"]
    assert second["a fox embedding:two"] != first["a fox embedding:two"]


def test_rows_and_their_errors(dataset):
    found, output = dataset
    table = pa.concat_tables([pq.read_table(path) for path in sorted(Path(output).glob("data/*.parquet"))])
    assert (found.planned, found.ok, found.failed) == (4, 3, 1)
    length = {row["prompt"][:9]: row["prompt:length"] for row in table.to_pylist()}
    assert [*map(int, [length["a (red:1."][0], length["a red fox"][0]])] == [77, 154]
    warned = {row["prompt"]: row["warning"] for row in table.to_pylist()}
    assert warned["a fox embedding:two"] == "an embedding in the prompt is read by clip_l alone"
    assert not warned["a (red:1.3) fox"]
    [error] = [json.loads(line) for path in Path(output).glob("errors/*.jsonl") for line in path.open()]
    assert "embedding:nobody, and there is no such file" in json.dumps(error)


def test_a_job_by_its_model_alone(tmp_path):
    """``model=comfy``: all three parts are of one checkpoint, or of the files that it names."""
    models = comfy_tiny.build(comfy_words.build(tmp_path / "ComfyUI/models", "embeddings/two"), "checkpoints/sd15")
    (tmp_path / "prompts.txt").write_text("a fox\n", encoding="utf-8")
    told = [f"source.path={tmp_path / 'prompts.txt'}", "cluster=inline", "model=comfy", f"model.models={models}"]
    size = ["scheduler.grid=comfy", "sampling.steps=1", "sampling.width=64", "sampling.height=64", "samples_per_row=1"]
    found = latentmill.run("txt2img", [*told, *size, "model.checkpoint=sd15.safetensors", f"output={tmp_path / 'one'}"])
    assert (found.ok, found.failed) == (1, 0)
    comfy_words.build(models, "text_encoders/clip_l", "clip/clip_g")
    several = ["model.type=sd3", "model.text_encoders=[clip_l.safetensors,clip_g.safetensors]"]
    flow = ["flow=[read, encode_text, write]", f"output={tmp_path / 'several'}"]
    assert latentmill.run("encode_text", [*told, *flow, *several]).failed == 0

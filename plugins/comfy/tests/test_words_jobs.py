"""The text encoder ``comfy`` in a job: prompts of every length in one batch, and rows that ComfyUI would have drawn with less than they ask for."""

import json
from pathlib import Path

import comfy_words
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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

"""Rows of pipelines that are run by their parts: in any company, with what is drawn for each, and in jobs."""

import io
import json
from itertools import count

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines import PROMPTS, SIZES, directly, ours, stages, table_of, theirs

import latentmill
from latentmill.batch import PROMPT_PREFIX, from_dicts
from latentmill.config import load_job
from latentmill.plugin import tensors
from latentmill_diffusers.pipeline import PipelineDenoise, noted


def test_a_row_does_not_depend_on_its_company(model):
    """Prompts of one length and of others, with noise drawn on the way: LCM's scheduler does."""
    name = "LatentConsistencyModelPipeline"
    encode, denoise = stages(model(name), name)
    table = table_of([("a", ""), ("b", ""), ("three", ""), ("a", "")], steps=3)
    together = ours(encode, denoise, table)
    for i in range(len(table)):
        [alone] = ours(encode, denoise, table.slice(i, 1))
        assert torch.allclose(alone, together[i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[3], atol=0.1)  # one prompt, two seeds


def test_a_prompt_is_encoded_once_in_a_run_and_rows_share_it(model, monkeypatch):
    name = "StableDiffusionPipeline"
    encode, denoise = stages(model(name), name)
    calls = []
    encode.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = table_of([("a", ""), ("b", ""), ("a", "")])
    [part] = encode(first, lambda i, reason: pytest.fail(reason))
    seen = len(calls)
    assert seen and tensors.shared(part, f"{PROMPT_PREFIX}0")[1] == [0, 1, 0]
    [again] = encode(table_of([("b", ""), ("a", "")]), lambda i, reason: pytest.fail(reason))
    assert len(calls) == seen
    for k, row in ((0, 1), (1, 0)):
        assert torch.equal(
            tensors.from_arrow(again, f"{PROMPT_PREFIX}0")[k], tensors.from_arrow(part, f"{PROMPT_PREFIX}0")[row]
        )
    plain = ours(lambda table, reject: [tensors.expanded(part)], denoise, first)
    assert all(map(torch.equal, plain, ours(encode, denoise, first)))
    assert len(calls) == seen
    monkeypatch.setattr("latentmill_diffusers.pipeline.encode.NOTED_ROOM", 0)
    ours(encode, denoise, first)
    ours(encode, denoise, first)
    assert len(calls) > seen, "the room is bounded"


def test_a_row_alone_has_the_bits_that_it_has_in_company(model):
    """Rows of one size, steps and guidance, which else go together."""
    name = "StableDiffusionPipeline"
    encode, denoise = stages(model(name), name)
    table = table_of(PROMPTS)
    denoise.alone = True
    for i, found in enumerate(ours(encode, denoise, table)):
        assert torch.equal(found, ours(encode, denoise, table.slice(i, 1))[0])


def test_a_deterministic_job_makes_the_same_bytes_in_other_company(model, tmp_path, monkeypatch):
    """A batch that fails once, and then in halves, has no batch of its first size again."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt, _ in PROMPTS))
    told = ["model=pipeline", "cluster=inline", f"model.path={model('StableDiffusionPipeline')}", "samples_per_row=1"]
    told += [f"source.path={tmp_path / 'rows.jsonl'}", "sampling.width=64", "sampling.height=32", "sampling.steps=2"]
    told += ["deterministic=true", "rows_per_shard=3", "stages.denoise.batch_size=3", "stages.denoise.retries=0"]
    told += ["flow=[read,pipeline_encode,pipeline_denoise,write]"]
    assert latentmill.run("txt2img", [*told, f"output={tmp_path / 'whole'}"]).ok == 3
    monkeypatch.setenv("LATENTMILL_FAILPOINT", f"pipeline_denoise:memory:{tmp_path}")
    assert latentmill.run("txt2img", [*told, f"output={tmp_path / 'halves'}"]).ok == 3
    assert (tmp_path / "pipeline_denoise").exists()
    whole, halves = (tmp_path / name / "data" / "00000.parquet" for name in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_of_the_vae_s_dtype(dtype, model):
    name = "StableDiffusionPipeline"
    folder, table = str(model(name)), table_of(PROMPTS)
    encode, denoise = stages(folder, name)
    wanted = torch.stack(ours(encode, denoise, table))
    halves = PipelineDenoise(folder, vae={"name": "diffusers", "path": folder, "dtype": dtype})
    halves.load(torch.device("cpu"))
    found = torch.stack(ours(encode, halves, table))
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, wanted.to(found.dtype))


def test_what_rows_share_is_what_they_agree_in(model):
    """FLUX's places of tokens have no batch axis. Rows that bring other ones go apart, each with its own."""
    name = "FluxPipeline"
    encode, denoise = stages(model(name), name)
    [part] = map(tensors.expanded, encode(table_of(PROMPTS), lambda i, reason: pytest.fail(reason)))
    wanted = ours(lambda table, reject: [table], denoise, part)
    form = json.loads(part.schema.field(f"{PROMPT_PREFIX}0").metadata[noted.NOTED])
    [shared] = noted.shared_leaves(form)
    about = part.schema.field(f"{PROMPT_PREFIX}{shared}").metadata
    places = tensors.from_arrow(part, f"{PROMPT_PREFIX}{shared}").clone()
    places[1] += 1
    moved = tensors.with_tensor(part, f"{PROMPT_PREFIX}{shared}", places)
    assert moved.schema.field(f"{PROMPT_PREFIX}{shared}").metadata == about
    found = ours(lambda table, reject: [table], denoise, moved)
    same = [torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True)]
    assert same == [True, False, True]


def test_what_is_drawn_for_a_prompt_is_of_the_row_s_seed(model):
    """GLM-Image writes a picture's tokens before its network sees anything: one prompt, two seeds, two writings."""
    name = "GlmImagePipeline"
    encode, denoise = stages(model(name), name)
    table = table_of([("a red fox", None)] * 2, guidance=1.0, size=SIZES[name])
    [part] = encode(table, lambda i, reason: pytest.fail(reason))
    first, second = tensors.from_arrow(part, f"{PROMPT_PREFIX}0")
    assert first.shape == (32,) and not torch.equal(first, second)
    wanted = theirs(directly(model(name), name), name, denoise.spec, table)
    for found, one in zip(ours(encode, denoise, table), wanted, strict=True):
        assert float((found - one).norm() / one.norm()) <= 2e-6


def test_what_encode_prompt_returns_comes_back_for_several_rows():
    def returned(count):
        """Of rows 0, 1, ...: along the first axis, along the second, a list a row, ends, a number, none, shared, nested."""
        each = [torch.full((3, 2), float(row)) for row in range(count)]
        ends = torch.tensor([0, *(2 + row for row in range(count))]).cumsum(0)
        layers = [torch.stack(each), torch.stack(each) + 10, torch.stack(each) + 20]
        return torch.stack(each), torch.stack(each, 1), each, ends, 7, None, torch.arange(6), layers

    form = noted.form_of(returned(1), returned(2), count())
    second = [v[1:] if k in (0, 2) else v for k, v in enumerate(returned(2))]
    second[1], second[3], second[7] = second[1][:, 1:], torch.tensor([0, 3]), [v[1:] for v in second[7]]
    both = zip(noted.leaves_of(returned(1), form), noted.leaves_of(second, form), strict=True)
    found = noted.filled(form, [torch.stack(pair) for pair in both])
    wanted = returned(2)
    for k in (0, 1, 3, 6):
        assert torch.equal(found[k], wanted[k]), k
    assert all(torch.equal(a, b) for k in (2, 7) for a, b in zip(found[k], wanted[k], strict=True))
    assert found[4:6] == (7, None)


def test_a_job(model, tmp_path):
    """Pictures, of rows with steps, guidance and sizes of their own; what its own loop can't do ends in the error table."""
    name = "ChromaPipeline"
    lines = [
        {"prompt": "a red fox", "seed": 0, "steps": 2, "guidance_scale": 4.0},
        {"prompt": "two houses", "negative_prompt": "dull", "seed": 1, "steps": 3, "guidance_scale": 4.0},
        {"prompt": "a red fox", "seed": 2, "steps": 2, "guidance_scale": 1.0, "width": 32},
        {"prompt": "a red fox", "seed": 3, "scheduler": "euler"},
        {"prompt": "a red fox", "seed": 4, "guidance_rescale": 0.7},
        {"prompt": "a red fox", "seed": 5, "steps": 2, "guidance_scale": 4.0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = latentmill.run(
        "txt2img",
        [
            "model=pipeline",
            f"model.path={model(name)}",
            "cluster=inline",
            f"source.path={tmp_path / 'rows.jsonl'}",
            "samples_per_row=1",
            "sampling.height=32",
            "sampling.width=64",
            f"output={tmp_path / 'out'}",
        ],
    )
    assert (result.ok, result.failed) == (4, 2)
    said = [json.loads(line)["reason"] for line in (tmp_path / "out/errors/00000.jsonl").read_text().splitlines()]
    assert said == [
        "ChromaPipeline runs its own loop, without scheduler: '' is expected, not 'euler'",
        "ChromaPipeline runs its own loop, without guidance_rescale: 0.0 is expected, not 0.7",
    ]
    made = pq.read_table(tmp_path / "out/data").to_pylist()
    assert [row["seed"] for row in made] == [0, 1, 2, 5]
    _, denoise = stages(model(name), name)
    for row in made:
        single = table_of([(row["prompt"], row["negative_prompt"])]).slice(0, 1).to_pylist()[0]
        single |= {key: row[key] for key in ("seed", "steps", "guidance_scale", "height", "width")}
        [wanted] = theirs(directly(model(name), name), name, denoise.spec, from_dicts([single]), "pil")
        found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)
        assert (np.abs(found - np.asarray(wanted).astype(int)) <= 1).mean() >= 0.999


def test_its_stages_have_the_workers_of_encode_and_denoise():
    job = load_job("txt2img", ["model=pipeline", "model.path=x", "stages=gpu", "stages.denoise.replicas=3"])
    plain = load_job("txt2img", ["stages=gpu", "stages.denoise.replicas=3"])
    assert job.flow == plain.flow
    for stage in ("encode", "denoise"):
        made = vars(job.stages[stage])
        assert made["name"] == f"pipeline_{stage}" and made == vars(job.stages[f"pipeline_{stage}"])
        assert {**made, "name": None, "settings": {}} == vars(plain.stages[stage])
    assert job.stages["denoise"].replicas == 3
    assert job.stages["denoise"].settings["vae"]["path"] == "x"

"""Half-way latents: one trajectory in two jobs is the trajectory, to the bit; another model or path is found out."""

import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

import latentmill
from latentmill.config import load_job
from latentmill.errors import JobError, PlanError
from latentmill.parts import parts

PROMPT = "a red star above a blue ring on a yellow background"
SCHEDULERS = ["dpmpp_2m", "unipc", "euler_ancestral", "heun"]
SETTINGS = ["cluster=inline", "deterministic=true", "stages.denoise.batch_size=4", "rows_per_shard=4"]


def rows_of(output):
    return {row["row_id"]: row for path in sorted(output.glob("data/*")) for row in pq.read_table(path).to_pylist()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eight rows that differ in scheduler, steps and guidance, denoised in one go, and the job that did it."""
    folder = tmp_path_factory.mktemp("whole")
    lines = [
        {"prompt": PROMPT, "scheduler": SCHEDULERS[n % 4], "steps": 4 + n, "guidance_scale": [1.0, 4.0][n % 2],
         "width": 32, "height": 32}
        for n in range(8)
    ]  # fmt: skip
    lines[7] |= {"guidance_rescale": 0.7, "guidance_from": 0.8, "guidance_until": 0.3}
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [*SETTINGS, f"source.path={folder / 'rows.jsonl'}"]
    result = latentmill.run("denoise", [*settings, f"output={folder / 'out'}"])
    assert result.ok == 8
    return settings, rows_of(folder / "out")


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """The dataset of the same rows, each left half-way."""
    output = tmp_path_factory.mktemp("half") / "out"
    assert latentmill.run("denoise", [*whole[0], "sampling.until=0.5", f"output={output}"]).ok == 8
    return output


def test_two_jobs_are_one_trajectory(whole, tmp_path):
    """Through files, and in two steps: noise to 0.7, to 0.4, to clean."""
    settings, wanted = whole
    half, quarter, clean = (tmp_path / name for name in ("half", "quarter", "clean"))
    assert latentmill.run("denoise", [*settings, "sampling.until=0.7", f"output={half}"]).ok == 8
    on = [*SETTINGS, "source=latents"]
    assert latentmill.run("denoise", [*on, "sampling.until=0.4", f"source.path={half}", f"output={quarter}"]).ok == 8
    assert latentmill.run("denoise", [*on, f"source.path={quarter}", f"output={clean}"]).ok == 8
    for row in rows_of(half).values():
        steps = row["steps"]
        assert row["time"] == pytest.approx(max(k / steps for k in range(steps) if k / steps < 0.7), abs=1e-3)
    found = rows_of(clean)
    assert found.keys() == wanted.keys() and "time" not in found["000000000-000"]
    for name, row in wanted.items():
        assert np.array_equal(found[name]["latents"], row["latents"]), name


def test_the_state_is_of_model_and_scheduler(half, tmp_path):
    """What was half-way with one scheduler goes on with another, which begins anew; its old state would mislead it."""
    held = {row["scheduler"]: {part["name"] for part in row["state"]} for row in rows_of(half).values()}
    assert held["dpmpp_2m"] == {"clean", "log_ratio"} and held["heun"] == set() and "t" in held["unipc"]
    found = []
    for name, forget in (("kept", False), ("forgotten", True)):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        for path in half.glob("data/*"):
            table = pq.read_table(path)
            if forget:  # as if another model had brought it here
                paths = [text.partition("/")[0] + "/another" for text in table.column("trajectory").to_pylist()]
                at = table.column_names.index("trajectory")
                table = table.set_column(at, table.schema.field(at), [paths])
            pq.write_table(table, folder / path.name)
        output = tmp_path / f"{name} done"
        assert latentmill.run("denoise", [*SETTINGS, "source=latents", f"source.path={folder}", f"output={output}"]).ok
        found.append(rows_of(output))
    for row_id, row in found[0].items():
        if row["steps"] < 8:  # one step is left, to t = 0, and there a step is of first order
            continue
        same = np.array_equal(row["latents"], found[1][row_id]["latents"])
        assert same == (row["scheduler"] in ("heun", "euler_ancestral")), row["scheduler"]


def test_another_noise_path_is_refused_row_by_row(half, tmp_path):
    folder = tmp_path / "another"
    folder.mkdir()
    for path in half.glob("data/*"):
        table = pq.read_table(path)
        at = table.column_names.index("trajectory")
        pq.write_table(table.set_column(at, table.schema.field(at), [["0123/4567"] * len(table)]), folder / path.name)
    result = latentmill.run(
        "denoise", [*SETTINGS, "source=latents", f"source.path={folder}", f"output={tmp_path / 'out'}"]
    )
    assert (result.ok, result.failed) == (0, 8)
    reasons = {json.loads(line)["reason"] for path in tmp_path.glob("out/errors/*") for line in path.open()}
    assert reasons == {"the latents are half-way on a noise schedule that is not this denoiser's"}


def test_only_denoise_can_finish_them(half, tmp_path):
    result = latentmill.run("decode", ["cluster=inline", f"source.path={half}", f"output={tmp_path / 'out'}"])
    assert result.ok == 0
    reasons = {json.loads(line)["reason"] for path in tmp_path.glob("out/errors/*") for line in path.open()}
    assert all("half-way, at time 0." in reason and "only a job with denoise" in reason for reason in reasons)
    said = r"sampling\.until leaves latents half-way, so flow must end with denoise, write"
    with pytest.raises(PlanError, match=said):
        parts(load_job("txt2img", ["sampling.until=0.5"]))
    with pytest.raises(JobError, match=r"sampling\.until must be a time from 0 to less than 1, not 1\.0"):
        load_job("denoise", ["sampling.until=1"])


def test_one_schema_whatever_the_rows_schedulers_are(tmp_path):
    """A shard without state, one with it, and one in which all rows failed: datasets opens them as one."""
    lines = [{"prompt": PROMPT, "scheduler": name} for name in ("heun", "dpmpp_2m")] + [{"prompt": "a zebra"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["cluster=inline", "rows_per_shard=1", "sampling.steps=4", "sampling.until=0.5"]
    result = latentmill.run("denoise", [*settings, f"source.path={tmp_path}/rows.jsonl", f"output={tmp_path / 'out'}"])
    assert (result.ok, result.failed) == (2, 1)
    schemas = [pq.read_schema(path) for path in sorted(tmp_path.glob("out/data/*"))]
    assert len(schemas) == 3 and schemas[0].equals(schemas[1]) and schemas[0].equals(schemas[2])
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/data/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["time"] == [0.25, 0.25]

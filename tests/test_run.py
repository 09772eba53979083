"""Whole jobs on the shapes model: the same rows wherever they run, however often they are interrupted."""

import hashlib
import io
import json
import os
import signal
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests import ray_forks
from tests.forked import SOCKET

import latentmill
from latentmill import parts, storage
from latentmill import plan as planning
from latentmill.cli import main
from latentmill.config import load_job
from latentmill.dataset import Dataset, status
from latentmill.driver.loop import view
from latentmill.errors import PlanError
from latentmill.runner import begin

SMALL = ["samples_per_row=1", "sampling.steps=4", "rows_per_shard=8", "stages.denoise.batch_size=4"]
SMALL += ["sampling.height=32", "sampling.width=32"]
PROMPTS = [
    f"a {colour} {shape} on a white background" for shape in ("star", "ring") for colour in ("red", "blue", "green")
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS * 3) + "\n")
    return f"source.path={path}"


def files(output):
    """Every data and error file's bytes, hashed, by name."""
    paths = sorted([*Path(output).glob("data/*"), *Path(output).glob("errors/*")])
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def table(output):
    return pq.read_table(sorted(Path(output).glob("data/*.parquet"))[0].parent)


def whole(output):
    """Each planned row exactly once, in the dataset or in the error table."""
    plan = json.loads((Path(output) / "plan.json").read_text())
    errors = [json.loads(line) for path in sorted(Path(output).glob("errors/*.jsonl")) for line in path.open()]
    ids = table(output).column("row_id").to_pylist() + [error["row_id"] for error in errors]
    samples = plan["samples_per_row"]
    assert sorted(ids) == [f"{row // samples:09d}-{row % samples:03d}" for row in range(plan["rows"])]
    assert (Path(output) / "_SUCCESS").exists()


@pytest.fixture(scope="module")
def cluster():
    """Settings of a job that runs on a Ray cluster of two cores."""
    there = ray_forks.Cluster(num_cpus=2)
    yield ["cluster=ray", f"cluster.address={there.address}"]
    there.shutdown()


def test_inline_one_worker_and_three_give_the_same_bytes(tmp_path, prompts, cluster):
    outputs = {}
    for name, settings in {
        "inline": ["cluster=inline"],
        "one": cluster,
        "three": [
            *cluster,
            "stages.denoise.replicas=3",
            "stages.denoise.num_cpus=0.2",
            "stages.decode.replicas=2",
        ],
        "fused": [*cluster, "placement=fused", "stages.denoise.replicas=2", "stages.denoise.num_cpus=0.7"],
    }.items():
        outputs[name] = tmp_path / name
        latentmill.run("txt2img", [*SMALL, *settings, prompts, "deterministic=true", f"output={outputs[name]}"])
        whole(outputs[name])
    assert files(outputs["inline"]) == files(outputs["one"]) == files(outputs["three"]) == files(outputs["fused"])


def test_without_deterministic_the_rows_and_seeds_are_the_same(tmp_path, prompts):
    for name, settings in {"a": ["stages.denoise.batch_size=4"], "b": ["stages.denoise.batch_size=7"]}.items():
        latentmill.run("txt2img", [*SMALL, *settings, prompts, "cluster=inline", f"output={tmp_path / name}"])
    a, b = table(tmp_path / "a").drop_columns("image"), table(tmp_path / "b").drop_columns("image")
    assert a.equals(b)
    assert len(set(a.column("seed").to_pylist())) == len(a)


def test_a_driver_that_is_killed_leaves_a_dataset_that_goes_on(tmp_path, prompts, cluster, forks):
    """First with the Ray cluster that it has started, then alone."""
    settings = [*SMALL, prompts, "deterministic=true", "rows_per_shard=2", "sampling.steps=10"]
    latentmill.run("txt2img", [*settings, "cluster=inline", f"output={tmp_path / 'undisturbed'}"])
    output, log = tmp_path / "killed", tmp_path / "log"
    for enough, place in ((1, ["cluster=local"]), (4, cluster)):
        command = ["run", "txt2img", *settings, *place, f"output={output}"]
        driver = forks.begin(command, log, **{SOCKET: os.environ[SOCKET]})
        while len(list(output.glob("data/*"))) < enough and forks.runs(driver):
            time.sleep(0.01)
        os.kill(driver, signal.SIGKILL)
        assert forks.end(driver) == -signal.SIGKILL, log.read_text()
        assert enough <= len(list(output.glob("data/*"))) < 9, "the driver was to be killed in the middle"
        assert not (output / "_SUCCESS").exists()
        before, done = len(list(output.glob("data/*"))), status(str(output))["shards_done"]
        assert before <= done <= len(list(output.glob("data/*")))  # a worker may outlive the driver for a moment
    latentmill.run("txt2img", [*settings, *cluster, f"output={output}"])
    whole(output)
    assert files(output) == files(tmp_path / "undisturbed")


def test_sigterm_stops_cleanly_says_how_to_go_on_and_the_run_goes_on(tmp_path, prompts, forks):
    output, log = tmp_path / "out", tmp_path / "log"
    command = ["run", "txt2img", *SMALL, prompts, "rows_per_shard=2", "grace=0", "cluster=inline", f"output={output}"]
    driver = forks.begin(command, log, LATENTMILL_FAILPOINT=f"published:pause:{tmp_path}")
    while not list(output.glob("data/*")) and forks.runs(driver):
        time.sleep(0.01)
    os.kill(driver, signal.SIGTERM)
    (tmp_path / "go").touch()
    assert forks.end(driver) == 130, log.read_text()
    said = log.read_text()
    assert "same command" in said and "Traceback" not in said
    assert not list(output.glob(".tmp/*"))
    assert forks.run(command, log) == 0, log.read_text()
    whole(output)


def test_a_finished_job_does_nothing_and_says_so(tmp_path, prompts):
    settings = [*SMALL, prompts, "cluster=inline", f"output={tmp_path / 'out'}"]
    latentmill.run("txt2img", settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    result = latentmill.run("txt2img", settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert "nothing to do" in result.text and result.ok == 18


def test_a_changed_job_on_an_existing_output_is_refused_and_nothing_is_touched(tmp_path, prompts):
    settings = [*SMALL, prompts, "cluster=inline", f"output={tmp_path / 'out'}"]
    latentmill.run("txt2img", settings)
    before = files(tmp_path / "out")
    with pytest.raises(PlanError, match=r"dataset: sampling\.steps: 4 -> 5\. Choose"):
        latentmill.run("txt2img", [*settings, "sampling.steps=5"])
    with pytest.raises(PlanError, match=r"dataset: seed: 0 -> 1\. Choose"):
        latentmill.run("txt2img", [*settings, "seed=1"])
    assert files(tmp_path / "out") == before


def test_bad_rows_end_in_the_error_table_with_their_reasons(tmp_path):
    source = tmp_path / "rows.jsonl"
    good = "a red star on a white background"
    lines = [
        {"prompt": good},
        {"prompt": "a red zebra on a white background"},
        {"prompt": good, "steps": 0},
        {"prompt": good, "steps": 3, "seed": 7, "guidance_scale": 1.5, "scheduler": "euler"},
        {"prompt": good, "scheduler": "eulerr"},
        {"prompt": good, "width": 66},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    output = tmp_path / "out"
    result = latentmill.run("txt2img", [*SMALL, f"source.path={source}", "cluster=inline", f"output={output}"])
    whole(output)
    assert (result.planned, result.ok, result.failed) == (7, 2, 5)
    errors = [json.loads(line) for path in output.glob("errors/*") for line in path.open()]
    said = {int(error["row_id"][:9]): f"{error['stage']}: {error['reason']}" for error in errors}
    assert sorted(said) == [1, 2, 4, 5, 6]
    for row, words in {1: "zebra", 2: "steps", 4: "eulerr", 5: "66", 6: "JSON"}.items():
        assert words in said[row], said
    rows = {row["row_id"]: row for row in table(output).to_pylist()}
    row = rows["000000003-000"]
    assert (row["steps"], row["seed"], row["guidance_scale"], row["scheduler"]) == (3, 7, 1.5, "euler")


def test_hugging_face_datasets_opens_it_as_pictures(tmp_path, prompts):
    latentmill.run("txt2img", [*SMALL, prompts, "cluster=inline", f"output={tmp_path / 'out'}"])
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/data/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == 18
    assert isinstance(loaded[0]["image"], Image.Image) and loaded[0]["image"].size == (32, 32)
    assert loaded[0]["prompt"] == PROMPTS[0]


@pytest.mark.parametrize("name", ["txt2img", "img2img", "encode", "denoise", "decode", "reconstruct"])
def test_each_shipped_job_runs_as_it_is(name, tmp_path):
    output = tmp_path / name
    result = latentmill.run(name, ["cluster=inline", "samples_per_row=1", "sampling.steps=2", f"output={output}"])
    assert result.failed == 0 and result.ok == result.planned > 0
    whole(output)
    found = table(output)
    if name in ("encode", "denoise"):
        assert found.schema.metadata[b"latentmill.latents"]
        assert found.column("shape").to_pylist()[0] == [4, 16, 16]
    else:
        pictures = [Image.open(io.BytesIO(row["bytes"])) for row in found.column("image").to_pylist()]
        assert all(picture.size == (64, 64) for picture in pictures)
    if name == "reconstruct":
        assert min(found.column("psnr").to_pylist()) > 24


def test_latents_travel_from_encode_to_decode_and_equal_reconstruct(tmp_path):
    latentmill.run("encode", ["cluster=inline", f"output={tmp_path / 'latents'}"])
    latentmill.run(
        "decode", ["cluster=inline", f"source.path={tmp_path / 'latents'}", f"output={tmp_path / 'decoded'}"]
    )
    latentmill.run("reconstruct", ["cluster=inline", f"output={tmp_path / 'both'}"])
    assert table(tmp_path / "decoded").column("image").equals(table(tmp_path / "both").column("image"))


def test_latents_of_one_vae_are_refused_by_another_before_anything_starts(tmp_path):
    latentmill.run("encode", ["cluster=inline", f"output={tmp_path / 'latents'}"])
    with pytest.raises(PlanError, match="another space"):
        latentmill.run(
            "decode",
            ["vae=patches", "cluster=inline", f"source.path={tmp_path / 'latents'}", f"output={tmp_path / 'decoded'}"],
        )
    assert not (tmp_path / "decoded").exists()


def test_a_run_in_which_no_row_succeeded_is_no_success(tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("a zebra\na lion\n")
    settings = [f"source.path={tmp_path}/bad.txt", "cluster=inline", f"output={tmp_path}/out", "samples_per_row=1"]
    assert main(["run", "txt2img", *settings]) == 5
    assert "2 rows, each with its reason" in capsys.readouterr().out
    whole_errors = [json.loads(line)["reason"] for line in (tmp_path / "out/errors/00000.jsonl").open()]
    assert len(whole_errors) == 2


def test_the_view_counts_rows_of_earlier_runs_without_looking_at_each_shard(tmp_path, prompts):
    job = load_job("txt2img", [*SMALL, prompts, f"output={tmp_path / 'out'}"])
    built = parts.parts(job)
    plan = planning.plan(job, built)
    state = begin(job, Dataset(storage.at(job.output), plan, built.sink))
    for done in ({0}, {2}, {0, 2}, {0, 1, 2}):  # of 18 rows in shards of 8
        state.done = done
        assert view(state, plan, 0.0).finished == sum(len(plan.shard_rows(shard)) for shard in done)


def test_a_job_on_an_s3_server_is_the_job_on_a_disk(tmp_path, prompts, bucket, capsys, cluster):
    """Over HTTP, from the workers of a Ray cluster, where an earlier run did one of the shards."""
    settings = [*SMALL, prompts, "deterministic=true", *cluster]
    latentmill.run("txt2img", [*settings, "cluster=inline", f"output={tmp_path / 'out'}"])
    store = storage.at(f"{bucket}/some/out")
    for name in ("plan.json", "data/00001.parquet"):  # as if a run that did one shard had been killed
        store.create(name, str(tmp_path / "out" / name))
    result = latentmill.run("txt2img", [*settings, f"output={bucket}/some/out"])
    assert (result.ok, result.failed) == (18, 0) and f"{bucket}/some/out/contact_sheet.png" in result.text
    ours = storage.at(str(tmp_path / "out"))
    for folder in ("", "data", "errors"):
        assert sorted(store.names(folder)) == sorted(ours.names(folder))
        for name in (f"{folder}/{last}".lstrip("/") for last in store.names(folder)):
            if name != "report.html":  # in it are the run's rates
                assert store.read(name) == ours.read(name), name
    assert main(["status", f"{bucket}/some/out"]) == 0
    assert "18 of 18 rows: 18 ok, 0 failed" in capsys.readouterr().out
    assert "nothing to do" in latentmill.run("txt2img", [*settings, f"output={bucket}/some/out"]).text


def test_a_bucket_that_is_not_there_is_one_line_before_anything_starts(bucket, capsys):
    assert main(["run", "txt2img", "output=s3://elsewhere/out", "cluster=inline"]) != 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("latentmill: s3://elsewhere/out/") and "bucket does not exist" in said[-1]

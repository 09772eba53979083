"""``plan --probe``: a few rows run, the rest is reckoned, and nothing stays."""

import json

import pytest


@pytest.fixture
def job(tmp_path):
    lines = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square")]
    (tmp_path / "prompts.txt").write_text("\n".join(lines * 20))
    settings = ["samples_per_row=1", "sampling.steps=1", "rows_per_shard=60", "cluster=inline"]
    settings += ["sampling.width=32", "sampling.height=32"]
    return ["txt2img", f"source.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'out'}", *settings]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_probe_leaves_nothing_and_knows_how_large_the_dataset_will_be(latentmill, job, tmp_path):
    before = files(tmp_path)
    assert latentmill("plan", *job, "--probe", "64", "--json") == 0, latentmill.err
    found = json.loads(latentmill.out)
    assert files(tmp_path) == before
    assert (found["rows"], found["failed"], found["filtered"], found["cost"]) == (48, 0, 0, None)
    of = found["estimate"]
    for name in ("rows_a_second", "seconds", "bytes"):
        assert 0 < of[name]["low"] <= of[name]["value"] <= of[name]["high"], name
    assert of["workers"] == [1, 1, 1] and of["slowest"] == 1
    assert next(iter(found["columns"])) == "image" and {"prompt", "row_id", "seed"} < found["columns"].keys()
    assert latentmill("run", *job) == 0
    real = sum(path.stat().st_size for path in (tmp_path / "out" / "data").glob("*.parquet"))
    assert of["bytes"]["value"] == pytest.approx(real, rel=0.15)
    assert latentmill("plan", *job, "--probe", "16", "--price", "2.5") == 0  # beside the dataset, which stays as it is
    assert "120 rows in 2 shards" in latentmill.out and "no worker asks for a GPU" in latentmill.out
    assert latentmill("verify", tmp_path / "out") == 0


def test_rows_that_fail_are_counted_and_the_place_is_cleared(latentmill, job, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square and a green triangle\n" * 40)
    assert latentmill("plan", *job, "--probe", "64") == 0
    assert "32 of 64 rows failed" in latentmill.out
    assert not list(tmp_path.glob("out*"))


def test_what_makes_no_probe(latentmill, job, tmp_path):
    assert latentmill("plan", *job, "--probe", "3") == 2
    assert "--probe 3: a probe takes 4 rows or more" in latentmill.err
    assert latentmill("plan", *job, "--price", "2.5") == 2
    assert "--price is of what --probe finds" in latentmill.err
    assert not list(tmp_path.glob("out*"))


NOTES = """
from latentmill.plugin import Stage

class Notes(Stage):
    contract = 2

    def __init__(self, path: str):
        self.path = path

    def __call__(self, batch, reject):
        with open(self.path, "a") as file:
            file.writelines(f"{prompt}\\n" for prompt in batch["prompt"].to_pylist())
        return batch
"""


def test_rows_are_taken_from_all_over_the_source(latentmill, install, job, tmp_path):
    install("acme", "[latentmill.stages]\nnotes = acme_notes:Notes\n", acme_notes=NOTES)
    colours, shapes = "red green blue yellow white purple".split(), "circle square triangle ring cross".split()
    lines = [f"a {a} {b} above a {c} circle" for a in colours for b in shapes for c in colours][:160]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    flow = f"flow=[read,{{name: notes, path: {tmp_path / 'seen.txt'}}},encode,denoise,decode,write]"
    assert latentmill("plan", *job, flow, "--probe", "32") == 0, latentmill.err
    seen = [lines.index(line) for line in (tmp_path / "seen.txt").read_text().splitlines()]
    runs = [range(start, start + 8) for start in (0, 51, 101, 152)]
    assert sorted(seen) == [number for run in runs for number in run]

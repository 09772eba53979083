"""Stages by their declarations: twice in a flow, filled by plugins, sized apart, continuous, and with their own plugins alone."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentmill.plugin import CONTRACT

ACME = '''
import pyarrow as pa
from latentmill.plugin import ContinuousStage, Stage
from latentmill.stages.encode import Encode
from latentmill.plugin.tensors import from_arrow


class Brightness(Stage):
    """Rejects pictures whose mean is below ``least`` or above ``most``."""

    contract = {CONTRACT}

    def __init__(self, least: float = 0.0, most: float = 1.0):
        self.least, self.most = least, most

    def __call__(self, batch, reject):
        means = (from_arrow(batch, "image").double() / 255).flatten(1).mean(1).tolist()
        good = [self.least <= mean <= self.most for mean in means]
        for i, fine in enumerate(good):
            if not fine:
                reject(i, f"brightness {means[i]:.2f}")
        return batch.filter(pa.array(good))


class Score(Stage):
    contract = {CONTRACT}
    adds = (pa.field("score", pa.float64()),)
    resources = {"batch_size": 3, "num_cpus": 0.5}

    def __init__(self, score: float = 1.0, refuse: str = ""):
        self.score, self.refuse = score, refuse

    def __call__(self, batch, reject):
        good = [self.refuse not in row or not self.refuse for row in batch.column("row_id").to_pylist()]
        for i, fine in enumerate(good):
            if not fine:
                reject(i, "refused")
        batch = batch.filter(pa.array(good))
        return batch.append_column("score", pa.array([self.score] * len(batch), pa.float64()))


class Mine(Encode):
    contract = {CONTRACT}

    def __init__(self, marks: str = "marked"):
        self.marks = marks

    def __call__(self, batch, reject):
        for table in super().__call__(batch, reject):
            at = table.schema.get_field_index("warning")
            yield table.set_column(at, table.schema.field(at), pa.array([self.marks] * len(table)))


class Going:
    def __init__(self, batch):
        self.batch, self.left = batch, 3

    @property
    def done(self):
        return not self.left


class Slow(ContinuousStage):
    """Needs three steps for a batch, and moves all that it has in each. A row says how many batches were there with it."""

    contract = {CONTRACT}
    adds = (pa.field("together", pa.int64()),)

    def __init__(self):
        self.going = []

    def take(self, batch, reject):
        self.going.append(Going(batch))
        return self.going[-1]

    def advance(self):
        for request in self.going:
            request.left -= 1
            request.together = len(self.going)
        self.going = [request for request in self.going if request.left]

    def finish(self, request):
        together = pa.array([request.together] * len(request.batch), pa.int64())
        yield request.batch.append_column("together", together)
'''

RECORDING = {
    "vae": """
class Part(VAE):
    contract = {CONTRACT}
    spec = LatentSpec(channels=3, downscale=1, scale=1.0, shift=0.0, dtype="float32", fingerprint="recording")

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents
""",
    "text_encoder": """
class Part(TextEncoder):
    contract = {CONTRACT}

    def encode(self, prompts):
        return {"length": torch.tensor([[float(len(prompt))] for prompt in prompts])}
""",
    "denoiser": """
class Part(Denoiser):
    contract, prediction, noise_schedule = {CONTRACT}, "flow", RectifiedFlow()

    def predict(self, x, t, conditioning):
        return x * 0.5
""",
}
HEAD = """
import os
import torch
from latentmill.plugin import VAE, Denoiser, LatentSpec, TextEncoder
from latentmill.schedulers.noise_schedules import RectifiedFlow

def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} KIND {os.environ.get('ME', 'driver')}\\n")

note("import")
"""
BUILT = """
    def __init__(self):
        note("build")
"""


def of_this_contract(code):
    return code.replace("{CONTRACT}", str(CONTRACT))


@pytest.fixture
def acme(install):
    points = ["[latentmill.stages]", "brightness = acme:Brightness", "score = acme:Score", "mine = acme:Mine"]
    install("acme", "\n".join([*points, "slow = acme:Slow"]), acme=of_this_contract(ACME))


def test_a_stage_stands_twice_with_other_settings_and_the_command_line_has_the_last_word(
    latentmill, patches, pictures, acme, tmp_path, rows, failed
):
    """Means of the four: 0.30, 0.31, 0.33, 0.34."""
    flow = "flow=[read, {name: brightness, as: too_dark, least: 0.305}, {name: brightness, as: too_light, most: 0.335}, encode, write]"
    job = ("run", "encode", *patches, f"source.path={pictures}", flow)
    assert latentmill(*job, f"output={tmp_path / 'a'}", "stages.too_dark.batch_size=2") == 0, latentmill.said
    kept = {row["row_id"][8] for row in rows(tmp_path / "a")}
    assert kept == {"1", "2"}
    stages = [(error["row_id"][8], error["stage"]) for error in failed(tmp_path / "a")]
    assert stages == [("0", "too_dark"), ("3", "too_light")]
    assert latentmill(*job, f"output={tmp_path / 'b'}", "stages.too_dark.settings.least=0.32") == 0, latentmill.said
    assert {row["row_id"][8] for row in rows(tmp_path / "b")} == {"2"}
    assert latentmill("plan", *job[1:], f"output={tmp_path / 'b'}") == 2  # another plan's
    assert "stages.too_dark.settings.least: 0.32 -> 0.305" in latentmill.err, latentmill.err
    assert latentmill("plan", *job[1:], "output=x", "stages.too_dark.settings.lest=1") == 2
    assert "stage brightness has no setting 'lest' (did you mean 'least'?)" in latentmill.err
    assert latentmill("plan", *job[1:-1], "output=x", "flow=[read, brightness, brightness, write]") == 2
    assert "flow has brightness twice: give one of them a name of its own" in latentmill.err


def test_what_a_job_does_not_say_of_a_stage_s_workers_the_stage_says(latentmill, acme):
    import latentmill as package

    job = package.load_job("txt2img", ["flow=[read, encode, score, write]", "stages.score.num_cpus=2"])
    found = job.stages["score"]
    assert (found.batch_size, found.num_cpus, found.replicas, found.retries) == (3, 2.0, "auto", 1)


def test_a_plugin_fills_a_stage_s_place_with_its_workers(latentmill, patches, pictures, acme, tmp_path, rows):
    job = ("run", "encode", *patches, f"source.path={pictures}")
    for number, filled in enumerate(
        (["stages.encode.name=mine"], ["flow=[read, {name: mine, as: encode}, write]"]),
    ):
        output = tmp_path / str(number)
        assert latentmill(*job, *filled, "stages.encode.settings.marks=so", f"output={output}") == 0, latentmill.said
        assert {row["warning"] for row in rows(output)} == {"so"}
        plan = json.loads((output / "plan.json").read_text())
        assert plan["plugins"]["stage encode"]["name"] == "mine" and plan["config"]["flow"] == [
            "read",
            "encode",
            "write",
        ]


def test_text_and_pictures_encoded_apart_are_the_same_bit_by_bit(latentmill, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"a {c} star", "seed": n}) + "\n" for n, c in enumerate(["red", "blue", "green"] * 3)
        )
    )
    same = [
        "cluster=inline",
        "deterministic=true",
        "sampling.steps=2",
        "samples_per_row=1",
        f"source.path={tmp_path}/rows.jsonl",
    ]
    made = []
    for number, encode in enumerate(("encode", "encode_text, encode_images", "encode_images, encode_text")):
        sizes = [f"stages.{name}.batch_size=4" for name in encode.split(", ")]
        flow = f"flow=[read, {encode}, denoise, write]"
        assert latentmill("run", "txt2img", *same, *sizes, flow, f"output={tmp_path / str(number)}") == 0, (
            latentmill.said
        )
        made.append(pq.read_table(tmp_path / str(number) / "data"))
    assert made[0].equals(made[1]) and made[0].equals(made[2]) and len(made[0]) == 9


def test_a_plugin_s_continuous_stage_has_several_batches_at_a_time(latentmill, patches, pictures, acme, tmp_path, rows):
    job = (
        "run",
        "encode",
        *patches,
        f"source.path={pictures}",
        "stages.encode.batch_size=1",
        "stages.slow.batch_size=1",
    )
    assert latentmill(*job, "flow=[read, encode, slow, write]", f"output={tmp_path / 'out'}") == 0, latentmill.said
    made = rows(tmp_path / "out")
    assert len(made) == 4 and max(row["together"] for row in made) > 1


def test_a_shard_in_which_all_rows_failed_has_the_columns_that_its_stages_declare(
    latentmill, patches, pictures, acme, tmp_path
):
    job = ("run", "encode", *patches, f"source.path={pictures}", "rows_per_shard=1", "max_error_rate=1")
    flow = "flow=[read, encode, {name: score, refuse: '2-000'}, write]"
    assert latentmill(*job, flow, "sampling.width=4", "sampling.height=4", f"output={tmp_path / 'out'}") == 0, (
        latentmill.said
    )
    schemas = [pq.read_schema(tmp_path / f"out/data/0000{shard}.parquet") for shard in range(4)]
    assert pq.read_metadata(tmp_path / "out/data/00002.parquet").num_rows == 0
    assert "score" in schemas[0].names and all(schema.equals(schemas[0]) for schema in schemas)


def test_a_column_that_two_stages_add_is_a_fault_of_the_second(latentmill, patches, pictures, acme, tmp_path):
    flow = "flow=[read, score, {name: score, as: again}, encode, write]"
    job = ("run", "encode", *patches, f"source.path={pictures}", flow, f"output={tmp_path / 'out'}")
    assert latentmill(*job) == 1
    assert "stage score of acme 1.0 returned the column score twice" in latentmill.err, latentmill.err
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_stages_that_do_not_fit_together_are_refused_before_anything_starts(latentmill, tmp_path):
    for flow, said in {
        "[read, denoise, write]": "denoise needs a source of latents; source prompts has none",
        "[read, encode_images, denoise, write]": "flow needs a stage before denoise that adds prompt:*",
        "[encode, read, write]": "flow must begin with read and end with write",
        "[read, encode, write, decode]": "flow must begin with read and end with write",
    }.items():
        assert latentmill("plan", "txt2img", f"flow={flow}", f"output={tmp_path / 'out'}") == 2
        assert said in latentmill.err, latentmill.err


def test_a_worker_imports_and_builds_its_own_plugins_and_no_others(latentmill, install, tmp_path, monkeypatch):
    """The factory of workers, in a process forked for each stage, of plugins that note when they are imported and built."""
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))
    codes = {
        f"acme_{kind}": of_this_contract(HEAD.replace("KIND", kind) + code + BUILT) for kind, code in RECORDING.items()
    }
    points = [line for kind in RECORDING for line in (f"[latentmill.{kind}s]", f"recording = acme_{kind}:Part")]
    (tmp_path / "p.txt").write_text("a\nb\n")
    chosen = [f"{kind}={{name: recording}}" for kind in RECORDING]
    told = [
        *chosen,
        "cluster=inline",
        f"source.path={tmp_path}/p.txt",
        f"output={tmp_path / 'out'}",
        "sampling.steps=1",
    ]
    told += ["sampling.width=4", "sampling.height=4", "samples_per_row=1"]
    told += ["flow=[read, encode_text, encode_images, denoise, decode, write]"]
    code = f"""
import os, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from latentmill import config, plan_files, storage
from latentmill.workers.context import make_stage
job = config.load_job("txt2img", {told!r})
plan = plan_files.load(storage.at(job.output, False))
open(os.environ["NOTES"], "w").close()
for name in job.flow:
    if not os.fork():
        os.environ["ME"] = name
        make_stage(job, plan, name)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    install("acme", "\n".join(points), **codes)
    assert latentmill("run", "txt2img", *told) == 0, latentmill.said
    subprocess.run([sys.executable, "-c", code], check=True)
    wanted = {"encode_text": "text_encoder", "encode_images": "vae", "denoise": "denoiser", "decode": "vae"}
    assert sorted(notes.read_text().splitlines()) == sorted(
        f"{what} {kind} {stage}" for stage, kind in wanted.items() for what in ("build", "import")
    )


def test_pictures_without_a_size_are_cut_to_what_the_network_takes(latentmill, tmp_path):
    """The middle of each, evenly from both edges: as if somebody had cut it before."""
    given = np.random.default_rng(3).integers(0, 255, (52, 76, 3), np.uint8)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a red ring", "image": "a.png"}\n')
    told = [
        "cluster=inline",
        f"source.path={tmp_path / 'edits.jsonl'}",
        "sampling={steps: 2, width: null, height: null}",
    ]
    found = {}
    for name, picture in (("whole", given), ("cut", given[2:50, 6:70])):
        Image.fromarray(picture).save(tmp_path / "a.png")
        assert latentmill("run", "img2img", *told, f"output={tmp_path / name}") == 0, latentmill.said
        found[name] = pq.read_table(tmp_path / name / "data").to_pylist()
    assert [(row["width"], row["height"]) for row in found["whole"]] == [(64, 48)] * 2
    assert [row["image"]["bytes"] for row in found["whole"]] == [row["image"]["bytes"] for row in found["cut"]]

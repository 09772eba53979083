"""``run -m`` with workers that go on from job to job: each model is loaded once, and each dataset is what it would be alone."""

import gc
import json
import os
import time
from pathlib import Path

import pytest
import torch
from ray.util import list_named_actors, placement_group_table
from tests import ray_forks
from tests.outside.conftest import table

CODE = '''
import os, signal
from pathlib import Path
import torch
from acme_prompts import Counting, Seen, Shown, note
from latentmill import weights

def happens(what):
    """Whether it is to be, once."""
    once = Path(os.environ["NOTES"] + "-" + what)
    return once.exists() and not once.unlink()

class Loads:
    """Says when it is loaded, and when it is no more."""

    def __init__(self, path: str = "", bias: float = 0.0) -> None:
        self.path, self.bias = path, bias

    def load(self, device):
        self.itself = self if "CYCLES" in os.environ else None
        weights.record(self.path)
        self.value = float(Path(self.path).read_text()) + self.bias
        note(load=type(self).__name__, by=os.getpid())

    def fingerprint(self):
        return Path(self.path).read_text()

    def __del__(self):
        if hasattr(self, "value"):
            note(gone=type(self).__name__)

class Net(Loads, Shown):
    contract = 2

    def predict(self, x, t, conditioning):
        return 0.1 * x + super().predict(x, t, conditioning) + self.value

class Lens(Loads, Seen):
    contract = 2

    def decode(self, latents):
        if self.bias and happens("stop"):
            os.kill(int(os.environ["DRIVER"]), signal.SIGINT)
        return torch.tanh(0.02 * latents + self.value)

class Words(Loads, Counting):
    """It remembers what was in a file that a prompt names."""

    contract, bad, slotted, extra = 2, "", False, 0.0

    def encode(self, prompts, tone):
        if tone and happens("death"):
            os._exit(1)
        if any("<" in prompt for prompt in prompts):
            file = Path(self.path).with_name("extra")
            weights.record(file)
            self.extra = self.extra or float(file.read_text())
        made = super().encode(prompts, 0.0)
        return {**made, "embeds": made["embeds"] + self.value + self.extra}
'''
POINTS = """
[latentmill.denoisers]
net = acme_sweep:Net
[latentmill.vaes]
lens = acme_sweep:Lens
[latentmill.text_encoders]
words = acme_sweep:Words
"""


class Sweep:
    """Sweeps with models that count, and the same jobs alone."""

    def __init__(self, acme, folder):
        self.acme, self.notes, self.folder = acme, acme.notes, folder
        self.given = []

    def let(self, happen):
        (self.folder / f"notes-{happen}").touch()

    def __call__(self, *more, code=0):
        """Run a sweep; what was loaded (``Net``) and let go (``-Net``), in that order."""
        self.notes.write_text("")
        assert self.acme.latentmill("run", "-m", *self.given, *more, f"output={self.folder}/out") == code, self.said
        noted = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [note.get("load") or "-" + note["gone"] for note in noted if {"load", "gone"} & note.keys()]

    @property
    def said(self):
        return self.acme.latentmill.said

    def require_as_alone(self, label, *more):
        """The dataset in this folder is what the job makes alone, and says that the same weights made it."""
        alone = f"{self.folder}/{label}-alone"
        assert self.acme.latentmill("run", *self.given, *more, "cluster=inline", f"output={alone}") == 0, self.said
        there, same = (Path(self.folder, at) for at in (f"out/{label}", alone))
        assert table(there).equals(table(same)) and table(there).num_rows == 3
        assert told(there) == told(same)


def told(output):
    return {path.name: path.read_text() for path in output.glob("weights/*")}


@pytest.fixture
def sweep(acme, install, tmp_path, monkeypatch):
    install("acme-sweep", POINTS, acme_sweep=CODE)
    for name in ("net", "lens", "words"):
        (tmp_path / name).write_text("0.125")
    (tmp_path / "extra").write_text("2")
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    acme.source(["a fox", "a cat", "an owl"])
    found = Sweep(acme, tmp_path)
    found.given = [
        *("txt2img", "samples_per_row=1", "sampling.steps=2", "rows_per_shard=2", "scheduler.name=euler"),
        *("sampling.width=1", "sampling.height=1", "sampling.guidance_scale=1", f"source.path={tmp_path}/rows.jsonl"),
        *("denoiser.name=net", f"denoiser.path={tmp_path}/net", "vae.name=lens", f"vae.path={tmp_path}/lens"),
        *("text_encoder.name=words", f"text_encoder.path={tmp_path}/words"),
    ]
    return found


def test_a_model_is_loaded_once_for_all_jobs_in_one_process(sweep):
    threads = torch.get_num_threads()
    loaded = sweep("cluster=inline", "deterministic=true,false")
    assert loaded[:3] == ["Words", "Net", "Lens"] and sorted(loaded[3:]) == ["-Lens", "-Net", "-Words"]
    for deterministic in ("true", "false"):
        sweep.require_as_alone(f"deterministic={deterministic}", f"deterministic={deterministic}")
    assert torch.get_num_threads() == threads


def test_what_is_not_the_same_is_let_go_before_what_comes_is_loaded(sweep, monkeypatch):
    """So it is with models that know themselves, as libraries' may."""
    monkeypatch.setenv("CYCLES", "")
    loaded = sweep("cluster=inline", "vae.bias=0,0.5", "denoiser.bias=0,1")
    assert loaded[:5] == ["Words", "Net", "Lens", "-Net", "Net"]
    assert {*loaded[5:7]} == {"-Net", "-Lens"} and loaded[7:11] == ["Net", "Lens", "-Net", "Net"]
    sweep.require_as_alone("vae.bias=0.5,denoiser.bias=1", "vae.bias=0.5", "denoiser.bias=1")
    gc.collect()  # what was loaded last says so in this test's notes


def test_a_model_that_has_read_files_for_rows_is_loaded_again(sweep):
    """It may remember what was in them, and the next dataset must be told by which its rows were made."""
    sweep.acme.source(["a fox <extra>", "a cat", "an owl"])
    loaded = [name for name in sweep("cluster=inline", "sampling.tone=0,1") if name[0] != "-"]
    assert loaded == ["Words", "Net", "Lens"] * 2
    sweep.require_as_alone("tone=1", "sampling.tone=1")
    assert any("file" in name for name in told(sweep.folder / "out" / "tone=1"))


def test_a_job_that_is_stopped_stops_the_sweep_and_the_same_command_goes_on(sweep):
    sweep.let("stop")
    job = ("cluster=inline", "vae.bias=0,0.5,1")
    assert sweep(*job, code=130)[:3] == ["Words", "Net", "Lens"]
    done = [(sweep.folder / "out" / f"bias={bias}" / "_SUCCESS").exists() for bias in (0, 0.5, 1)]
    assert done == [True, False, False] and not (sweep.folder / "out" / "bias=1").exists()
    assert sweep(*job)[:3] == ["Words", "Net", "Lens"]
    sweep.require_as_alone("bias=0.5", "vae.bias=0.5")


@pytest.fixture
def on_ray(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    there = ray_forks.Cluster(num_cpus=2)
    stages = ("read", "encode", "denoise", "decode", "write")
    workers = [f"stages.{name}.{said}" for name in stages for said in ("num_cpus=0.1", "replicas=1")]
    yield ["placement=split", "cluster=ray", f"cluster.address={there.address}", *workers]
    there.shutdown()


def test_on_ray_a_worker_goes_on_with_the_next_job_unless_that_needs_another_model(sweep, on_ray):
    """In the second job a worker ends that the first has left. The third has another VAE, of which encode asks for the shapes; it is stopped.

    Models that are let go end with their process: Ray either kills it, or has it end as Python does, which says so.
    """
    sweep.let("death")
    sweep.let("stop")
    job = (*on_ray, "vae.bias=0,0.5", "sampling.tone=0,1")
    loaded = [name for name in sweep(*job, code=130) if name[0] != "-"]
    assert sorted(loaded) == ["Lens", "Lens", "Net", "Words", "Words", "Words"]
    assert not (sweep.folder / "out" / "bias=0.5,tone=1").exists()
    logs = [
        [*(sweep.folder / "out" / f"bias={job}" / "logs").iterdir()] for job in ("0,tone=0", "0,tone=1", "0.5,tone=0")
    ]
    assert [len(each) for each in logs] == [5, 6, 5]
    texts = [" ".join(path.read_text() for path in each) for each in logs]
    assert [text.count("which was") for text in texts] == [0, 5, 3]
    # What is left of the third job may be done before all of its workers are ready: those are begun anew for the fourth.
    assert {name for name in sweep(*job) if name[0] != "-"} == {"Lens", "Net", "Words"}
    require_nobody_is_left()
    for label in ("bias=0,tone=1", "bias=0.5,tone=0", "bias=0.5,tone=1"):
        sweep.require_as_alone(label, *(f"{kind}.{said}" for kind, said in zip(("vae", "sampling"), label.split(","))))


def require_nobody_is_left():
    until = time.monotonic() + 20
    while left := [each for each in placement_group_table().values() if each["state"] != "REMOVED"] + list_named_actors(
        True
    ):
        assert time.monotonic() < until, left
        time.sleep(0.1)

"""A signal that comes amid a library's work, which makes an error of its own of it, or goes on: torch does the one, C code the other."""

import json
import os
import signal
import time

import pytest

POINTS = "[latentmill.denoisers]\nhears = acme_hears:Hears\n"
CODE = """
import os
import time
from pathlib import Path

import torch
from latentmill.plugin import Denoiser
from latentmill.schedulers.noise_schedules import RectifiedFlow

FOLDER = Path(os.environ["HEARS"])


def reach(place):
    for wanted in sorted(FOLDER.glob(f"{place} *")):
        _, makes, *numbers = wanted.name.split()
        wanted.unlink()
        try:
            for number in numbers:
                os.kill(os.getpid(), int(number))
                time.sleep(0)  # here Python hears it
        except KeyboardInterrupt:
            if makes == "error":
                raise ValueError("could not determine the shape") from None


class Hears(Denoiser):
    contract, prediction, noise_schedule = 2, "flow", RectifiedFlow()

    def __init__(self, name: str = ""):
        reach("init")

    def load(self, device):
        reach("load")

    def predict(self, x, t, conditioning):
        reach("predict")
        return torch.sin(x * 3)
"""


@pytest.fixture
def job(latentmill, install, tmp_path, monkeypatch):
    """Run it, with signals at a place; what the command came to."""
    install("acme", POINTS, acme_hears=CODE)
    monkeypatch.setenv("HEARS", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("red circle\n" * 8)

    def run(output, place="", makes="", *numbers, grace=0):
        if numbers:
            (tmp_path / " ".join([place, makes, *(str(int(number)) for number in numbers)])).touch()
        return latentmill(
            "run", "txt2img", f"output={tmp_path / output}", f"source.path={tmp_path / 'prompts.txt'}", "cluster=inline",
            "vae.name=patches", "vae.side=1", "denoiser.name=hears", "samples_per_row=1", "rows_per_shard=4",
            "sampling.steps=4", "sampling.width=4", "sampling.height=4", "scheduler=euler", f"grace={grace}",
            "stages.denoise.batch_size=1",
        )  # fmt: skip

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("place", "makes"), [("init", "error"), ("load", "error"), ("load", "nothing")])
def test_it_is_an_interrupt_all_the_same(job, latentmill, tmp_path, place, makes, number):
    assert job("out", place, makes, number) == 130, latentmill.said
    assert "shape" not in latentmill.said and "start" not in latentmill.err
    assert job("out") == 0, latentmill.said
    assert job("whole") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("makes", ["error", "nothing"])
def test_two_of_them_make_no_row_fail(job, latentmill, tmp_path, makes):
    """The first leaves time to end what has begun, and the second ends it: a row that was at its step did not fail."""
    assert job("out", "predict", makes, signal.SIGTERM, signal.SIGTERM, grace="10m") == 130, latentmill.said
    assert latentmill("status", tmp_path / "out", "--json") == 0
    assert json.loads(latentmill.out)["failed"] == 0
    assert job("out") == 0, latentmill.said
    assert job("whole") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "{out}", "{out}/../exported", "--to", "mds"], "interrupted; the same command goes on\n"),
        (["push", "{out}", "hf://datasets/me/mine"], "interrupted; the same command goes on\n"),
        (["status", "{out}"], "stopped before anything was begun\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_it_ends_other_commands_as_ctrl_c_does(job, latentmill, tmp_path, monkeypatch, words, says):
    """It comes as one of the dataset's files is read, and is an error there."""
    assert job("out") == 0, latentmill.said

    def read(text, *more, **how):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
        except KeyboardInterrupt:
            raise ValueError("no JSON") from None

    monkeypatch.setattr(json, "loads", read)
    assert latentmill(*(word.format(out=tmp_path / "out") for word in words)) == 130, latentmill.said
    assert latentmill.err == says


def files(output):
    return {path.name: path.read_bytes() for path in sorted((output / "data").glob("*"))}

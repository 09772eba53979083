"""Pictures that stay floats between the stages that take them so, and are bytes for all others."""

import json
import signal

import numpy as np
import pytest
from tests.outside.drain_parts import CODE, POINTS, Counted

STAGES = """[latentmill.stages]
watch = acme_watch:Watch
bytes = acme_watch:Bytes
shown = acme_watch:Shown
"""
WATCH = """
import os

import torch
from acme_counts import count
from latentmill.plugin import Stage, tensors


class Watch(Stage):
    contract, takes_floats = 2, True
    expected = torch.float32

    def __call__(self, batch, reject):
        assert tensors.from_arrow(batch, "image").dtype == self.expected
        count(os.environ["NOTES"], "evaluated", len(batch))
        return batch


class Shown(Watch):
    expected = torch.uint8


class Bytes(Shown):
    takes_floats = False
"""
LARGER = "{name: image_upscale, method: bicubic, scale: 1.5}"
TWICE = f"flow=[read,encode,denoise,decode,{LARGER},watch,{{name: encode_images, as: again}},{{name: denoise, as: refine}},{{name: decode, as: shown}},write]"
AGAIN = "stages.refine.sampling={strength: 0.5, seed: 3}"
FLOATS = "float_pictures=true"


@pytest.fixture
def counted(latentmill, install, tmp_path, monkeypatch):
    install("acme", POINTS + STAGES, acme_counts=CODE, acme_watch=WATCH)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return Counted(latentmill, tmp_path, rows=12)


def latents(table):
    return np.array([row["latents"] for row in table], np.float32)


def test_what_is_decoded_and_encoded_again_is_what_it_was(counted, rows):
    """But for what is beyond black and white; of bytes each value is the nearest 255th."""
    tail = "decode,{name: encode_images, as: again},write]"
    for name, flow, setting in (("plain", "write]", ()), ("floats", tail, (FLOATS,)), ("bytes", tail, ())):
        counted.run(name, f"flow=[read,encode,denoise,{flow}", "sampling.steps=3", *setting)
    plain, floats, rounded = (latents(rows(counted.place(name))) for name in ("plain", "floats", "bytes"))
    scale = np.abs(floats).max()  # where the picture is white
    shown = np.clip(plain / scale, -1, 1)
    assert np.abs(plain).max() > scale and np.abs(floats / scale - shown).max() < 1e-6
    assert 1 / 1000 < np.abs(rounded / scale - shown).max() <= 1.001 / 255


def test_a_stop_between_two_passes_keeps_floats_and_no_byte_is_another(counted):
    whole = counted.run("whole", TWICE, AGAIN, FLOATS)[1]
    made, waited = [], set()
    for when in (43, 60, 110):
        counted.stop(signal.SIGTERM, when - sum(made))
        made.append(counted.run("out", TWICE, AGAIN, FLOATS, "grace=0s", code=130)[1])
        waited |= {stage for name in counted.kept("out") for stage in stages_that_wait(counted, name)}
    made.append(counted.run("out", TWICE, AGAIN, FLOATS)[1])
    assert waited & {4, 5, 6}, "rows with pictures of floats"
    assert sum(made) == whole and counted.files("out") == counted.files("whole") and not counted.kept("out")


def stages_that_wait(counted, name):
    text = (counted.place("out") / "half_done" / name).read_bytes()
    about, _ = json.JSONDecoder().raw_decode(text[text.index(b'{"plan"') :].decode("latin-1"))
    return about["stages"]


def test_a_picture_is_rounded_once_for_who_takes_bytes(counted, rows):
    """A stage that knows of no floats, and the sink, which others stand before that would pass floats on."""
    larger = LARGER.replace("bicubic", "nearest-exact")
    flow = f"flow=[read,encode,denoise,decode,{larger},watch,{larger.replace('}', ', as: more}')},shown,bytes,write]"
    counted.run("floats", flow, FLOATS)
    counted.run("bytes", flow.replace("watch,", ""))
    floats, rounded = ([row["image"] for row in rows(counted.place(name))] for name in ("floats", "bytes"))
    counted.run("sink", flow.replace("bytes,", ""), FLOATS)
    assert floats == rounded == [row["image"] for row in rows(counted.place("sink"))]
    assert len({image["bytes"] for image in floats}) == 12
    plans = [json.loads((counted.place(name) / "plan.json").read_text()) for name in ("floats", "bytes")]
    assert [plan["config"].get("float_pictures") for plan in plans] == [True, None]
    assert plans[0]["hash"] != plans[1]["hash"]


@pytest.mark.parametrize(
    ("flow", "said"),
    [
        ("read,encode,denoise,decode,write", "float_pictures is of pictures that are made larger or encoded once a stage has made them"),
        ("read,encode,denoise,decode,bytes,write", "float_pictures is of pictures that are made larger or encoded once"),
        ("read,encode,denoise,decode,watch,write", "float_pictures is of pictures that are made larger or encoded once"),
        (f"read,encode,denoise,decode,bytes,{LARGER},write", "bytes takes pictures of bytes, so image_upscale would be given rounded ones: float_pictures=false"),
        (f"read,encode,denoise,decode,{LARGER},bytes,{{name: encode_images, as: again}},{{name: denoise, as: refine}},{{name: decode, as: shown}},write",
         "bytes takes pictures of bytes, so again would be given rounded ones"),
    ],
)  # fmt: skip
def test_floats_that_would_be_lost_are_refused(counted, latentmill, flow, said):
    code = latentmill("plan", "txt2img", *counted.settings, f"flow=[{flow}]", FLOATS, f"output={counted.place('out')}")
    assert code == 2 and said in latentmill.err and "Traceback" not in latentmill.err

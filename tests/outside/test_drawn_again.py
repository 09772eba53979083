"""``accept``: what stays of a row from one attempt to the next, what can't be drawn again, and what is told of attempts."""

import pytest
from PIL import Image

STAGES = '''
import os
import pyarrow as pa
from latentmill.plugin import Filtered, RowField, Stage
from latentmill.stages.read import Read


class Gate(Stage):
    """Lets a row pass from the attempt on that the environment says, and rejects those that are of a green ring then."""

    contract = 2

    def __call__(self, batch, reject):
        at, good = int(os.environ.get("GATE", "0")), []
        for i, row in enumerate(batch.select(["attempt", "prompt"]).to_pylist()):
            good.append(row["attempt"] >= at and row["prompt"] != "a green ring")
            if row["attempt"] < at:
                reject(i, Filtered("too early"))
            elif not good[-1]:
                reject(i, "dull")
        return batch.filter(pa.array(good))


class Plain(Read):
    """Reads a row as it is, whatever the attempt."""

    def declare(self, context):
        context.attempts = None
        return super().declare(context)


class Greedy(Gate):
    row_fields = [RowField("attempt", pa.int64(), "theirs")]


class Boxed(Gate):
    row_fields = [RowField("bucket", pa.int64(), "theirs", default=0)]
'''
POINTS = "[latentmill.stages]\n" + "".join(
    f"{name.lower()} = gates:{name}\n" for name in ("Gate", "Plain", "Greedy", "Boxed")
)
SIZE = ("sampling.width=16", "sampling.height=16", "sampling.steps=2", "samples_per_row=1")
OWN_SIZE = ("sampling.width=null", "sampling.height=null")


@pytest.fixture
def run(latentmill, install, tmp_path):
    """``run(OUT, ...)``: a job of two prompts in this process, with two attempts."""
    install("gates", POINTS, gates=STAGES)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star")

    def run(
        name, *settings, job="txt2img", flow="read,encode,denoise,decode,gate,write", accept="accept={attempts: 2}"
    ):
        told = (f"source.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / name}", f"flow=[{flow}]", *SIZE)
        return latentmill("run", job, "cluster=inline", *told, *([accept] if accept else []), *settings)

    return run


def test_a_picture_that_is_cut_at_random_is_cut_at_the_same_place_in_each_attempt(
    run, rows, tmp_path, monkeypatch, latentmill
):
    """What is filtered before the noise is made would be filtered in any attempt."""
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (64 + number, 16), (60 * number, 30, 200)).save(tmp_path / "pictures" / f"{number}.png")
    size = (
        "size.buckets=[[16,16]]",
        "size.crop=random",
        "sampling.strength=0.8",
        *OWN_SIZE,
    )
    of = ("source=images", f"source.path={tmp_path / 'pictures'}", *size)
    monkeypatch.setenv("GATE", "1")
    assert run("out", *of) == 0, latentmill.said
    assert run("plain", *of, flow="read,encode,denoise,decode,write", accept="") == 0, latentmill.said
    again, once = rows(tmp_path / "out"), rows(tmp_path / "plain")
    assert [row["attempt"] for row in again] == [1] * 4 and all(a["seed"] != b["seed"] for a, b in zip(again, once))
    assert [row["crop_ltrb"] for row in again] == [row["crop_ltrb"] for row in once]
    assert len({row["crop_ltrb"][0] for row in once}) > 1


def test_of_half_way_latents_no_other_sample_is_drawn(run, failed, tmp_path, latentmill):
    assert run("half", "sampling.until=0.6", job="denoise", flow="read,encode,denoise,write", accept="") == 0, (
        latentmill.said
    )
    on = {"job": "denoise", "flow": "read,encode,denoise,gate,write"}
    of = ("source=latents", f"source.path={tmp_path / 'half'}")
    assert run("out", *of, **on) == 5
    assert {row["reason"] for row in failed(tmp_path / "out")} == {
        "the latents are half-way, at time 0.5: their noise was drawn where they were made, and accept can draw no other"
    }
    assert run("once", *of, **on, accept="accept={attempts: 1}") == 0, latentmill.said


def test_a_first_stage_that_does_not_go_by_attempts_is_refused(run, latentmill, tmp_path):
    flow = "plain,encode,denoise,decode,gate,write"
    assert run("out", flow=flow) == 2 and not (tmp_path / "out").exists()
    assert latentmill.err == (
        "latentmill: txt2img: accept draws rows again, and plain would read the same: a stage that stands first must declare attempt, "
        "and go by it\n"
    )


@pytest.mark.parametrize(
    ("stage", "settings", "says"),
    [
        ("greedy", ("source=images",), "a row field attempt, which is a column that stage read adds"),
        (
            "boxed",
            ("source=images", "size.buckets=[[16,16]]", *OWN_SIZE),
            "a row field bucket, which is a column that stage read adds",
        ),
    ],
)
def test_a_row_field_called_as_a_column_of_the_first_stage_is_refused(run, latentmill, tmp_path, stage, settings, says):
    (tmp_path / "prompts.txt").unlink()
    (tmp_path / "prompts.txt").mkdir()
    Image.new("RGB", (64, 16)).save(tmp_path / "prompts.txt" / "a.png")
    assert run("out", *settings, flow=f"read,encode,denoise,decode,{stage},write") == 2
    assert f"stage {stage} of gates 1.0 has {says}" in latentmill.err and not (tmp_path / "out").exists()


def test_rows_that_are_not_stored_say_how_many_samples_were_drawn(
    run, failed, filtered, tmp_path, monkeypatch, latentmill
):
    (tmp_path / "prompts.txt").write_text("a green ring\na blue star")
    assert run("first") == 0, latentmill.said
    assert [row.get("attempt") for row in failed(tmp_path / "first")] == [None]
    monkeypatch.setenv("GATE", "1")
    assert run("second") == 0, latentmill.said
    assert [(row["reason"], row["attempt"]) for row in failed(tmp_path / "second")] == [("dull", 1)]
    assert run("one", accept="accept={attempts: 1}") == 0, latentmill.said
    assert [(row["reason"], row["attempts"]) for row in filtered(tmp_path / "one")] == [("too early", 1)] * 2


@pytest.mark.parametrize("sink", ["parquet", "webdataset"])
def test_a_shard_that_was_made_again_with_other_samples_is_exported_again(run, latentmill, sink, tmp_path, monkeypatch):
    def exported(to):
        command = ("export", tmp_path / "out", "--to", "folder", tmp_path / to, "--names", "row_id")
        assert latentmill(*command) == 0, latentmill.said
        return {path.stem: path.read_bytes() for path in (tmp_path / to).rglob("*.png")}

    assert run("out", f"sink={sink}") == 0, latentmill.said
    before = exported("to")
    [shard] = (tmp_path / "out" / "data").iterdir()
    shard.unlink()
    monkeypatch.setenv("GATE", "1")
    assert run("out", f"sink={sink}") == 0, latentmill.said
    after = exported("anew")
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)
    assert exported("to") == after

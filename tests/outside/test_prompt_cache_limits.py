"""What a prompt cache must not do: fail a row that it could do without, or give one weights' prompts to others'."""

import io
from importlib.metadata import entry_points
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file

from latentmill.plugin import StageContext
from latentmill.plugin.stage import Declaration


def files(folder):
    return sorted(Path(folder).glob("*/*/*.safetensors"))


def test_a_conditioning_that_is_not_in_one_piece_is_kept_as_any(acme, monkeypatch):
    acme.source(["fox", "cat"])
    monkeypatch.setenv("BAD", "turned")
    job = ("flow=[read, encode_text, write]", f"prompt_cache={acme.folder / 'cache'}")
    acme(*job)
    assert "prompt_cache" not in acme.latentmill.err and len(acme.read(acme.output)) == 2
    assert {tuple(load(path.read_bytes())["embeds"].shape) for path in files(acme.folder / "cache")} == {(2, 32)}
    acme(*job)
    assert acme.encoded() == {}


def test_a_folder_that_can_not_be_written_to_is_told_of_once_and_no_row_fails(acme, monkeypatch):
    acme.source([f"prompt {k}" for k in range(6)])

    def full(*_, **__):
        raise ValueError("no room for this")

    monkeypatch.setattr("safetensors.torch.save", full)
    made = acme(f"prompt_cache={acme.folder / 'cache'}", "stages.read.batch_size=2", "stages.encode.batch_size=2")
    assert len(made) == 6 and files(acme.folder / "cache") == []
    assert acme.latentmill.err.count("can't be written to, and is only read: no room for this") == 1


def test_without_a_fingerprint_a_cache_is_not_used(acme, monkeypatch):
    acme.source(["fox", "fox"])
    monkeypatch.setenv("BAD", "nameless")
    for _ in range(2):
        acme(f"prompt_cache={acme.folder / 'cache'}")
        assert acme.encoded() == {"fox": 1, "": 1} and not (acme.folder / "cache").exists()
        said = "prompt_cache: not used: text_encoder counting of acme 1.0 has no fingerprint"
        assert acme.latentmill.err.count(said) == 1


def test_a_file_of_other_shapes_than_the_encoder_makes_is_encoded_anew(acme, monkeypatch):
    """As after an edit of an encoder that is installed to be edited: its version is what it was."""
    acme.source(["fox", "cat"])
    job = (f"prompt_cache={acme.folder / 'cache'}", "stages.read.batch_size=2", "stages.encode.batch_size=2")
    first = acme(*job)
    monkeypatch.setenv("BAD", "wide")
    acme.source(["fox", "cat", "owl", "fox"])
    made = acme(*job)
    assert acme.encoded()["owl"] == 1 and {**made, **first} == made and made[3] == made[0]
    assert "is damaged: its shapes are not those of the text encoder: its prompt is encoded anew" in acme.latentmill.err
    monkeypatch.delenv("BAD")
    wide = {path for path in files(acme.folder / "cache") if load_file(path)["embeds"].shape == (65,)}
    with_text = set()
    for path in wide:
        with safe_open(path, "pt") as file:
            with_text.add(file.metadata()["prompt"])
    assert "owl" in with_text and len(with_text) > 1, "what was found to be wrong is put right"


def test_an_encoder_that_is_the_first_to_use_a_gpu_draws_nothing_by_that(acme, monkeypatch):
    acme.source(["fox"])
    begun = iter([False])
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: next(begun, True))
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: torch.ones(16, dtype=torch.uint8))
    acme("flow=[read, encode_text, write]", f"prompt_cache={acme.folder / 'cache'}")
    assert "draws from a global random generator" not in acme.latentmill.err
    assert len(files(acme.folder / "cache")) == 2


def test_a_negative_prompt_is_encoded_for_a_stage_that_takes_one_name_of_it():
    for takes, read in (("negative:embeds", True), ("negative:", True), ("prompt:", False)):
        after = [Declaration("own", takes=(takes,)), Declaration("denoise", ignores=("negative:",))]
        assert StageContext(Declaration("encode"), after=after).is_read("negative:") == read


def test_a_clip_with_a_frame_that_is_null_is_told_as_that():
    [sink] = entry_points(group="latentmill.sinks", name="parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    frame, file = {"bytes": buffer.getvalue(), "path": "0.png"}, io.BytesIO()
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    clips = pa.array([[frame, None], [frame, {"bytes": None, "path": "1.png"}], [frame]], kind)
    pq.write_table(pa.table({"row_id": ["a", "b", "c"], "video": clips}), file)
    *bad, good = sink.load()().read(file, None, [0, 1, 2], None)
    assert [str(each) for each in bad] == ["frame 1 of the clip is null"] * 2 and len(good) == 1

"""Equal prompts are encoded once: in a run, wherever they stand, and, with ``prompt_cache``, once for all runs. A text encoder counts in a file."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save


def files(folder):
    return sorted(Path(folder).glob("*/*/*.safetensors"))


HUNDRED = [f"prompt {k}" for k in range(100)]


def test_two_thousand_rows_of_a_hundred_prompts_are_a_hundred_encodings_and_none_in_the_next_run(acme):
    acme.source([HUNDRED[k * 37 % 100] for k in range(2000)])
    job = ("flow=[read, encode_text, write]", "rows_per_shard=2000", f"prompt_cache={acme.folder / 'cache'}")
    job += ("stages.read.batch_size=200", "stages.encode_text.batch_size=100", "stages.write.batch_size=200")
    acme(*job)
    assert acme.encoded() == {**dict.fromkeys(HUNDRED, 1), "": 1}
    acme(*job)
    assert acme.encoded() == {} and len(acme.read(acme.output)) == 2000


def test_without_a_folder_they_are_encoded_once_a_run(acme):
    acme.source([HUNDRED[k * 37 % 10] for k in range(60)])
    made = acme("stages.encode.batch_size=4", "stages.read.batch_size=4")
    assert acme.encoded() == {**dict.fromkeys(HUNDRED[:10], 1), "": 1}
    assert list(made.values()) == [torch.tensor(acme.number(HUNDRED[k * 37 % 10])).item() for k in range(60)]


def test_several_workers_share_a_folder_and_each_file_is_whole(acme, forks):
    acme.source(HUNDRED[:40] * 2)
    cache = f"prompt_cache={acme.folder / 'cache'}"
    commands = [["run", *acme.job(cache, "stages.encode.batch_size=4")] for _ in range(2)]
    acme.notes.write_text("")
    there = {"path": [acme.folder / "site"], "NOTES": str(acme.notes)}
    both = [forks.begin(command, acme.folder / "log", **there) for command in commands]
    assert [forks.end(process) for process in both] == [0, 0], (acme.folder / "log").read_text()
    assert acme.encoded().keys() == {*HUNDRED[:40], ""} and max(acme.encoded().values()) <= 2
    assert len(files(acme.folder / "cache")) == 41 and not list((acme.folder / "cache/.tmp").iterdir())
    one, two, again = acme.read(acme.folder / "out1"), acme.read(acme.folder / "out2"), acme(cache)
    assert one == two and [row["latents"][0] for row in one] == list(again.values())
    assert acme.encoded() == {} and "prompt_cache" not in acme.latentmill.said


def test_an_object_store_holds_them_as_a_folder_does(acme, bucket):
    acme.source(["a fox", "a cat", "a fox"])
    plain = acme(f"prompt_cache={bucket}/prompts")
    assert acme.encoded() == {"a fox": 1, "a cat": 1, "": 1}
    assert acme(f"prompt_cache={bucket}/prompts") == plain and acme.encoded() == {}


def test_a_deterministic_job_has_the_same_bytes_from_a_cold_and_a_warm_cache_and_from_none(acme):
    """Of an encoder whose numbers depend on the size of a call and on the slot in it, as those of a matrix product may."""
    prompts = ["fox", "cat", "owl", "cow", "hen"]
    acme.source([prompts[k * 7 % 5] for k in range(60)])
    fixed = ("deterministic=true", "text_encoder.slotted=true", "stages.encode.batch_size=4", "rows_per_shard=22")
    cache = f"prompt_cache={acme.folder / 'cache'}"
    plain = acme(*fixed)
    assert {len(texts) for texts in acme.noted("prompts")} == {4} and len({*plain.values()}) == len(prompts) * 4
    for row, value in plain.items():
        assert value == torch.tensor(acme.number(prompts[row * 7 % 5]) + 0.001 * (row % 22 % 4) + 4).item(), row
    assert acme(*fixed, cache) == plain
    assert acme(*fixed, cache) == plain and acme.encoded() == {}
    moved = acme(*fixed, cache, "rows_per_shard=10", "stages.read.batch_size=3")
    for row, value in moved.items():
        assert value == torch.tensor(acme.number(prompts[row * 7 % 5]) + 0.001 * (row % 10 % 4) + 4).item(), row
    larger = acme(*fixed, cache, "stages.encode.batch_size=5")
    for row, value in larger.items():
        assert value == torch.tensor(acme.number(prompts[row * 7 % 5]) + 0.001 * (row % 22 % 5) + 5).item(), row


def test_a_deterministic_job_whose_samples_stand_side_by_side_calls_once_for_each_prompt(acme):
    acme.source(HUNDRED[:10])
    acme("deterministic=true", "samples_per_row=10", "stages.encode.batch_size=4", "rows_per_shard=40")
    assert len(acme.noted("prompts")) == 11


def test_it_is_readable_without_us(acme):
    acme.source([{"prompt": "a fox", "tone": 0.5}])
    acme(f"prompt_cache={acme.folder / 'cache'}", "text_encoder.bias=2")
    found = {}
    for path in files(acme.folder / "cache"):
        with safe_open(path, "pt") as file:
            about = file.metadata()
            found[about["prompt"]] = about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == {"a fox", ""}
    about, tensors = found["a fox"]
    assert tensors["embeds"].shape == (64,) and tensors["count"].item() == 5
    assert json.loads(about["fields"]) == {"tone": 0.5} and about["negative"] == "false"
    encoder = json.loads(about["encoder"])
    assert encoder["name"] == "counting" and encoder["version"] == "1.0" and encoder["settings"] == {"bias": 2}


def test_what_changes_the_numbers_is_encoded_anew_and_what_does_not_is_not(acme, monkeypatch):
    cache = f"prompt_cache={acme.folder / 'cache'}"
    for name in ("model", "moved", "other"):
        (acme.folder / name).write_text("other weights" if name == "other" else "weights")
    acme.source([{"prompt": "a fox", "tone": tone} for tone in (0, 1)])
    told = (cache, f"text_encoder.path={acme.folder / 'model'}")
    first = acme(*told)
    assert acme.encoded() == {"a fox": 2, "": 2} and first[1] == first[0] + 1
    again = ("sampling.steps=2", "seed=4", "stages.encode.batch_size=1", "samples_per_row=2")
    assert acme(cache, f"text_encoder.path={acme.folder / 'moved'}", *again) == first and acme.encoded() == {}
    secret = "text_encoder.voice=${oc.env:VOICE}"  # which no plan and no file shows
    for more in (f"text_encoder.path={acme.folder / 'other'}", "text_encoder.bias=1", secret, secret):
        monkeypatch.setenv("VOICE", "31415" * acme.runs)
        acme(*told, more)
        assert acme.encoded() == {"a fox": 2, "": 2}, more
    assert not any(b"31415" in path.read_bytes() for path in files(acme.folder / "cache"))
    acme(*told, "deterministic=true", "stages.encode.batch_size=1")
    assert acme.encoded() == {"a fox": 2, "": 2}


def test_warnings_come_with_prompts_from_the_cache_and_none_stays_another_thing_than_an_empty_negative_prompt(acme):
    negative = [None, "", "one of thirteen", None]
    acme.source(
        [{"prompt": text, "negative_prompt": no} for text, no in zip(["a fox"] * 3 + ["one of thirteen"], negative)]
    )
    long, made = "the prompt is longer than 12 letters", []
    for encoded in ([[None, "", "one of thirteen"]], []):
        made.append(acme(f"prompt_cache={acme.folder / 'cache'}", "text_encoder.name=zeros"))
        assert acme.noted("negative") == encoded and bool(acme.encoded()) == bool(encoded)
        assert [row["warning"] for row in acme.read(acme.output)] == ["", "", f"negative_prompt: {long}", long]
    assert made[0] == made[1]


@pytest.mark.parametrize(("bad", "fixed"), [("raise", "false"), ("raise", "true"), ("nan", "true")])
def test_a_prompt_that_fails_fails_each_of_its_rows_and_is_not_kept(acme, failed, monkeypatch, bad, fixed):
    acme.source(["fox", "bad", "cat", "bad", "fox", {"prompt": "cat", "negative_prompt": "bad"}, "refused", "refused"])
    job = (
        f"prompt_cache={acme.folder / 'cache'}",
        f"deterministic={fixed}",
        "max_error_rate=1",
        "stages.encode.retries=0",
    )
    monkeypatch.setenv("BAD", bad)
    made = acme(*job)
    assert [*made] == [0, 2, 4]
    reasons = {int(row["row_id"].partition("-")[0]): row["reason"] for row in failed(acme.output)}
    assert [*reasons] == [1, 3, 5, 6, 7] and "a refused prompt" in reasons[6] and reasons[6] == reasons[7]
    for row, prompt in ((1, "prompt"), (3, "prompt"), (5, "negative prompt")):
        assert ("out of words" if bad == "raise" else f"embeds of the {prompt} are not finite") in reasons[row]
    monkeypatch.delenv("BAD")
    healed = acme(*job)
    assert [*healed] == [0, 1, 2, 3, 4, 5] and {**healed, **made} == healed
    assert acme.encoded()["bad"] and not acme.encoded()["fox"] and not acme.encoded()["cat"]


def test_numbers_that_are_drawn_are_not_kept(acme, monkeypatch):
    acme.source(["fox", "cat", "fox", "cat"])
    monkeypatch.setenv("BAD", "draw")
    made = acme(f"prompt_cache={acme.folder / 'cache'}", "stages.encode.batch_size=2", "stages.read.batch_size=2")
    assert acme.encoded() == {"fox": 2, "cat": 2, "": 2} and len({*made.values()}) == 4
    assert "text_encoder counting of acme 1.0: encode draws from a global random generator" in acme.latentmill.err
    assert files(acme.folder / "cache") == []


def test_a_file_that_is_not_what_was_written_is_named_and_encoded_anew(acme):
    prompts = ["torn", "empty", "foreign", "damaged", "swapped", "whole"]
    acme.source(prompts)
    job = (f"prompt_cache={acme.folder / 'cache'}",)
    first = acme(*job)
    path = {}
    for each in files(acme.folder / "cache"):
        with safe_open(each, "pt") as file:
            path[file.metadata()["prompt"]] = each
    whole = {text: each.read_bytes() for text, each in path.items()}
    wrong = {
        "torn": (whole["torn"][:-7], "is torn, or no file"),
        "empty": (b"", "is torn, or no file"),
        "foreign": (save({"embeds": torch.ones(64)}), "is torn, or no file"),
        "damaged": (whole["damaged"][:-1] + bytes([whole["damaged"][-1] ^ 1]), "is damaged"),
        "swapped": (whole["whole"], "is another's"),
    }
    for texts in (["torn", "empty", "foreign"], ["damaged", "swapped"]):  # a worker is heard of three at most
        for text in texts:
            path[text].write_bytes(wrong[text][0])
        assert acme(*job) == first
        assert acme.encoded() == dict.fromkeys(texts, 1)
        for text in texts:
            assert f"{path[text]} {wrong[text][1]}" in acme.latentmill.err
        assert all(load(path[text].read_bytes()).keys() == {"embeds", "count"} for text in texts), "they are put right"


def test_a_cache_that_can_not_be_used_is_told_of_and_done_without(acme):
    acme.source(["fox", "cat"])
    job = (f"prompt_cache={acme.folder / 'cache'}",)
    first = acme(*job)
    [encoder] = [path for path in (acme.folder / "cache").iterdir() if path.name != ".tmp"]
    encoder.rename(acme.folder / "away")
    encoder.write_text("in the way")
    assert acme(*job) == first and sum(acme.encoded().values()) == 3
    assert "prompt_cache: can't be read, and is left alone" in acme.latentmill.err
    for place, said in {
        encoder: f"must name a folder or a URL, not '{encoder}'",
        "ftp://x/y": "is no place for prompts",
    }.items():
        assert acme.latentmill("run", *acme.job(f"prompt_cache={place}")) == 2
        assert "prompt_cache" in acme.latentmill.err and said in acme.latentmill.err, acme.latentmill.err


def test_beside_a_network_that_guides_itself_no_negative_prompt_is_encoded(acme):
    acme.source([{"prompt": "fox", "negative_prompt": text} for text in ("ugly", None)])
    acme("denoiser.name=guided")
    assert acme.encoded() == {"fox": 1}
    acme("denoiser.name=shown")
    assert acme.encoded() == {"fox": 1, "ugly": 1, "": 1}


def test_a_picture_under_a_mask_is_encoded_only_for_a_network_that_reads_it(acme):
    for name, mode in (("picture", "RGB"), ("mask", "L")):
        Image.new(mode, (4, 4), 9).save(acme.folder / f"{name}.png")
    acme.source([{"prompt": "fox", "image": "picture.png", "mask": "mask.png"}] * 3)
    for network, times in (("shown", 1), ("inpainting", 2)):
        acme("sampling.width=4", "sampling.height=4", "sampling.strength=0.5", f"denoiser.name={network}")
        assert acme.noted("pictures") == [3] * times


def test_a_stage_that_knows_nothing_of_shared_tensors_is_given_none(acme):
    acme.source(["fox", "cat", "fox", "fox"])
    made = acme("flow=[read, encode, looks, denoise, write]")
    assert acme.noted("kind") == ["extension<arrow.fixed_shape_tensor[value_type=float, shape=[64]]>"]
    assert acme.noted("looks") == [list(made.values())]


def test_a_conditioning_that_a_stage_brings_is_held_to_be_finite_too(acme, failed):
    acme.source(["fox", "cat", "fox", "fox"])
    assert [*acme("flow=[read, controls, encode, denoise, write]", "max_error_rate=1")] == [0, 2]
    assert {row["reason"] for row in failed(acme.output)} == {"the text encoder's control of the prompt are not finite"}

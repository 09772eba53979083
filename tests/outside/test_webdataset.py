"""``sink=webdataset``: what the libraries make of its tars, and that a dataset of them is one like any other."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

SINK = "sink=webdataset"


def samples(output, decoded="rgb8"):
    """All samples of a dataset, as the library webdataset reads them, by key."""
    urls = [str(path) for path in sorted(Path(output).glob("data/*.tar"))]
    found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return {sample["__key__"]: sample for sample in (found.decode(decoded) if decoded else found)}


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


@pytest.fixture
def made(tmp_path, latentmill, patches, pictures):
    """A job's rows by both sinks, and the arguments that made them."""

    def make(job, *more, source=pictures):
        command = [job, f"source.path={source}", "rows_per_shard=3", *patches, *more]
        for name in ("parquet", "webdataset"):
            assert latentmill("run", *command, f"sink={name}", f"output={tmp_path / name}") == 0, latentmill.said
        return tmp_path / "webdataset", [*command, SINK, f"output={tmp_path / 'webdataset'}"]

    return make


def test_the_library_gives_each_row_s_picture_prompt_and_columns(made, rows):
    output, _ = made("reconstruct")
    found = samples(output)
    expected = rows(output.parent / "parquet")
    assert [*found] == [row["row_id"] for row in expected]
    for row in expected:
        sample = found[row["row_id"]]
        assert np.array_equal(sample["png"], pixels(row))
        assert sample["txt"] == row["prompt"]
        plain = {name: value for name, value in row.items() if name not in ("image", "prompt")}
        assert sample["json"] == {**plain, "psnr": None if plain["psnr"] == float("inf") else plain["psnr"]}


def test_datasets_opens_the_folder_by_its_card(made, tmp_path):
    output, _ = made("reconstruct")
    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 4 and loaded[0]["__key__"] == "000000000-000"
    assert loaded[0]["png"].size == (4, 4) and loaded[0]["json"]["width"] == 4
    card = (output / "README.md").read_text()
    assert "data_files: data/*.tar" in card and "| `png` | the picture |" in card


def test_report_and_contact_sheet_are_those_of_parquet(made):
    output, _ = made("reconstruct")
    one, other = (output.parent / name for name in ("parquet", "webdataset"))
    sheets = [Image.open(folder / "contact_sheet.png").convert("RGB").tobytes() for folder in (one, other)]
    assert sheets[0] == sheets[1]
    pages = [(folder / "report.html").read_text() for folder in (one, other)]
    assert [page.count("<figure>") for page in pages] == [4, 4]


def test_status_and_verify_speak_of_it_and_the_bytes_are_the_same_again(made, latentmill, tmp_path):
    output, command = made("reconstruct")
    assert latentmill("status", output) == 0 and "4 of 4 rows: 4 ok, 0 failed" in latentmill.out
    assert latentmill("verify", output) == 0 and latentmill.out.endswith("sound\n")
    before = {path.name: path.read_bytes() for path in output.glob("data/*")}
    (output / "data" / "00001.tar").unlink()
    assert latentmill("run", *command) == 0
    assert {path.name: path.read_bytes() for path in output.glob("data/*")} == before
    assert latentmill("run", *command) == 0 and "nothing to do" in latentmill.out


def test_members_say_nothing_of_the_machine_or_the_clock(made):
    output, _ = made("encode")
    with tarfile.open(output / "data" / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
        assert tar.getnames()[:4] == ["__latentmill__", *(f"000000000-000.{s}" for s in ("txt", "json", "latents.npy"))]


@pytest.mark.parametrize("std", [False, True])
def test_stored_latents_are_a_source_like_parquet_s(made, latentmill, patches, rows, tmp_path, std):
    output, _ = made("encode", "latents_std=true") if std else made("encode")
    for name in ("parquet", "webdataset"):
        to = f"output={tmp_path / name}-decoded"
        assert latentmill("run", "decode", f"source.path={tmp_path / name}", *patches, to) == 0, latentmill.said
    one, other = (rows(f"{tmp_path / name}-decoded") for name in ("parquet", "webdataset"))
    assert len(one) == 4 and one == other
    latents = samples(output)["000000001-000"]["latents.npy"]
    row = rows(tmp_path / "parquet")[1]
    assert latents.flatten().tolist() == row["latents"] and [*latents.shape] == row["shape"]
    if std:
        assert samples(output)["000000001-000"]["latents_std.npy"].flatten().tolist() == row["latents_std"]


def test_half_way_latents_go_on_with_what_the_scheduler_remembers(latentmill, rows, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star on a white background\na blue ring on a white background\n")
    halfway = [f"source.path={tmp_path / 'prompts.txt'}", "cluster=inline", "samples_per_row=1", "sampling.steps=6"]
    halfway += ["scheduler=dpmpp_2m", "sampling.until=0.5", "flow=[read,encode,denoise,write]"]
    for name in ("parquet", "webdataset"):
        first, second = tmp_path / name, tmp_path / f"{name}-2"
        assert latentmill("run", "txt2img", *halfway, f"sink={name}", f"output={first}") == 0, latentmill.said
        command = [
            "denoise",
            "source=latents",
            f"source.path={first}",
            "cluster=inline",
            "scheduler=dpmpp_2m",
            f"output={second}",
        ]
        assert latentmill("run", *command) == 0, latentmill.said
    assert any(name.startswith("state.") for name in samples(tmp_path / "webdataset")["000000000-000"])
    one, other = (rows(tmp_path / f"{name}-2") for name in ("parquet", "webdataset"))
    assert one == other and len(one) == 2


DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "a record cut off": lambda content: content[:-512],
    "empty": lambda content: b"",
    "more behind it": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_cut_off_is_found_taken_out_and_done_again(made, latentmill, damage):
    output, command = made("encode")
    shard = output / "data" / "00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(DAMAGE[damage](whole))
    assert latentmill("verify", output, "--repair") == 1 and "shard 0 can't be read" in latentmill.out
    assert not shard.exists()
    assert latentmill("run", *command) == 0 and shard.read_bytes() == whole
    assert latentmill("verify", output) == 0


def test_a_changed_byte_is_found_wherever_it_is(made, latentmill):
    output, _ = made("encode")
    shard = output / "data" / "00001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        inside = [place for m in tar if m.size for place in (m.offset, m.offset_data + m.size // 2)]
    for at in [*inside, len(whole) - 1]:
        content = bytearray(whole)
        content[at] ^= 1
        shard.write_bytes(content)
        assert latentmill("verify", output) == 1, at
    shard.write_bytes(whole)
    assert latentmill("verify", output) == 0


def test_a_shard_whose_rows_all_failed_is_a_tar_without_samples_until_they_are_done(
    latentmill, patches, pictures, tmp_path
):
    good = [(pictures / f"{number}.png").read_bytes() for number in range(4)]
    for number in range(2):
        (pictures / f"{number}.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    command = ["reconstruct", f"source.path={pictures}", "rows_per_shard=2", *patches, SINK, f"output={output}"]
    assert latentmill("run", *command) == 0, latentmill.said
    with tarfile.open(output / "data" / "00000.tar") as tar:
        assert tar.getnames() == ["__latentmill__"]
    assert len(samples(output)) == 2
    assert latentmill("verify", output) == 0 and "2 rows ok, 2 failed" in latentmill.out
    assert len([json.loads(line) for line in (output / "errors" / "00000.jsonl").open()]) == 2
    assert latentmill("run", *command, "--retry-failed") == 0, latentmill.said
    assert len(samples(output)) == 2 and good


def test_a_job_that_is_killed_in_a_commit_goes_on(made, latentmill, patches, pictures, tmp_path, monkeypatch):
    """The interrupt stands for the kill: what it leaves is looked at by the same command."""
    from latentmill import failpoints

    output, command = made("encode")
    whole = {path.name: path.read_bytes() for path in output.glob("data/*")}
    again = [*command[:-1], f"output={tmp_path / 'again'}"]
    reached = []

    def stop(name):
        reached.append(name)
        if name == "data synced" and reached.count(name) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "reach", stop)
        assert latentmill("run", *again) == 130
    assert [path.name for path in (tmp_path / "again" / "data").iterdir()] == ["00000.tar"]
    assert latentmill("run", *again) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("data/*")} == whole


def test_latents_whose_first_shard_has_no_rows_are_a_source(latentmill, patches, pictures, tmp_path):
    """All of its rows failed, so its tar says nothing of what rows would hold."""
    for k in range(2):
        (pictures / f"!{k}.png").write_bytes(b"no picture")
    first, second = tmp_path / "first", tmp_path / "second"
    words = (*patches, f"source.path={pictures}", "sink=webdataset", "rows_per_shard=2", "max_error_rate=1")
    assert latentmill("run", "encode", *words, f"output={first}") == 0, latentmill.said
    assert latentmill("run", "decode", *patches, f"source.path={first}", f"output={second}") == 0, latentmill.said
    assert sum(pq.ParquetFile(file).metadata.num_rows for file in second.glob("data/*")) == 4

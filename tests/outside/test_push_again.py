"""What is on the Hub already, or happens while a dataset is pushed: never less than there was, and never what was not read back."""

import os
import shutil

import pytest
from PIL import Image
from tests.outside.hub import REPO, TOKEN, Hub

TARGET = f"hf://datasets/{REPO}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield hub
    hub.close()


@pytest.fixture
def encode(latentmill, patches, pictures, tmp_path):
    """``encode(*SETTINGS)``: four pictures' latents in ``tmp_path / "out"``, in two shards; returns the folder."""

    def encode(*more, output=tmp_path / "out"):
        told = ["run", "encode", *patches, f"source.path={pictures}", "rows_per_shard=2", f"output={output}", *more]
        assert latentmill(*told) == 0, latentmill.said
        return output

    return encode


@pytest.fixture
def push(hub, latentmill):
    return lambda output, target=TARGET: latentmill("push", output, target)


def picture(folder, name, colour=(9, 9, 9)):
    Image.new("RGB", (4, 4), colour).save(folder / name)


def test_a_copy_that_has_grown_otherwise_or_less_stays_away(hub, push, latentmill, encode, pictures, tmp_path):
    output = encode()
    old, other = (tmp_path / name for name in ("old", "other"))
    for copy in (old, other):
        shutil.copytree(output, copy)
    picture(pictures, "x.png")
    encode("--grow")
    picture(pictures, "x.png", (1, 2, 3))
    encode("--grow", output=other)
    assert push(output) == 0, latentmill.said
    there, commits = dict(hub.files), len(hub.commits)
    for copy in (old, other):
        assert push(copy) == 2
        assert f"{TARGET} holds this dataset, and it has grown further or otherwise there, by its plan-1.json" in (
            latentmill.err
        )
    assert hub.files == there and len(hub.commits) == commits


def retried(output):
    (output / "_SUCCESS").unlink()


def made_again(output):
    path = output / "data" / "00001.parquet"
    shutil.copy(path, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def grown(output):
    (output / "plan-1.json").write_text("{}")


@pytest.mark.parametrize("what", [retried, made_again, grown])
@pytest.mark.parametrize("when", [("create", 0), ("commit", 1)])
def test_what_changes_while_it_is_pushed_is_not_called_complete(what, when, hub, push, latentmill, encode):
    output = encode()
    hub.meanwhile[when] = lambda: what(output)
    assert push(output) == 1
    assert "out changed while it was pushed; the same command goes on" in latentmill.err
    assert "Traceback" not in latentmill.said and "_SUCCESS" not in hub.files


def test_a_shard_of_the_same_size_comes_without_a_success(hub, push, latentmill, encode):
    output = encode()
    assert push(output) == 0, latentmill.said
    name = "data/00001.parquet"
    good, begun = hub.files[name], len(hub.commits)
    hub.files[name] = bytes(len(good))
    assert push(output) == 0, latentmill.said
    assert hub.commits[begun:] == [["_SUCCESS"], [name], ["_SUCCESS"]] and hub.files[name] == good


def test_a_card_that_people_wrote_there_stays(hub, push, latentmill, encode, pictures):
    output = encode()
    card = b"---\nlicense: mit\n---\nmine\n"
    hub.files["README.md"] = card
    assert push(output) == 0, latentmill.said
    assert hub.files["README.md"] == card and f"{TARGET} has a README.md of its own, which stays" in latentmill.err
    commits = len(hub.commits)
    assert push(output) == 0 and len(hub.commits) == commits, "nothing to do"
    (output / "README.md").write_text("mine, and newer\n")
    assert push(output) == 0 and hub.files["README.md"] == b"mine, and newer\n", (
        "what people wrote here they want there"
    )


def test_a_card_of_ours_is_replaced(hub, push, latentmill, encode, pictures):
    output = encode()
    assert push(output) == 0, latentmill.said
    before = hub.files["README.md"]
    picture(pictures, "x.png")
    encode("--grow")
    assert push(output) == 0, latentmill.said
    assert hub.files["README.md"] == (output / "README.md").read_bytes() != before


@pytest.mark.parametrize("name", ["me/a--b", "me/..", "me/a.git", ".me/a"])
def test_a_name_that_the_hub_refuses_is_told_before_anything_is_read(name, hub, push, latentmill, tmp_path):
    assert push(tmp_path / "nothing", f"hf://datasets/{name}") == 2
    assert f"hf://datasets/{name} is no name that the Hub takes" in latentmill.err and not hub.asked


def test_more_files_than_the_hub_takes_are_told_before_anything_is_read(hub, push, latentmill, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    for shard in range(10_001):
        (tmp_path / "out" / "data" / f"{shard:05d}.parquet").touch()
    assert push(tmp_path / "out") == 2 and not hub.asked
    assert "data has 10,001 files, and the Hub takes 10,000 a folder" in latentmill.err

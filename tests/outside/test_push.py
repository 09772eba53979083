"""A finished dataset on the Hugging Face Hub: all of it once, with the right bytes, whatever was killed on the way."""

import signal

import pytest
from PIL import Image
from tests.outside.hub import REPO, TOKEN, Hub

TARGET = f"hf://datasets/{REPO}"


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


CHOOSY = """
import pyarrow as pa
from latentmill.plugin import Filtered, Stage

class Choosy(Stage):
    contract = 2

    def __call__(self, batch, reject):
        names = batch.column("file").to_pylist()
        for i in (i for i, name in enumerate(names) if name == "2.png"):
            reject(i, Filtered("not that one"))
        return batch.filter(pa.array([name != "2.png" for name in names]))
"""


@pytest.fixture
def encode(latentmill, patches, pictures, install, tmp_path):
    install("choosy", "[latentmill.stages]\nchoosy = choosy:Choosy\n", choosy=CHOOSY)

    def encode(*more):
        told = ["run", "encode", *patches, f"source.path={pictures}", "rows_per_shard=2", "source.keep=[file]"]
        told += ["flow=[read, choosy, encode, write]", f"output={tmp_path / 'out'}", *more]
        assert latentmill(*told) == 0, latentmill.said

    return encode


@pytest.fixture
def dataset(encode, pictures, tmp_path):
    """A dataset of two rows, a failed and a filtered one in two shards, with what is nobody else's business beside it."""
    (pictures / "3.png").write_bytes(b"no picture")
    encode()
    (tmp_path / "out" / "leases").mkdir(exist_ok=True)
    (tmp_path / "out" / "leases" / "00000").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "data" / ".hidden").write_text("mine")
    return tmp_path / "out"


@pytest.fixture
def push(hub, latentmill, forks, dataset, monkeypatch, tmp_path):
    """``push()``: the exit code of ``latentmill push``; ``push.said``: what it said; ``push.killed(AT)``: in a process that the Hub kills."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )

    class Push:
        said = ""

        def __call__(self, output=dataset, target=TARGET):
            code = latentmill("push", output, target)
            self.said = latentmill.said
            return code

        def killed(self, *at, **environment):
            """At what is asked of the Hub then, and how often before."""
            hub.kill = at
            told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), **environment}
            hub.victim = forks.begin(["push", dataset, TARGET], tmp_path / "log", **told)
            assert forks.end(hub.victim) == -signal.SIGKILL, (tmp_path / "log").read_text()
            assert "_SUCCESS" not in hub.files

    return Push()


def files(output):
    """What is to be there, by the folder."""
    names = [
        path for folder in ("data", "errors", "filtered") for path in (output / folder).iterdir() if path.name[0] != "."
    ]
    names += [output / name for name in ("README.md", "contact_sheet.png", "report.html", "_SUCCESS")]
    names += output.glob("plan*.json")
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in names if path.exists()}


def test_a_dataset_is_there_whole_and_nothing_else_is(hub, push, dataset):
    assert push() == 0, push.said
    assert (
        hub.files == files(dataset)
        and {"data/00001.parquet", "errors/00001.jsonl", "filtered/00001.jsonl", "README.md"} <= hub.files.keys()
    )
    assert f"{len(hub.files)} files of 4 rows at {hub.url}/datasets/{REPO}" in push.said
    assert [hub.commits[0], hub.commits[-1], len(hub.commits)] == [["plan.json"], ["_SUCCESS"], 3]
    assert push() == 0 and len(hub.commits) == 3, "nothing to do"


@pytest.mark.parametrize("at", [("commit", 0), ("commit", 1), ("commit", 2), ("preupload", 1)])
def test_killed_in_the_middle_it_goes_on(at, hub, push, dataset):
    push.killed(*at)
    assert push() == 0, push.said
    assert hub.files == files(dataset)
    sent = [name for names in hub.commits for name in names]
    assert sorted(sent) == sorted(hub.files), "each file once"


def test_large_files_that_are_there_are_not_sent_again(hub, push, dataset, monkeypatch):
    hub.large = True
    push.killed("blob", 1, HF_HUB_DISABLE_XET="1")
    assert len(hub.blobs) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    assert push() == 0, push.said
    assert hub.files == files(dataset) and hub.asked.count("blob") == 2 and len(hub.lfs) == 2


def test_what_has_grown_is_added(hub, push, dataset, encode, pictures):
    assert push() == 0, push.said
    Image.new("RGB", (4, 4), (9, 9, 9)).save(pictures / "4.png")
    encode("--grow")
    push.killed("commit", 4)
    assert push() == 0, push.said
    assert hub.files == files(dataset) and {"plan-1.json", "data/00002.parquet"} <= hub.files.keys()


def test_files_of_shards_that_were_made_anew_go(hub, push, dataset):
    assert push() == 0, push.said
    hub.files["files/00000-0123456789ab-old.bin"] = b"of a shard that was made again"
    assert push() == 0, push.said
    assert hub.files == files(dataset)


def test_an_unfinished_dataset_is_refused(hub, push, dataset):
    (dataset / "_SUCCESS").unlink()
    assert push() == 2 and "is not finished: it has no _SUCCESS" in push.said
    (dataset / "data" / "00001.parquet").unlink()
    assert push() == 2 and "is not finished: 1 of its 2 shards are missing" in push.said
    assert not hub.asked


def test_a_damaged_dataset_is_refused(hub, push, dataset):
    path = dataset / "data" / "00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert push() == 2 and "is not sound: latentmill verify says what is wrong" in push.said and not hub.asked


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"plan.json": b"{}"}, "holds another dataset, by its plan.json"),
        ({"data/train.parquet": b"somebody's"}, "holds data/train.parquet, and no plan.json of this dataset"),
    ],
)
def test_a_repository_of_something_else_stays_as_it_is(there, said, hub, push):
    hub.files.update(there)
    assert push() == 2 and said in push.said and hub.files == there and not hub.commits


def test_what_else_is_in_the_repository_stays(hub, push, dataset):
    hub.files |= {".gitattributes": b"*.parquet filter=lfs", "LICENSE": b"CC0"}
    assert push() == 0, push.said
    assert hub.files == {**files(dataset), ".gitattributes": b"*.parquet filter=lfs", "LICENSE": b"CC0"}


def test_a_token_is_never_told(hub, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert push() == 1
    assert "hf_wrongwrongwrong" not in push.said and "HF_TOKEN or hf auth login says who you are" in push.said
    assert push.said.count("\n") == 1


@pytest.mark.parametrize("target", ["hf://me/pictures", "hf://datasets/pictures", "s3://bucket/x", "pictures"])
def test_where_else_is_refused(target, hub, push):
    assert push(target=target) == 2 and "hf://datasets/OWNER/NAME is" in push.said and not hub.asked


def test_a_dataset_in_a_store_is_refused_by_name(hub, push):
    assert push(output="s3://bucket/out") == 2 and "read from a folder: copy the dataset into one" in push.said


def test_without_the_library_one_line_says_what_to_install(hub, forks, dataset, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "huggingface_hub.py").write_text("raise ImportError('not here')")
    told = forks.begin(["push", dataset, TARGET], tmp_path / "log", path=[tmp_path / "without"])
    assert forks.end(told) == 2
    assert "push needs huggingface_hub: pip install 'latentmill[hf]'" in (tmp_path / "log").read_text()

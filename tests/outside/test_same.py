"""A dataset is one thing: the same weights, versions and sources from its first row to its last, wherever they lie."""

import gzip
import hashlib
import json
import logging
import os
import shutil
import socket
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latentmill import digests, weights

PLUGINS = '''
import os
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from latentmill import weights
from latentmill.plugin import VAE, LatentSpec


class Keen(VAE):
    """Adds a number, its weights, to a picture; its fingerprint is always the same."""

    contract = 2

    def __init__(self, path=""):
        self.path, self.shift = path, None

    @property
    def spec(self):
        return LatentSpec(3, 1, 1.0, 0.0, "float32", "keen")

    def load(self, device):
        self.shift = weights.load(self.path or os.environ["KEEN_WEIGHTS"])["shift"]

    def encode(self, images):
        return images + self.shift

    def decode(self, latents):
        return latents - self.shift


class Late(Keen):
    """The same, read when it is first needed."""

    def load(self, device):
        pass

    def encode(self, images):
        Keen.load(self, None)
        return super().encode(images)

    def decode(self, latents):
        Keen.load(self, None)
        return super().decode(latents)


class Aloof(Keen):
    """The same, read by a library, and recorded."""

    def load(self, device):
        from safetensors.torch import load_file
        weights.record(os.environ["KEEN_WEIGHTS"])
        self.shift = load_file(os.environ["KEEN_WEIGHTS"])["shift"]


class Hashed(Keen):
    """The same, with a fingerprint of what is in its file, which may lie anywhere."""

    fingerprinted = ("path",)
    libraries = ("numbers-of-keen",)

    @property
    def spec(self):
        return LatentSpec(3, 1, 1.0, 0.0, "float32", weights.digest(self.path)[:16])
'''


def install(folder, name, version, points=(), **modules):
    """An installed distribution, as far as importlib.metadata is concerned."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("\n".join(points))
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)
    return about


@pytest.fixture(autouse=True)
def settled(tmp_path, monkeypatch):
    """Files as they are in life: no younger than the file system's clock is coarse."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def keen(tmp_path, monkeypatch):
    """Plugins whose weights lie at the path that it returns."""
    points = [
        "[latentmill.vaes]",
        *(f"{name.lower()} = keen_vaes:{name}" for name in ("Keen", "Late", "Aloof", "Hashed")),
    ]
    install(tmp_path / "site", "keen", "1.0", points, keen_vaes=PLUGINS)
    install(tmp_path / "site", "numbers-of-keen", "1.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = tmp_path / "keen.safetensors"
    monkeypatch.setenv("KEEN_WEIGHTS", str(path))
    save(path, 0.25)
    return path


def save(path, shift):
    save_file({"shift": torch.tensor(shift)}, path)


def job(pictures, output, vae, *more):
    return ("run", "reconstruct", "cluster=inline", "rows_per_shard=2", f"source.path={pictures}", f"vae.name={vae}", f"output={output}", *more)  # fmt: skip


def begin(latentmill, pictures, output, vae, *more):
    """A dataset of which the second shard is still to be done."""
    assert latentmill(*job(pictures, output, vae, *more)) == 0, latentmill.err
    for name in ("data/00001.parquet", "_SUCCESS"):
        (output / name).unlink()


@pytest.mark.parametrize("vae", ["keen", "late", "aloof"])
def test_other_weights_under_the_same_fingerprint_are_refused(latentmill, keen, pictures, tmp_path, rows, vae):
    output = tmp_path / "out"
    begin(latentmill, pictures, output, vae)
    save(keen, 0.75)
    there = (output / "data" / "00000.parquet").read_bytes()
    assert latentmill(*job(pictures, output, vae)) == 1
    said = latentmill.err.splitlines()[-1]
    where = "stage encode" if vae == "late" else f"vae {vae}"
    assert f"node {socket.gethostname()}" in said and f"{where} " in said and "reads keen.safetensors" in said
    assert hashlib.sha256(keen.read_bytes()).hexdigest()[:16] in said and "--fork" in said
    assert [file.name for file in (output / "data").iterdir()] == ["00000.parquet"] and not (
        output / "_SUCCESS"
    ).exists()
    assert not list(output.glob("errors/*")) and (output / "data" / "00000.parquet").read_bytes() == there
    save(keen, 0.25)
    assert latentmill(*job(pictures, output, vae)) == 0 and len(rows(output)) == 4


def test_a_fork_and_a_deleted_dataset_begin_anew(latentmill, keen, pictures, tmp_path):
    output = tmp_path / "out"
    begin(latentmill, pictures, output, "keen")
    save(keen, 0.75)
    assert latentmill(*job(pictures, output, "keen"), "--fork", tmp_path / "other") == 0
    shutil.rmtree(output)
    assert latentmill(*job(pictures, output, "keen")) == 0


def test_what_was_read_stands_beside_the_plan_without_a_path(latentmill, keen, pictures, tmp_path):
    assert latentmill("plan", *job(pictures, tmp_path / "out", "keen")[1:]) == 0
    assert not (tmp_path / "out").exists()
    assert latentmill(*job(pictures, tmp_path / "out", "keen")) == 0
    assert [file.name for file in (tmp_path / "out" / "weights").iterdir()] == ["vae.json"]
    found = json.loads((tmp_path / "out" / "weights" / "vae.json").read_text())
    assert found == {"read_for": "vae", "files": [["keen.safetensors", hashlib.sha256(keen.read_bytes()).hexdigest()]]}


@pytest.mark.parametrize("damaged", ["", "{", '{"files": [["keen.safetensors"]]}', "[]", "\xff"])
def test_what_was_read_is_damaged_and_a_line_says_what_to_do(latentmill, keen, pictures, tmp_path, rows, damaged):
    output = tmp_path / "out"
    begin(latentmill, pictures, output, "keen")
    (output / "weights" / "vae.json").write_bytes(damaged.encode("latin-1"))
    assert latentmill(*job(pictures, output, "keen")) == 1
    said = latentmill.err.splitlines()[-1]
    assert f"{output}/weights/vae.json can't be read (" in said and "delete it" in said
    assert "PlanError" not in said and not (output / "_SUCCESS").exists()
    (output / "weights" / "vae.json").unlink()
    assert latentmill(*job(pictures, output, "keen")) == 0 and len(rows(output)) == 4


# ----------------------------------------------------------------------------------------------------- libraries


def test_a_deterministic_job_goes_on_with_the_same_libraries_only(latentmill, keen, pictures, tmp_path):
    output, told = tmp_path / "out", ("hashed", f"vae.path={keen}", "deterministic=true")
    begin(latentmill, pictures, output, *told)
    libraries = json.loads((output / "plan.json").read_text())["libraries"]
    assert libraries["numbers-of-keen"] == "1.0" and libraries["torch"] == torch.__version__.partition("+")[0]
    assert {"latentmill", "numpy", "pillow"} < libraries.keys()
    (tmp_path / "site" / "numbers_of_keen-1.0.dist-info").rename(tmp_path / "site" / "old")
    install(tmp_path / "site", "numbers-of-keen", "1.1")
    assert latentmill(*job(pictures, output, *told)) == 2
    assert "libraries.numbers-of-keen: 1.0 -> 1.1" in latentmill.err and len(list((output / "data").iterdir())) == 1


def test_any_other_job_goes_on_and_says_so(latentmill, keen, pictures, tmp_path, rows, caplog):
    output, told = tmp_path / "out", ("hashed", f"vae.path={keen}")
    begin(latentmill, pictures, output, *told)
    (tmp_path / "site" / "numbers_of_keen-1.0.dist-info").rename(tmp_path / "site" / "old")
    install(tmp_path / "site", "numbers-of-keen", "1.1")
    line = "begun with numbers-of-keen 1.0, going on with 1.1"
    assert latentmill("plan", *job(pictures, output, *told)[1:]) == 0 and f"notice   {line}" in latentmill.out
    with caplog.at_level(logging.WARNING, "latentmill"):
        assert latentmill(*job(pictures, output, *told)) == 0
    assert any(record.message.startswith(line) for record in caplog.records) and len(rows(output)) == 4


# ------------------------------------------------------------------------------------------------------- contents


def plan(latentmill, *told):
    assert latentmill("plan", *told, "--json") == 0, latentmill.err
    return json.loads(latentmill.out)


def test_a_byte_in_the_middle_of_large_weights_is_another_plan(latentmill, keen, pictures, tmp_path):
    save_file({"shift": torch.zeros(1), "much": torch.zeros(1_500_000)}, keen)
    told = [*job(pictures, tmp_path / "out", "hashed", f"vae.path={keen}")[1:]]
    first = plan(latentmill, *told)
    with keen.open("r+b") as file:
        file.seek(3_000_001)
        file.write(b"\1")
    assert plan(latentmill, *told)["hash"] != first["hash"]
    fingerprint = plan(latentmill, *told)["plugins"]["vae"]["fingerprint"]
    assert fingerprint == hashlib.sha256(keen.read_bytes()).hexdigest()[:16]


def test_a_file_is_hashed_once_and_again_when_it_changes_in_silence(latentmill, tmp_path, monkeypatch):
    """Its size and times are put back, as a copy in place would: the time of the change can't be."""
    path = tmp_path / "big.txt"
    path.write_bytes(b"a" * 5000)
    monkeypatch.setattr(digests, "SETTLED", 0.2)
    time.sleep(0.2)  # files are remembered that have been left alone for so long
    found = [
        plan(latentmill, "txt2img", f"source.path={tmp_path / name}", f"output={tmp_path / 'out'}")["fragments"]
        for name in ("big.txt", "*.txt", "")
    ]
    (tmp_path / "below").mkdir()
    os.link(path, tmp_path / "below" / "big.txt")
    time.sleep(0.2)
    told = ("txt2img", f"source.path={tmp_path / '*' / 'big.txt'}", f"output={tmp_path / 'out'}")
    assert found[0] == found[1] == found[2] != plan(latentmill, *told)["fragments"]
    first = weights.digest(path)
    assert first == hashlib.sha256(b"a" * 5000).hexdigest()
    assert first in (tmp_path / "cache" / "latentmill" / "digests").read_text()
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2500)
        file.write(b"b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.digest(path) == hashlib.sha256(b"a" * 2500 + b"b" + b"a" * 2499).hexdigest()


def test_without_a_home_files_are_read_again(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"a")
    os.utime(tmp_path / "file", (0, 0))
    for cache in ("/dev/null/no", "~nobody-of-this-name/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert weights.digest(tmp_path / "file") == hashlib.sha256(b"a").hexdigest()


def test_the_hub_names_files_by_what_is_in_them(tmp_path):
    blob = tmp_path / "models--org--name" / "blobs" / ("ab" * 32)
    link = tmp_path / "models--org--name" / "snapshots" / "main" / "model.safetensors"
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    blob.write_bytes(b"many gigabytes")
    os.utime(blob, (1e9, 1e9))
    link.symlink_to(blob)
    assert weights.digest(link) == "ab" * 32  # unread
    os.utime(link, (1e9 - 9, 1e9 - 9), follow_symlinks=False)  # somebody wrote through the link
    assert weights.digest(link) == hashlib.sha256(b"many gigabytes").hexdigest()


# ------------------------------------------------------------------------------------------------------- moved


def test_a_source_that_was_moved_as_a_whole_is_the_same(latentmill, patches, pictures, tmp_path):
    told = ("reconstruct", *patches, f"output={tmp_path / 'out'}")
    assert latentmill("run", *told, f"source.path={pictures}") == 0
    pictures.rename(tmp_path / "elsewhere")
    begun = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert begun["config"]["source"]["path"] == str(pictures)  # shown, all the same
    assert latentmill("run", *told, f"source.path={tmp_path / 'elsewhere'}") == 0, latentmill.err
    Image.new("RGB", (4, 4), "red").save(tmp_path / "elsewhere" / "2.png")
    assert latentmill("run", *told, f"source.path={tmp_path / 'elsewhere'}") == 2
    assert "fragments: " in latentmill.err and "source.path" not in latentmill.err


def test_prompts_that_were_moved_are_the_same_unless_they_name_pictures_beside_them(latentmill, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.csv").write_text("prompt,steps\na red circle,2\n")
        (tmp_path / name / "p.jsonl").write_text('{"prompt": "a red circle"}\n')
        (tmp_path / name / "i.csv").write_text("prompt,image\na red circle,a.png\n")
        (tmp_path / name / "i.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n')
    same = {}
    for file in ("p.csv", "p.jsonl", "i.csv", "i.jsonl"):
        told = ("txt2img", f"output={tmp_path / 'out'}", "cluster=inline")
        hashes = {plan(latentmill, *told, f"source.path={tmp_path / name / file}")["hash"] for name in ("one", "two")}
        same[file] = len(hashes) == 1
    assert same == {"p.csv": True, "p.jsonl": True, "i.csv": False, "i.jsonl": False}


def test_large_prompts_that_were_copied_over_themselves_are_the_same(latentmill, patches, tmp_path):
    with gzip.open(tmp_path / "p.gz", "wb", 1) as file:
        for _ in range(70):
            file.write(b"a red circle " + b"x" * 1_000_000 + b"\n")
    told = ("txt2img", "cluster=inline", f"output={tmp_path / 'out'}", f"source.path={tmp_path / 'p.txt'}")
    found = []
    for _ in range(2):
        with gzip.open(tmp_path / "p.gz") as packed, (tmp_path / "p.txt").open("wb") as file:
            shutil.copyfileobj(packed, file)
        found.append(plan(latentmill, *told)["hash"])
    assert found[0] == found[1]


def test_a_model_that_was_moved_is_the_same(latentmill, keen, pictures, tmp_path):
    output, shared = tmp_path / "out", ("hashed", "++model.path={}", "vae.path=${{model.path}}")

    def told(path):
        return [word.format(path) for word in shared]

    begin(latentmill, pictures, output, *told(keen))
    (tmp_path / "models").mkdir()
    moved = shutil.move(keen, tmp_path / "models")
    assert latentmill(*job(pictures, output, *told(moved))) == 0, latentmill.err
    assert json.loads((output / "plan.json").read_text())["config"]["model"] == {"path": str(keen)}
    save(moved, 0.75)
    assert latentmill("plan", *job(pictures, output, *told(moved))[1:]) == 2
    assert "plugins.vae.fingerprint: " in latentmill.err


CHANGING = """
import os
import pyarrow as pa
from latentmill.plugin import Stage


class Changing(Stage):
    contract = 2

    def __call__(self, batch, reject):
        return batch

    def load(self, device):
        exec(os.environ["CHANGE"])
"""


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("images", "import shutil; shutil.copy('{0}/0.png', '{0}/1.png')"),
        ("images", "os.remove('{0}/3.png')"),
        ("images", "open('{0}/0.txt', 'w').write('a caption')"),
        ("prompts", "open('{0}/p.csv', 'a').write('a blue square,1.png')"),
    ],
)
def test_a_source_that_is_another_for_the_worker_than_for_the_plan_ends_the_job(
    latentmill, patches, pictures, tmp_path, monkeypatch, source, change
):
    install(
        tmp_path / "site", "changing", "1.0", ["[latentmill.stages]", "changing = changing:Changing"], changing=CHANGING
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("CHANGE", change.format(pictures))
    (pictures / "p.csv").write_text("prompt,image\na red circle,0.png\n")
    path = pictures if source == "images" else pictures / "p.csv"
    told = ("encode", *patches, f"source.name={source}", f"source.path={path}", f"output={tmp_path / 'out'}")
    assert latentmill("run", *told, "flow=[read,changing,encode,write]", "rows_per_shard=2") == 1
    said = latentmill.err.splitlines()[-1]
    assert (
        "stage read: a worker is not what the plan says: node " in said
        and f"for source {source} than was planned" in said
    )
    assert not list(tmp_path.glob("out/errors/*")) and not (tmp_path / "out" / "_SUCCESS").exists()


SCHEDULER = """
from latentmill.schedulers.euler import Euler


class Mine(Euler):
    contract = 2
"""


def test_a_scheduler_that_only_a_row_names_stays_the_same(latentmill, tmp_path, monkeypatch, failed):
    site, output = tmp_path / "site", tmp_path / "out"
    about = install(
        site, "mine", "1.0", ["[latentmill.schedulers]", "mine = mine_scheduler:Mine"], mine_scheduler=SCHEDULER
    )
    monkeypatch.syspath_prepend(site)
    (tmp_path / "p.csv").write_text("prompt,scheduler\na red circle,mine\na blue square,mine\na red star,oh no\n")
    told = ("run", "txt2img", "cluster=inline", f"source.path={tmp_path / 'p.csv'}", f"output={output}")
    told += ("samples_per_row=1", "rows_per_shard=1", "sampling.steps=1")
    assert latentmill(*told) == 0, latentmill.err
    assert len(failed(output)) == 1 and (output / "weights" / "scheduler-mine.json").exists()
    (output / "data" / "00001.parquet").unlink()
    about.rename(site / "old")
    (site / "old" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.1\n")
    (site / "old").rename(site / "mine-1.1.dist-info")
    monkeypatch.syspath_prepend(tmp_path / "nothing")  # installed plugins are listed once for each path
    assert latentmill(*told) == 1
    said = latentmill.err.splitlines()[-1]
    assert "scheduler mine" in said and "mine 1.1" in said and "mine 1.0" in said, said
    assert not (output / "data" / "00001.parquet").exists()

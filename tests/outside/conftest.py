"""Tests that speak through the command line, the contract and the dataset's files alone, so that they outlive our modules."""

import importlib
import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.outside import prompt_parts, trainer_parts
from tests.outside.launch_parts import TOKEN
from tests.outside.store_parts import Before, Hub

from latentmill.cli import main
from latentmill.plugin import RowError


class Command:
    """``latentmill`` in this process: what it prints and logs, and the exit code."""

    def __init__(self, capsys, caplog):
        self.capsys, self.caplog = capsys, caplog
        self.code, self.out, self.err = 0, "", ""

    def __call__(self, *arguments):
        self.capsys.readouterr()
        self.caplog.clear()
        try:
            self.code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            self.code = error.code
        self.out, self.err = self.capsys.readouterr()
        self.err += "".join(f"{record.getMessage()}\n" for record in self.caplog.records)
        return self.code

    @property
    def said(self):
        return self.out + self.err


@pytest.fixture
def latentmill(capsys, caplog):
    return Command(capsys, caplog)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(NAME, POINTS, MODULE=CODE)``: a distribution as pip leaves it, in ``tmp_path / "site"``, first on the path.

    ``POINTS`` is its entry_points.txt. Its modules are forgotten when the test ends.
    """
    site, brought = tmp_path / "site", []

    def install(name, points, version="1.0", **modules):
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "entry_points.txt").write_text(points)
        for module, code in modules.items():
            (site / f"{module}.py").write_text(code)
        brought.extend(modules)
        monkeypatch.syspath_prepend(site)  # each time, for what is installed is listed once for each path
        importlib.invalidate_caches()

    yield install
    for module in brought:
        sys.modules.pop(module, None)


@pytest.fixture
def patches():
    """Overrides that run a job in this process with a VAE without weights, of which nothing is lost."""
    return ("cluster=inline", "vae.name=patches", "vae.side=1")


@pytest.fixture
def pictures(tmp_path):
    """A folder of four pictures, 4 x 4 pixels, of four colours."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4), (60 * number, 30, 200 - 50 * number)).save(folder / f"{number}.png")
    return folder


def table(output):
    """All rows of a dataset, in the order of its shards."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(Path(output).glob("data/*.parquet"))])


def told(output, folder):
    return [json.loads(line) for path in sorted(Path(output).glob(f"{folder}/*.jsonl")) for line in path.open()]


@pytest.fixture
def rows():
    """``rows(OUT)``: a dataset's rows, a dict each."""
    return lambda output: table(output).to_pylist()


@pytest.fixture
def failed():
    """``failed(OUT)``: a dataset's error rows, a dict each."""
    return lambda output: told(output, "errors")


@pytest.fixture
def filtered():
    """``filtered(OUT)``: a dataset's rows that were filtered, a dict each."""
    return lambda output: told(output, "filtered")


@pytest.fixture
def executable():
    """The command for a process of its own: ``[python, -m, latentmill.cli]``."""
    return [sys.executable, "-m", "latentmill.cli"]


@pytest.fixture
def read(tmp_path):
    """``read(files)``: of each file's bytes the pixels, or the error row: out of a Parquet file, or one ``by_name`` out of a folder."""

    def plugin(name, **settings):
        [found] = [point for point in entry_points(group="latentmill.sources") if point.name == name]
        return found.load()(**settings)

    def read(files, by_name=False):
        if by_name:
            folder = tmp_path / "folder"
            folder.mkdir()
            for number, file in enumerate(files):
                (folder / f"{number:05d}.png").write_bytes(file)
            images = plugin("images", path=str(folder))
        else:
            table = pa.table({"image": pa.array(files, pa.binary())})
            pq.write_table(table, tmp_path / "pictures.parquet")
            images = plugin("prompts", path=str(tmp_path / "pictures.parquet"))
        [fragment] = images.fragments()
        rows = list(images.read(fragment.name, 0, fragment.rows))
        assert len(rows) == len(files)
        return [row if isinstance(row, RowError) else row["image"] for row in rows]

    return read


@pytest.fixture
def acme(latentmill, install, tmp_path, monkeypatch, rows):
    points = "".join(f"[latentmill.{kind}s]\n" + "\n".join(some) + "\n" for kind, some in prompt_parts.POINTS.items())
    install("acme", points, acme_prompts=prompt_parts.CODE)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.delenv("BAD", raising=False)
    return prompt_parts.Acme(latentmill, tmp_path, rows)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture
def trainers(latentmill, install, tmp_path, encoded):
    install("acme", trainer_parts.POINTS, acme_known=trainer_parts.CODE)
    return trainer_parts.Trainers(latentmill, tmp_path, encoded)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(bucket, monkeypatch):
    """A proxy before S3, which counts."""
    server = Before(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.close()


@pytest.fixture
def another_store(store, monkeypatch):
    """``another_store()``: a proxy before the same objects, for what is asked from now on. What an earlier command asked for ahead, and no longer waits for, still comes to the one before."""
    servers = []

    def another():
        servers.append(Before(store.upstream_url))
        monkeypatch.setenv("AWS_ENDPOINT_URL", servers[-1].url)
        return servers[-1]

    yield another
    for server in servers:
        server.close()


@pytest.fixture
def records(tmp_path, monkeypatch):
    """The folder of what was submitted, of a test that is in a folder of its own and has secrets in its environment."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("ACME_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state" / "latentmill" / "jobs"


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.fixture
def asked(latentmill, patches, tmp_path):
    """``asked("plan" or "run", PATH, *more)``: of a job over it; all that it says."""

    def asked(command, path, *more, output="out", code=0):
        given = (*patches, f"source.path={path}", f"output={tmp_path / output}", "max_error_rate=1", *more)
        assert latentmill(command, "encode", *given) == code, latentmill.said
        return latentmill.said

    return asked

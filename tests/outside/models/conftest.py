"""A model on a disk, on a Hub and in a bucket, and jobs whose stage reads it."""

import pytest
from tests.outside import model_parts
from tests.outside.model_parts import FILES, WANTED, ModelHub
from tests.outside.store_parts import upload


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def local(model, tmp_path):
    """The same model as people have it on a disk, without what nobody wants."""
    folder = tmp_path / "local"
    for name in WANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES[name])
    return folder


@pytest.fixture
def model_hub(monkeypatch, model, node):
    server = ModelHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.commit(model)
    yield server
    server.close()


@pytest.fixture
def model_store(store, model, node):
    """S3 behind a proxy that counts; s3://bucket/models/red is the model."""
    upload(store.url, model, "models/red")
    return store


@pytest.fixture
def node(tmp_path, monkeypatch):
    """``node(NAME)``: from now on this is another machine, as far as its caches go."""

    def node(name):
        folder = tmp_path / name
        for variable, below in {"XDG_CACHE_HOME": "cache", "HF_HOME": "hf", "TMPDIR": "tmp"}.items():
            (folder / below).mkdir(parents=True, exist_ok=True)
            monkeypatch.setenv(variable, str(folder / below))
        monkeypatch.setattr("tempfile.tempdir", None)
        return folder / "cache" / "latentmill" / "models"

    node("node-1")
    return node


@pytest.fixture
def given(install, pictures, patches, tmp_path, monkeypatch, node):
    """``given(PATH, *more)``: the words of a job whose stage ``tint`` reads the weights at PATH."""
    install("acme-tint", model_parts.POINTS, acme_tint=model_parts.CODE)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))

    def given(path, *more, output="out"):
        told = (f"source.path={pictures}", f"output={tmp_path / output}", "flow=[read,encode,tint,write]")
        return ["encode", *patches, *told, f"stages.tint.settings.path={path}", *more]

    return given


@pytest.fixture
def made(latentmill, given, rows, tmp_path):
    """``made(PATH)``: the rows of such a job."""

    def made(path, *more, output="out", code=0):
        assert latentmill("run", *given(path, *more, output=output)) == code, latentmill.said
        return rows(tmp_path / output) if code == 0 else latentmill.said

    return made


@pytest.fixture
def notes(tmp_path):
    return lambda: (tmp_path / "notes").read_text().splitlines()

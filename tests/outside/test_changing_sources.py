"""A source that changes while a job reads it, or between two of its runs: no dataset is made of both."""

import json
import os

import pytest
from PIL import Image
from tests.outside.drain_parts import CODE, POINTS, Counted

CHANGES = """
from pathlib import Path

from acme_counts import Counts


class Changing(Counts):
    def predict(self, x, t, conditioning):
        path = Path(self.notes, "write")
        if path.exists():
            where, _, text = path.read_text().partition("\\n")
            path.unlink()
            Path(where).write_text(text)
        return super().predict(x, t, conditioning)
"""


@pytest.fixture
def counted(latentmill, install, tmp_path):
    points = f"{POINTS}changing = acme_changes:Changing\n"
    install("acme", points, acme_counts=CODE, acme_changes=CHANGES)
    return Counted(latentmill, tmp_path, rows=80)


@pytest.mark.parametrize("known_by", ["contents", "times"])
def test_a_file_that_is_written_over_while_it_is_read_ends_the_job_and_no_row_is_of_it(counted, known_by, monkeypatch):
    if known_by == "times":
        monkeypatch.setattr("latentmill.sources.files.local.MAX_DIGESTED_BYTES", 0)
    prompts = counted.folder / "prompts.txt"
    before, times = prompts.read_text(), (prompts.stat().st_atime_ns, prompts.stat().st_mtime_ns)
    few = ("denoiser.name=changing", "sampling.steps=2")
    counted.run("whole", *few)
    (counted.notes / "write").write_text(f"{prompts}\n{before.replace('prompt', 'other!')}")
    counted.run("out", *few, code=1)
    assert "has another prompts.txt for source prompts than was planned" in counted.latentmill.err
    assert not (counted.place("out") / "_SUCCESS").exists()
    counted.run("out", *few, code=2)  # now it is another source
    prompts.write_text(before)
    os.utime(prompts, ns=times)
    counted.run("out", *few)
    assert counted.files("out") == counted.files("whole")


@pytest.mark.parametrize("more", ["", "and one more\n"])
def test_a_file_that_is_only_written_anew_or_gets_longer_is_the_same(counted, more):
    prompts = counted.folder / "prompts.txt"
    (counted.notes / "write").write_text(f"{prompts}\n{prompts.read_text()}{more}")
    counted.run("out", "denoiser.name=changing", "sampling.steps=2")
    assert not (counted.notes / "write").exists() and len(counted.files("out")) == 10


STAGE = """
import os
from pathlib import Path

from latentmill.plugin import Stage


class Changes(Stage):
    contract = 2

    def __call__(self, batch, reject):
        if (todo := os.environ.pop("CHANGE", None)) is not None:
            exec(todo)
        return batch
"""


@pytest.mark.parametrize("change", ["path.write_bytes(other)", "path.write_bytes(other); more.write_bytes(other)"])
def test_a_picture_that_is_another_by_the_time_that_it_is_read_ends_the_job(
    latentmill, install, patches, tmp_path, monkeypatch, change
):
    install("acme", "[latentmill.stages]\nchanges = acme_changes:Changes\n", acme_changes=STAGE)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number:02d}.png")
    paths = f"path, more = Path({str(folder / '39.png')!r}), Path({str(folder / '40.png')!r})"
    monkeypatch.setenv("CHANGE", f"{paths}; other = Path({str(folder / '00.png')!r}).read_bytes(); {change}")
    job = (
        "run", "encode", *patches, f"source.path={folder}", f"output={tmp_path / 'out'}", "flow=[read,changes,encode,write]",
        "rows_per_shard=2", "stages.read.batch_size=1",
    )  # fmt: skip
    assert latentmill(*job) == 1
    assert "for source images than was planned" in latentmill.err.splitlines()[-1], latentmill.err
    assert not (tmp_path / "out" / "_SUCCESS").exists() and not [*tmp_path.glob("out/errors/*")]


def test_a_picture_of_source_defaults_that_is_another_is_another_source(latentmill, patches, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "in.png")
    (tmp_path / "p.csv").write_text("prompt\na\nb\n")
    job = (
        "run", "encode", *patches, "source=prompts", f"source.path={tmp_path / 'p.csv'}", f"output={tmp_path / 'out'}",
        f"source.defaults={{image: {tmp_path / 'in.png'}}}",
    )  # fmt: skip
    assert latentmill(*job) == 0, latentmill.said
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["plugins"]["source"]["fingerprint"]
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "in.png")
    assert latentmill(*job) == 2 and "source" in latentmill.err
    Image.new("RGB", (4, 4), "red").save(tmp_path / "in.png")
    assert latentmill(*job) == 0, latentmill.said

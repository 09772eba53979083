"""A shard of two files: a toy sink that keeps the rows' text in one and their sizes beside it, through all that can happen."""

import json
import signal

import pyarrow as pa
import pytest

from latentmill import failpoints
from latentmill.plugin import CONTRACT

SINK = '''
"""JSON lines; the sizes of pictures are in a side file. It makes an index of the whole."""

import json
import os
import signal
import subprocess
from pathlib import Path
import pyarrow as pa
from latentmill.plugin import Sink


class TwoFiles(Sink):
    contract = CONTRACT
    suffix = ".lines"

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def pack(self, batch):
        return batch.select(["row", "row_id", "prompt", "width", "height", "warning"])

    def write(self, path, shard, metadata):
        lines = [dict(metadata), *shard.select(["row_id", "prompt"]).to_pylist()]
        Path(path).write_text("".join(json.dumps(line) + "\\n" for line in lines))

    def write_side_files(self, folder, shard):
        Path(folder, "sizes.json").write_text(json.dumps(shard.select(["width", "height"]).to_pylist()))

    def _lines(self, file):
        assert file.tell() == 0, "files come at position 0"
        return [json.loads(line) for line in file.read().decode().splitlines()]

    def row_ids(self, file):
        return [row["row_id"] for row in self._lines(file)[1:]]

    def metadata(self, file):
        return self._lines(file)[0]

    def count(self, file):
        return len(self._lines(file)) - 1

    def schema(self, file):
        return pa.schema({"row_id": pa.string(), "prompt": pa.string(), "width": pa.int64(), "height": pa.int64()})

    def read(self, file, columns, rows, side_file):
        lines = self._lines(file)[1:]
        with side_file("sizes.json") as sizes:
            found = [{**row, **size} for row, size in zip(lines, json.loads(sizes.read()))]
        wanted = [name for name in self.schema(file).names if columns is None or name in columns]
        yield pa.Table.from_pylist([found[at] for at in rows]).select(wanted)

    def finish(self, shards):
        name = "plan.json" if self.wrong == "name" else "index.json"
        return {name: json.dumps([[shard.name, shard.rows] for shard in shards]).encode()}
'''


@pytest.fixture
def command(patches, pictures, install):
    """A job of four rows in two shards, by the sink above, installed as any plugin is; without its output."""
    points = "[latentmill.sinks]\ntwo_files = toy_two_files:TwoFiles\n"
    install("two-files", points, toy_two_files=SINK.replace("= CONTRACT", f"= {CONTRACT}"))
    sink = "sink={name: two_files}"
    return ["run", "reconstruct", f"source.path={pictures}", "rows_per_shard=2", *patches, "~sink", f"+{sink}"]


@pytest.fixture
def output(latentmill, command, tmp_path):
    assert latentmill(*command, f"output={tmp_path / 'out'}") == 0, latentmill.said
    return tmp_path / "out"


def files(output, folder="files"):
    return sorted(path.name for path in (output / folder).glob("*"))


def names(output):
    """The side files that the shards name."""
    shards = [json.loads(path.open().readline()) for path in sorted(output.glob("data/*.lines"))]
    return [side["stored_as"] for about in shards for side in json.loads(about["latentmill.files"])]


def test_a_shard_names_the_files_beside_it_and_the_whole_has_an_index(output, latentmill):
    assert files(output) == names(output) and [name[:6] for name in names(output)] == ["00000-", "00001-"]
    assert json.loads((output / "index.json").read_text()) == [["data/00000.lines", 2], ["data/00001.lines", 2]]
    assert latentmill("verify", output) == 0 and latentmill.out.endswith("sound\n")
    assert latentmill("status", output) == 0 and "4 ok" in latentmill.out


def test_rows_are_read_back_from_both(output):
    from latentmill import dataset, storage

    [table] = dataset.load(storage.at(str(output))).shard(1).read(["row_id", "width"], [1])
    assert table.to_pylist() == [{"row_id": "000000003-000", "width": 4}]


@pytest.mark.parametrize(("damage", "said"), [("gone", "is not there"), ("changed", "is not as it was written")])
def test_a_side_file_that_is_wrong_damages_its_shard(output, latentmill, command, damage, said):
    side = output / "files" / names(output)[0]
    side.unlink() if damage == "gone" else side.write_text("[]")
    assert latentmill("verify", output, "--repair") == 1
    assert "shard 0 can't be read" in latentmill.out and said in latentmill.out
    assert files(output) == names(output) and len(names(output)) == 1, "it went along with its shard"
    assert len(files(output, "quarantine")) == (1 if damage == "gone" else 2)
    assert latentmill(*command, f"output={output}") == 0
    assert files(output) == names(output) and len(names(output)) == 2
    assert latentmill("verify", output) == 0


def test_a_file_that_no_shard_names_is_found_and_taken_out(output, latentmill):
    stray = output / "files" / "00000-0123456789ab-sizes.json"
    stray.write_text("[]")
    assert latentmill("verify", output, "--repair") == 1
    assert f"files/{stray.name} is no file of this dataset" in latentmill.out
    assert files(output) == names(output) and files(output, "quarantine") == [f"foreign-{stray.name}"]
    assert latentmill("verify", output) == 0


def test_of_two_drivers_the_loser_s_files_are_deleted(latentmill, command, tmp_path, monkeypatch):
    """The second runs whole while the first is between its side files and its commit."""
    output, racing = tmp_path / "out", []

    def overtake(name):
        if name == "data synced" and not racing:
            racing.append(name)
            assert latentmill(*command, "single_writer=false", f"output={output}.other") == 0
            for folder in ("files", "data"):
                for path in (tmp_path / "out.other" / folder).iterdir():
                    path.rename(output / folder / path.name) if folder == "files" else path.rename(
                        _folder(output / folder) / path.name
                    )

    monkeypatch.setattr(failpoints, "reach", overtake)
    assert latentmill(*command, f"output={output}") == 0, latentmill.said
    assert racing and files(output) == names(output) and len(names(output)) == 2
    assert latentmill("verify", output) == 0, latentmill.out


def test_a_shard_that_is_there_though_its_commit_failed_keeps_its_files(latentmill, command, tmp_path, monkeypatch):
    """The store's answer was lost, or what came after it failed: the next attempt finds the shard there."""
    output, failed = tmp_path / "out", []

    def fail(name):
        if name == "published" and not failed:
            failed.append(name)
            raise OSError(5, "the answer was lost")

    monkeypatch.setattr(failpoints, "reach", fail)
    assert latentmill(*command, f"output={output}") == 0, latentmill.said
    assert failed and files(output) == names(output) and len(names(output)) == 2
    assert latentmill("verify", output) == 0, latentmill.out


def _folder(path):
    path.mkdir(exist_ok=True)
    return path


def test_what_a_killed_writer_left_is_swept(output, latentmill, command, tmp_path):
    """A kill between side file and commit leaves a file that no shard names: as one copied here."""
    left = output / "files" / "00001-0123456789ab-sizes.json"
    left.write_text("[]")
    (output / "data" / "00001.lines").unlink()
    assert latentmill("verify", output) == 1 and left.name not in latentmill.out, "it may be at work"
    assert latentmill(*command, f"output={output}") == 0
    assert not left.exists() and files(output) == names(output)


def test_failed_rows_are_retried_with_their_files(latentmill, command, pictures, tmp_path):
    good = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    assert latentmill(*command, f"output={output}") == 0
    before = names(output)
    assert latentmill(*command, f"output={output}", "--retry-failed") == 0, latentmill.said
    assert names(output)[0] == before[0] and names(output)[1] != before[1]
    assert files(output) == names(output) and files(output, "quarantine") == [] and good


def test_an_index_may_not_take_a_name_of_ours(latentmill, command, tmp_path):
    assert latentmill(*command, "+sink.wrong=name", f"output={tmp_path / 'out'}") == 1
    assert "two_files" in latentmill.err and "finish" in latentmill.err and "'plan.json'" in latentmill.err


def test_a_writer_that_is_killed_between_side_file_and_commit_leaves_nothing(latentmill, command, forks, tmp_path):
    output, places = tmp_path / "out", tmp_path / "places"
    places.mkdir()
    there = {"path": [tmp_path / "site"], "LATENTMILL_FAILPOINT": f"data synced:kill:{places}"}
    code = forks.run([*command, f"output={output}"], tmp_path / "log", **there)
    assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert files(output, "data") == [] and [name[:6] for name in files(output)] == ["00000-"]
    [left] = files(output)
    assert latentmill(*command, f"output={output}") == 0, latentmill.said
    assert left not in files(output) and files(output) == names(output) and len(names(output)) == 2
    assert latentmill("verify", output) == 0


def test_the_loser_deletes_its_files_itself(command, tmp_path):
    from latentmill import registry, storage
    from latentmill.shards import data_name, with_side_files

    store, sink = storage.at(str(tmp_path / "out")), registry.build("sink", {"name": "two_files"})
    table = pa.table({"width": [4], "height": [4]})
    rows = pa.table({"row_id": ["000000000-000"], "prompt": ["a"]})

    def publish_as(shard, side_files):
        with store.aside("a") as path:
            sink.write(path, rows, side_files.metadata)
            return store.create(data_name(shard, sink), path)

    with with_side_files(store, sink, 0, table) as winner:
        assert publish_as(0, winner)
        winner.keep()
    with with_side_files(store, sink, 0, table) as loser:
        assert len(files(tmp_path / "out")) == 2 and not publish_as(0, loser)
    assert files(tmp_path / "out") == [*winner.paths]
    with with_side_files(store, sink, 1, table) as ours:  # a store may say of what it has just made that it was there
        publish_as(1, ours)
    assert files(tmp_path / "out") == sorted([*winner.paths, *ours.paths])

"""Declared ids: none twice, told before anything starts; and a row's seed hangs on its id, not on its place."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import latentmill
from latentmill import ids
from latentmill.batch import from_dicts, with_latents
from latentmill.cli import main
from latentmill.fields import ID
from latentmill.ids import Twice, find_twice
from latentmill.plugin import Fragment, LatentSpec, RowError, Source
from latentmill.sinks.parquet import Parquet
from latentmill.sources.images import Images
from latentmill.sources.latents import Latents
from latentmill.sources.prompts import Prompts


class Given(Source):
    """A source of ids that a test gives, each list a fragment."""

    contract = 2

    id_column = "id"

    def __init__(self, *given):
        self.given = given

    def fragments(self):
        return [Fragment(str(at), len(part)) for at, part in enumerate(self.given)]

    def read(self, fragment, start, stop):
        for id in self.given[int(fragment)][start:stop]:
            yield RowError("no id") if id is None else {"id": id}


def twice(*given):
    source = Given(*given)
    return find_twice(source, source.fragments())


def test_two_rows_of_one_id_are_found_wherever_they_are():
    assert twice(["a", "b"], [], ["c", "A", "b"]) == Twice("b", ("0", 1), ("2", 2))
    assert twice(["a", "x", "x"]) == Twice("x", ("0", 1), ("0", 2))
    assert twice(["a", None, None], [None, "b"]) is None
    assert twice() is None
    assert str(twice(["a"], ["a"])) == "id 'a' is there twice: row 0 of 0 and row 0 of 1, counted from 0"


def test_among_many_ids_the_two_are_found():
    many = [str(i) for i in range(3 * ids.CHUNK + 7)]
    assert twice(many) is None
    assert twice(many, ["new", many[ids.CHUNK]]) == Twice(many[ids.CHUNK], ("0", ids.CHUNK), ("1", 1))


def test_ids_whose_hashes_agree_are_compared(monkeypatch):
    monkeypatch.setattr(ids, "hash", lambda id: 7, raising=False)
    assert twice(["a", "b", "c"]) is None
    assert twice(["a", "b", "c", "b"]) == Twice("b", ("0", 1), ("0", 3))


def prompts(path, content, **settings):
    if isinstance(content, pa.Table):
        pq.write_table(content, path, row_group_size=2)
    else:
        path.write_bytes(content)
    return Prompts(str(path), **settings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", b"name,prompt\ncat,a\n7,b\n,c\n\xff,d\n"),
        (
            "p.jsonl",
            b'{"name":"cat","prompt":"a"}\n{"name":7,"prompt":"b"}\n{"prompt":"c"}\n{"name":1.5,"prompt":"d"}\n',
        ),
        (
            "p.parquet",
            pa.table(
                {"prompt": ["a", "b", "c", "d"], "name": pa.array([b"cat", b"7", None, b"\xff"]).view(pa.string())}
            ),
        ),
    ],
)
def test_ids_are_read_from_their_column_and_a_bad_one_costs_its_row(tmp_path, name, content):
    source = prompts(tmp_path / name, content, id_column="name")
    [fragment] = source.fragments()
    found = list(source.read(name, 0, 4))
    assert found[:2] == [{"prompt": "a", "id": "cat"}, {"prompt": "b", "id": "7"}]
    assert re.match("the id is (null|empty)", str(found[2]))
    assert str(found[3]) in (
        "the id is not UTF-8, at byte 0",
        "name is not UTF-8, at byte 0",
        "an id must be text or a whole number, not 1.5",
    )
    assert list(source.ids(fragment)) == ["cat", "7", None, None]


def test_whole_numbers_are_ids_and_a_column_may_be_both(tmp_path):
    path = tmp_path / "p.parquet"
    source = prompts(path, pa.table({"prompt": ["a", "b"], "seed": [5, 6]}), id_column="seed")
    [fragment] = source.fragments()
    assert list(source.read("p.parquet", 0, 2)) == [
        {"prompt": "a", "seed": 5, "id": "5"},
        {"prompt": "b", "seed": 6, "id": "6"},
    ]
    assert list(source.ids(fragment)) == ["5", "6"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a", "p.txt: lines of text have no columns, and id_column is name"),
        ("p.csv", b"prompt\na\n", "p.csv has no one column name \\(id_column\\), only prompt"),
        ("p.csv", b"prompt,name,name\na,1,2\n", "p.csv has no one column name"),
        ("p.parquet", pa.table({"prompt": ["a"]}), "p.parquet has no column name \\(id_column\\), only prompt"),
        ("p.parquet", pa.table({"prompt": ["a"], "name": [1.5]}), "column name is double, and ids are text or whole"),
    ],
)  # fmt: skip
def test_a_source_without_the_column_says_so_before_the_start(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        prompts(tmp_path / name, content, id_column="name").fragments()


def test_a_picture_s_id_is_its_path(tmp_path):
    from PIL import Image

    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    source = Images(str(tmp_path), id_column="path")
    [fragment] = source.fragments()
    assert (
        [row["id"] for row in source.read(fragment.name, 0, 2)] == list(source.ids(fragment)) == ["b.png", "sub/a.png"]
    )
    with pytest.raises(ValueError, match="id_column must be path, the only one that pictures have, not 'name'"):
        Images(str(tmp_path), id_column="name")


@pytest.mark.parametrize(("column", "expected"), [("id", ["cat", "dog"]), ("row_id", ["0", "1"])])
def test_latents_keep_the_id_of_their_row(tmp_path, column, expected):
    spec = LatentSpec(channels=4, downscale=4, scale=1.0, shift=0.0, dtype="float32", fingerprint="x")
    same = {
        "prompt": "", "negative_prompt": "", "seed": 1, "steps": 1, "guidance_scale": 1.0, "strength": 1.0,
        "scheduler": "", "width": 8, "height": 8,
    }  # fmt: skip
    table = from_dicts([{**same, "row": n, "row_id": str(n)} for n in range(2)])
    table = table.append_column(ID, pa.array(["cat", "dog"]))
    table = Parquet().pack(with_latents(table, torch.zeros(2, 4, 2, 2), spec)).drop_columns(["row"])
    Parquet().write(str(tmp_path / "a.parquet"), table, {})
    source = Latents(str(tmp_path), id_column=column)
    [fragment] = source.fragments()
    assert [row["id"] for row in source.read("a.parquet", 0, 2)] == list(source.ids(fragment)) == expected
    with pytest.raises(ValueError, match=r"a.parquet has no column name \(id_column\)"):
        Latents(str(tmp_path), id_column="name").fragments()


JOB = ["samples_per_row=2", "rows_per_shard=2", "sampling.steps=2", "cluster=inline", "deterministic=true"]
JOB += ["sampling.width=32", "sampling.height=32"]
COLOURS = ("red", "green", "blue")


def csv(path, names):
    lines = [f"{name},a {name} star on a white background" for name in names]
    path.write_text("\n".join(["name,prompt", *lines]) + "\n")
    return ["txt2img", f"source.path={path}", "source.id_column=name", *JOB]


def test_the_same_id_twice_stops_the_job_before_anything_is_written(tmp_path, capsys):
    command = csv(tmp_path / "p.csv", ["red", "green", "blue", "green"])
    for verb in ("plan", "run"):
        assert main([verb, *command, f"output={tmp_path / 'out'}"]) == 2
        said = capsys.readouterr().err
        assert said == (
            "latentmill: source prompts: id 'green' is there twice: row 1 of p.csv and row 3 of p.csv, counted from 0\n"
        )
    assert not (tmp_path / "out").exists()


def test_rows_that_come_before_others_change_none_of_them(tmp_path):
    first = csv(tmp_path / "p.csv", COLOURS)
    latentmill.run(first[0], [*first[1:], f"output={tmp_path / 'before'}"])
    more = csv(tmp_path / "p.csv", ["zebra", "black", *COLOURS])  # the model knows no zebra: a shard without a row
    latentmill.run(more[0], [*more[1:], f"output={tmp_path / 'after'}"])
    assert (
        json.loads((tmp_path / "after" / "errors" / "00000.jsonl").read_text().splitlines()[0])["row_id"]
        == "000000000-000"
    )

    def pictures(output):
        loaded = datasets.load_dataset(
            "parquet", data_files=f"{tmp_path}/{output}/data/*.parquet", split="train", cache_dir=str(tmp_path / "hf")
        )
        return {(row["id"], row["row_id"][-3:]): (row["seed"], row["image"].tobytes()) for row in loaded}

    before, after = pictures("before"), pictures("after")
    assert len(before) == 6 and len(after) == 8
    assert len({seed for seed, _ in after.values()}) == 8
    assert {key: after[key] for key in before} == before

"""What is asked of a store, and what is not: of listings, ranges, tars that are known already, a branch of the Hub that moves on."""

import gzip
import json
import random
import struct
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from tests.outside.conftest import table
from tests.outside.store_parts import errors, put, upload
from tests.outside.test_stores import COLOURS, KINDS, png

TEXT = ("source=prompts", "sampling.width=4", "sampling.height=4")


pytestmark = pytest.mark.usefixtures("cache")


def test_a_plan_lists_and_asks_for_no_object_alone(store, asked):
    for k in range(25):
        put(store.url, f"in/{k % 5}/{k:04d}.png", b"")  # no plan opens one
        put(store.url, f"tables/{k:04d}.csv", b"prompt\n" + b"a\n" * k)
    store.asked.clear()
    assert "25 rows in 1 files" in asked("plan", "s3://bucket/in", "source=images")
    assert store.count("HEAD") == 1 and store.count("GET", "list-type") == 2  # is it a file, a folder; what is in it
    assert store.count("GET") == 2
    store.asked.clear()
    assert "300 rows in 25 files" in asked("plan", "s3://bucket/tables", *TEXT)
    assert store.count("HEAD") == 1 and store.count("GET", "list-type") == 2
    assert store.count("GET", "csv") <= 2 * 25  # to count the rows, and to look for syntax of other tools


def test_of_a_parquet_file_the_footer_is_read_and_the_columns_that_are_wanted(store, asked, tmp_path):
    noise = [random.Random(k).randbytes(200_000) for k in range(40)]
    pq.write_table(
        pa.table({"prompt": [f"a {k}" for k in range(40)], "noise": noise}), tmp_path / "p.parquet", row_group_size=10
    )
    put(store.url, "p.parquet", (tmp_path / "p.parquet").read_bytes())
    store.sent = 0
    asked("run", "s3://bucket/p.parquet", *TEXT)
    assert [row["prompt"] for row in table(tmp_path / "out").to_pylist()] == [f"a {k}" for k in range(40)]
    assert store.sent < 40 * 200_000 / 2


@pytest.mark.parametrize("packed", [False, True])
def test_a_range_that_is_refused_is_no_damage_of_the_file(packed, store, asked, tmp_path):
    """Neither of a row group nor of what is unpacked on the way."""
    noise = [random.Random(k).randbytes(300_000).hex() for k in range(8)]
    rows = [{"prompt": f"a {k}", "noise": each} for k, each in enumerate(noise)]
    name = "p.jsonl.gz" if packed else "p.parquet"
    if packed:
        put(store.url, name, gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=1)
        put(store.url, name, (tmp_path / name).read_bytes())
    seen = []

    def first(method, path):
        if method == "GET" and path.endswith(name) and (tmp_path / "out" / "plan.json").exists():
            seen.append(path)
            return 403 if len(seen) > 1 else None
        return None

    store.first = first
    said = asked("run", f"s3://bucket/{name}", *TEXT, "source.keep=[noise]", code=1)
    assert f"stage read: s3://bucket/{name}: " in said and "403" in said
    assert errors(tmp_path / "out") == []


def test_a_tar_is_gone_through_once_on_a_machine(store, another_store, files, asked, cache, tmp_path):
    KINDS["tars"](files)
    size = sum(path.stat().st_size for path in files.iterdir())
    upload(store.url, files, "in")
    more = ("source=prompts",)
    store.sent = 0
    asked("plan", "s3://bucket/in", *more)
    assert store.sent >= size / 2
    kept = sorted((cache / "latentmill" / "tars").iterdir())
    assert len(kept) == 2
    second = another_store()
    asked("plan", "s3://bucket/in", *more, "source.max_pixels=1000")
    assert 0 < second.sent < size / 20
    asked("run", "s3://bucket/in", *more)
    first = table(tmp_path / "out")
    for path in kept:
        path.write_bytes(path.read_bytes()[:-9] + b"otherwise")
    asked("run", "s3://bucket/in", *more, output="torn")
    assert table(tmp_path / "torn").equals(first) and first.num_rows == len(COLOURS)
    put(store.url, "in/0.tar", (files / "1.tar").read_bytes())  # another under the name of the first
    assert "is there twice" in asked(
        "plan", "s3://bucket/in", *more, "source.id_column=__key__", output="other", code=2
    )


def test_buckets_are_counted_by_the_pictures_heads_and_ends(store, another_store, files, asked):
    for k, size in enumerate([(640, 480), (480, 640), (512, 512)]):
        noise = np.random.default_rng(k).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(files / f"{k}.png")
    content = (files / "0.png").read_bytes()  # what says that it lies on its side may come behind the pixels
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    told = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(told) - 4) + told + struct.pack(">I", zlib.crc32(told))
    (files / "0.png").write_bytes(content[:-12] + chunk + content[-12:])
    (files / "t.jsonl").write_text("".join(json.dumps({"image": f"{k}.png"}) + "\n" for k in (0, 1, 2, 3)))
    upload(store.url, files, "in")
    turned, others = (files / "0.png").stat().st_size, sum((files / f"{k}.png").stat().st_size for k in (1, 2))
    for more, path in ((("source=images",), ""), (("source=prompts",), "/t.jsonl")):
        more = (*more, "size={buckets: kohya, area: 262144, step: 64}")
        wanted = [line for line in asked("plan", f"{files}{path}", *more).splitlines() if line.startswith("buckets")]
        assert wanted[-1].split()[1:] == ["448x576", "2,", "512x512", "1"]
        counting = another_store()
        found = asked("plan", f"s3://bucket/in{path}", *more)
        assert all(line in found for line in wanted)
        assert 0 < counting.sent < 1.2 * turned + 0.25 * others
        assert counting.count("HEAD", "png") == 0


def test_of_what_a_row_names_no_more_is_held_than_is_said(store, another_store, hub, files, asked, tmp_path):
    """An empty file, one that is there in one piece, and one of many."""
    (files / "0.png").write_bytes(b"")
    (files / "1.png").write_bytes(png("red"))
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1200, 3), np.uint8)
    Image.fromarray(noise).save(files / "2.bmp")
    names = ["0.png", "1.png", "2.bmp", "not there.png", "1.png"]
    (files / "t.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    upload(store.url, files, "in")
    more = ("source=prompts", "size={buckets: kohya, area: 65536, step: 32}")
    asked("run", f"{files}/t.jsonl", *more, output="wanted")
    sizes = []
    counting = another_store()
    forward = counting.answer

    def answer(method, path, headers, body):
        status, kept, content = forward(method, path, headers, body)
        sizes.append((method, path, len(content)))
        return status, kept, content

    counting.answer = answer
    asked("run", "s3://bucket/in/t.jsonl", *more)
    assert table(tmp_path / "out").equals(table(tmp_path / "wanted"))
    told = [[(row["row_id"], row["reason"]) for row in errors(tmp_path / name)] for name in ("wanted", "out")]
    assert len(told[0]) == 2 and told[0] == told[1]
    assert max(size for _, _, size in sizes) <= 2 << 20 < 1000 * 1200 * 3
    assert [path for method, path, _ in sizes if method == "HEAD" and "1.png" in path] == []
    hub.commit(files)
    asked("run", "hf://datasets/some/pictures/t.jsonl", *more, output="hub")
    assert table(tmp_path / "hub").equals(table(tmp_path / "wanted"))
    assert [row["reason"] for row in errors(tmp_path / "hub")] == [reason for _, reason in told[0]]


@pytest.mark.parametrize(("kind", "changes"), [("pictures", "a/8.png"), ("named", "images/8.png")])
def test_a_branch_that_moves_on_is_read_at_the_commit_of_the_plan(kind, changes, hub, files, asked, tmp_path):
    path, more = KINDS[kind](files)
    asked("run", f"{files}{path}", *more, output="wanted")
    planned = hub.commit(files)
    answer = hub.answer

    def moves_on(method, path, headers, body):
        found = answer(method, path, headers, body)
        if "/revision/main" in path:
            (files / changes).write_bytes(png("white"))
            hub.commit(files)
        return found

    hub.answer = moves_on
    asked("run", f"hf://datasets/{hub.repository}{path}", *more)
    rows, wanted = (table(tmp_path / name).replace_schema_metadata() for name in ("out", "wanted"))
    assert hub.main != planned and rows.equals(wanted) and errors(tmp_path / "out") == errors(tmp_path / "wanted")
    [fragment] = json.loads((tmp_path / "out" / "plan.json").read_text())["fragments"]
    assert fragment[2].startswith(f"{planned} ")
    said = asked("run", f"hf://datasets/{hub.repository}{path}", *more, code=2)
    assert f"fragments: {fragment}" in said and hub.main in said
    asked("run", f"hf://datasets/{hub.repository}@{planned}{path}", *more)  # the same plan, and all is done


def test_the_hub_fails_now_and_then_and_no_row_is_blamed(hub, files, asked, tmp_path):
    path, more = KINDS["named"](files)
    asked("run", f"{files}{path}", *more, output="wanted")
    hub.commit(files)
    dice, answer, failed = random.Random(1), hub.answer, []

    def fails(*request):
        if dice.randrange(5):
            return answer(*request)
        failed.append(request)
        return 503, {}, b""

    hub.answer = fails
    asked("run", f"hf://datasets/{hub.repository}{path}", *more)
    assert failed and table(tmp_path / "out").replace_schema_metadata().equals(
        table(tmp_path / "wanted").replace_schema_metadata()
    )
    assert errors(tmp_path / "out") == errors(tmp_path / "wanted")


@pytest.mark.parametrize("headers", [{"Retry-After": "2"}, {"RateLimit": '"resolvers";r=0;t=2'}])
def test_the_hub_is_waited_for_as_long_as_it_says(headers, hub, files, asked):
    (files / "p.txt").write_text("a\n")
    hub.commit(files)
    answer, refused, later = hub.answer, [], []

    def refuses(*request):
        (later if refused else refused).append(time.monotonic())
        return answer(*request) if later else (429, headers, b"")

    hub.answer = refuses
    assert "1 rows" in asked("plan", f"hf://datasets/{hub.repository}/p.txt", *TEXT)
    assert later[0] - refused[0] > 1.9


NOT_THERE = {
    "hf://datasets/nobody/nothing/p.csv": (3, "hf://datasets/nobody/nothing is not there, or not for everybody: HF_TOKEN"),
    "hf://datasets/some/pictures@none/p.csv": (3, "hf://datasets/some/pictures has no revision none"),
    "hf://datasets/some/pictures/none.csv": (2, "there is no file or folder hf://datasets/some/pictures/none.csv"),
    "hf://some/model": (2, "hf://some/model is no file or folder of a dataset: hf://datasets/OWNER/NAME@REVISION/PATH"),
    "s3://bucket/none": (2, "there is no file or folder s3://bucket/none"),
    "s3://bucket/*.csv": (2, "s3://bucket/*.csv: no .txt, .csv"),
    "s3://nowhere/p.csv": (3, "s3://nowhere/p.csv: "),
    "s3:///p.csv": (2, "s3:///p.csv names no bucket: s3://BUCKET/PATH"),
    "ftp://host/p.csv": (2, "sources are files of this machine or a shared disk, s3://BUCKET/PATH"),
}  # fmt: skip


def test_what_is_not_there_is_said_in_a_line_before_anything_starts(store, hub, files, asked, tmp_path):
    (files / "a.csv").write_text("prompt\na\n")
    hub.commit(files)
    for path, (code, wanted) in NOT_THERE.items():
        said = asked("run", path, *TEXT, code=code)
        assert f"latentmill: {wanted}" in said.replace("source prompts: ", ""), path
        assert not (tmp_path / "out").exists()


SHELF = """
from latentmill.plugin import Fragment, Source, StorageError

class Shelf(Source):
    contract = 2

    def fragments(self):
        return [Fragment("shelf", 6)]

    def read(self, fragment, start, stop):
        for k in range(start, stop):
            if k == 3:
                raise StorageError("shelf://3: no answer")
            yield {"prompt": f"a {k}"}
"""


def test_a_plugin_s_source_says_that_its_store_fails(latentmill, install, patches, tmp_path):
    install("shelf", "[latentmill.sources]\nshelf = shelves:Shelf\n", shelves=SHELF)
    size = ("sampling.width=4", "sampling.height=4", "rows_per_shard=1", "stages.read.batch_size=1")
    given = (*patches, "source.name=shelf", "~source.path", *size, f"output={tmp_path / 'out'}")
    assert latentmill("run", "encode", *given) == 1
    assert "latentmill: stage read: shelf://3: no answer" in latentmill.err and errors(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("kind", "place"),
    [("images", "s3://bucket/in"), ("images", "hf://datasets/some/pictures"), ("prompts", "s3://bucket/in")],
)
def test_a_source_in_a_store_grows(kind, place, store, hub, files, asked, tmp_path):
    def come(*numbers):
        for k in numbers:
            (files / f"{k}.png").write_bytes(png(COLOURS[k]))
            (files / f"{k}.txt").write_text(f"a {k}")
        upload(store.url, files, "in")
        hub.commit(files)

    more = (f"source={kind}", *TEXT[1:], "rows_per_shard=2")
    come(0, 2, 3)
    asked("run", place, *more)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    come(1, 4)
    assert "holds another job's dataset" in asked("run", place, *more, code=2)
    asked("run", place, *more, "--grow")
    assert sorted(row["prompt"] for row in table(tmp_path / "out").to_pylist()) == [f"a {k}" for k in range(5)]
    assert {name: (tmp_path / "out" / "data" / name).read_bytes() for name in first} == first

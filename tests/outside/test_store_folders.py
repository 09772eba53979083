"""What is a folder in a store, where all are names: markers, characters of globs, names that are a file's too; and what lies in one."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.outside.conftest import table
from tests.outside.store_parts import errors, put, put_as_is, upload
from tests.outside.test_store_reading import TEXT
from tests.outside.test_stores import COLOURS, pictures, png

pytestmark = pytest.mark.usefixtures("cache")


def rows(output):
    return table(output).replace_schema_metadata()


def test_marked_folders_of_pictures_are_folders(store, files, asked, tmp_path):
    _, more = pictures(files)
    asked("run", files, *more, output="wanted")
    upload(store.url, files, "in")
    for folder in ("in", "in/a", "in/a/b%20c", "in/empty"):
        put_as_is(store.url, f"{folder}/")
    said = asked("run", "s3://bucket/in", *more)
    assert "passed over" not in said and rows(tmp_path / "out").equals(rows(tmp_path / "wanted"))
    assert errors(tmp_path / "out") == errors(tmp_path / "wanted")


@pytest.mark.parametrize("path", ["x.parquet", "x.parquet/", "**/*.parquet"])
def test_a_marked_folder_that_is_named_like_a_file_is_a_folder(path, store, asked, tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "0.parquet")
    put(store.url, "in/x.parquet/0.parquet", (tmp_path / "0.parquet").read_bytes())
    put_as_is(store.url, "in/")
    put_as_is(store.url, "in/x.parquet/")
    asked("run", f"s3://bucket/in/{path}", *TEXT)
    assert [row["prompt"] for row in rows(tmp_path / "out").to_pylist()] == ["a", "b"]


def test_a_folder_with_the_name_of_a_file_is_there_beside_it(store, asked, tmp_path):
    for name, colour in zip(("a.png", "a.png/b.png", "a.png/c/d.png", "e.png"), COLOURS):
        put(store.url, f"in/{name}", png(colour))
    asked("run", "s3://bucket/in", "source=images", "source.keep=[file]")
    found = [row["file"] for row in rows(tmp_path / "out").to_pylist()]
    assert found == ["a.png", "a.png/b.png", "a.png/c/d.png", "e.png"]


def test_a_folder_may_have_the_characters_of_a_glob(store, hub, files, asked, tmp_path):
    folder = files / "photos [2023]*?"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red"))
    (folder / "p.csv").write_text("prompt\na\n")
    upload(store.url, files, "in")
    hub.commit(files)
    for place in ("s3://bucket/in", f"hf://datasets/{hub.repository}"):
        assert "1 rows in 1 files" in asked("plan", f"{place}/{folder.name}", "source=images")
        assert "1 rows in 1 files" in asked("plan", f"{place}/{folder.name}", *TEXT)
        assert "1 rows in 1 files" in asked("plan", f"{place}/*/*.csv", *TEXT)


@pytest.mark.parametrize("key", ["in/a//b.png", "in/./b.png"])
def test_a_key_that_is_no_path_is_named(key, store, asked):
    put(store.url, "in/ok.png", png("red"))
    put_as_is(store.url, key, png("red"))
    said = asked("plan", "s3://bucket/in", "source=images", code=3)
    assert key in said and "of that kind can't be read: give it another name" in said


def test_an_output_inside_a_source_in_a_store_is_refused(store, asked, files, tmp_path):
    _, more = pictures(files)
    upload(store.url, files, "in")
    store.asked.clear()
    inside = "lies in what the source reads"
    for output in ("s3://bucket/in", "s3://bucket//in/a/out/"):
        assert f"{output} {inside}" in asked("run", "s3://bucket/in", *more, f"output={output}", code=2)
    assert inside in asked("run", "s3://bucket", *more, "output=s3://bucket/out", code=2)
    assert store.count("PUT") == 0
    for output in ("s3://bucket/into", f"{tmp_path}/s3:/bucket/in"):
        assert inside not in asked("plan", "s3://bucket/in", *more, f"output={output}")
    put(store.url, "tables/p.csv", b"prompt\na\n")
    assert inside in asked("run", "s3://bucket/tables", *TEXT, "output=s3://bucket/tables", code=2)
    assert inside not in asked(
        "plan", "s3://bucket/tables", *TEXT, "output=s3://bucket/tables/out"
    )  # which is not read


def test_whether_a_folder_of_the_hub_is_there_is_asked_without_a_list_of_all(hub, files, asked):
    pictures(files)
    hub.commit(files)
    assert "3 rows" in asked("plan", f"hf://datasets/{hub.repository}/a/b c", "source=images")
    assert hub.count("GET", "/tree/") == 1


def test_latents_are_read_at_the_commit_of_the_plan(hub, files, asked, latentmill, patches, tmp_path):
    _, more = pictures(files)
    asked("run", files, *more, "rows_per_shard=3", output="made")
    decode = [*patches, f"output={tmp_path / 'out'}"]
    assert (
        latentmill("run", "decode", *patches, f"source.path={tmp_path / 'made'}", f"output={tmp_path / 'wanted'}") == 0
    )
    planned = hub.commit(tmp_path / "made")
    answer = hub.answer

    def moves_on(method, path, headers, body):
        found = answer(method, path, headers, body)
        if "/revision/main" in path:
            (tmp_path / "made" / "README.md").write_text("of later")
            hub.commit(tmp_path / "made")
        return found

    hub.answer = moves_on
    assert latentmill("run", "decode", *decode, f"source.path=hf://datasets/{hub.repository}") == 0, latentmill.said
    assert hub.main != planned and rows(tmp_path / "out").equals(rows(tmp_path / "wanted"))


def test_a_picture_that_a_row_names_is_the_one_that_was_first_read(store, files, asked, tmp_path):
    """Some rows are read twice."""
    for k in (0, 1):
        put(store.url, f"in/{k}.png", png(COLOURS[k]))
    put(store.url, "in/t.jsonl", b'{"image": "0.png"}\n{"image": "1.png"}\n')
    seen = []

    def first(method, path):
        if method == "GET" and path.endswith("1.png"):
            seen.append(path)
            if len(seen) == 2:
                put(store.upstream_url, "in/1.png", png("white"))

    store.first = first
    said = asked("run", "s3://bucket/in/t.jsonl", *TEXT[:1], code=1)
    assert "s3://bucket/in/1.png was changed since it was first read" in said
    assert errors(tmp_path / "out") == []


def test_a_store_that_fails_says_nothing_of_how_a_picture_lies(store, files, asked):
    """Of a PNG all is read to know that: what may say it stands behind the pixels."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (640, 480), random.Random(0).randbytes(3 * 640 * 480)).save(buffer, "png")
    put(store.url, "in/a.png", buffer.getvalue())
    seen = []

    def first(method, path):
        if method == "GET" and path.endswith("a.png"):
            seen.append(path)
            return 403 if len(seen) > 1 else None
        return None

    store.first = first
    said = asked("plan", "s3://bucket/in", "source=images", "size={buckets: kohya, area: 65536, step: 64}", code=3)
    assert "s3://bucket/in/a.png: " in said and "403" in said

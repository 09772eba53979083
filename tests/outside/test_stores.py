"""Sources in stores: the rows are those of the same files on disk, whatever a store does meanwhile, or one line says why not."""

import io
import json
import os
import random
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.outside.conftest import table
from tests.outside.store_parts import Before, errors, put, upload
from tests.outside.test_prompt_files import FILES, TEXT


def png(colour, size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


COLOURS = [(20 * k, 200 - 10 * k, 7) for k in range(12)]


def pictures(folder):
    """Folders in folders, captions of both kinds, a broken picture, what is passed over."""
    for k, colour in enumerate(COLOURS):
        at = folder / ("a", "a/b c", "ü#%41", "")[k % 4]
        at.mkdir(parents=True, exist_ok=True)
        (at / f"{k}.png").write_bytes(png(colour))
        if k % 2:
            (at / f"{k}{('.txt', '.caption')[k % 3 == 0]}").write_text(f"a colour, {k}")
    (folder / "a" / "broken.jpg").write_bytes(b"no picture")
    (folder / "a" / "notes.md").write_text("no row")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(png("red"))
    return "", ("source=images",)


def texts(folder):
    for name, (content, _, _) in FILES.items():
        (folder / name).write_bytes(content)
    return "", ("source=prompts", *TEXT)


def globbed(folder):
    for name in ("a.csv", "._a.csv", ".old/b.csv", "c/d.csv", "c/._d.csv", "e.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"\0" if "._" in name else f"prompt\n{name}\n".encode())
    return "/**/[a-d].csv", ("source=prompts", *TEXT)


def long_lines(folder):
    """Some pieces, so that reading runs ahead."""
    with (folder / "p.jsonl").open("w") as file:
        for k in range(200):
            file.write(json.dumps({"prompt": f"{k} " + "x" * (100 * k), "seed": k}) + "\n")
    return "/p.jsonl", ("source=prompts", *TEXT, "rows_per_shard=64")


def named(folder):
    """A Hugging Face folder: pictures that a table names, one of which is not there."""
    (folder / "images").mkdir()
    rows = [{"file_name": f"images/{k}.png", "text": f"a {k}"} for k in range(len(COLOURS))]
    for row, colour in zip(rows, COLOURS):
        (folder / row["file_name"]).write_bytes(png(colour))
    rows[3]["file_name"], rows[5]["file_name"], rows[6]["file_name"] = "images/none.png", "../p.png", "./images//6.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "/metadata.jsonl", ("source=prompts", "source.columns={image: file_name, prompt: text}")


def columns(folder):
    """Parquet files of several row groups, with pictures in them."""
    for part in range(3):
        held = [{"bytes": png(colour), "path": None} for colour in COLOURS[4 * part : 4 * part + 4]]
        data = pa.table(
            {"image": held, "prompt": [f"a {part} {k}" for k in range(4)], "score": [1.5 * k for k in range(4)]}
        )
        pq.write_table(data, folder / f"{part}.parquet", row_group_size=3)
    return "", ("source=prompts", "source.keep=[score]")


def tars(folder):
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for k, colour in enumerate(COLOURS[6 * shard : 6 * shard + 6]):
                noise = random.Random(k).randbytes(300_000)  # which nobody reads
                files = {"png": png(colour), "txt": f"a {k}".encode(), "json": b'{"score": 3}', "bin": noise}
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{shard}{k}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return "", ("source=prompts", "source.keep=[score]", "source.id_column=__key__", "samples_per_row=1")


KINDS = {make.__name__: make for make in (pictures, texts, globbed, long_lines, named, columns, tars)}

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def encoded(latentmill, patches, tmp_path):
    """``encoded(PATH, *more)``: what a job over it makes: its rows, and its error rows."""
    count = iter(range(100))

    def encoded(path, *more, output=None, code=0, read=True):
        output = output or tmp_path / f"out{next(count)}"
        given = [*patches, f"source.path={path}", f"output={output}", "max_error_rate=1", *more]
        assert latentmill("run", "encode", *given) == code, latentmill.said
        if code or not read:
            return latentmill.err
        return table(output).replace_schema_metadata(), errors(output)

    return encoded


@pytest.fixture
def before(bucket, monkeypatch):
    """``before(...)``: a proxy before the store, which jobs speak to from here on."""
    made = []

    def before(**how):
        made.append(Before(os.environ["AWS_ENDPOINT_URL"], **how))
        monkeypatch.setenv("AWS_ENDPOINT_URL", made[-1].url)
        return made[-1]

    yield before
    for each in made:
        each.close()


@pytest.fixture
def on_disk(encoded, files):
    """``on_disk(KIND)``: its files are in ``files``; the path behind them, the settings, and what a job over them makes."""

    def on_disk(kind):
        path, more = KINDS[kind](files)
        if kind not in FROM_DISK:
            FROM_DISK[kind] = encoded(f"{files}{path}", *more)
        return path, more, *FROM_DISK[kind]

    return on_disk


FROM_DISK = {}
"""What that was, by kind: the same in each test."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_and_the_hub_give_the_rows_of_the_disk(kind, files, encoded, on_disk, bucket, hub):
    path, more, wanted, failed = on_disk(kind)
    assert wanted.num_rows > 1
    if kind != "texts":
        upload(os.environ["AWS_ENDPOINT_URL"], files, "some/in")
    commit = hub.commit(files)
    places = [f"hf://datasets/{hub.repository}@{commit}", *([f"{bucket}/some/in"] if kind != "texts" else [])]
    for place in places:  # so many files take the server of S3 long
        rows, wrong = encoded(f"{place}{path}", *more)
        assert rows.equals(wanted) and wrong == failed, place


@pytest.mark.parametrize("sink", ["parquet", "webdataset"])
def test_our_own_datasets_are_read_wherever_they_lie(sink, files, encoded, latentmill, patches, bucket, hub, tmp_path):
    _, more = pictures(files)
    made = tmp_path / "made"
    encoded(files, *more, f"sink={sink}", "latents_std=true", "rows_per_shard=3", output=made, read=False)
    upload(os.environ["AWS_ENDPOINT_URL"], made, "made")
    hub.commit(made)
    places = {
        "parquet": [f"{bucket}/made", f"hf://datasets/{hub.repository}", f"{bucket}/made/data"],
        "webdataset": [f"{bucket}/made"],
    }
    found = []
    for at, place in enumerate([made, *places[sink]]):
        output = tmp_path / f"decoded{at}"
        assert latentmill("run", "decode", *patches, f"source.path={place}", f"output={output}") == 0, latentmill.said
        found.append(table(output).replace_schema_metadata())
    assert found[0].num_rows == len(COLOURS) and all(each.equals(found[0]) for each in found[1:])


@pytest.mark.parametrize("kind", ["pictures", "named", "columns", "tars", "long_lines"])
def test_a_store_that_is_slow_and_fails_now_and_then_fails_no_row(
    kind, files, encoded, on_disk, bucket, before, tmp_path
):
    """With 500 and 503, which its client tries again, and once, while rows are read, with 403, which that doesn't."""
    path, more, wanted, failed = on_disk(kind)
    upload(os.environ["AWS_ENDPOINT_URL"], files, "in")
    output, refused = tmp_path / "out", []

    def first(method, path):
        if method == "GET" and (output / "plan.json").exists() and not refused:
            refused.append(path)
            return 403
        return None

    store = before(seconds=0.05, fails=5, first=first)
    rows, wrong = encoded(f"{bucket}/in{path}", *more, output=output)
    assert store.failed and refused and rows.equals(wanted) and wrong == failed


def test_an_object_that_is_changed_while_a_job_reads_ends_it(files, encoded, bucket, before, tmp_path):
    _, more = pictures(files)
    upload(os.environ["AWS_ENDPOINT_URL"], files, "in")
    endpoint = os.environ["AWS_ENDPOINT_URL"]

    def first(method, path):
        if method == "GET" and path.endswith("/a/8.png"):
            put(endpoint, "in/a/8.png", png("white", (8, 8)))

    before(first=first)
    output = tmp_path / "out"
    said = encoded(f"{bucket}/in", *more, "rows_per_shard=4", output=output, code=1)
    assert "s3://bucket/in/a/8.png was changed since it was listed: a source must stay as it was planned" in said
    assert errors(output) == [] and not (output / "_SUCCESS").exists()
    assert "holds another job's dataset: fragments" in encoded(
        f"{bucket}/in", *more, "rows_per_shard=4", output=output, code=2
    )


@pytest.mark.parametrize(
    ("kind", "name", "to"),
    [
        ("long_lines", "p.jsonl", "another"),
        ("long_lines", "p.jsonl", "shorter"),
        ("tars", "0.tar", "another"),
        ("tars", "0.tar", "nothing"),
        ("columns", "1.parquet", "another"),
    ],
)
def test_a_file_that_is_changed_or_goes_while_it_is_read_ends_the_job(
    kind, name, to, files, encoded, bucket, before, tmp_path
):
    path, more = KINDS[kind](files)
    upload(os.environ["AWS_ENDPOINT_URL"], files, "in")
    content, endpoint, output, seen = (files / name).read_bytes(), os.environ["AWS_ENDPOINT_URL"], tmp_path / "out", []

    def first(method, path):
        if method == "GET" and path.endswith(name) and (output / "plan.json").exists():
            seen.append(path)
            if len(seen) == (1 if kind == "columns" else 2):  # of the others a piece is read
                put(endpoint, f"in/{name}", {"another": content[::-1], "shorter": b"short", "nothing": None}[to])

    before(first=first)
    said = encoded(f"{bucket}/in{path}", *more, code=1, output=output)
    what = "is not there any more" if to == "nothing" else "was changed since it was listed"
    assert f"s3://bucket/in/{name} {what}: a source must stay as it was planned" in said
    assert errors(output) == [] and not (output / "_SUCCESS").exists()


def test_a_store_that_refuses_for_good_ends_the_job_in_a_line(files, encoded, bucket, before, tmp_path):
    path, more = named(files)
    upload(os.environ["AWS_ENDPOINT_URL"], files, "in")
    before(first=lambda method, path: 403 if path.endswith("/7.png") else None)
    said = encoded(f"{bucket}/in{path}", *more, "rows_per_shard=2", output=tmp_path / "out", code=1)
    assert re.search(r"stage read: s3://bucket/in/images/7.png: .*403", said), said
    assert {error["reason"].partition(":")[0] for error in errors(tmp_path / "out")} <= {
        "image 'images/none.png'",
        "image '../p.png'",
    }

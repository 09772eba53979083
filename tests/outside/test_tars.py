"""Tars of samples as a source: the rows that webdataset's own reader finds, in its order."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image


def png(colour, size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def pack(path, files):
    """A tar of ``(name, content)``, in that order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key, colour, **about):
    return [(f"{key}.png", png(colour)), (f"{key}.txt", f"a {key}\n"), (f"{key}.json", json.dumps(about))]


@pytest.fixture
def encoded(latentmill, patches, tmp_path):
    """``encoded(path, *more)``: pictures of a source to latents that are their pixels; the dataset, and what failed."""

    def encoded(path, *more, code=0):
        output = tmp_path / "out"
        assert (
            latentmill("run", "encode", *patches, "source=prompts", f"source.path={path}", f"output={output}", *more)
            == code
        )
        if code:
            return latentmill.err
        failed = [
            json.loads(line) for file in sorted(output.glob("errors/*")) for line in file.read_text().splitlines()
        ]
        files = sorted(output.glob("data/*"))
        return [row for file in files for row in pq.read_table(file).to_pylist()], [
            (error["row_id"], error["reason"]) for error in failed
        ]

    return encoded


def pixels(row):
    """The colour of a row's first pixel, 0 to 255: the VAE keeps pixels, as -1 to 1."""
    red, green, blue = np.asarray(row["latents"], float).reshape(row["shape"])[:, 0, 0]
    return tuple(round((value + 1) * 127.5) for value in (red, green, blue))


def test_the_rows_are_those_that_webdataset_finds(encoded, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    colours = [(k, 255 - k, 7) for k in range(0, 120, 10)]
    for shard in range(3):
        files = [file for k in range(4) for file in sample(f"{shard}/cat {k}", colours[4 * shard + k])]
        pack(tars / f"{shard:05d}.tar", [("__about__", "{}"), *files])
    rows, failed = encoded(tars)
    assert failed == []
    found = webdataset.WebDataset([str(path) for path in sorted(tars.glob("*"))], shardshuffle=False, empty_check=False)
    theirs = [(each["txt"].decode().strip(), np.asarray(Image.open(io.BytesIO(each["png"])))[0, 0]) for each in found]
    assert [(row["prompt"], pixels(row)) for row in rows] == [(text, (*map(int, colour),)) for text, colour in theirs]


def test_columns_of_json_and_the_key_travel(encoded, tmp_path):
    tar = pack(tmp_path / "a.tar", [*sample("x", "red", url="u", score=3), *sample("y", "lime", url=None, score=4)])
    rows, _ = encoded(tar, "source.keep=[url, score]", "source.id_column=__key__")
    assert [(row["id"], row["url"], row["score"], pixels(row)) for row in rows] == [
        ("x", "u", 3, (255, 0, 0)), ("y", None, 4, (0, 255, 0))
    ]  # fmt: skip


def test_a_column_of_json_may_be_the_prompt(encoded, tmp_path):
    tar = pack(tmp_path / "a.tar", [*sample("x", "red", caption="a long one", prompt="theirs")])
    assert [row["prompt"] for row in encoded(tar)[0]] == ["theirs"], "a column of that name goes before .txt"


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_a_prompt_for_all_is_enough(encoded, tmp_path, kind):
    line = '{"seed": 1, "width": 4, "height": 4}'
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(line)
    else:
        pack(tmp_path / "a.tar", [("x.json", line)])
    [row], failed = encoded(tmp_path / f"a.{kind}", "source.defaults={prompt: a ring}")
    assert (row["seed"], row["prompt"], failed) == (1, "a ring", [])


def test_source_columns_names_another(encoded, tmp_path):
    tar = pack(tmp_path / "a.tar", [*sample("x", "red", caption="a long one", prompt="theirs")])
    assert [row["prompt"] for row in encoded(tar, "source.columns={prompt: caption}")[0]] == ["a long one"]


def test_what_is_wrong_with_a_sample_is_its_row_s_error(encoded, tmp_path):
    files = [
        *sample("good", "red"),
        ("json.png", png("red")), ("json.json", "{"),
        ("list.png", png("red")), ("list.json", "[1]"),
        ("twice.png", png("red")), ("twice.png", png("lime")),
        ("none.cls", "7"),
        ("torn.png", png("red")[:50]), ("torn.txt", "torn"),
        ("text.png", png("red")), ("text.txt", b"\xff\xfe\xfa"),
        ("apart.png", png("lime")), ("between.png", png("blue")), ("apart.txt", "its text"),
    ]  # fmt: skip
    rows, failed = encoded(pack(tmp_path / "a.tar", files), "max_error_rate=1", "rows_per_shard=100")
    assert [(row["prompt"], pixels(row)) for row in rows] == [
        ("a good", (255, 0, 0)), ("", (0, 255, 0)), ("", (0, 0, 255))
    ]  # fmt: skip
    assert [(row_id.partition("-")[0], reason) for row_id, reason in failed] == [
        (
            "000000001",
            "json.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("000000002", "list.json holds no object in braces"),
        ("000000003", "twice.png is there twice"),
        ("000000004", "the row has neither prompt nor image, only __key__"),
        ("000000005", "image: can't be decoded: image file is truncated"),
        ("000000006", "text.txt is not UTF-8, at byte 0"),
        ("000000009", "a row without a picture needs width and height"),
    ]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda content: content[: len(content) // 2], "is no whole tar: unexpected end of data"),
        (lambda content: b"no tar at all" * 100, "is no whole tar"),
        (lambda content: b"", "is no whole tar: empty file"),
    ],
    ids=["cut off", "no tar", "empty"],
)
def test_a_tar_that_is_broken_is_said_before_anything_starts(encoded, tmp_path, broken, said):
    path = pack(tmp_path / "a.tar", [*sample("x", "red"), ("x.big", b"0" * 100_000)])
    path.write_bytes(broken(path.read_bytes()))
    assert said in encoded(path, code=2) and not (tmp_path / "out").exists()


def test_a_tar_of_pictures_that_no_column_names_says_which_there_are(encoded, tmp_path):
    path = pack(tmp_path / "a.tar", [("x.cls", "7"), ("x.json", '{"caption": "a"}')])
    said = encoded(path, code=2)
    assert "a.tar has no column prompt or image, only caption, __key__; write source.columns={prompt: caption}" in said


def test_a_tar_that_is_changed_is_another_source(encoded, tmp_path):
    path = pack(tmp_path / "a.tar", sample("x", "red"))
    encoded(path)
    pack(path, sample("x", "blue"))
    assert "holds another job's dataset: fragments" in encoded(path, code=2)


def test_our_own_tars_are_a_source(latentmill, encoded, patches, tmp_path):
    tar = pack(tmp_path / "a.tar", [*sample("x", "red"), *sample("y", "blue")])
    first = tmp_path / "first"
    words = ("source=prompts", f"source.path={tar}", "sink=webdataset", f"output={first}")
    assert latentmill("run", "reconstruct", *patches, *words) == 0
    rows, _ = encoded(first / "data", "source.id_column=__key__")
    assert [(row["prompt"], pixels(row)) for row in rows] == [("a x", (255, 0, 0)), ("a y", (0, 0, 255))]
    assert [row["id"] for row in rows] == ["000000000-000", "000000001-000"]


def test_pictures_and_sources_on_the_web_are_said_to_be_none_of_ours(encoded, tmp_path):
    table = tmp_path / "rows.jsonl"
    (tmp_path / "a.png").write_bytes(png("red"))
    table.write_text('{"image": "a.png"}\n{"image": "https://example.com/a.png"}\n')
    _, [(_, reason)] = encoded(table, "max_error_rate=1")
    assert reason == (
        "image 'https://example.com/a.png' is on the web: img2dataset fetches pictures, and its .tar files are read here"
    )
    said = encoded("https://example.com/rows.jsonl", f"output={tmp_path}/other", code=2)
    assert (
        "sources are files of this machine or a shared disk, s3://BUCKET/PATH, gs://BUCKET/PATH, az://BUCKET/PATH or "
        "hf://datasets/OWNER/NAME/PATH, and https://example.com/rows.jsonl is not: copy it first" in said
    )


@pytest.mark.parametrize("broken", ["cut between files", "cut in a header", "a byte of a header", "a header of zeros"])
def test_a_tar_never_ends_in_silence_before_its_end(encoded, tmp_path, broken):
    path = pack(tmp_path / "a.tar", [file for k in range(4) for file in sample(f"x{k}", "red")])
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("x2.png").offset
    if broken == "a byte of a header":
        content[at + 3] ^= 1
    elif broken == "a header of zeros":
        content[at : at + 512] = bytes(512)
    else:
        content = content[: at + (0 if broken == "cut between files" else 100)]
    path.write_bytes(content)
    assert "a.tar is no whole tar: " in encoded(path, code=2)


def test_what_a_mac_packs_beside_files_is_no_row(encoded, tmp_path):
    files = [("._x.png", b"\0"), ("x.png", png("red")), ("._x.txt", b"\0"), ("x.txt", "a fox"), (".DS_Store", b"\0")]
    rows, failed = encoded(pack(tmp_path / "a.tar", files))
    assert [(row["prompt"], pixels(row)) for row in rows] == [("a fox", (255, 0, 0))] and failed == []


def test_the_size_that_img2dataset_says_is_the_picture_s_and_none_that_is_wanted(encoded, tmp_path):
    files = sample("x", "red", width=33, height=25, original_width=66, original_height=50)
    files[0] = ("x.png", png("red", (33, 25)))
    rows, _ = encoded(
        pack(tmp_path / "a.tar", files), "sampling={width: null, height: null}", "size.buckets=[[16, 16]]"
    )
    assert [(row["bucket"], row["original_size"]) for row in rows] == [([16, 16], [33, 25])]

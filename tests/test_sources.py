"""Rows out of real files, the bad ones with a reason; and pictures of every kind, upright and in 8-bit RGB."""

import io
import json
import os
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms

from latentmill.batch import SPEC_KEY, from_dicts, with_latents
from latentmill.plugin import LatentSpec, RowError
from latentmill.sinks.parquet import STATE, Parquet
from latentmill.sources.images import DEPTH, RUN, Images
from latentmill.sources.latents import Latents
from latentmill.sources.pictures import decode
from latentmill.sources.prompts import Prompts
from latentmill.sources.readers.text_reader import TextReader


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def all_rows(source):
    """Every row of a source; a bad one as its reason."""
    found = []
    for fragment in source.fragments():
        part = list(source.read(fragment.name, 0, fragment.rows))
        assert len(part) == fragment.rows
        found += [str(row) if isinstance(row, RowError) else dict(row) for row in part]
    return found


def picture(mode="RGB", size=(4, 3), color=None, format="PNG", **options):
    """A picture's file."""
    file = io.BytesIO()
    image = Image.new(mode, size, color) if color is not None else Image.new(mode, size)
    image.save(file, format, **options)
    return file.getvalue()


def parquet(rename=None, **columns):
    """A Parquet file."""
    file = io.BytesIO()
    table = pa.table(columns)
    pq.write_table(
        table.rename_columns(rename) if rename else table,
        file,
        row_group_size=10,
        compression="none",
        use_dictionary=False,
    )
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- prompts


def test_a_line_of_text_is_a_prompt_and_a_blank_line_is_none(tmp_path):
    path = written(tmp_path / "p.txt", b"\xef\xbb\xbfa cat\r\n\n  \t \r\n  a dog \n\xff\xfe\nl\xc3\xb6we")
    assert all_rows(Prompts(path)) == [
        {"prompt": "a cat"},
        {"prompt": "a dog"},
        "the line is not UTF-8, at byte 0",
        {"prompt": "löwe"},
    ]


def test_csv_overrides_row_by_row(tmp_path):
    path = written(
        tmp_path / "p.csv",
        "prompt, seed,steps,guidance_scale,strength,width,height,negative_prompt,scheduler,note\n"
        'a cat,7,20,4.5,1,64,32,ugly,euler,"x, y"\n'
        '"two\nlines, ""quoted""",,,,,,,,,\n'
        "\n"
        ",18446744073709551615,,,,,,,,\n"
        "a dog,seven,,,,,,,,\n"
        "too,few\n",
    )
    assert all_rows(Prompts(path)) == [
        {
            "prompt": "a cat",
            "seed": 7,
            "steps": 20,
            "guidance_scale": 4.5,
            "strength": 1,
            "width": 64,
            "height": 32,
            "negative_prompt": "ugly",
            "scheduler": "euler",
        },
        {"prompt": 'two\nlines, "quoted"'},
        {"prompt": "", "seed": 2**64 - 1},
        "seed must be a number, not 'seven'",
        "the row has 2 fields, the header 10",
    ]


def test_a_lone_carriage_return_in_csv_is_counted_as_it_is_read(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"prompt\na\nx\ry\n \r \nb\nc\n")
    source = Prompts(str(tmp_path / "p.csv"))
    [fragment] = source.fragments()
    together = [
        getattr(row, "get", lambda key: "error")("prompt") for row in source.read(fragment.name, 0, fragment.rows)
    ]
    assert together == ["a", "error", "b", "c"]


def test_bad_bytes_and_bad_quotes_in_csv_cost_one_row(tmp_path):
    lines = [b"prompt", b"a \xff cat", b"a\rb", b'5" nail', b'"' + b"x" * 200_000 + b'"', b"last"]
    path = written(tmp_path / "p.csv", b"\n".join(lines))
    found = all_rows(Prompts(path))
    assert found.pop(1).startswith("not CSV: new-line character")
    assert found == [
        "prompt is not UTF-8, at byte 2",
        {"prompt": '5" nail'},
        {"prompt": "x" * 200_000},
        {"prompt": "last"},
    ]


def test_json_lines_and_their_faults(tmp_path):
    path = written(
        tmp_path / "p.jsonl",
        '{"prompt": "a cat", "seed": 3, "steps": null, "unknown": [1]}\n'
        "\n"
        '{"prompt": "broken\n'
        '["a list"]\n'
        '{"prompt": null}\n'
        '{"seed": 1}\n'
        '{"prompt": "a", "image": 7}\n' + "[" * 100_000 + "\n"
        '{"prompt": 5}\n',
    )
    found = all_rows(Prompts(path))
    assert found[0] == {"prompt": "a cat", "seed": 3, "steps": None}
    assert found[1].startswith("not JSON: Unterminated string")
    assert found[2] == "the line is JSON, but no object in braces"
    assert found[3] == "prompt is null"
    assert found[4] == "the row has neither prompt nor image, only seed"
    assert found[5] == "image must be a path, not 7"
    assert found[6].startswith("not JSON that can be read:")
    assert found[7] == {"prompt": 5}  # of the wrong type, as Read will say of any source


def test_parquet_rows_and_their_faults(tmp_path):
    path = tmp_path / "p.parquet"
    bad = pa.array([b"a", b"\xff", None, b"d"]).view(pa.string())
    pq.write_table(
        pa.table({"prompt": bad, "seed": pa.array([1, None, 3, 2**64 - 1], pa.uint64()), "x": [1, 2, 3, 4]}), path
    )
    assert all_rows(Prompts(str(path))) == [
        {"prompt": "a", "seed": 1},
        "prompt is not UTF-8, at byte 0",
        "prompt is null",
        {"prompt": "d", "seed": 2**64 - 1},
    ]


def test_parquet_text_of_every_arrow_kind(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        path = tmp_path / "p.parquet"
        pq.write_table(pa.table({"prompt": pa.array(["a", "b", "a"]).cast(kind)}), path, row_group_size=2)
        assert all_rows(Prompts(str(path))) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "text,seed\na,1\n", "has no column prompt or image, only text, seed"),
        ("p.csv", "prompt,seed,seed\na,1,2\n", "there are two columns seed"),
        ("p.csv", "", "has no column prompt or image, none"),
        ("p.csv", "prompt\n\n", "has no rows"),
        ("p.txt", " \n\n", "has no rows"),
        ("p.jsonl", "", "has no rows"),
        ("p.parquet", b"PAR1 it is not", "p.parquet: Parquet"),
        ("p.parquet", b"", "p.parquet: Parquet file size is 0 bytes"),
        ("p.parquet", b"PAR1" + b"\xff" * 99 + (99).to_bytes(4, "little") + b"PAR1", "p.parquet: .*deserialize thrift"),
        ("p.parquet", parquet(prompt=["a"])[:-9], "p.parquet: Parquet magic bytes not found"),
        ("p.parquet", parquet(prompt=[["a"]]), "column prompt is list<.*>, which it can't be"),
        ("p.parquet", parquet(prompt=pa.array([], pa.string())), "has no rows"),
        ("p.parquet", parquet(prompt=["a"], b=["b"], rename=["prompt", "prompt"]), "there are two columns prompt"),
        ("p.csv", b"prompt,\xff\n\xc3\xa9,1\n", "p.csv: the header is not UTF-8"),
        ("p.csv", "a\x1b[2J\n", r"has no column prompt or image, only a\\x1b\[2J"),
        ("p.csv", "prompt\rx\na", "the header can't be read: not CSV: new-line character"),
        ("p.docx", "a", "no .txt, .csv, .tsv, .json, .jsonl, .ndjson, .parquet file there"),
    ],
)
def test_a_source_that_can_t_be_used_says_so_in_one_line(tmp_path, name, content, message):
    source = Prompts(written(tmp_path / name, content))
    with pytest.raises(ValueError, match=message) as error:
        source.fragments()
    assert "\n" not in str(error.value)


def test_a_parquet_column_of_the_wrong_type_is_an_error_of_the_source(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "steps": ["20"]}), path)
    with pytest.raises(ValueError, match="column steps is string, which it can't be"):
        Prompts(str(path)).fragments()
    pq.write_table(pa.table({"seed": [1]}), path)
    with pytest.raises(ValueError, match="has no column prompt or image, only seed"):
        Prompts(str(path)).fragments()


def test_what_is_missing_says_so(tmp_path):
    for source in (Prompts, Images, Latents):
        with pytest.raises(ValueError, match="there is no f"):
            source(str(tmp_path / "missing")).fragments()
        with pytest.raises(ValueError, match="there is no package nowhere_at_all"):
            source("pkg://nowhere_at_all/x").fragments()
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"empty: no (pictures|\..* file) there"):
            source(str(tmp_path / "empty")).fragments()


def test_a_folder_and_a_glob_are_several_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c/d.txt", ".hidden.txt", "notes.md"):
        written(tmp_path / name, name)
    assert [f.name for f in Prompts(str(tmp_path)).fragments()] == ["a.txt", "b.txt"]
    assert all_rows(Prompts(str(tmp_path))) == [{"prompt": "a.txt"}, {"prompt": "b.txt"}]
    glob = Prompts(str(tmp_path / "**" / "[a-d].txt"))
    assert [f.name for f in glob.fragments()] == ["a.txt", "b.txt", "c/d.txt"]
    assert all_rows(glob)[2] == {"prompt": "c/d.txt"}
    written(tmp_path / "odd[1].txt", "literal")
    assert all_rows(Prompts(str(tmp_path / "odd[1].txt"))) == [{"prompt": "literal"}]


def test_a_link_to_nothing_is_no_gap(tmp_path):
    written(tmp_path / "a.txt", "a")
    (tmp_path / "b.md").symlink_to("nowhere")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    assert [f.name for f in Prompts(str(tmp_path)).fragments()] == ["a.txt"]
    (tmp_path / "c.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match="c.txt is a link to nothing"):
        Prompts(str(tmp_path)).fragments()
    with pytest.raises(ValueError, match="there is no file or folder"):
        Prompts(str(tmp_path / "pipe.txt")).fragments()


def test_pictures_of_prompts_obey_the_source_s_limits(tmp_path):
    written(tmp_path / "red.png", picture(color="red"))
    written(tmp_path / "in" / "p.jsonl", '{"image": "red.png"}')
    (tmp_path / "in" / "red.png").symlink_to("../red.png")
    path = str(tmp_path / "in" / "p.jsonl")
    assert all_rows(Prompts(path)) == [
        "image 'red.png': a link out of the source's folder, which only follow_links: true follows"
    ]
    assert all_rows(Prompts(path, follow_links=True))[0]["image"][0, 0].tolist() == [255, 0, 0]
    limited = all_rows(Prompts(path, follow_links=True, max_pixels=11))
    assert limited == ["image 'red.png': more than 11 pixels (max_pixels): a decompression bomb?"]
    pq.write_table(pa.table({"image": [picture(color="red")]}), tmp_path / "p.parquet")
    [reason] = all_rows(Prompts(str(tmp_path / "p.parquet"), max_pixels=11))
    assert reason == "image: more than 11 pixels (max_pixels): a decompression bomb?"
    for source in (Prompts, Images):
        with pytest.raises(ValueError, match="max_pixels must be 1 or more, not 0"):
            source(path, max_pixels=0)


def test_paths_are_relative_to_the_working_directory_or_in_a_package(tmp_path, monkeypatch):
    written(tmp_path / "here.txt", "here")
    written(tmp_path / "some_package_of_data" / "__init__.py", "")
    written(tmp_path / "some_package_of_data" / "data" / "p.txt", "packed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert all_rows(Prompts("here.txt")) == [{"prompt": "here"}]
    packaged = Prompts("pkg://some_package_of_data/data/p.txt")
    assert packaged.fragments()[0].name == "p.txt"
    assert all_rows(packaged) == [{"prompt": "packed"}]


def test_a_fingerprint_follows_the_content_and_not_the_clock(tmp_path):
    path = written(tmp_path / "p.txt", "a")
    [before] = Prompts(path).fragments()
    os.utime(path, (1, 1))
    assert Prompts(path).fragments() == [before]
    written(tmp_path / "p.txt", "b")
    assert Prompts(path).fragments() != [before]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_fresh_reader_finds_any_row_of_a_long_file(tmp_path, name, monkeypatch):
    monkeypatch.setattr(TextReader, "MARK", 1000)  # many marks without a large file
    prompts = [f"row {i}" + " x" * (i % 37) for i in range(5000)]
    if name == "p.csv":  # some quoted, over several lines, longer than a mark; blanks between
        prompts = [p + '\nsecond "line"\n\n' + "y" * (i % 1700) if i % 50 < 3 else p for i, p in enumerate(prompts)]
        quoted = ['"' + p.replace('"', '""') + '"' if i % 50 < 3 else p for i, p in enumerate(prompts)]
        lines = ["prompt", *(line + "\n" * (i % 3 == 0) for i, line in enumerate(quoted))]
    elif name == "p.jsonl":
        lines = [json.dumps({"prompt": p}) + "\n" * (i % 3 == 0) for i, p in enumerate(prompts)]
    else:
        lines = [p + "\n  " * (i % 3 == 0) for i, p in enumerate(prompts)]
    path = written(tmp_path / name, "\n".join(lines))
    counted = Prompts(path)
    assert counted.fragments()[0].rows == 5000
    for start, stop in ((4990, 5000), (0, 5), (2500, 2504), (149, 152), (4999, 5000)):
        for source in (counted, Prompts(path)):
            assert [row["prompt"] for row in source.read(name, start, stop)] == prompts[start:stop]


def test_reading_on_does_not_start_at_the_top_again(tmp_path, monkeypatch):
    monkeypatch.setattr(TextReader, "MARK", 1000)
    path = written(tmp_path / "p.txt", "\n".join(f"prompt {i:06d}" for i in range(10_000)))
    source = Prompts(path)
    assert source.fragments()[0].rows == 10_000
    parsed = []
    monkeypatch.setattr(TextReader, "items", lambda self, file: (parsed.append(line) or line for line in file))
    for start in range(0, 10_000, 100):
        assert len(list(source.read("p.txt", start, start + 100))) == 100
    assert len(parsed) < 2 * 10_000


def test_a_parquet_row_group_is_decoded_once(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [str(i) for i in range(1000)]}), path, row_group_size=100)
    source = Prompts(str(path))
    assert [row["prompt"] for row in source.read("p.parquet", 95, 205)] == [str(i) for i in range(95, 205)]
    kept = source._files["p.parquet"].file._kept[1]
    assert [row["prompt"] for row in source.read("p.parquet", 205, 210)] == [str(i) for i in range(205, 210)]
    assert source._files["p.parquet"].file._kept[1] is kept


@pytest.mark.parametrize("checksums", [False, True])
def test_damage_in_parquet_costs_the_rows_of_its_group(tmp_path, checksums):
    path = tmp_path / "p.parquet"
    prompts = [f"prompt {i:03d}" for i in range(40)]
    pq.write_table(
        pa.table({"prompt": prompts}), path, row_group_size=10, compression="none", use_dictionary=False,
        write_page_checksum=checksums,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    at = content.index(b"prompt 015") - 4
    content[at : at + 4] = b"\xff\xff\xff\x7f"  # the length of a text
    path.write_bytes(content)
    found = all_rows(Prompts(str(path)))
    assert [row["prompt"] for row in found[:10] + found[20:]] == prompts[:10] + prompts[20:]
    for reason in found[10:20]:
        assert reason.startswith("row group 1 of p.parquet is damaged: ") and "\n" not in reason
    assert list(Prompts(str(path)).read("p.parquet", 8, 11))[1]["prompt"] == "prompt 009"


def test_images_of_rows_lie_below_the_file(tmp_path):
    written(tmp_path / "in" / "pictures" / "red.png", picture(color="red"))
    written(tmp_path / "secret.png", picture(color="blue"))
    names = ["pictures/red.png", "../secret.png", str(tmp_path / "secret.png"), "pictures/none.png", "pictures", "a\0b"]
    names += ["x" * 300]
    path = written(tmp_path / "in" / "p.jsonl", "\n".join(json.dumps({"prompt": "a", "image": n}) for n in names))
    found = all_rows(Prompts(path))
    assert found[0]["image"].tolist() == [[[255, 0, 0]] * 4] * 3
    outside = "the path must lead to a file below the source's folder"
    assert [reason.partition(": ")[2] for reason in found[1:]] == [
        outside,
        outside,
        "no such file or directory",
        "not a file",
        "not a file name: embedded null byte",
        "file name too long",
    ]


def test_images_in_parquet_are_bytes_or_a_hugging_face_struct(tmp_path):
    path = tmp_path / "p.parquet"
    files = [picture(color="red"), b"no picture", None]
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "image": files}), path)
    found = all_rows(Prompts(str(path)))
    assert found[0]["image"][0, 0].tolist() == [255, 0, 0]
    assert found[1] == "image: not a picture in PNG, JPEG, WEBP, BMP, TIFF or GIF"
    assert found[2] == {"prompt": "c", "image": None}
    written(tmp_path / "blue.png", picture(color="blue"))
    structs = [{"bytes": files[0], "path": "any.png"}, {"bytes": None, "path": "blue.png"}]
    pq.write_table(pa.table({"image": structs}), path)
    assert [row["image"][0, 0].tolist() for row in all_rows(Prompts(str(path)))] == [[255, 0, 0], [0, 0, 255]]


# -------------------------------------------------------------------------------------------------------- images


def test_a_folder_of_pictures_is_sorted_and_captioned(tmp_path):
    for name, color in (("b.png", "red"), ("a/z.jpg", "lime"), ("a/y.PNG", "blue"), ("c.webp", "white")):
        written(tmp_path / name, picture(color=color, format={"g": "PNG", "G": "PNG", "p": "WEBP"}[name[-1]]))
    written(tmp_path / "b.txt", b"\xef\xbb\xbf a red field \n")
    written(tmp_path / "c.txt", b"\xff")
    for name in ("README.md", ".hidden.png", ".git/x.png", "lonely.txt"):
        written(tmp_path / name, "x")
    written(tmp_path / "d.avif", "x")
    written(tmp_path / "e.png", "")
    (tmp_path / "f.png").symlink_to("nowhere")
    found = all_rows(Images(str(tmp_path)))
    assert [row["image"][0, 0].tolist() for row in found[:3]] == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert ["prompt" in row for row in found[:3]] == [False, False, True]
    assert found[2]["prompt"] == "a red field"
    assert found[3:] == [
        "c.txt: not UTF-8, at byte 0",
        "d.avif: not a picture in PNG, JPEG, WEBP, BMP, TIFF or GIF",
        "e.png: the file is empty",
        "f.png: no such file or directory",
    ]


def test_fragments_are_runs_of_pictures_and_are_found_again_by_name(tmp_path):
    names = sorted(f"{i % 7}/{i:05d}.png" for i in range(2 * RUN + 10))
    for name in names:
        written(tmp_path / name, picture(size=(1, 1), color=(int(name[2:7]) % 256, int(name[2:7]) // 256, 0)))
    fragments = Images(str(tmp_path)).fragments()
    assert [fragment.rows for fragment in fragments] == [RUN, RUN, 10]
    reader = Images(str(tmp_path))
    for at, fragment in enumerate(fragments):
        got = [row["image"][0, 0].tolist() for row in reader.read(fragment.name, 3, 8)]
        want = [int(name[2:7]) for name in names[at * RUN + 3 : at * RUN + 8]]
        assert got == [[number % 256, number // 256, 0] for number in want]


def test_a_picture_that_comes_while_a_job_runs_never_shifts_the_rows(tmp_path):
    for name in ("a.png", "c.png"):
        written(tmp_path / name, picture())
    [fragment] = Images(str(tmp_path)).fragments()
    written(tmp_path / "b.png", picture())
    fresh = Images(str(tmp_path))
    assert fresh.fragments()[0].fingerprint != fragment.fingerprint
    with pytest.raises(RuntimeError, match="pictures came or went"):
        list(fresh.read(fragment.name, 0, 1))


def test_folders_in_folders_are_walked_into_but_not_for_ever(tmp_path):
    deep = tmp_path.joinpath(*"a" * DEPTH)
    written(deep / "x.png", picture())
    [fragment] = Images(str(tmp_path)).fragments()
    assert len(all_rows(Images(str(tmp_path)))) == 1 and fragment.name.startswith("a/" * DEPTH + "x.png")
    written(deep / "a" / "x.png", picture())
    with pytest.raises(ValueError, match="folders in folders, more than 100 deep"):
        Images(str(tmp_path)).fragments()


def test_a_caption_is_part_of_the_fingerprint(tmp_path):
    written(tmp_path / "a.png", picture())
    marks = [Images(str(tmp_path)).fragments()[0].fingerprint]
    for caption in ("one", "two"):
        written(tmp_path / "a.txt", caption)
        marks.append(Images(str(tmp_path)).fragments()[0].fingerprint)
    os.utime(tmp_path / "a.png", (1, 1))
    assert len(set(marks)) == 3 and Images(str(tmp_path)).fragments()[0].fingerprint == marks[-1]


# ------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(
    ("file", "pixel"),
    [
        (picture("RGB", color=(1, 2, 3)), [1, 2, 3]),
        (picture("L", color=7), [7, 7, 7]),
        (picture("1", color=1), [255, 255, 255]),
        (picture("RGBA", color=(255, 0, 0, 0)), [255, 255, 255]),
        (picture("RGBA", color=(0, 0, 0, 51)), [204, 204, 204]),
        (picture("LA", color=(0, 255)), [0, 0, 0]),
        (picture("RGB", color=(9, 9, 9), transparency=(9, 9, 9)), [255, 255, 255]),
        (picture("P", color=0, format="GIF", transparency=0), [255, 255, 255]),
        (picture("I;16", color=65535), [255, 255, 255]),
        (picture("I;16", color=257 * 100), [100, 100, 100]),
        (picture("I;16", color=300), [1, 1, 1]),
        (picture("CMYK", color=(0, 255, 255, 0), format="TIFF"), [255, 0, 0]),
        (picture("RGB", color=(10, 20, 30), format="BMP"), [10, 20, 30]),
        (picture("RGB", color=(10, 20, 30), format="WEBP", lossless=True), [10, 20, 30]),
    ],
)
def test_every_kind_of_picture_becomes_rgb(file, pixel):
    array = decode(file)
    assert array.dtype == np.uint8 and array.shape == (3, 4, 3)
    assert array.reshape(-1, 3).tolist() == [pixel] * 12


def test_a_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode(file.getvalue()).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (2, 3), "black")
    upright.putpixel((0, 0), (255, 255, 255))
    upright.putpixel((1, 0), (255, 0, 0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose that a camera's turn amounts to
    turned = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    assert decode(file.getvalue()).tolist() == np.asarray(upright).tolist()


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(
            file, format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
        )
        assert decode(file.getvalue())[0, 0].tolist() == [255, 0, 0], format


def cmyk_profile(lab):
    """An ICC profile (v2, lut8) by which every mixture of inks is the one colour ``lab``."""
    number = int.to_bytes
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += b"".join(number(65536 * (i % 4 == 0), 4, "big") for i in range(9))  # identity, s15Fixed16
    table += bytes(range(256)) * 4 + bytes(lab) * 2**4 + bytes(range(256)) * 3
    tags = [
        (b"desc", b"desc" + bytes(4) + number(2, 4, "big") + b"x\0" + bytes(78)),
        (b"cprt", b"text" + bytes(4) + b"x\0"),
        (b"wtpt", b"XYZ " + bytes(4) + bytes.fromhex("0000f6d6000100000000d32d")),
        (b"A2B0", table),
    ]
    directory, data, offset = number(len(tags), 4, "big"), b"", 132 + 12 * len(tags)
    for name, content in tags:
        content += bytes(-len(content) % 4)
        directory += name + number(offset + len(data), 4, "big") + number(len(content), 4, "big")
        data += content
    header = bytes(8) + bytes.fromhex("02200000") + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += bytes.fromhex("0000f6d6000100000000d32d")
    header += bytes(128 - len(header))
    return number(132 + 12 * len(tags) + len(data), 4, "big") + header[4:] + directory + data


def test_cmyk_with_a_profile_goes_through_it():
    inks = {"color": (200, 0, 0, 0), "format": "TIFF"}
    assert decode(picture("CMYK", **inks))[0, 0].tolist() == [55, 255, 255]
    red = cmyk_profile([136, 208, 195])  # sRGB's red: L 53.2, a 80.1, b 67.2
    through = decode(picture("CMYK", **inks, icc_profile=red))[0, 0].tolist()
    assert through[0] > 100 and max(through[1:]) < 20, "cyan ink, and a profile by which all inks are a red"
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for wrong in (rgb, b"garbage"):
        with pytest.raises(RowError, match="its colour profile is not one of CMYK"):
            decode(picture("CMYK", **inks, icc_profile=wrong))


def png_header(width, height):
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a picture in PNG, JPEG, WEBP, BMP, TIFF or GIF"),
        (picture(size=(99, 99), format="JPEG")[:-200], "can't be decoded: .*truncated"),
        (picture(size=(99, 99), color="red")[:-30], "can't be decoded: .*[Tt]runcated"),
        (picture(size=(99, 99), format="WEBP")[:-20], "."),
        (png_header(10_000, 10_000), r"more than 89478485 pixels \(max_pixels\): a decompression bomb"),
        (png_header(2**31 - 1, 2**31 - 1), r"more than 89478485 pixels \(max_pixels\): a decompression bomb"),
        (picture(format="ICO"), "not a picture in"),
        (picture(format="PPM"), "not a picture in"),
        (picture("F", format="TIFF"), "samples that are signed, or of 32 bits and more"),
        (picture("I", format="TIFF"), "samples that are signed, or of 32 bits and more"),
    ],
)
def test_what_can_t_be_decoded_says_why_in_one_line(file, reason):
    with pytest.raises(RowError, match=reason) as error:
        decode(file)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_every_truncation_is_a_row_error():
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        image = Image.effect_noise((40, 30), 60).convert("RGB")
        file = io.BytesIO()
        image.save(file, format)
        whole = file.getvalue()
        for length in range(0, len(whole) * 3 // 4, max(1, len(whole) // 40)):
            with pytest.raises(RowError):
                decode(whole[:length])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_whatever_is_wrong_with_a_file_it_is_a_picture_or_a_row_error(format):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, format)
    chance = random.Random(0)
    for _ in range(300):
        content = bytearray(file.getvalue())
        for _ in range(chance.randint(1, 6)):
            content[chance.randrange(chance.choice([len(content), 300]))] = chance.randrange(256)
        try:
            assert decode(bytes(content)).shape[2] == 3
        except RowError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("orientation", [2, 6])
def test_orientation_is_applied_once_to_tiff_and_to_16_bits(orientation):
    upright = Image.fromarray(np.array([[60_000, 300], [0, 0], [9000, 0]], np.uint16))
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 6: Image.Transpose.ROTATE_90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("TIFF", "PNG"):
        file = io.BytesIO()
        upright.transpose(undo[orientation]).save(file, format, exif=exif)
        assert decode(file.getvalue())[..., 0].tolist() == [[233, 1], [0, 0], [35, 0]]


# ------------------------------------------------------------------------------------------------------- latents

SPEC = LatentSpec(channels=4, downscale=4, scale=0.5, shift=0.25, dtype="float16", fingerprint="abc")


def shard(folder, name, numbers, spec=SPEC, scheduler="", shape=(4, 2, 3)):
    table = from_dicts(
        [
            {
                "row": n,
                "row_id": f"{n:09d}-000",
                "prompt": f"prompt {n}",
                "negative_prompt": "ugly",
                "seed": 2**64 - 1 - n,
                "steps": 20,
                "guidance_scale": 4.0,
                "strength": 0.5,
                "scheduler": scheduler,
                "width": 12,
                "height": 8,
            }
            for n in numbers
        ]
    )
    latents = torch.stack([torch.full(shape, n + 0.5) for n in numbers]).to(getattr(torch, spec.dtype))
    sink = Parquet()
    folder.mkdir(parents=True, exist_ok=True)
    sink.write(str(folder / name), sink.pack(with_latents(table, latents, spec)).drop_columns(["row"]), {})


def test_latents_come_back_with_prompt_and_seed(tmp_path):
    shard(tmp_path / "data", "00001.parquet", [2])
    shard(tmp_path / "data", "00000.parquet", [0, 1], scheduler="euler")
    source = Latents(str(tmp_path))
    assert source.latent_spec() == SPEC
    assert [(f.name, f.rows) for f in source.fragments()] == [("00000.parquet", 2), ("00001.parquet", 1)]
    found = all_rows(source)
    for n, row in enumerate(found):
        latents = row.pop("latents")
        assert latents.dtype == np.float16 and latents.shape == (4, 2, 3) and (latents == n + 0.5).all()
    text = {"negative_prompt": "ugly", "warning": ""}
    sampling = {"steps": 20, "guidance_scale": 4.0, "strength": 0.5, "scheduler": "euler"}
    sampling |= {"guidance_rescale": 0.0, "guidance_from": 1.0, "guidance_until": 0.0}
    assert found == [
        {"prompt": "prompt 0", "seed": 2**64 - 1, **text, **sampling},
        {"prompt": "prompt 1", "seed": 2**64 - 2, **text, **sampling},
        {"prompt": "prompt 2", "seed": 2**64 - 3, **text},
    ]
    for row in all_rows(Latents(str(tmp_path), keep_sampling=False)):
        assert row.keys() == {"prompt", "negative_prompt", "seed", "warning", "latents"}
    assert [row["prompt"] for row in Latents(str(tmp_path / "data" / "00000.parquet")).read("00000.parquet", 1, 2)] == [
        "prompt 1"
    ]


def test_bfloat16_latents_are_bfloat16_again(tmp_path):
    spec = LatentSpec(**{**vars(SPEC), "dtype": "bfloat16"})
    shard(tmp_path, "a.parquet", [0], spec)
    [row] = all_rows(Latents(str(tmp_path)))
    assert row["latents"].dtype == torch.bfloat16 and bool((row["latents"] == 0.5).all())


def test_what_holds_no_latents_or_several_spaces_is_refused(tmp_path):
    shard(tmp_path, "a.parquet", [0])
    shard(tmp_path, "b.parquet", [1], LatentSpec(**{**vars(SPEC), "fingerprint": "other"}))
    with pytest.raises(ValueError, match=r"a.parquet and b.parquet hold latents of different spaces"):
        Latents(str(tmp_path)).fragments()
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet holds no latents of ours"):
        Latents(str(tmp_path)).latent_spec()


def test_a_shape_that_does_not_fit_is_that_row_s_error(tmp_path):
    shard(tmp_path, "a.parquet", [0, 1])
    path = Path(tmp_path / "a.parquet")
    table = pq.read_table(path)
    at = table.schema.get_field_index("shape")
    shapes = pa.array([[4, 2, 4], [4, 2, 3]], table.schema.field(at).type)
    pq.write_table(table.set_column(at, table.schema.field(at), shapes), path)
    found = all_rows(Latents(str(tmp_path)))
    assert found[0] == "24 latent values can't be of shape [4, 2, 4]"
    assert found[1]["latents"].shape == (4, 2, 3)


def changed(path, name, values, type=None):
    """The column with other values."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    column = pa.array(values, type or table.schema.field(at).type)
    pq.write_table(
        table.set_column(at, pa.field(name, column.type, metadata=table.schema.field(at).metadata), column), path
    )


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([-4, -2, 3], "24 latent values can't be of shape [-4, -2, 3]"),
        ([0, 2, 3], "24 latent values can't be of shape [0, 2, 3]"),
        ([4, 6, None], "24 latent values can't be of shape [4, 6, None]"),
        (None, "latents are null"),
    ],
)
def test_a_shape_that_can_t_be_is_that_row_s_error(tmp_path, shape, reason):
    shard(tmp_path, "a.parquet", [0, 1])
    changed(tmp_path / "a.parquet", "shape", [[4, 2, 3], shape])
    found = all_rows(Latents(str(tmp_path)))
    assert found[0]["latents"].shape == (4, 2, 3) and found[1] == reason


def test_a_state_that_can_t_be_read_is_that_row_s_error(tmp_path):
    shard(tmp_path, "a.parquet", [0, 1, 2, 3])
    good = {"name": "history", "dtype": "float32", "shape": [2], "values": [1.0, 2.0]}
    bad = [{**good, "dtype": "load"}, {**good, "dtype": "nothing"}, {**good, "shape": [3]}]
    path = tmp_path / "a.parquet"
    pq.write_table(pq.read_table(path).append_column("state", pa.array([[s] for s in (good, *bad)], STATE)), path)
    found = all_rows(Latents(str(tmp_path)))
    assert found[0]["state"]["history"].tolist() == [1.0, 2.0]
    assert found[1] == "the state can't be read: load is no dtype"
    assert [str(row).partition(":")[0] for row in found[2:]] == ["the state can't be read"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: changed(path, "latents", ["x"], pa.string()), "column latents is string, which it can't be"),
        (lambda path: changed(path, "shape", [3.0], pa.float32()), "column shape is float, which it can't be"),
        (lambda path: pq.write_table(pq.read_table(path).drop_columns(["shape"]), path), "holds no latents of ours"),
        (lambda path: said(path, "{"), "says of its latents what can't be read"),
        (lambda path: said(path, '{"channels": 4}'), "says of its latents what can't be read"),
        (lambda path: said(path, "[]"), "says of its latents what can't be read"),
        (lambda path: said(path, json.dumps({**vars(SPEC), "dtype": "load"})), "says of its latents what can't be"),
    ],
)
def test_a_file_that_is_no_latents_of_ours_is_refused_before_the_start(tmp_path, change, message):
    shard(tmp_path, "a.parquet", [0])
    change(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message) as error:
        Latents(str(tmp_path)).latent_spec()
    assert "\n" not in str(error.value)


def said(path, text):
    """The file, with another text about its latent space."""
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, SPEC_KEY: text.encode()}), path)


def test_many_files_don_t_stay_open(tmp_path):
    for n in range(40):
        pq.write_table(pa.table({"prompt": [f"{n}"]}), tmp_path / f"{n:02}.parquet")
    source = Prompts(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for fragment in source.fragments():
        [row] = source.read(fragment.name, 0, 1)
        assert row["prompt"] == str(int(fragment.name[:2]))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_masks_of_prompts_are_pictures_beside_the_picture(tmp_path):
    for name, color in (("red.png", "red"), ("mask.png", "white")):
        written(tmp_path / name, picture(color=color))
    path = written(
        tmp_path / "p.jsonl", '{"prompt": "a", "image": "red.png", "mask": "mask.png"}\n{"prompt": "b", "mask": 7}\n'
    )
    first, second = all_rows(Prompts(path))
    assert first["image"][0, 0].tolist() == [255, 0, 0] and first["mask"][0, 0].tolist() == [255, 255, 255]
    assert second == "mask must be a path, not 7"


KINDS_OF_FILES = "csv", "tsv", "json", "jsonl", "parquet"


def table(path, rows):
    """A file of rows, all with the same columns, as its suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join(separator.join(row) for row in [rows[0], *(row.values() for row in rows)]))
    return str(path)


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_a_file_that_names_pictures_is_not_known_by_its_contents_alone(kind, tmp_path):
    written(tmp_path / "red.png", picture(color="red"))
    for columns, fingerprinted in (({"prompt": "a"}, ("path",)), ({"prompt": "a", "image": "red.png"}, ())):
        source = Prompts(table(tmp_path / f"p.{kind}", [columns]))
        source.fragments()
        assert source.fingerprinted == fingerprinted


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_the_texts_of_rows_are_there_without_the_rows(kind, tmp_path):
    rows = [{"prompt": name, "negative_prompt": f"no {name}", "image": "nowhere.png"} for name in "abc"]
    source = Prompts(table(tmp_path / f"p.{kind}", rows))
    [fragment] = source.fragments()
    assert list(source.texts(fragment)) == [(name, f"no {name}") for name in "abc"]

"""Which files a source reads: folders, globs, links, packages; pictures in a folder, and those that rows name."""

import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.files import KINDS_OF_FILES, all_rows, picture, table, written

from latentmill.sources.images import DEPTH, RUN, Images
from latentmill.sources.latents import Latents
from latentmill.sources.prompts import Prompts


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


def test_masks_of_prompts_are_pictures_beside_the_picture(tmp_path):
    for name, color in (("red.png", "red"), ("mask.png", "white")):
        written(tmp_path / name, picture(color=color))
    path = written(
        tmp_path / "p.jsonl", '{"prompt": "a", "image": "red.png", "mask": "mask.png"}\n{"prompt": "b", "mask": 7}\n'
    )
    first, second = all_rows(Prompts(path))
    assert first["image"][0, 0].tolist() == [255, 0, 0] and first["mask"][0, 0].tolist() == [255, 255, 255]
    assert second == "mask must be a path, not 7"


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_a_file_that_names_pictures_is_not_known_by_its_contents_alone(kind, tmp_path):
    written(tmp_path / "red.png", picture(color="red"))
    for columns, fingerprinted in (({"prompt": "a"}, ("path",)), ({"prompt": "a", "image": "red.png"}, ())):
        source = Prompts(table(tmp_path / f"p.{kind}", [columns]))
        source.fragments()
        assert source.fingerprinted == fingerprinted

"""Prompt files as people have them: each is read as what it is, or refused in one line that says what to write."""

import csv
import gzip
import io
import json
import random
from importlib import metadata

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

TEXT = ("source=prompts", "sampling.width=4", "sampling.height=4", "max_error_rate=1")


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


class Bad(str):
    """The reason of an error row."""


TSV = b"prompt\tseed\na, b\t7\n\t\n \t8\n"

FILES = {
    # encodings
    "utf16le.txt": (b"\xff\xfe" + "caf\u00e9\r\n\r\n\u7ea2\r\n".encode("utf-16-le"), ["caf\u00e9", "\u7ea2"], "read as utf-16-le"),
    "utf16be.csv": (b"\xfe\xff" + "prompt,seed\ncaf\u00e9,7\n".encode("utf-16-be"), [("caf\u00e9", 7)], "read as utf-16-be"),
    "utf16nomark.csv": ("prompt;seed\ncaf\u00e9;7\n".encode("utf-16-le"), [("caf\u00e9", 7)], "read as utf-16-le"),
    "utf16half.txt": ("\ufeffa\nb".encode("utf-16-le")[:-1], ["a", Bad("the line is not UTF-8, at byte 0")], "read as utf-16-le"),
    "utf32.txt": ("\ufeffcaf\u00e9\n".encode("utf-32-le"), ["caf\u00e9"], "read as utf-32-le"),
    "windows.csv": (b"prompt;seed\ncaf\xe9 \x93x\x94;7\n", [("caf\u00e9 \u201cx\u201d", 7)], "read as cp1252, which is a guess: source.encoding=NAME"),
    "mixed.txt": (b"caf\xe9\ncaf\xc3\xa9\n", [Bad("the line is not UTF-8, at byte 3"), "caf\u00e9"], "lines that are not UTF-8 will be error rows"),
    "mark.csv": (b'\xef\xbb\xbf"prompt",seed\na,7\n', [("a", 7)], None),
    # lines
    "mac.csv": (b'prompt,seed\ra,7\r"b, c",8\r', [("a", 7), ("b, c", 8)], None),
    "mac.txt": (b"a\r\rb", ["a", "b"], None),
    "blank.txt": ("a\n\u00a0\n\u3000 \n\x0b\n\ufeff\n \ufeff \n\u2003b\u00a0\n".encode(), ["a", "b"], None),
    "blank.csv": ("prompt\na\n\u00a0\n  \n\nb\n".encode(), ["a", "b"], None),
    "marks.txt": ("\ufeffa\n\ufeffb\n".encode(), ["a", "b"], None),
    "marks.jsonl": ('\ufeff{"prompt":"a"}\n\ufeff{"prompt":"b"}\n'.encode(), ["a", "b"], None),
    "twice.csv": ("\ufeffprompt,seed\na,7\n\ufeffprompt,seed\n\ufeff\"b\",8\n".encode(), [("a", 7), Bad("the header once more: are these several files in one?"), ("b", 8)], None),
    # separators
    "semicolons.csv": (b'prompt;seed\n"a; b";7\n', [("a; b", 7)], "columns are parted by semicolons"),
    "tabs.csv": (TSV, [("a, b", 7), "", (" ", 8)], "columns are parted by tabs"),
    "tabs.tsv": (TSV, [("a, b", 7), "", (" ", 8)], None),
    "excel.csv": (b"sep=;\r\nprompt;seed\r\na;7\r\n", [("a", 7)], "columns are parted by semicolons"),
    # quotes
    "unclosed.csv": (b'prompt\n"a cat\nb\nc\n', [Bad("a quote that is never closed, from line 2 on"), "b", "c"], None),
    "flipped.csv": (b'prompt\na\n"b\nc\n"d, e"\nf\n', ["a", Bad("a quote that is not closed in its cell, from line 3 on"), "c", "d, e", "f"], None),
    "inner.csv": (b'prompt\n"a "nice" cat"\nb\n12" c\n', [Bad('a quote within a quoted cell must be doubled ("")'), "b", '12" c'], None),
    "empty.csv": (b'prompt\na\n""\nb\n', ["a", "", "b"], None),
    "long.csv": (b'prompt,note\n"' + b"y" * 150_000 + b"\n" + b"y" * 50_000 + b'",n\nb,"' + b"z" * 1_500_000 + b'"\n' + b"w\n" * 9 + b"x" * 1_000_001 + b",n\n",
                 ["y" * 150_000 + "\n" + "y" * 50_000, "b", *[Bad("the row has 1 fields, the header 2")] * 9, Bad("prompt has 1000001 characters, and 1000000 are the most")], "columns not used: note"),
    "commas.csv": (b"prompt\na, b\nc\n", [Bad("the row has 2 fields, the header 1: text with a comma needs quotes"), "c"], None),
    # JSON
    "keys.jsonl": (b'{"prompt": "a", "prompt": "b"}\n{"prompt": "c"}\n', [Bad("not JSON that can be read: the key 'prompt' is there twice"), "c"], None),
    "array.json": (b'[{"prompt": "a", "seed": 7},\n {"prompt": "b"}]\n', [("a", 7), "b"], None),
    "pretty.json": (json.dumps({"prompt": "a", "seed": 7}, indent=2).encode(), [("a", 7)], None),
    "pretty.jsonl": (b"\n".join(json.dumps({"prompt": p}, indent=1).encode() for p in "ab"), ["a", "b"], None),
    "lines.json": (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', ["a", "b"], None),
    "texts.json": (b'["a", "b", 3]', ["a", "b", Bad("the line is JSON, but no object in braces")], None),
    "some.jsonl": (b'{"caption": "a", "URL": "u"}\n{"prompt": "b"}\n', [Bad("the row has neither prompt nor image, only caption, URL"), "b"], "columns not used: caption, URL"),
    # packed
    "packed.txt.gz": (gzip.compress(b"a\n") + gzip.compress(b"b\n"), ["a", "b"], None),
    "packed.csv.gz": (gzip.compress("prompt;seed\n\"a;\nb\";7\nc;8\n".encode("utf-16")), [("a;\nb", 7), ("c", 8)], "read as utf-16-le"),
    "packed.jsonl.zst": (zstd(b'{"prompt": "a"}\n{"prompt": "b"}'), ["a", "b"], None),
    "packed.json.zst": (zstd(b'[{"prompt": "a"}, {"prompt": "b"}]'), ["a", "b"], None),
    "packed.tsv.zst": (zstd(TSV), [("a, b", 7), "", (" ", 8)], None),
    "packed.csv": (gzip.compress(b"prompt\na\n"), ["a"], None),
    # tables
    "nulls.parquet": (parquet(prompt=["a", "b"], negative_prompt=pa.nulls(2), scheduler=pa.nulls(2), image=pa.nulls(2), seed=pa.nulls(2)), ["a", "b"], None),
    "like.csv": (b"prompt,negative prompt,Steps,cfg_scale,num_inference_steps\na,ugly,7,3,9\n", ["a"],
                 "columns not used: negative prompt, Steps, cfg_scale, num_inference_steps (did you mean source.columns={negative_prompt: negative prompt, steps: Steps, guidance_scale: cfg_scale}?)"),
    "like.jsonl": (b'{"prompt": "a", "Seed": 7}\n', ["a"], "columns not used: Seed (did you mean source.columns={seed: Seed}?)"),
    "like.parquet": (parquet(prompt=["a"], sampler=["x"], URL=["u"]), ["a"], "columns not used: sampler, URL (did you mean source.columns={scheduler: sampler}?)"),
    "table.txt": (b"prompt\tseed\na\t7\n", ["prompt\tseed", "a\t7"], "the first line, prompt\\tseed, is taken for a prompt: if it is a table's header"),
    "json.txt": (b'{"prompt": "a"}\n', ['{"prompt": "a"}'], "lines of JSON are taken for prompts"),
}  # fmt: skip


def found(rows, failed, output):
    """Every row of a dataset in order: prompt and, unless it is made up, seed; or the reason of an error."""
    by_row = {row["row_id"]: (row["prompt"], row["seed"]) for row in rows(output)}
    assert len(by_row) == len(rows(output))
    for error in failed(output):
        assert error["row_id"] not in by_row
        by_row[error["row_id"]] = Bad(error["reason"])
    return [by_row[key] for key in sorted(by_row)]


def same(row, expected):
    if isinstance(expected, tuple):
        return row == expected
    return row == expected if isinstance(expected, Bad) or isinstance(row, Bad) else row[0] == expected


def test_each_file_is_read_as_what_it_is(tmp_path, latentmill, patches, rows, failed):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (content, _, _) in FILES.items():
        (folder / name).write_bytes(content)
    for hidden in ("._like.csv", ".a.txt"):  # what macOS leaves behind
        (folder / hidden).write_bytes(b"\0\5\x16\7")
    arguments = ("encode", *patches, *TEXT, f"source.path={folder}", f"output={tmp_path / 'out'}")
    assert latentmill("plan", *arguments) == 0
    notices = [
        line.partition("source prompts: ")[2] for line in latentmill.out.splitlines() if line.startswith("notice")
    ]
    for name, (_, _, notice) in FILES.items():
        said = [line.partition(": ")[2] for line in notices if line.startswith(f"{name}: ")]
        shared = [line for line in notices if line.startswith(f"{name} and ")]
        if notice is None:
            assert not said and not shared, name
        else:
            assert any(line.startswith(notice) for line in said + [line.partition(": ")[2] for line in notices]), name
    assert latentmill("run", *arguments) == 0, latentmill.said
    expected = [row for name in sorted(FILES) for row in FILES[name][1]]
    got = found(rows, failed, tmp_path / "out")
    assert len(got) == len(expected)
    assert [(row, want) for row, want in zip(got, expected) if not same(row, want)] == []


REFUSED = {
    "caption.csv": (b"URL,caption\nu,a\n", "has no column prompt or image, only URL, caption; write source.columns={prompt: caption}"),
    "metadata.csv": (b"file_name,text\n0.png,a\n", "only file_name, text; write source.columns={prompt: text, image: file_name}"),
    "metadata.jsonl": (b'{"file_name": "0.png", "text": "a"}\n', "only file_name, text; write source.columns={prompt: text, image: file_name}"),
    "caption.parquet": (parquet(TEXT=["a"]), "has no column prompt or image, only TEXT; write source.columns={prompt: TEXT}"),
    "upper.csv": (b"Prompt,Seed\na,7\n", "only Prompt, Seed; write source.columns={prompt: Prompt, seed: Seed}"),
    "headless.csv": (b"a red circle,7\na blue square,8\n", "has no column prompt or image, only a red circle, 7; its first line must name the columns"),
    "book.csv": (b"PK\x03\x04\x14\0\6\0", "is a zip file or a spreadsheet: unpack it, or save it as CSV"),
    "p.txt": (parquet(prompt=["a"]), "is a Parquet file: let its name end in .parquet"),
    "p.csv.gz": (gzip.compress(b"prompt\n" + random.Random(0).randbytes(999).hex().encode())[:-9], "can't be unpacked: Truncated compressed stream"),
    "p.jsonl.zst": (zstd(b'{"prompt": "a"}\n' * 99)[:-5], "can't be unpacked: Truncated compressed stream"),
    "kanji.csv": ("prompt\n\u8d64\u3044\u661f\u3068\u6708\n".encode("shift_jis"), "is neither UTF-8 nor UTF-16: write its encoding, source.encoding=NAME, as cp1251, shift_jis or gb18030"),
    "russian.txt": ("\u043a\u0440\u0430\u0441\u043d\u0430\u044f\n".encode("cp1251"), "is neither UTF-8 nor UTF-16"),
    "later.txt": (b"caf\xe9\n" + b"a\n" * (1 << 20) + "caf\u00e9\n".encode(), "was taken for cp1252, and further on it is not"),
    "cut.json": (b'[{"prompt": "a"},\n {"prompt": "b"},\n', "line 3: the file ends within the array: is it cut off?"),
    "broken.json": (b'[{"prompt": "a"},\n {"prompt": b}]\n', "line 2: not JSON: Expecting value"),
    "comma.json": (b'[{"prompt": "a"}\n {"prompt": "b"}]\n', "line 2: a comma was expected between two rows"),
    "two.json": (b'[{"prompt": "a"}]\n[{"prompt": "b"}]\n', "line 1: something stands behind the array"),
    "keys.json": (b'[{"prompt": "a", "prompt": "b"}]\n', "line 1: not JSON that can be read: the key 'prompt' is there twice"),
    "columns.json": (b'{"prompt": {"0": "a", "1": "b"}}', "is one object of whole columns: write a list of rows"),
    "data.json": (b'{"data": [{"prompt": "a"}]}', "has no column prompt or image, only data"),
    "nulls.parquet": (parquet(prompt=pa.nulls(2)), "column prompt holds nulls and nothing else"),
    "unclosed.csv": (b'prompt\na\n"b\n' + b"c d e f g\n" * 1_700_000, 'line 3 has a quote that is not closed within 16 MiB: close it, or double it ("") if the text has it'),
    "header.csv": (b'"prompt\na\nb\n', "the header can't be read: a quote that is never closed, from line 1 on"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_read_is_refused_before_the_start_in_one_line(name, tmp_path, latentmill, patches):
    content, expected = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    arguments = ("encode", *patches, *TEXT, f"source.path={tmp_path / name}", f"output={tmp_path / 'out'}")
    assert latentmill("run", *arguments) == 2
    assert expected in latentmill.err and latentmill.err.count("\n") == 1, latentmill.said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["prompts", "images", "latents"])
def test_an_empty_path_is_not_the_working_directory(source, tmp_path, latentmill, patches, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "p.txt").write_text("a\n")
    assert latentmill("plan", "encode", *patches, f"source={source}", "source.path=", f"output={tmp_path / 'out'}") == 2
    assert "source.path is empty: name a file, a folder or a glob" in latentmill.err
    assert latentmill.err.count("\n") == 1


def job(tmp_path, text):
    """A job file with this source."""
    (tmp_path / "renamed.yaml").write_text(
        "defaults: [job, source: prompts, sink: parquet, cluster: inline, _self_]\n"
        f"flow: [read, encode, write]\nvae: {{name: patches, side: 1}}\noutput: {tmp_path / 'out'}\nsource: {text}\n"
    )
    return tmp_path / "renamed.yaml"


def test_columns_are_renamed_by_a_setting(tmp_path, latentmill, pictures, rows):
    """As Hugging Face's metadata has them, pictures beside it."""
    columns = "{image: file_name, prompt: text, negative_prompt: text}"
    lines = [{"file_name": f"{n}.png", "text": f"picture {n}", "prompt": "not this"} for n in (2, 0)]
    content = {
        "metadata.csv": "file_name,text,prompt\n" + "".join(",".join(row.values()) + "\n" for row in lines),
        "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in lines),
        "metadata.json": json.dumps(lines),
    }
    for name, text in content.items():
        (pictures / name).write_text(text)
    pq.write_table(pa.table({key: [row[key] for row in lines] for key in lines[0]}), pictures / "metadata.parquet")
    path = job(tmp_path, f"{{path: '{pictures}/metadata.*', columns: {columns}}}")
    assert latentmill("plan", path) == 0, latentmill.said
    assert "notice   source prompts: metadata.csv and 3 more files: columns not used: prompt\n" in latentmill.out
    assert latentmill("run", path) == 0, latentmill.said
    made = rows(tmp_path / "out")
    assert [row["prompt"] for row in made] == ["picture 2", "picture 0"] * 4
    assert [row["negative_prompt"] for row in made] == ["picture 2", "picture 0"] * 4
    assert len({str(row["latents"]) for row in made}) == 2 and made[0]["latents"] == made[6]["latents"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("{prompt: caption}", "has no column caption (source.columns), only prompt, seed"),
        ("{caption: prompt}", "columns: caption is no column of ours; there are: prompt, negative_prompt"),
        ("{prompt: 7}", "has no column 7 (source.columns), only prompt, seed"),
        ("prompt", "columns must be as {prompt: caption}, not 'prompt'"),
    ],
)
def test_a_wrong_renaming_says_so(setting, reason, tmp_path, latentmill):
    (tmp_path / "p.csv").write_text("prompt,seed\na,7\n")
    path = job(tmp_path, f"{{path: '{tmp_path / 'p.csv'}', columns: {setting}}}")
    assert latentmill("plan", path) == 2
    assert reason in latentmill.err and latentmill.err.count("\n") == 1, latentmill.said


def test_an_encoding_can_be_named(tmp_path, latentmill, patches, rows):
    (tmp_path / "p.csv").write_bytes("prompt\n\u8d64\u3044\u661f\n".encode("shift_jis"))
    arguments = ("encode", *patches, *TEXT, f"source.path={tmp_path / 'p.csv'}", f"output={tmp_path / 'out'}")
    assert latentmill("run", *arguments, "source.encoding=shift_jis") == 0, latentmill.said
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["\u8d64\u3044\u661f"]
    assert latentmill("plan", *arguments, "source.encoding=nonsense") == 2
    assert "encoding: there is none called nonsense" in latentmill.err


def source_of(path):
    """The source ``prompts``, by the door that all plugins come in by."""
    [entry] = metadata.entry_points(group="latentmill.sources", name="prompts")
    return entry.load()(path=str(path))


def read_back(path, pieces):
    """How many rows a source counts, and its prompts, read by another one in pieces, last first or in order."""
    [fragment] = source_of(path).fragments()
    reader = source_of(path)
    starts = pieces(range(0, fragment.rows, 7))
    parts = {start: list(reader.read(fragment.name, start, min(start + 7, fragment.rows))) for start in starts}
    return fragment.rows, [row["prompt"] for start in sorted(parts) for row in parts[start]]


def wild(chance, long):
    """A text with what CSV is about in it."""
    pieces = [
        '"',
        '""',
        ",",
        ";",
        "\n",
        "\r\n",
        " ",
        "\t",
        "a",
        "b c",
        "\u00a0",
        "\u00e9",
        "'",
        "prompt",
        "\x0b",
        "sep=;",
    ]
    text = "".join(chance.choices(pieces, k=chance.randint(0, 12)))
    return text + "x" * chance.randint(0, 3000) if long else text


@pytest.mark.parametrize("writer", ["csv", "pandas"])
@pytest.mark.parametrize("seed", range(25))
def test_rows_of_random_csv_are_those_that_were_written(writer, seed, tmp_path):
    chance = random.Random(seed)
    long = seed < 3  # longer than what is counted at a time, which is half a megabyte
    columns = chance.choice([["prompt"], ["prompt", "note"], ["note", "prompt", "more"]])
    table = [{name: wild(chance, long) for name in columns} for _ in range(1500 if long else chance.randint(1, 30))]
    if columns == ["prompt"]:  # there, a line of white space is a blank line
        table = [row if row["prompt"].strip() or not row["prompt"] else {"prompt": "blank"} for row in table]
    quoting = chance.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    path = tmp_path / ("p.csv.gz" if seed % 5 == 4 else "p.csv")
    buffer = io.StringIO(newline="")
    if writer == "csv":
        made = csv.DictWriter(buffer, columns, quoting=quoting, lineterminator=chance.choice(["\r\n", "\n"]))
        made.writeheader()
        made.writerows(table)
    else:
        pandas.DataFrame(table, columns=columns).to_csv(buffer, index=False, quoting=quoting)
    content = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    expected = [row["prompt"] for row in table]
    assert read_back(path, list) == (len(table), expected)
    assert read_back(path, reversed) == (len(table), expected)


def test_a_glob_passes_over_what_a_folder_passes_over(tmp_path, latentmill, patches):
    for name in ("a.csv", "._a.csv", ".old/b.csv", "c/d.csv", "c/._d.csv"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_bytes(b"\0\5\x16" if "._" in name else b"prompt\na\n")
    arguments = ("encode", *patches, *TEXT, f"output={tmp_path / 'out'}")
    assert latentmill("plan", *arguments, f"source.path={tmp_path}/in/**/*.csv", "--json") == 0, latentmill.err
    assert [name for name, _, _ in json.loads(latentmill.out)["fragments"]] == ["a.csv", "c/d.csv"]
    assert latentmill("plan", *arguments, f"source.path={tmp_path}/in/.old/*.csv", "--json") == 0, latentmill.err
    assert [name for name, _, _ in json.loads(latentmill.out)["fragments"]] == ["b.csv"]
    (tmp_path / "in" / "z.csv").symlink_to("nowhere")
    assert latentmill("plan", *arguments, f"source.path={tmp_path}/in/*.csv") == 2
    assert "z.csv is a link to nothing" in latentmill.err


# ---------------------------------------------------------------------------------------------- captions of pictures


def picture(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), color).save(path)


def captions(rows, output):
    return {row["id"]: row["prompt"] for row in rows(output)}


def images(tmp_path, *more):
    return (f"source.path={tmp_path / 'in'}", "source.id_column=path", f"output={tmp_path / 'out'}", *more)


def test_captions_go_by_several_names(tmp_path, latentmill, patches, rows):
    composed, parted = "caf\u00e9", "cafe\u0301"
    texts = {
        "a.txt": "a",
        "b.TXT": "b",
        "c.caption": "c",
        "d.txt": "the txt",
        "d.caption": "not this",
        parted + ".txt": "the letters are the same",
        "twins/" + composed + ".txt": "composed",
        "f.Caption": "f",
    }
    names = ["a", "b", "c", "d", composed, "twins/" + composed, "twins/" + parted, "f", "none"]
    for name in names:
        picture(tmp_path / "in" / f"{name}.png")
    for name, text in texts.items():
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    (tmp_path / "in" / "f.Caption").write_bytes(b"\xff\xfe" + "\u7ea2\n".encode("utf-16-le"))
    assert latentmill("run", "encode", *patches, *images(tmp_path)) == 0, latentmill.said
    assert captions(rows, tmp_path / "out") == {
        "a.png": "a",
        "b.png": "b",
        "c.png": "c",
        "d.png": "the txt",
        f"{composed}.png": "the letters are the same",
        f"twins/{composed}.png": "composed",
        f"twins/{parted}.png": "",  # the caption is its twin's
        "f.png": "\u7ea2",
        "none.png": "",
    }


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_of_captions_beside_pictures_is_not_passed_over_in_silence(name, tmp_path, latentmill, patches):
    picture(tmp_path / "in" / "train" / "0.png")
    (tmp_path / "in" / "train" / name).write_text("")
    assert latentmill("plan", "encode", *patches, *images(tmp_path)) == 0
    path = tmp_path / "in" / "train" / name
    assert (
        f"notice   source images: train/{name} is not read: source=prompts source.path={path} "
        "'source.columns={image: file_name, prompt: text}' reads it\n"
    ) in latentmill.out


def test_links_to_folders_are_followed_or_named(tmp_path, latentmill, patches, rows):
    picture(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "elsewhere" / "1.txt").write_text("from elsewhere")
    picture(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "train").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../in")  # round and round
    (tmp_path / "in" / "self").symlink_to(".")
    assert latentmill("plan", "encode", *patches, *images(tmp_path)) == 0
    assert "source   1 rows" in latentmill.out
    assert "source images: 2 links to folders, self first, passed over: source.follow_links=true" in latentmill.out
    assert latentmill("run", "encode", *patches, *images(tmp_path, "source.follow_links=true")) == 0, latentmill.said
    assert captions(rows, tmp_path / "out") == {"0.png": "", "train/1.png": "from elsewhere"}
    assert "passed over" not in latentmill.said

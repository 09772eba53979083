"""Rows out of files of text, CSV, JSON and Parquet, the bad ones with a reason; any row of a long file is found."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.files import KINDS_OF_FILES, all_rows, parquet, table, written

from latentmill.sources.prompts import Prompts
from latentmill.sources.readers.text_reader import TextReader


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
        "a dog,1_0,,,,,,,,\n"
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
        "seed must be a number, not '1_0'",
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
        ("p.docx", "a", "no .txt, .csv, .tsv, .json, .jsonl, .ndjson, .parquet, .tar file there"),
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
    kept = source._readers["p.parquet"].file._kept[1]
    assert [row["prompt"] for row in source.read("p.parquet", 205, 210)] == [str(i) for i in range(205, 210)]
    assert source._readers["p.parquet"].file._kept[1] is kept


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


def test_many_files_don_t_stay_open(tmp_path):
    for n in range(40):
        pq.write_table(pa.table({"prompt": [f"{n}"]}), tmp_path / f"{n:02}.parquet")
    source = Prompts(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for fragment in source.fragments():
        [row] = source.read(fragment.name, 0, 1)
        assert row["prompt"] == str(int(fragment.name[:2]))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_the_texts_of_rows_are_there_without_the_rows(kind, tmp_path):
    rows = [{"prompt": name, "negative_prompt": f"no {name}", "image": "nowhere.png"} for name in "abc"]
    source = Prompts(table(tmp_path / f"p.{kind}", rows))
    [fragment] = source.fragments()
    assert list(source.texts(fragment)) == [(name, f"no {name}") for name in "abc"]

"""Fields that plugins bring, and columns of a source that travel: from the command line, YAML and source to the dataset."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentmill.plugin import CONTRACT

MODULE = (
    f"contract_number = {CONTRACT}\n"
    + '''
import pyarrow as pa
import torch
from latentmill.plugin import VAE, Denoiser, LatentSpec, RowError, RowField, Stage, TextEncoder
from latentmill.schedulers.noise_schedules import RectifiedFlow
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class Halves(VAE):
    contract = contract_number
    spec = LatentSpec(12, 2, 1.0, 0.0, "float32", "halves")
    def encode(self, images): return pixel_unshuffle(images, 2)
    def decode(self, latents): return pixel_shuffle(latents, 2)


class Styled(TextEncoder):
    """The conditioning of a prompt is the row's ``style``, and nothing else."""
    contract = contract_number
    row_fields = [RowField("style", pa.string(), "how to draw", default="plain")]
    def encode(self, prompts, style):
        return {"gray": torch.full((len(prompts),), {"plain": 0.0, "bright": 0.5}[style])}


class Painter(Denoiser):
    """Predicts a picture of one gray: the conditioning's, and the row's ``shade``."""
    contract = contract_number
    prediction = "sample"
    noise_schedule = RectifiedFlow()
    row_fields = [
        RowField("shade", pa.float32(), "how bright", default=0.0, least=0, most=0.5),
        RowField("invert", pa.bool_(), "whether dark is bright", default=False, stored=False),
    ]
    def predict(self, x, t, conditioning):
        shade, invert = conditioning["shade"], conditioning["invert"]
        assert shade.dtype == torch.float32 and shade.shape == (len(x),) and invert.dtype == torch.bool
        gray = conditioning["gray"] + shade
        return torch.where(invert, -gray, gray)[:, None, None, None].expand_as(x).to(x.dtype)


class Only(Stage):
    """Rejects what is brighter than the row wants."""
    contract = contract_number
    row_fields = [RowField("most", pa.int64(), "the brightest pixel allowed", default=255, least=0, most=255)]
    def __call__(self, batch, reject):
        good = []
        for i, row in enumerate(batch.select(["shade", "most"]).to_pylist()):
            good.append(row["shade"] * 255 <= row["most"])
            if not good[-1]:
                reject(i, f"brighter than {row['most']}")
        return batch.filter(pa.array(good))


class Clashing(Only):
    row_fields = [RowField("shade", pa.int8(), "something else")]

class Ours(Only):
    row_fields = [RowField("strength", pa.float64(), "ours")]

class Tensor(Only):
    row_fields = [RowField("image", pa.string(), "a column of ours")]
'''
)
POINTS = """[latentmill.vaes]
halves = theirs:Halves
[latentmill.text_encoders]
styled = theirs:Styled
[latentmill.denoisers]
painter = theirs:Painter
[latentmill.stages]
only = theirs:Only
clashing = theirs:Clashing
ours = theirs:Ours
tensor = theirs:Tensor
"""


@pytest.fixture
def theirs(install):
    install("theirs", POINTS, theirs=MODULE)


@pytest.fixture
def job(theirs, tmp_path):
    """``job(SOURCE, KEY=VALUE)``: the path of a job of their parts, in this process."""

    def write(at, **more):
        content = {
            "defaults": ["job", "_self_"],
            "output": str(tmp_path / "out"),
            "flow": ["read", "encode", "denoise", "decode", "write"],
            "source": {"name": "prompts", "path": str(at)},
            "sink": {"name": "parquet"},
            "vae": {"name": "halves"},
            "text_encoder": {"name": "styled"},
            "denoiser": {"name": "painter"},
            "scheduler": {"name": "euler"},
            "cluster": {"kind": "inline"},
            "sampling": {"steps": 1, "width": 4, "height": 4, "guidance_scale": 1.0},
        }
        for key, value in more.items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        (tmp_path / "job.yaml").write_text(json.dumps(content))
        return tmp_path / "job.yaml"

    return write


def grays(found):
    """The value of the pixels of each row's picture."""
    import io

    import numpy as np
    from PIL import Image

    return [int(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).max()) for row in found]


def pixel(gray):
    return round((gray + 1) * 127.5)


def test_a_plugin_s_fields_are_given_by_job_command_line_and_source(latentmill, job, tmp_path, rows, failed):
    table = tmp_path / "p.csv"
    table.write_text("prompt,shade,style,invert\na,0.25,bright,\nb,,,\nc,,bright,true\nd,0.75,,\ne,wide,,\nf,,,maybe\n")
    path = job(table, sampling={"shade": 0.125}, rows_per_shard=20)
    assert latentmill("run", path, "sampling.style=plain") == 0, latentmill.said
    found = rows(tmp_path / "out")
    assert [(row["prompt"], row["shade"], row["style"]) for row in found] == [
        ("a", 0.25, "bright"),
        ("b", 0.125, "plain"),
        ("c", 0.125, "bright"),
    ]
    assert "invert" not in found[0]  # it is not stored
    expected = [pixel(0.75), pixel(0.125), pixel(-0.625)]
    assert all(abs(a - b) <= 1 for a, b in zip(grays(found), expected)), (grays(found), expected)
    reasons = {row["row"]: row["reason"] for row in failed(tmp_path / "out")}
    assert reasons[3] == "shade must be from 0 to 0.5, not 0.75"
    assert reasons[4] == "shade must be a number, not 'wide'"
    assert reasons[5] == "invert must be true or false, not 'maybe'"
    assert pq.read_schema(tmp_path / "out/data/00000.parquet").field("shade").type == pa.float32()
    assert "| `shade` | how bright |" in (tmp_path / "out/README.md").read_text()


def test_a_stage_s_field_reaches_it_and_a_shard_whose_rows_all_failed_has_its_columns(latentmill, job, tmp_path, rows):
    table = tmp_path / "p.jsonl"
    lines = [{"prompt": "a", "shade": 0.5, "most": 100, "note": "x"}, {"prompt": "b", "shade": 0.5, "note": "y"}]
    table.write_text("\n".join(map(json.dumps, lines)))
    path = job(
        table,
        flow=["read", "only", "encode", "denoise", "decode", "write"],
        source={"keep": ["note"]},
        rows_per_shard=1,
    )
    assert latentmill("run", path) == 0, latentmill.said
    [found] = rows(tmp_path / "out")
    assert (found["prompt"], found["most"], found["note"]) == ("b", 255, "y")
    empty, full = (pq.read_schema(tmp_path / f"out/data/0000{k}.parquet").remove_metadata() for k in (0, 1))
    assert empty == full and {"most", "shade", "style", "note"} <= {*full.names}


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("clashing", "stage clashing of theirs 1.0 and denoiser painter of theirs 1.0 both have a row field shade, and they are not the same"),
        ("ours", "stage ours of theirs 1.0 has a row field strength, which is a field of every row"),
        ("tensor", "stage tensor of theirs 1.0 has a row field image, which is a column of ours"),
    ],
)  # fmt: skip
def test_a_field_s_name_that_is_taken_is_refused_before_the_start(latentmill, job, tmp_path, stage, said):
    (tmp_path / "p.txt").write_text("a\n")
    path = job(tmp_path / "p.txt", flow=["read", stage, "encode", "denoise", "decode", "write"])
    assert latentmill("run", path) == 2
    assert said in latentmill.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.shad=0.1", "there is no key sampling.shad (did you mean 'sampling.shade'?)"),
        ("sampling.shade=0.75", "sampling.shade must be from 0 to 0.5, not 0.75"),
        ("sampling.shade=dark", "sampling.shade must be a number, not 'dark'"),
        ("sampling.invert=3", "sampling.invert must be true or false, not 3"),
        ("+sampling.stepps=3", "there is no key sampling.stepps (did you mean 'sampling.steps'?)"),
    ],
)
def test_a_key_that_nobody_reads_and_a_value_that_does_not_fit_are_refused(latentmill, job, tmp_path, override, said):
    (tmp_path / "p.txt").write_text("a\n")
    assert latentmill("run", job(tmp_path / "p.txt"), override) == 2
    assert said in latentmill.err and not (tmp_path / "out").exists()


def test_text_that_looks_like_a_number_is_text_for_a_field_of_text(latentmill, job, tmp_path, failed):
    (tmp_path / "p.txt").write_text("a\n")
    latentmill("run", job(tmp_path / "p.txt"), "sampling.style=7")
    assert "KeyError: '7'" in latentmill.err or "KeyError: '7'" in failed(tmp_path / "out")[0]["reason"]


# ----------------------------------------------------------------------------------------------------- kept columns

WHEN = datetime.datetime(2026, 11, 25, 8, 30, 0, 123456, tzinfo=datetime.UTC)
TYPES = {
    "n": pa.int16(),
    "words": pa.list_(pa.string()),
    "box": pa.struct([("x", pa.int32()), ("label", pa.string())]),
    "when": pa.timestamp("us", tz="UTC"),
}
VALUES = {
    "n": [1, None, 3],
    "words": [["a", "b"], [], None],
    "box": [{"x": 1, "label": "l"}, None, {"x": None, "label": "m"}],
    "when": [WHEN, None, WHEN],
}


@pytest.fixture
def typed(tmp_path):
    """A Parquet file of three captions, with columns of many types."""
    columns = {name: pa.array(VALUES[name], type) for name, type in TYPES.items()}
    url = pa.array(["u", "v", "u"]).dictionary_encode()
    pq.write_table(pa.table({"caption": ["x", "y", "z"], **columns, "url": url}), tmp_path / "typed.parquet")
    return tmp_path / "typed.parquet"


@pytest.mark.parametrize("keep", [[*TYPES, "caption"], "all"])
def test_kept_columns_travel_with_their_types(latentmill, job, tmp_path, typed, rows, keep):
    path = job(typed, source={"columns": {"prompt": "caption"}, "keep": keep}, samples_per_row=2)
    assert latentmill("run", path) == 0, latentmill.said
    schema, found = pq.read_schema(tmp_path / "out/data/00000.parquet"), rows(tmp_path / "out")
    for name, type in TYPES.items():
        assert schema.field(name).type == type
        assert [row[name] for row in found] == [value for value in VALUES[name] for _ in range(2)]
    assert [row["prompt"] for row in found] == ["x", "x", "y", "y", "z", "z"]
    if keep == "all":  # what is read as a field is not kept again
        assert "caption" not in schema.names and schema.field("url").type == pa.string()
    else:
        assert [row["caption"] for row in found] == ["x", "x", "y", "y", "z", "z"]
        assert "columns not used: url" in latentmill.err


def test_kept_columns_travel_through_encode_and_out_of_stored_latents(latentmill, job, tmp_path, typed, rows, patches):
    pictures = [{"bytes": None, "path": "a.png"}] * 3
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    table = pq.read_table(typed).append_column("image", pa.array(pictures)).drop_columns(["url"])
    pq.write_table(table, typed)
    source = {"columns": {"prompt": "caption"}, "keep": "all"}
    path = job(typed, flow=["read", "encode", "write"], source=source)
    assert latentmill("run", path) == 0, latentmill.said
    path = job(tmp_path / "out", flow=["read", "decode", "write"], source={"name": "latents"})
    assert latentmill("plan", path, f"output={tmp_path / 'two'}") == 0
    assert "columns not kept: n, words, box, when (source.keep=all keeps them)" in latentmill.out
    path = job(tmp_path / "out", flow=["read", "decode", "write"], source={"name": "latents", "keep": "all"})
    assert latentmill("run", path, f"output={tmp_path / 'two'}") == 0, latentmill.said
    schema, found = pq.read_schema(tmp_path / "two/data/00000.parquet"), rows(tmp_path / "two")
    for name, type in TYPES.items():
        assert schema.field(name).type == type and [row[name] for row in found] == VALUES[name]


CSV = b"prompt,score,count,zip,fine,note\na,0.5,1,007,true,\nb,2,,12,FALSE,x\n"
LINES = b'{"prompt": "a", "score": 1, "tags": ["x"], "at": {"x": 1}}\n{"prompt": "b", "score": 0.5}\n'


@pytest.mark.parametrize(
    ("name", "content", "types"),
    [
        ("p.csv", CSV, {"score": "double", "count": "int64", "zip": "string", "fine": "bool", "note": "string"}),
        ("p.jsonl", LINES, {"score": "double", "tags": "list<item: string>", "at": "struct<x: int64>"}),
        ("p.json", b'[{"prompt": "a", "n": 1}, {"prompt": "b", "m": true}]', {"n": "int64", "m": "bool"}),
    ],
)
def test_types_of_text_are_those_that_all_values_have(latentmill, job, tmp_path, rows, name, content, types):
    (tmp_path / name).write_bytes(content)
    path = job(tmp_path / name, source={"keep": "all"})
    assert latentmill("plan", path) == 0
    assert (
        f"columns       style string, shade float, invert bool, {', '.join(f'{n} {t}' for n, t in types.items())}\n"
        in latentmill.out
    )
    assert latentmill("run", path) == 0, latentmill.said
    schema = pq.read_schema(tmp_path / "out/data/00000.parquet")
    assert {column: str(schema.field(column).type).replace("element", "item") for column in types} == types
    first, second = rows(tmp_path / "out")
    if name == "p.csv":
        assert (first["zip"], first["fine"], first["note"], second["count"], second["score"]) == (
            "007",
            True,
            None,
            None,
            2.0,
        )


def test_views_of_text_travel_as_text(latentmill, job, tmp_path, rows):
    columns = {
        "words": pa.array(["x", None], pa.string_view()),
        "bytes": pa.array([b"x", b""], pa.binary_view()),
        "many": pa.array([["x", "y"], []], pa.list_(pa.string_view())),
        "at": pa.array([{"x": "y"}, None], pa.struct([("x", pa.string_view())])),
    }
    pq.write_table(pa.table({"prompt": ["a", "b"], **columns}), tmp_path / "p.parquet")
    assert latentmill("run", job(tmp_path / "p.parquet", source={"keep": "all"}, samples_per_row=2)) == 0, (
        latentmill.said
    )
    assert [[row[name] for row in rows(tmp_path / "out")[::2]] for name in columns] == [
        column.to_pylist() for column in columns.values()
    ]


def test_a_dataset_with_maps_is_the_one_that_was_planned(latentmill, job, tmp_path, rows):
    tags = pa.map_(pa.string(), pa.int32())
    columns = {
        "tags": pa.array([[("x", 1)], None], tags),
        "many": pa.array([[[("x", 1)], []], []], pa.large_list(tags)),
        "at": pa.array([{"x": [("y", 2)]}, None], pa.struct([("x", tags)])),
    }
    pq.write_table(pa.table({"prompt": ["a", "b"], **columns}), tmp_path / "p.parquet")
    job = job(tmp_path / "p.parquet", source={"keep": "all"})
    assert latentmill("run", job) == 0, latentmill.said
    assert latentmill("verify", tmp_path / "out") == 0, latentmill.said
    assert [[row[name] for row in rows(tmp_path / "out")] for name in columns] == [
        column.to_pylist() for column in columns.values()
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("keep", [["x"], "all"])
def test_of_two_columns_of_one_name_none_can_be_kept(latentmill, job, tmp_path, kind, keep):
    path = tmp_path / f"p.{kind}"
    if kind == "csv":
        path.write_text("prompt,x,x\na,1,2\n")
    else:
        pq.write_table(
            pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["prompt", "x", "x"]), path
        )
    assert latentmill("run", job(path, source={"keep": keep})) == 2
    assert f"p.{kind}: there are two columns x" in latentmill.err and not (tmp_path / "out").exists()


def test_a_number_that_no_type_holds_to_the_last_digit_is_text(latentmill, job, tmp_path, rows):
    """Ids of 19 digits, larger ones, and names of commits that read as numbers: none of them is rounded, or infinity."""
    columns = {
        "tweet": ["1234567890123456789", "-9223372036854775808"],
        "large": ["9223372036854775809", "1"],
        "both": ["9007199254740993", "0.5"],
        "exact": ["9007199254740992", "0.5"],
        "commit": ["12e4567", "77e1234"],
    }
    lines = zip(["prompt", "a", "b"], *([name, *texts] for name, texts in columns.items()))
    (tmp_path / "p.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    assert latentmill("run", job(tmp_path / "p.csv", source={"keep": "all"})) == 0, latentmill.said
    found = rows(tmp_path / "out")
    assert {name: [row[name] for row in found] for name in columns} == {
        **columns, "tweet": [1234567890123456789, -(2**63)], "exact": [2.0**53, 0.5]
    }  # fmt: skip


def test_a_number_of_one_file_that_the_type_of_all_files_does_not_hold_is_its_row_s_error(
    latentmill, job, tmp_path, failed
):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,n\na,9007199254740993\n")
    (folder / "b.csv").write_text("prompt,n\nb,0.5\n")
    assert latentmill("run", job(folder, source={"keep": ["n"]}, max_error_rate=1)) == 0, latentmill.said
    assert [row["reason"] for row in failed(tmp_path / "out")] == ["column n: '9007199254740993' is no double"]


def test_types_are_those_of_all_files_and_a_file_without_the_column_has_nulls(latentmill, job, tmp_path, rows):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,n\na,1\n")
    (folder / "b.csv").write_text("prompt,n\nb,1.5\n")
    (folder / "c.jsonl").write_text('{"prompt": "c"}\n')
    pq.write_table(pa.table({"prompt": ["d"], "n": pa.array([7], pa.int8())}), folder / "d.parquet")
    assert latentmill("run", job(folder, source={"keep": ["n"]})) == 0, latentmill.said
    assert [row["n"] for row in rows(tmp_path / "out")] == [1.0, 1.5, None, 7.0]
    (folder / "e.jsonl").write_text('{"prompt": "e", "n": "many"}\n')
    assert latentmill("run", job(folder, source={"keep": ["n"]}, output=str(tmp_path / "more"))) == 2
    assert (
        "column n is double in a.csv and string in e.jsonl: say what it is to be, as source.keep={n: string}"
        in latentmill.err
    )


def test_a_type_may_be_told_and_what_does_not_fit_it_is_its_row_s_error(latentmill, job, tmp_path, rows, failed):
    (tmp_path / "p.csv").write_text("prompt,n,when\na,1,2026-11-25\nb,x,2026-11-25\nc,300,2026-11-25\n")
    path = job(tmp_path / "p.csv", source={"keep": {"n": "int8", "when": "timestamp[s]"}})
    assert latentmill("run", path) == 0, latentmill.said
    [found] = rows(tmp_path / "out")
    assert (found["n"], found["when"]) == (1, datetime.datetime(2026, 11, 25))
    assert [row["reason"] for row in failed(tmp_path / "out")] == [
        "column n: 'x' is no int8",
        "column n: '300' is no int8",
    ]


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (["scor"], "source.keep: there is no column scor (did you mean 'score'?)"),
        (["prompt"], "source.keep: the column prompt can't be kept, since that is a field of every row"),
        (["psnr"], "source.keep: the column psnr can't be kept, since that is a column of ours"),
        (["video"], "source.keep: the column video can't be kept, since that is a column of ours"),
        (["shade"], "source.keep: the column shade can't be kept, since that is a field of a plugin"),
        ("all", "source.keep: the column psnr can't be kept, since that is a column of ours; name the columns to keep, without it"),
        ("some", "source.keep must be all, a list of columns, or columns and their types as {score: float32}, not 'some'"),
        ({"score": "flaot"}, "source.keep: score: 'flaot' is no type; int64, float32, string, bool"),
    ],
)  # fmt: skip
def test_a_column_that_can_t_be_kept_is_refused_before_the_start(latentmill, job, tmp_path, keep, said):
    (tmp_path / "p.csv").write_text("prompt,score,psnr,video,shade\na,1,2,3,0.5\n")
    assert latentmill("run", job(tmp_path / "p.csv", source={"keep": keep})) == 2
    assert said in latentmill.err and not (tmp_path / "out").exists()


def test_a_column_that_a_stage_adds_is_not_kept_beside_it(latentmill, patches, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "p.csv").write_text("image,brightness\npictures/a.png,3\n")
    told = ("source=prompts", f"source.path={tmp_path / 'p.csv'}", f"output={tmp_path / 'out'}")
    flow = "flow=[read,encode,decode,mean_brightness,write]"
    assert latentmill("run", "reconstruct", *patches, *told, flow, "source.keep=[brightness]") == 2
    assert "can't be kept, since that is a column that stage mean_brightness adds" in latentmill.err
    assert not (tmp_path / "out").exists()


def test_what_is_kept_is_part_of_the_plan_and_what_is_not_is_named(latentmill, job, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,score,url\na,1,u\n")
    hashes = set()
    for keep in (["score"], ["url"], {"score": "float32"}):
        assert latentmill("plan", job(tmp_path / "p.csv", source={"keep": keep})) == 0
        hashes.add(next(line for line in latentmill.out.splitlines() if line.startswith("hash")))
        left = "score" if keep == ["url"] else "url"
        assert f"notice   source prompts: p.csv: columns not used: {left}\n" in latentmill.out
    assert len(hashes) == 3
    assert latentmill("run", job(tmp_path / "p.csv", source={"keep": ["score"]})) == 0
    assert latentmill("run", job(tmp_path / "p.csv", source={"keep": ["url"]})) == 2
    assert "source.keep: ['score'] -> ['url']" in latentmill.err


def test_text_of_a_parquet_file_that_is_no_utf_8_costs_its_row(latentmill, job, tmp_path, rows, failed):
    text = pa.array([b"fine", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a", "b"], "note": text}), tmp_path / "p.parquet")
    assert latentmill("run", job(tmp_path / "p.parquet", source={"keep": ["note"]})) == 0, latentmill.said
    assert [row["note"] for row in rows(tmp_path / "out")] == ["fine"]
    assert [row["reason"] for row in failed(tmp_path / "out")] == ["column note: what is no UTF-8 is no string"]

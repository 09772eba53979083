"""What a text encoder made of prompts is stored, once for all rows of a prompt, and read where a job encodes none."""

import json
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill.batch import from_dicts
from latentmill.plugin import RowError, tensors
from latentmill.sinks.parquet import Parquet
from latentmill.sinks.webdataset import WebDataset

FLOW = "flow=[read, encode_images, denoise, write]"


@pytest.fixture
def denoised(acme):
    """``denoised(folder)``: a job that encodes no text over what is stored there; the values of its rows, or what it says."""

    def denoised(folder, *more, encoder="text_encoder.name=counting", code=0):
        acme.notes.write_text("")
        job = [each for each in acme.job() if not each.startswith(("source.path", "text_encoder"))]
        flow = [] if any(each.startswith("flow") for each in more) else [FLOW]
        given = ["source=latents", f"source.path={folder}", encoder, *flow, *more]
        assert acme.latentmill("run", *job, *given) == code, acme.latentmill.said
        return acme.latentmill.err if code else [row["latents"][0] for row in acme.read(acme.output)]

    return denoised


@pytest.mark.parametrize("sink", ["parquet", "webdataset"])
def test_a_job_without_a_text_encoder_makes_what_one_with_it_makes(acme, denoised, sink):
    acme.source(["a fox", "a cat", "a fox", {"prompt": "a dog", "negative_prompt": "a bone"}])
    same = ("sampling.guidance_scale=3", "sampling.steps=3", "rows_per_shard=3")
    acme("samples_per_row=2", *same)
    wanted = [row["latents"][0] for row in acme.read(acme.output)]
    acme.notes.write_text("")
    job = acme.job("flow=[read, encode_text, write]", f"sink={sink}", "samples_per_row=2", *same)
    assert acme.latentmill("run", *job) == 0, acme.latentmill.said
    assert acme.encoded() == {"a fox": 1, "a cat": 1, "a dog": 1, "a bone": 1, "": 1}
    assert denoised(acme.output, *same) == wanted
    assert acme.encoded() == {}


def test_rows_of_one_prompt_share_one_copy(acme):
    acme.source([f"prompt {k * 37 % 10}" for k in range(200)])
    acme("flow=[read, encode_text, write]", "rows_per_shard=100")
    [first, second] = sorted(acme.output.glob("data/*"))
    for file in (first, second):
        stored = pq.ParquetFile(file)
        assert stored.num_row_groups == 1
        for name, count in (("prompt:embeds", 10), ("negative:embeds", 1)):
            column = stored.read().column(name).combine_chunks()
            assert len(column) == 100 and len(column.dictionary) == count
    embeds = pq.read_table(first).column("prompt:embeds")
    values = torch.frombuffer(bytearray(embeds[3].as_py()), dtype=torch.float32)
    assert values.tolist() == [torch.tensor(acme.number("prompt 1")).item()] * 64, (
        "3 * 37 = 111: the tenth prompt's bytes"
    )


TEXTS = [{"prompt": text} for text in ("a red ring", "a red ring", "a red ring", "a blue star")]
TEXTS.append({"prompt": "a green cross", "negative_prompt": "a ring"})
NUMBERS = "embeds [12, 64] float32, pooled [192] float32: 3.84 kB a prompt"


@pytest.mark.parametrize(
    ("sink", "bytes", "said"),
    [
        ("parquet", 7 * 3840, "26.9 kB"),
        ("webdataset", 10 * (512 + 7 * 512 + 512 + 2 * 512), "56.3 kB"),  # two files a row and column
    ],
)
def test_plan_says_how_large_encoded_prompts_will_be(latentmill, tmp_path, sink, bytes, said):
    """Of shards of two rows: one prompt, two, and one; no negative prompt thrice counts once in each, and the one that there is."""
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    job = ["encode_text", "cluster=inline", f"source.path={tmp_path}/texts.jsonl", "rows_per_shard=2", f"sink={sink}"]
    assert latentmill("plan", *job, f"output={tmp_path}/out") == 0, latentmill.said
    lines = latentmill.out.splitlines()
    [at] = [k for k, line in enumerate(lines) if line.startswith("text  ")]
    assert [line[14:] for line in lines[at : at + 2]] == [
        NUMBERS,
        f"4 prompts and 3 negative prompts, each once a shard, of 5 rows: at most {said} beside other columns",
    ]
    assert latentmill("run", *job, f"output={tmp_path}/out") == 0, latentmill.said
    assert sum(map(stored_bytes, (tmp_path / "out/data").iterdir())) == bytes


def stored_bytes(file):
    """What conditioning takes in a shard."""
    if file.suffix == ".tar":
        with tarfile.open(file) as tar:
            sizes = [member.size for member in tar if member.name.endswith(".npy")]
        return sum(512 + -(-size // 512) * 512 for size in sizes)
    columns = [
        pq.read_table(file).column(f"{p}:{name}") for p in ("prompt", "negative") for name in ("embeds", "pooled")
    ]
    return sum(len(value.as_py()) for column in columns for value in column.combine_chunks().dictionary)


def test_plan_counts_rows_of_which_a_source_tells_no_text(latentmill, install, tmp_path):
    """Each may have a prompt of its own, and be in two shards: of rows of three samples, in shards of four, half."""
    install("mute", "[latentmill.sources]\nmute = acme_mute:Mute\n", acme_mute=MUTE)
    job = [
        "encode_text",
        "cluster=inline",
        "source=prompts",
        "source.name=mute",
        "samples_per_row=3",
        "rows_per_shard=4",
    ]
    assert latentmill("plan", *job, f"source.path={tmp_path}", f"output={tmp_path}/out") == 0, latentmill.said
    assert "15 prompts and 15 negative prompts, each once a shard, of 30 rows: at most 115 kB beside" in latentmill.out


MUTE = """
from latentmill.plugin import Fragment, Source


class Mute(Source):
    contract = 2

    def __init__(self, path: str):
        pass

    def fragments(self):
        return [Fragment("all", 10)]

    def read(self, fragment, start, stop):
        return ({"prompt": "a red ring"} for _ in range(start, stop))
"""


def test_plan_says_that_it_does_not_know_how_large_encoded_prompts_will_be(acme):
    acme.source(["a fox"])
    assert acme.latentmill("plan", *acme.job("flow=[read, encode_text, write]")) == 0, acme.latentmill.said
    line = "text          text encoder counting doesn't say how large what it makes is: plan --probe 64 measures it"
    assert line in acme.latentmill.out.splitlines()


def test_another_text_encoder_than_the_job_s_is_refused(acme, denoised, tmp_path):
    acme.source(["a fox"])
    acme("flow=[read, encode_text, write]")
    stored = acme.output
    (tmp_path / "words").write_text("others")
    said = denoised(stored, "text_encoder.name=counting", encoder=f"+text_encoder.path={tmp_path}/words", code=2)
    assert "are of another text encoder than counting: its fingerprint is others, and theirs counting" in said
    denoised(stored)
    assert acme.encoded() == {}


def test_a_job_that_encodes_text_reads_none_that_is_stored(acme, denoised):
    acme.source(["a fox"])
    acme("flow=[read, encode_text, write]")
    assert len(denoised(acme.output, "flow=[read, encode, denoise, write]")) == 1
    assert acme.encoded()["a fox"] == 1


def test_latents_without_conditioning_need_a_stage_that_encodes(acme, denoised):
    acme.source(["a fox"])
    acme()
    said = denoised(acme.output, "flow=[read, denoise, write]", code=2)
    assert "flow needs a stage before denoise that adds prompt:*, as encode does" in said


def batch(**columns):
    table = from_dicts(
        [
            {"row": k, "row_id": str(k), "prompt": "", "seed": k, "width": 0, "height": 0, "scheduler": ""}
            for k in range(3)
        ]
    )
    for name, (values, index) in columns.items():
        table = tensors.with_shared(table, name.replace("_", ":", 1), values, index)
    return table


def written(sink, table, path):
    sink.write(str(path), sink.pack(table), {})
    with open(path, "rb") as file:
        return list(sink.read(file, None, [0, 1, 2], None))


@pytest.mark.parametrize("sink", [Parquet(), WebDataset()], ids=["parquet", "webdataset"])
def test_what_is_stored_comes_back_to_the_bit(sink, tmp_path):
    half = torch.tensor(
        [[[1.5, -2.0], [0.0, 3.0], [0.0, 0.0]], [[0.0, 0.0]] * 3, [[1.0, 1.0], [2.0, 2.0], [4.0, -0.0]]]
    )
    given = {
        "prompt_a": (half.bfloat16(), [0, 1, 2]),
        "prompt_b": (half.half(), [2, 2, 0]),
        "prompt_mask": (torch.tensor([[True, False, False], [True, True, True]]), [0, 1, 1]),
        "prompt_ids": (torch.tensor([[1, 0], [0, 7]]), [1, 0, 1]),
        "prompt_length": (torch.tensor([3, 5]), [1, 1, 0]),
    }
    [table] = written(sink, batch(**given), tmp_path / "file")
    for name, (values, index) in given.items():
        found = tensors.from_arrow(table, name.replace("_", ":", 1))
        assert found.dtype == values.dtype and torch.equal(found, values[index]), name
    signs = tensors.from_arrow(table, "prompt:b")[0]
    assert bool(signs[2, 1].signbit()), "minus zero is no padding"


def test_zeros_at_the_end_take_no_room_and_all_else_is_the_tensor_s_bytes(tmp_path):
    values = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 5.0], [0.0, 0.0]]])
    written(Parquet(), batch(prompt_a=(values, [0, 1, 0])), tmp_path / "file")
    column = pq.read_table(tmp_path / "file").column("prompt:a")
    one, two = values[0, :1].numpy().tobytes(), values[1, :2].numpy().tobytes()
    assert column.to_pylist() == [one, two, one] and len(one) == 8 and len(two) == 16
    about = pq.read_schema(tmp_path / "file").field("prompt:a").metadata
    assert json.loads(about[b"latentmill.shape"]) == [3, 2] and about[b"latentmill.dtype"] == b"float32"


def test_each_row_group_has_what_its_rows_need_alone(tmp_path):
    """16 MiB a group: four prompts of 6 MiB, of which each group but the last has two or three."""
    values = torch.arange(4.0)[:, None, None].expand(4, 1536, 1024).contiguous() + 1
    tables = [batch(prompt_a=(values, [k, k, k])) for k in range(4)]
    sink = Parquet()
    shard = pa.concat_tables([sink.pack(table) for table in tables])
    sink.write(str(tmp_path / "file"), shard, {})
    stored = pq.ParquetFile(tmp_path / "file")
    distinct = [
        len(stored.read_row_group(k).column("prompt:a").combine_chunks().dictionary)
        for k in range(stored.num_row_groups)
    ]
    assert stored.num_row_groups == 2 and max(distinct) == 3
    assert (tmp_path / "file").stat().st_size < 5.1 * 6 * 2**20
    with open(tmp_path / "file", "rb") as file:
        found = [tensors.shared(table, "prompt:a") for table in sink.read(file, None, range(12), None)]
    assert [float(each[k][0, 0]) for each, index in found for k in index] == [1.0] * 3 + [2.0] * 3 + [3.0] * 3 + [
        4.0
    ] * 3
    assert all(len(each) <= 3 for each, _ in found)


def test_what_can_t_be_read_is_its_row_s_error(tmp_path):
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sink = Parquet()
    packed = sink.pack(batch(prompt_a=(values, [0, 1, 1])))
    at = packed.schema.get_field_index("prompt:a")
    short = pa.array([b"abc", values[1].numpy().tobytes()], pa.large_binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), short)
    sink.write(str(tmp_path / "file"), packed.set_column(at, packed.schema.field(at), column), {})
    with open(tmp_path / "file", "rb") as file:
        first, good, null = sink.read(file, None, [0, 1, 2], None)
    assert isinstance(first, RowError) and str(first) == "prompt:a has 3 bytes, which can't be of shape [2]"
    assert tensors.from_arrow(good, "prompt:a").tolist() == [[3.0, 4.0]]
    assert isinstance(null, RowError) and str(null) == "prompt:a is null"


def test_conditioning_of_several_shapes_is_refused_before_it_is_mixed_up(acme, install):
    code = """
import torch
from PIL import Image
from latentmill.plugin import Stage, tensors

class Ragged(Stage):
    contract = 2
    adds = ("prompt:control",)

    def __call__(self, batch, reject):
        first = batch.column("row")[0].as_py()
        return tensors.with_tensor(batch, "prompt:control", torch.ones(len(batch), 2 + first % 2, 4))
"""
    install("ragged", "[latentmill.stages]\nragged = acme_ragged:Ragged\n", acme_ragged=code)
    acme.source(["a fox", "a cat"])
    job = ["flow=[read, encode_text, ragged, write]", "stages.ragged.batch_size=1", "rows_per_shard=2"]
    assert acme.latentmill("run", *acme.job(*job)) == 3
    assert "prompt:control has several shapes or dtypes, and can't be stored" in acme.latentmill.err


def test_the_bytes_of_a_file_do_not_hang_on_what_came_together(tmp_path):
    """Two prompts of equal tensors, in one batch or in two, whole or row by row."""
    one = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    sink = Parquet()
    table = sink.pack(batch(prompt_a=(one, [0, 1, 2])))
    shards = {"whole": table, "by row": pa.concat_tables([table.slice(k, 1) for k in range(3)])}
    for name, shard in shards.items():
        sink.write(str(tmp_path / name), shard, {})
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "by row").read_bytes()


def test_files_of_two_text_encoders_are_refused_together(acme, denoised, tmp_path):
    """The first of them is the job's own."""
    acme.source(["a fox"])
    (tmp_path / "words").write_text("others")
    both = tmp_path / "both"
    both.mkdir()
    for name, more in {"a": (), "b": (f"+text_encoder.path={tmp_path}/words",)}.items():
        acme("flow=[read, encode_text, write]", *more)
        (acme.output / "data/00000.parquet").rename(both / f"{name}.parquet")
    assert "a.parquet and b.parquet hold conditioning of different text encoders" in denoised(both, code=2)


def test_a_negative_prompt_that_would_only_be_said_is_refused(acme, denoised):
    acme.source(["a fox"])
    acme("flow=[read, encode_text, write]")
    said = denoised(acme.output, "sampling.negative_prompt=ugly", "sampling.guidance_scale=3", code=2)
    assert "sampling.negative_prompt is of no use: the source's prompts and negative prompts are encoded" in said


def test_conditioning_without_the_negative_that_a_stage_reads_is_refused(acme, denoised, tmp_path):
    acme.source(["a fox"])
    acme("flow=[read, encode_text, write]")
    table = pq.read_table(acme.output / "data/00000.parquet")
    pq.write_table(table.drop_columns(["negative:count"]), tmp_path / "half.parquet")
    assert "the source has no negative:count, which denoise reads" in denoised(tmp_path / "half.parquet", code=2)


def test_seeds_stay_unless_the_job_s_are_asked_for(acme, denoised):
    acme.source(["a fox", "a cat"])
    acme("flow=[read, encode_text, write]")
    stored = acme.output
    seeds = {}
    for name, more in {
        "stored": (), "seed": ("seed=5",), "anew": ("source.keep_sampling=false",), "5": ("source.keep_sampling=false", "seed=5")
    }.items():  # fmt: skip
        denoised(stored, *more)
        seeds[name] = [row["seed"] for row in acme.read(acme.output)]
    assert seeds["stored"] == seeds["seed"] == [row["seed"] for row in acme.read(stored)]
    assert not {*seeds["5"]} & {*seeds["anew"]}


def test_a_file_that_another_program_has_written_again_is_read(acme, denoised, tmp_path):
    """Without Parquet's dictionaries: each row then has its bytes."""
    acme.source(["a fox", "a cat", "a fox"])
    wanted = acme("sampling.guidance_scale=3")
    acme("flow=[read, encode_text, write]", "sampling.guidance_scale=3")
    table = pq.read_table(acme.output / "data/00000.parquet")
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(at).cast(pa.large_binary())
            table = table.set_column(at, pa.field(field.name, pa.large_binary(), metadata=field.metadata), plain)
    pq.write_table(table, tmp_path / "again.parquet")
    assert denoised(tmp_path / "again.parquet", "sampling.guidance_scale=3") == [*wanted.values()]


def test_pictures_beside_prompts_are_no_business_of_a_job_that_encodes_prompts(acme, tmp_path):
    Image.new("RGB", (3, 5)).save(tmp_path / "a.png")
    acme.source([{"prompt": "a fox", "image": "a.png"}])
    acme("flow=[read, encode_text, write]", "sampling={width: null, height: null}")
    [row] = acme.read(acme.output)
    assert "image" not in row and (row["width"], row["height"]) == (0, 0)


def test_a_stage_before_that_adds_nothing_sees_the_picture(acme, install, tmp_path):
    code = """
from latentmill.plugin import Stage

class Sees(Stage):
    contract = 2

    def __call__(self, batch, reject):
        if "image" not in batch.column_names:
            reject(0, "no picture")
            return batch.slice(1)
        return batch
"""
    install("sees", "[latentmill.stages]\nsees = acme_sees:Sees\n", acme_sees=code)
    Image.new("RGB", (3, 5)).save(tmp_path / "a.png")
    acme.source([{"prompt": "a fox", "image": "a.png"}])
    acme("flow=[read, sees, encode_text, write]", "sampling={width: null, height: null}")
    assert [row["prompt"] for row in acme.read(acme.output)] == ["a fox"]


def test_reading_a_row_makes_no_tensors_of_all_others(tmp_path):
    """300 prompts of a mebibyte each, of which padding is all but a kibibyte: 64 rows are read at once."""
    values = torch.zeros(3, 1024, 256)
    sink, tables = Parquet(), []
    for k in range(100):
        values[:, 0, 0] = torch.arange(3) + 3 * k + 1
        tables.append(sink.pack(batch(prompt_a=(values, [0, 1, 2]))))
    sink.write(str(tmp_path / "file"), pa.concat_tables(tables), {})
    tracemalloc.start()
    with open(tmp_path / "file", "rb") as file:
        first = next(sink.read(file, None, range(300), None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensors.from_arrow(first, "prompt:a")[:, 0, 0].tolist() == [float(k + 1) for k in range(64)]
    assert peak < 100 << 20

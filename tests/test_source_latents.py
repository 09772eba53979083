"""Latents are read again with what they were made from, and what is none of ours is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.files import all_rows

from latentmill.batch import SPEC_KEY, from_dicts, with_latents
from latentmill.plugin import LatentSpec
from latentmill.sinks.parquet import STATE, Parquet
from latentmill.sources.latents import Latents

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
        {"prompt": "prompt 0", "seed": 2**64 - 1, "denoised": True, **text, **sampling},
        {"prompt": "prompt 1", "seed": 2**64 - 2, "denoised": True, **text, **sampling},
        {"prompt": "prompt 2", "seed": 2**64 - 3, "denoised": False, **text},
    ]
    for row in all_rows(Latents(str(tmp_path), keep_sampling=False)):
        assert row.keys() == {"prompt", "negative_prompt", "seed", "warning", "latents", "denoised"}
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


def test_each_worker_asks_one_file_and_the_plan_all(tmp_path):
    for k in range(3):
        shard(tmp_path / "data", f"{k:05d}.parquet", [k])
    (tmp_path / "data" / "00002.parquet").write_bytes(b"no Parquet")
    assert Latents(str(tmp_path)).latent_spec() == SPEC
    with pytest.raises(ValueError, match=r"00002\.parquet"):
        Latents(str(tmp_path)).fragments()

"""Seeds that a source says: what each row and sample is made with, and what can't be one."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def job(tmp_path, path, *more):
    return (
        *("encode", "cluster=inline", "vae.name=patches", "vae.side=1", "source=prompts", f"source.path={path}"),
        *("sampling.width=4", "sampling.height=4", f"output={tmp_path / 'out'}", *more),
    )


def test_neighbouring_seeds_share_no_sample(tmp_path, latentmill, rows):
    (tmp_path / "p.csv").write_text("prompt,seed\n" + "".join(f"a red circle,{seed}\n" for seed in range(100, 104)))
    assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", "samples_per_row=4")) == 0, latentmill.said
    made = [row["seed"] for row in rows(tmp_path / "out")]
    assert made[::4] == [100, 101, 102, 103]  # the first sample is what was asked for
    assert len(set(made)) == 16
    assert all(abs(a - b) > 1000 for at, a in enumerate(made) for b in made[at + 1 :] if at % 4 or b not in made[::4])


def test_one_picture_of_each_of_16_samples(tmp_path, latentmill, rows):
    """Through the model: as many pictures as there are pairs of prompt and seed."""
    (tmp_path / "p.csv").write_text("prompt,seed\n" + "".join(f"a red circle,{seed}\n" for seed in range(100, 104)))
    (tmp_path / "two.yaml").write_text(
        "defaults: [job, model: shapes, scheduler: euler, source: prompts, sink: parquet, cluster: inline, _self_]\n"
        "flow: [read, encode, denoise, write]\nsampling: {steps: 1, width: 32, height: 32}\nsamples_per_row: 4\n"
        f"source: {{path: {tmp_path / 'p.csv'}}}\noutput: {tmp_path / 'out'}\n"
    )
    assert latentmill("run", tmp_path / "two.yaml") == 0, latentmill.said
    assert len({str(row["latents"]) for row in rows(tmp_path / "out")}) == 16


WAYS = {
    "minus.csv": "prompt,seed\na,-1\na,-1\n",
    "empty.csv": "prompt,seed\na,\na,\n",
    "float.csv": "prompt,seed\na,-1.0\na,-1\n",
    "minus.jsonl": '{"prompt": "a", "seed": -1}\n{"prompt": "a", "seed": null}\n',
    "minus.parquet": {"prompt": ["a", "a"], "seed": pa.array([-1, None])},
    "float.parquet": {"prompt": ["a", "a"], "seed": pa.array([-1.0, None])},
    "none.parquet": {"prompt": ["a", "a"], "seed": pa.nulls(2)},
    "none.txt": "a\na\n",
}


@pytest.mark.parametrize("name", WAYS)
def test_minus_one_and_null_are_the_row_s_own_seed(name, tmp_path, latentmill, rows):
    path = tmp_path / name
    if isinstance(WAYS[name], str):
        path.write_text(WAYS[name])
    else:
        pq.write_table(pa.table(WAYS[name]), path)
    assert latentmill("run", *job(tmp_path, path, "samples_per_row=2")) == 0, latentmill.said
    own = [8369760948795442883, 490582064016246731, 7281895046868480650, 1331172340992398424]
    assert [row["seed"] for row in rows(tmp_path / "out")] == own
    assert latentmill("plan", *job(tmp_path, path)[:-1], f"output={tmp_path / 'new'}") == 0
    assert "notice" not in latentmill.out


def test_what_is_no_seed_is_an_error_row(tmp_path, latentmill, rows, failed):
    seeds = [2**64 - 1, 2**64, -2, 0, 1.5, 2**63]
    lines = [json.dumps({"prompt": str(seed), "seed": seed}) for seed in seeds]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    assert latentmill("run", *job(tmp_path, tmp_path / "p.jsonl")) == 0, latentmill.said
    assert [row["seed"] for row in rows(tmp_path / "out")] == [2**64 - 1, 0, 2**63]
    assert [(row["row"], row["reason"]) for row in failed(tmp_path / "out")] == [
        (1, "seed must be from 0 to 2^64 - 1, or -1 for the row's own, not 18446744073709551616"),
        (2, "seed must be from 0 to 2^64 - 1, or -1 for the row's own, not -2"),
        (4, "seed must be a whole number, not 1.5"),
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a,7,20", "a,7,20", "a,8,20", "b,7,20", "a,7,20"], "2 of 5 rows have prompt, seed and all else of a row before them"),
        (["a,7,20", "a,7,21", "a,8,20"], None),
        (["a,-1,20", "a,-1,20", "a,,20", "a,,20"], None),
        ([f"a,{n % 99_999},1" for n in range(120_000)], "1 of the first 100,000 rows have prompt, seed and all else"),
    ],
)  # fmt: skip
def test_rows_that_will_be_one_picture_are_counted(lines, said, tmp_path, latentmill):
    (tmp_path / "p.csv").write_text("prompt,seed,steps\n" + "".join(f"{line}\n" for line in lines))
    assert latentmill("plan", *job(tmp_path, tmp_path / "p.csv")) == 0, latentmill.said
    found = [line for line in latentmill.out.splitlines() if line.startswith("notice")]
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(f"notice   source prompts: {said}")


def test_rows_with_pictures_of_their_own_are_not_one_picture(tmp_path, latentmill):
    table = pa.table({"prompt": ["a", "a"], "seed": [7, 7], "image": [b"x", b"y"]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert latentmill("plan", *job(tmp_path, tmp_path / "p.parquet")) == 0
    assert "notice" not in latentmill.out
    (tmp_path / "p.csv").write_text("prompt,seed,image\na,7,0.png\na,7,1.png\na,7,0.png\n")
    assert latentmill("plan", *job(tmp_path, tmp_path / "p.csv")) == 0
    assert "source prompts: 1 of 3 rows have prompt, seed and all else" in latentmill.out

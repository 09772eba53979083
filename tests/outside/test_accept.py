"""``accept``: of a row that is filtered another sample is drawn, and which are accepted hangs on the rows alone."""

import hashlib
import json
import os
import signal
import time
from itertools import count

import pyarrow.parquet as pq
import pytest
from tests import ray_forks

SIEVE = '''
import os

import pyarrow as pa
from latentmill.plugin import Filtered, Stage


class Fourth(Stage):
    """Lets those pass whose seed is a multiple of four, and rejects those whose prompt it can't read."""

    contract = 2

    def __call__(self, batch, reject):
        seeds, prompts = batch.column("seed").to_pylist(), batch.column("prompt").to_pylist()
        good = [seed % 4 == 0 and "ring" not in prompt for seed, prompt in zip(seeds, prompts)]
        for i, (seed, prompt) in enumerate(zip(seeds, prompts)):
            if "ring" in prompt:
                reject(i, "unfit")
            elif seed % 4:
                reject(i, Filtered("no multiple of four", {"rest": seed % 4}))
        return batch.filter(pa.array(good))


class Word(Stage):
    """Filters by the prompt, which is the same whatever is drawn, and fails where there is trouble."""

    contract = 2

    def __call__(self, batch, reject):
        prompts, trouble = batch.column("prompt").to_pylist(), os.environ.get("TROUBLE", "nothing")
        for i, prompt in enumerate(prompts):
            if "cross" in prompt:
                reject(i, Filtered("a cross"))
            elif trouble in prompt:
                reject(i, "trouble")
        return batch.filter(pa.array(["cross" not in prompt and trouble not in prompt for prompt in prompts]))
'''
POINTS = "[latentmill.stages]\nfourth = fourth:Fourth\nword = fourth:Word\n"
PROMPTS = ("a red circle", "a blue star", "a green ring", "a black square", "a yellow cross")
ATTEMPTS = 3
SEED = 1  # of these twelve rows four pass at once, three at the second attempt, two at the third, and three never


def hashed(text):
    """63 bits of it, as docs/input.md says."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def expected(seed=SEED, samples=4, attempts=ATTEMPTS, prompts=PROMPTS):
    """Of each row by its id its (seed, attempt) if one passes, or how many were drawn of one that is filtered, or "failed"."""
    found = {}
    for number, prompt in enumerate(prompts):
        for sample in range(samples):
            row_id = f"{number:09d}-{sample:03d}"
            if "cross" in prompt:
                found[row_id] = 1
                continue
            if "ring" in prompt:
                found[row_id] = "failed"
                continue
            first = hashed(f"{seed}/{row_id}")
            seeds = [first, *(hashed(f"{first}/attempt/{k}") for k in range(1, attempts))]
            found[row_id] = next(((each, k) for k, each in enumerate(seeds) if each % 4 == 0), attempts)
    return found


def became(output):
    """The same of a dataset."""
    found = {}
    for path in sorted((output / "data").glob("*.parquet")):
        table = pq.read_table(path)
        for row in table.select(["row_id", "seed", "attempt"]).to_pylist():
            found[row["row_id"]] = row["seed"], row["attempt"]
        for row in json.loads(table.schema.metadata.get(b"latentmill.filtered", b"[]")):
            found[row["row_id"]] = row["attempts"]
        for row in json.loads(table.schema.metadata[b"latentmill.errors"]):
            found[row["row_id"]] = "failed"
    return found


def shards(output):
    return {path.name: path.read_bytes() for path in sorted((output / "data").glob("*"))}


@pytest.fixture
def job(install, tmp_path):
    """``job(OUT, ...)``: the words of a command of twenty rows in five shards. A prompt is filtered, and another can't be read."""
    install("fourth", POINTS, fourth=SIEVE)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flow = "flow=[read,word,encode,denoise,fourth,write]"

    def job(name, *settings, accept=f"accept={{attempts: {ATTEMPTS}}}", cluster="cluster=inline"):
        size = (
            f"seed={SEED}",
            "sampling.width=16",
            "sampling.height=16",
            "sampling.steps=1",
            "samples_per_row=4",
            "rows_per_shard=4",
        )
        told = (f"source.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / name}", *size, flow)
        return ["run", "denoise", cluster, *told, *([accept] if accept else []), *settings]

    return job


def test_another_sample_is_drawn_of_what_is_filtered_until_one_passes_or_none_is_left(
    job, latentmill, rows, filtered, tmp_path
):
    assert latentmill(*job("out")) == 0, latentmill.said
    wanted = expected()
    assert became(tmp_path / "out") == wanted
    drawn = [each[1] for each in wanted.values() if isinstance(each, tuple)]
    never = [row_id for row_id, each in wanted.items() if each == ATTEMPTS]
    assert {*drawn} == {0, 1, 2} and never  # else it would show nothing
    ok, left_out = len(drawn), len(never) + 4
    assert (
        f"20 of 20 rows: {ok} ok, 4 failed, {left_out} filtered"
        in (latentmill("status", tmp_path / "out"), latentmill.out)[1]
    )
    assert latentmill("verify", tmp_path / "out") == 0
    told = {row["row_id"]: row for row in filtered(tmp_path / "out")}
    assert all(told[row_id]["stage"] == "word" and told[row_id]["scores"] == {} for row_id in list(told)[-4:])
    last = hashed(f"{hashed(f'{SEED}/{never[0]}')}/attempt/{ATTEMPTS - 1}")  # its reason is that of the last sample
    assert (told[never[0]]["reason"], told[never[0]]["scores"]) == ("no multiple of four", {"rest": float(last % 4)})
    plain = [row["row_id"] for row in rows(tmp_path / "out") if row["attempt"] == 0]
    assert latentmill(*job("without", accept="")) == 0
    once = {row["row_id"]: row["seed"] for row in rows(tmp_path / "without")}
    assert once == {row_id: each[0] for row_id, each in wanted.items() if isinstance(each, tuple) and not each[1]}
    assert [*once] == plain and "attempt" not in rows(tmp_path / "without")[0]


def test_the_sample_that_is_accepted_is_what_its_seed_gives(job, latentmill, rows, tmp_path):
    """A job whose source says the seeds that were accepted makes the same latents, byte for byte, at the first attempt."""
    sizes = [f"stages.{name}.batch_size=4" for name in ("read", "word", "encode", "denoise", "fourth", "write")]
    settings = (*sizes, "deterministic=true")
    assert latentmill(*job("out", *settings)) == 0, latentmill.said
    found = rows(tmp_path / "out")
    assert {row["attempt"] for row in found} == {0, 1, 2}
    seeds = {row["row_id"]: row["seed"] for row in found}
    lines = [  # of every row, so that each has its number again, and with it its slot; that of the others is filtered
        json.dumps({"prompt": prompt, "seed": seeds.get(f"{number:09d}-{sample:03d}", 1)})
        for number, prompt in enumerate(PROMPTS)
        for sample in range(4)
    ]
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines))
    again = (*settings, f"source.path={tmp_path / 'seeds.jsonl'}", "samples_per_row=1")
    assert latentmill(*job("again", *again, accept="")) == 0
    same = ("prompt", "seed", "latents")
    assert [[row[name] for name in same] for row in rows(tmp_path / "again")] == [
        [row[name] for name in same] for row in found
    ]


def test_a_seed_of_the_source_is_the_first_attempt_s_and_no_other_row_s(job, latentmill, rows, tmp_path):
    """The second sample's seed is a hash of the given one, and so is the first's second attempt: another hash."""
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "a star", "seed": 5}\n{"prompt": "a star", "seed": 8}')
    given = (f"source.path={tmp_path / 'seeds.jsonl'}", "samples_per_row=2")
    assert latentmill(*job("out", *given, accept="accept={attempts: 40}")) == 0
    found = {row["row_id"]: (row["seed"], row["attempt"]) for row in rows(tmp_path / "out")}
    seeds = {row_id: seed for row_id, (seed, _) in found.items()}
    assert len({*seeds.values()}) == 4 and found["000000001-000"] == (8, 0)
    wanted = next((s, k) for k in count(1) if (s := hashed(f"5/attempt/{k}")) % 4 == 0)
    assert found["000000000-000"] == wanted
    second = int.from_bytes(hashlib.blake2b(b"5/1", digest_size=8).digest(), "little")
    chain = (second if k == 0 else hashed(f"{second}/attempt/{k}") for k in count())
    assert found["000000000-001"] == next((seed, k) for k, seed in enumerate(chain) if seed % 4 == 0)


def test_deterministic_the_same_bytes_after_a_kill_and_with_two_drivers(job, forks, tmp_path):
    settings = (
        "deterministic=true",
        "samples_per_row=2",
        *(f"stages.{name}.batch_size=3" for name in ("read", "word", "encode", "denoise")),
    )
    site, log = [tmp_path / "site"], tmp_path / "log"
    assert forks.run(job("alone", *settings), log, path=site) == 0, log.read_text()
    alone = shards(tmp_path / "alone")
    assert became(tmp_path / "alone") == expected(samples=2) and len(alone) == 3

    for number, place in enumerate(("denoise", "data synced")):
        at = tmp_path / f"at-{number}"
        at.mkdir()
        failpoint = f"{place}:kill:{at}"
        assert forks.run(job("killed", *settings), log, path=site, LATENTMILL_FAILPOINT=failpoint) == -9, (
            log.read_text()
        )
        assert shards(tmp_path / "killed").items() <= alone.items()
    assert forks.run(job("killed", *settings), log, path=site) == 0, log.read_text()
    assert shards(tmp_path / "killed") == alone

    (tmp_path / "pause").mkdir()
    first = forks.begin(
        job("shared", *settings),
        tmp_path / "first",
        path=site,
        LATENTMILL_FAILPOINT=f"published:pause:{tmp_path / 'pause'}",
    )
    try:
        while not (tmp_path / "pause" / "published").exists():
            assert forks.runs(first), (tmp_path / "first").read_text()
            time.sleep(0.01)
        second = forks.begin(job("shared", *settings), tmp_path / "second", path=site)
        (tmp_path / "pause" / "go").touch()
    except BaseException:
        os.kill(first, signal.SIGKILL)
        raise
    assert [forks.end(first), forks.end(second)] == [0, 0], (tmp_path / "second").read_text()
    assert shards(tmp_path / "shared") == alone


def test_on_ray_with_several_workers_the_same_rows(job, latentmill, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    there = ray_forks.Cluster(num_cpus=2)
    try:
        few = [f"stages.{name}.num_cpus=0.1" for name in ("read", "word", "encode", "denoise", "fourth", "write")]
        several = [
            "stages.denoise.replicas=2",
            "stages.fourth.replicas=2",
            "placement=split",
            f"cluster.address={there.address}",
        ]
        assert latentmill(*job("out", *few, *several, cluster="cluster=ray")) == 0, latentmill.said
    finally:
        there.shutdown()
    assert became(tmp_path / "out") == expected()


def test_it_is_part_of_what_the_dataset_is_where_it_is_said(job, latentmill, tmp_path):
    assert latentmill(*job("out")) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["config"]["accept"] == {"attempts": ATTEMPTS}
    assert latentmill(*job("out", accept="accept={attempts: 4}")) == 2
    assert f"accept.attempts: {ATTEMPTS} -> 4" in latentmill.err
    assert latentmill("plan", *job("other")[1:]) == 0
    assert f"accept   of each row up to {ATTEMPTS} samples, until one is not filtered\n" in latentmill.out
    hashes = set()
    for accept in ("", "accept=null", "accept={attempts: 1}", "accept={attempts: 2}", "accept.attempts=2"):
        assert latentmill("plan", *job("other", accept=accept)[1:], "--json") == 0
        hashes.add(json.loads(latentmill.out)["hash"])
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("accept", "says"),
    [
        ("{attempts: 0}", "accept.attempts must be 1 or more, the samples of a row that are drawn at most, not 0"),
        (
            "{attempts: many}",
            "accept.attempts must be 1 or more, the samples of a row that are drawn at most, not 'many'",
        ),
        (
            "{}",
            "accept must say attempts, the samples of a row that are drawn at most, or rows, how many rows are wanted, or both",
        ),
        ("{atempts: 3}", "there is no key accept.atempts (did you mean 'attempts'?)"),
        (
            "{rows: 0, attempts: 3}",
            "accept.rows must be 1 or more, the accepted rows that the dataset ends with, not 0",
        ),
    ],
)
def test_what_accept_can_t_be_is_one_line(job, latentmill, accept, says, tmp_path):
    assert latentmill(*job("out", accept=f"accept={accept}")) == 2
    assert latentmill.err == f"latentmill: denoise: {says}\n" and not (tmp_path / "out").exists()


def test_a_job_without_noise_has_nothing_to_draw(latentmill, patches, pictures, tmp_path):
    told = (f"source.path={pictures}", f"output={tmp_path / 'out'}", "accept={attempts: 3}")
    assert latentmill("run", "encode", *patches, *told) == 2
    assert latentmill.err == (
        "latentmill: encode: accept draws noise anew for rows that are filtered, and no stage of flow makes any, as denoise does: "
        "['read', 'encode', 'write']\n"
    )

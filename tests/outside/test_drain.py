"""A run that is told to stop keeps what is half done, and the next goes on with it: nothing is computed twice, and no byte is another."""

import json
import os
import random
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from tests import ray_forks
from tests.outside.drain_parts import CODE, POINTS, Counted

import latentmill as package
from latentmill import storage

CTRL_C = signal.SIGINT


@pytest.fixture
def counted(latentmill, install, tmp_path):
    install("acme", POINTS, acme_counts=CODE)
    return Counted(latentmill, tmp_path)


def test_ctrl_c_throws_nothing_away(counted):
    whole, made = counted.run("whole"), [(0, 0)]
    for when in (1, 40, 97, 150, 230):  # of the 240 evaluations of all its runs together
        counted.stop(CTRL_C, when - sum(evaluated for _, evaluated in made))
        made.append(counted.run("out", code=130))
        assert counted.kept("out") and "Ctrl-C: what is half done is kept" in counted.latentmill.err
        assert "half_done (" in counted.latentmill.out and "thrown away" not in counted.latentmill.out
        there = len(counted.files("out")), len(counted.kept("out"))
        counted.latentmill("status", counted.place("out"))
        assert f"{there[0]} of 3 shards, and {there[1]} half done: " in counted.latentmill.out
    made.append(counted.run("out"))
    assert tuple(map(sum, zip(*made))) == whole
    assert counted.files("out") == counted.files("whole") and not counted.kept("out")


def test_a_notice_lets_what_has_begun_go_on_for_a_while_and_what_follows_it_ends_that(latentmill, install, tmp_path):
    install("acme", POINTS, acme_counts=CODE)
    counted = Counted(latentmill, tmp_path, rows=60)
    whole = counted.run("whole")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        counted.stop(number, 90)
        first = counted.run(number.name, "grace=10m", code=130)
        assert f"{number.name}: what has begun goes on for 590 s" in latentmill.err
        assert 90 < first[1] < whole[1] and first[1] % 40 == 0, (
            "batches that were read were finished, and no more were read"
        )
        second = counted.run(number.name)
        assert first[1] + second[1] == whole[1]
        assert counted.files(number.name) == counted.files("whole")

    # A second signal ends at once, and it is said what that costs.
    counted.stop(signal.SIGTERM, 90)
    counted.stop(signal.SIGTERM, 99, name="stop again")
    first = counted.run("out", "grace=10m", code=130)
    assert first[1] < 110 and "thrown away   all that was done" in latentmill.out and not counted.kept("out")
    before = counted.files("out")

    # But SIGTERM after SIGUSR1, as Slurm sends them, hands over: the one comes some minutes before the end, the other at it.
    counted.stop(signal.SIGUSR1, 90)
    counted.stop(signal.SIGTERM, 99, name="stop again")
    first = counted.run("out", "grace=10m", code=130)
    assert first[1] < 110 and counted.kept("out") and "thrown away" not in latentmill.out
    second = counted.run("out")
    assert first[1] + second[1] == whole[1] - 10 * 8 * len(before)
    assert counted.files("out") == counted.files("whole")


def test_samples_that_are_drawn_anew_go_on_with_the_attempt_they_are_at(latentmill, install, tmp_path, monkeypatch):
    """Some rows are filtered and drawn again, some can't be done, and a stop comes amid all of that."""
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    install("acme", f"{POINTS}[latentmill.stages]\nthird = acme_third:Third\n", acme_counts=CODE, acme_third=THIRD)
    counted = Counted(latentmill, tmp_path, rows=12)
    lines = "".join(f"row {row}{' unfit' * (row == 5)}{' raises' * (row == 9)}\n" for row in range(12))
    (tmp_path / "prompts.txt").write_text(lines)
    flow = ("flow=[read,encode,denoise,third,decode,write]", "accept={attempts: 3}", "stages.third.batch_size=3")
    for more in (("sampling.steps=3",), ("sampling.steps=3", "deterministic=true")):
        job = (*flow, *more)
        whole, name = counted.run(f"whole {len(more)}", *job), f"out {len(more)}"
        failed, filtered = (counted.latentmill.out.count(what) for what in ("2 rows, each", "filtered"))
        assert failed and filtered
        for share in (7, 4, 3):
            counted.stop(CTRL_C, whole[1] // share)
            counted.run(name, *job, code=130)
        counted.run(name, *job)
        assert counted.files(name) == counted.files(f"whole {len(more)}") and not counted.kept(name)


THIRD = """
import os

import pyarrow as pa
from acme_counts import count
from latentmill.plugin import Filtered, Stage


class Third(Stage):
    contract = 2

    def __call__(self, batch, reject):
        count(os.environ["NOTES"], "evaluated", len(batch))
        seeds, prompts = batch.column("seed").to_pylist(), batch.column("prompt").to_pylist()
        if any("raises" in prompt for prompt in prompts):
            raise ValueError("not this one")
        for i, (seed, prompt) in enumerate(zip(seeds, prompts)):
            if "unfit" in prompt:
                reject(i, "unfit")
            elif seed % 3:
                reject(i, Filtered("no multiple of three", {"rest": seed % 3, "none": float("nan")}))
        return batch.filter(pa.array(["unfit" not in p and s % 3 == 0 for s, p in zip(seeds, prompts)]))
"""


def test_every_scheduler_goes_on_where_it_was_in_a_deterministic_job(counted):
    """Three stops in one run, over rows of eight schedulers, of different steps, some with guidance."""
    names = "dpmpp_2m dpmpp_2m_sde unipc euler_ancestral heun er_sde sa_solver euler".split()
    lines = [
        {"prompt": f"row {k}", "scheduler": names[k % len(names)], "steps": 3 + k % 5, "guidance_scale": 1.0 + k % 3}
        for k in range(24)
    ]
    path = counted.folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ("deterministic=true", f"source.path={path}", "sampling.guidance_scale=4")
    whole = counted.run("whole", *job)
    for when in (31, 77, 60):
        counted.stop(CTRL_C, when)
        counted.run("out", *job, code=130)
    counted.run("out", *job)
    assert counted.files("out") == counted.files("whole") and whole[1] > 31 + 77 + 60
    assert "24 rows" in counted.latentmill.out and "failed" not in counted.latentmill.out


DAMAGES = {
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "its end": lambda content: content[: len(content) // 2],
    "all": lambda content: b"",
    "its beginning": lambda content: b"x" + content[1:],
}


def test_a_file_that_is_damaged_is_passed_over_and_its_rows_are_made_anew(counted):
    whole = counted.run("whole")
    counted.stop(CTRL_C, 97)
    first = counted.run("stopped", code=130)
    count = len(counted.kept("stopped"))
    for damage, change in DAMAGES.items():
        shutil.copytree(counted.place("stopped"), counted.place(damage))
        counted.damage(damage, change)
        second = counted.run(damage)
        assert counted.latentmill.err.count("is passed over, and its rows are made anew: it is") == count
        assert first[1] + second[1] > whole[1] and counted.files(damage) == counted.files("whole")
        assert not counted.kept(damage)


def test_a_file_of_another_shard_or_plan_is_passed_over(counted):
    counted.run("whole")
    counted.stop(CTRL_C, 97)
    counted.run("other", "seed=7", code=130)
    counted.stop(CTRL_C, 97)
    counted.run("out", code=130)
    half_done = counted.place("out") / "half_done"
    for name in counted.kept("other"):
        shard = name[:5]
        for there in half_done.glob(f"{shard}-*"):
            there.write_bytes((counted.place("other") / "half_done" / name).read_bytes())
    counted.run("out")
    assert "made anew: it is of another plan" in counted.latentmill.err
    assert counted.files("out") == counted.files("whole")


def test_what_other_versions_of_libraries_left_is_made_anew(latentmill, install, tmp_path):
    """No row is made by one version to its middle, and by another from there."""
    install("acme", POINTS, acme_counts=f"{CODE}\n\nCounts.libraries = ('acme-numbers',)\n")
    install("acme-numbers", "")
    counted = Counted(latentmill, tmp_path)
    whole = counted.run("whole")
    counted.stop(CTRL_C, 97)
    first = counted.run("out", code=130)
    site = tmp_path / "site"
    (site / "acme_numbers-1.0.dist-info").rename(site / "old")
    install("acme-numbers", "", version="1.1")
    second = counted.run("out")
    assert "rows are made anew: it was written with acme-numbers 1.0\n" in latentmill.err
    assert first[1] + second[1] > whole[1] and counted.files("out") == counted.files("whole")


def test_a_disk_that_is_full_as_it_stops_is_said_and_costs_what_was_half_done(counted, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "faults" / "actions")
    counted.run("whole")
    counted.stop(CTRL_C, 97)
    monkeypatch.setenv("LATENTMILL_FAILPOINT", f"half_done synced:ENOSPC:{counted.folder}")
    counted.run("out", code=130)
    assert "No space left on device" in counted.latentmill.out and "thrown away" in counted.latentmill.out
    monkeypatch.delenv("LATENTMILL_FAILPOINT")
    counted.run("out")
    assert counted.files("out") == counted.files("whole")


def test_two_drivers_take_up_each_file_once(counted):
    whole = counted.run("whole")
    counted.stop(CTRL_C, 97)
    first = counted.run("out", code=130)
    before = counted.computed()
    job = package.load_job("txt2img", [*counted.settings, f"output={counted.place('out')}"])
    drivers = [threading.Thread(target=package.run, args=(job,)) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert first[1] + counted.computed()[1] - before[1] == whole[1]
    assert counted.files("out") == counted.files("whole") and not counted.kept("out")


def test_what_is_half_done_of_a_dataset_that_has_grown_is_taken_up(counted):
    counted.stop(CTRL_C, 97)
    first = counted.run("out", code=130)
    prompts = counted.folder / "prompts.txt"
    prompts.write_text(prompts.read_text() + "one more\nand one\n")
    second = counted.run("out", "--grow")
    assert first[1] + second[1] == 26 * 10 and len(counted.files("out")) == 4
    assert counted.latentmill("verify", counted.place("out")) == 0 and "26 rows ok" in counted.latentmill.out


def test_failed_rows_are_tried_again_and_taken_out_shards_begin_anew(counted):
    """What was kept of a shard is not taken up once the shard has been in the dataset."""
    counted.run("whole")
    counted.stop(CTRL_C, 97)
    counted.run("out", code=130)
    kept = {name: (counted.place("out") / "half_done" / name).read_bytes() for name in counted.kept("out")}
    counted.run("out")
    for name, content in kept.items():  # as a driver leaves them that is killed before it deletes them
        (counted.place("out") / "half_done" / name).write_bytes(content)
    next((counted.place("out") / "data").glob("00000*")).write_bytes(b"damaged")
    assert counted.latentmill("verify", counted.place("out"), "--repair") == 1
    assert not [name for name in counted.kept("out") if name.startswith("00000")]
    counted.run("out")
    assert counted.files("out") == counted.files("whole") and not counted.kept("out")


def test_in_a_store_it_is_the_same(counted, bucket):
    whole = counted.run("whole")
    output = f"{bucket}/out"
    counted.stop(CTRL_C, 97)
    first = counted.run(output, code=130)
    store = storage.at(output)
    assert store.names("half_done") and counted.latentmill("verify", output) == 0, counted.latentmill.said
    second = counted.run(output)
    assert (first[0] + second[0], first[1] + second[1]) == whole and not store.names("half_done")
    assert {name: store.read(f"data/{name}") for name in store.names("data")} == counted.files("whole")


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    there = ray_forks.Cluster(num_cpus=4)
    yield ["cluster=ray", f"cluster.address={there.address}", *(f"stages.{name}.num_cpus=0.1" for name in STAGES)]
    there.shutdown()


STAGES = ("read", "encode", "denoise", "decode", "write")


def test_on_a_cluster_it_is_the_same(latentmill, install, tmp_path, cluster, monkeypatch):
    """Both signals, and a run that takes up what one left and is stopped itself."""
    install("acme", POINTS, acme_counts=CODE)
    counted = Counted(latentmill, tmp_path, rows=48)
    whole, made = counted.run("whole"), []
    for number, when in ((CTRL_C, 97), (signal.SIGTERM, 70)):
        counted.stop(number, when)
        made.append(counted.run("out", *cluster, "grace=0", code=130))
        assert counted.kept("out") and "thrown away" not in counted.latentmill.out
    made.append(counted.run("out", *cluster))
    assert tuple(map(sum, zip(*made))) == whole == (48, 480)
    assert counted.files("out") == counted.files("whole") and not counted.kept("out")

    # Before it drives, too: Ray, as it began, has put a handler of its own for SIGTERM.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "faults" / "actions")
    for number in (CTRL_C, signal.SIGTERM):
        (counted.folder / number.name).mkdir()
        monkeypatch.setenv("LATENTMILL_FAILPOINT", f"planning:{number.name}:{counted.folder / number.name}")
        counted.run(f"early {number.name}", *cluster, code=130)


@pytest.mark.skipif(
    "STOPS" not in os.environ, reason="takes minutes: STOPS=10 makes ten runs in each place, and prints"
)
@pytest.mark.parametrize("place", ("inline", "Ray"))
def test_random_stops_lose_under_five_percent_of_what_is_in_flight(
    place, latentmill, install, tmp_path, request, capsys
):
    """Against a second signal at the next step, after which all is lost that is in no shard: as with every stop before there was a drain."""
    install("acme", POINTS, acme_counts=CODE)
    counted = Counted(latentmill, tmp_path, rows=96)
    size = ["rows_per_shard=24", *(request.getfixturevalue("cluster") if place == "Ray" else [])]
    whole, dice = counted.run("whole", *size)[1], random.Random(0)
    flying, lost = Counter(), Counter()
    for number in range(int(os.environ["STOPS"])):
        when = dice.randrange(20, whole - 60)
        for how in (
            ("drained", "ended at once") if place == "inline" else ("drained",)
        ):  # where two signals come one by one
            output = f"{how} {number}"
            counted.stop(signal.SIGTERM, when)
            if how != "drained":
                counted.stop(signal.SIGTERM, when + 1, name="stop again")
            grace = "grace=0" if how == "drained" else "grace=10m"
            first = counted.run(output, *size, grace, code=130)[1]
            flying[how] += first - 10 * 24 * len(counted.files(output))
            lost[how] += first + counted.run(output, *size)[1] - whole
            assert counted.files(output) == counted.files("whole")
    with capsys.disabled():
        for how in flying:
            print(
                f"{place}, {how}: {lost[how]} of {flying[how]} evaluations in flight lost, {lost[how] / flying[how]:.1%}"
            )
    assert lost["drained"] < 0.05 * flying["drained"]
    assert place == "Ray" or lost["ended at once"] == flying["ended at once"]

"""A shard is committed once, whole, with its errors; and nothing else of it is ever to be seen."""

import json
import multiprocessing
import resource
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentmill import registry, storage
from latentmill.batch import from_dicts, with_latents
from latentmill.columns import Columns
from latentmill.dataset import Dataset
from latentmill.parts import declarations
from latentmill.plugin import LatentSpec, StageContext, tensors
from latentmill.shards import done_shards
from latentmill.sinks.parquet import Parquet
from latentmill.sources.prompts import Prompts
from latentmill.text import one_line
from latentmill_example import Patches

SPEC = LatentSpec(channels=4, downscale=4, scale=0.5, shift=0.25, dtype="float16", fingerprint="abc")


@dataclass
class Plan:
    """Ten rows, four a shard."""

    flow: tuple[str, ...] = ("read", "encode", "denoise", "decode", "write")
    spec: LatentSpec | None = SPEC
    size: tuple[int | None, int | None] = (8, 8)
    config: dict = field(init=False)
    columns = Columns()

    def __post_init__(self):
        self.config = {
            "flow": list(self.flow),
            "source": {"name": "prompts"},
            "sampling": {"until": 0.0, "width": self.size[0], "height": self.size[1]},
        }

    def hash_of(self, shard):
        return "abc"

    def shard_rows(self, shard):
        return range(shard * 4, min(shard * 4 + 4, 10))

    def row_id(self, row):
        return f"{row:09d}"


def writing(sink, store, plan):
    """A stage that commits for ``plan``, with what the stages of its flow declare."""
    stages = {name: registry.build("stage", {"name": name}) for name in plan.flow}
    source = Prompts("no.txt")
    build = {"source": source, "vae": Patches()}.__getitem__
    declared = declarations(stages, lambda name: {"sampling": plan.config["sampling"], "build": build})
    write = stages["write"]
    write.prepare(
        StageContext(
            declared[-1],
            before=declared[:-1],
            plan=plan,
            sampling=plan.config["sampling"],
            build=lambda kind: sink,
            open_output=lambda: store,
        )
    )
    return write


def scalars(numbers):
    same = {
        "negative_prompt": "",
        "guidance_scale": 4.0,
        "strength": 1.0,
        "scheduler": "euler",
        "width": 8,
        "height": 8,
    }
    return from_dicts(
        [{"row": n, "row_id": f"{n:09d}", "prompt": f"p{n}", "seed": n, "steps": 20, **same} for n in numbers]
    )


def pictures(numbers, side=8):
    image = torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, side, side, 3)
    return tensors.with_tensor(scalars(numbers), "image", image)


def failed(row, reason="no", stage="read"):
    return {"row": row, "stage": stage, "reason": reason}


def commit(output, shard, batches, errors=(), plan=None):
    write = writing(Parquet(), storage.at(str(output)), plan or Plan())
    return write.commit(shard, [write(batch, None) for batch in batches], list(errors))


def shown(output):
    """Every file of an output."""
    return sorted(str(path.relative_to(output)) for path in Path(output).rglob("*") if path.is_file())


def errors_of(output, shard):
    lines = (Path(output) / "errors" / f"{shard:05d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load(output, **options):
    files = str(Path(output) / "data" / "*.parquet")
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=Path(output) / "cache", **options
    )


def test_a_shard_is_its_rows_in_the_plan_s_order(tmp_path):
    assert commit(tmp_path, 0, [pictures([2]), pictures([0, 3], side=16), pictures([1])]) is True
    assert shown(tmp_path) == ["data/00000.parquet"]
    table = pq.read_table(tmp_path / "data" / "00000.parquet")
    assert table.column("prompt").to_pylist() == ["p0", "p1", "p2", "p3"]
    assert "row" not in table.column_names
    assert table.schema.metadata[b"latentmill.plan"] == b"abc"
    data = load(tmp_path)
    assert [row["image"].getpixel((0, 0)) for row in data] == [(n, n, n) for n in range(4)]
    assert [row["image"].size for row in data] == [(16, 16), (8, 8), (8, 8), (16, 16)]


def test_failed_rows_are_in_the_error_table_with_stage_and_reason(tmp_path):
    errors = [failed(7, "late", "decode"), failed(5, "the word \u2728 is not known, \ud800")]
    assert commit(tmp_path, 1, [pictures([4, 6])], errors) is True
    assert shown(tmp_path) == ["data/00001.parquet", "errors/00001.jsonl"]
    assert errors_of(tmp_path, 1) == [
        {"row": 5, "row_id": "000000005", "stage": "read", "reason": "the word \u2728 is not known, \\ud800"},
        {"row": 7, "row_id": "000000007", "stage": "decode", "reason": "late"},
    ]
    assert "\u2728" in (tmp_path / "errors" / "00001.jsonl").read_text(encoding="utf-8")


def test_the_order_of_arrival_leaves_no_trace(tmp_path):
    for name, batches in (("a", [pictures([0, 1, 2])]), ("b", [pictures([2]), pictures([0]), pictures([1])])):
        commit(tmp_path / name, 0, batches, [failed(3)])
    a, b = ((tmp_path / name / "data" / "00000.parquet").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("numbers", "errors", "wrong"),
    [
        ([0, 1, 2], [], r"1 missing \(3\)"),
        ([0, 1, 2, 3], [3], r"1 twice \(3\)"),
        ([0, 1, 2, 2], [3], r"1 twice \(2\)"),
        ([0, 1, 2, 3, 4], [], r"1 foreign \(4\)"),
        ([], [0, 0, 1, 9], r"2 missing \(2, 3\), 1 twice \(0\), 1 foreign \(9\)"),
    ],
)
def test_a_shard_that_is_not_what_was_planned_is_never_published(tmp_path, numbers, errors, wrong):
    with pytest.raises(RuntimeError, match=wrong):
        commit(tmp_path, 0, [pictures(numbers)] if numbers else [], [failed(row) for row in errors])
    assert shown(tmp_path) == []


def test_who_comes_second_leaves_rows_and_errors_of_the_first(tmp_path):
    assert commit(tmp_path, 0, [pictures([0, 1, 2])], [failed(3, "mine")]) is True
    before = {name: (tmp_path / name).read_bytes() for name in shown(tmp_path)}
    assert commit(tmp_path, 0, [pictures([1, 2, 3])], [failed(0, "yours")]) is False
    assert commit(tmp_path, 0, [pictures([0, 1, 2, 3])]) is False
    assert {name: (tmp_path / name).read_bytes() for name in shown(tmp_path)} == before


def test_errors_lost_between_the_two_files_are_made_again(tmp_path):
    commit(tmp_path, 0, [pictures([0, 1])], [failed(2), failed(3)])
    commit(tmp_path, 2, [pictures([8, 9])])
    before = errors_of(tmp_path, 0)
    (tmp_path / "errors" / "00000.jsonl").unlink()
    for shard in (0, 2):
        Dataset(storage.at(str(tmp_path)), Plan(), Parquet()).make_copies(shard)
    assert errors_of(tmp_path, 0) == before
    assert shown(tmp_path) == ["data/00000.parquet", "data/00002.parquet", "errors/00000.jsonl"]


def test_a_reason_holds_nothing_that_the_job_took_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2-and-more")
    plan = Plan()
    plan.config["vae"] = {"name": "remote", "token": "${oc.env:SECRET}"}
    commit(tmp_path, 1, [pictures([4, 5, 6])], [failed(7, "401 for hunter2-and-more")], plan)
    [error] = errors_of(tmp_path, 1)
    assert error["reason"] == "401 for ${oc.env:SECRET}"
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file())


def test_a_reason_is_one_line_and_not_a_long_one():
    assert one_line("  said\nthe plugin\x1b[2J \udcff, ö\n") == r"said the plugin\x1b[2J \udcff, ö"
    assert one_line("x" * 1000) == "x" * 1000
    assert one_line("x" * 3_000_000) == "x" * 990 + " [cut off]"


@pytest.mark.parametrize(
    ("flow", "batch"),
    [
        (("read", "encode", "denoise", "decode", "write"), pictures([0, 1, 2, 3])),
        (("read", "decode", "write"), pictures([0, 1, 2, 3])),
        (
            ("read", "encode", "decode", "write"),
            tensors.with_tensor(
                scalars([0, 1, 2, 3]).append_column("psnr", pa.array([30.0] * 4)),
                "image",
                torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
            ),
        ),
        (("read", "encode", "write"), with_latents(scalars([0, 1, 2, 3]), torch.zeros(4, 4, 2, 2).half(), SPEC)),
        (
            ("read", "encode", "denoise", "write"),
            with_latents(scalars([0, 1, 2, 3]), torch.zeros(4, 4, 2, 2).half(), SPEC),
        ),
    ],
)
def test_a_shard_in_which_all_rows_failed_fits_beside_the_others(tmp_path, flow, batch):
    commit(tmp_path, 0, [batch], plan=Plan(flow))
    commit(tmp_path, 1, [], [failed(row) for row in range(4, 8)], Plan(flow))
    full, empty = (pq.read_schema(tmp_path / "data" / f"0000{shard}.parquet") for shard in range(2))
    assert empty.equals(full)
    assert len(load(tmp_path)) == 4
    assert len(errors_of(tmp_path, 1)) == 4


def test_latents_whose_size_only_the_pictures_know_can_all_fail(tmp_path):
    plan = Plan(("read", "encode", "write"), size=(None, None))
    assert commit(tmp_path, 2, [], [failed(8), failed(9)], plan) is True
    assert pq.read_table(tmp_path / "data" / "00002.parquet").num_rows == 0


def test_done_is_what_lies_in_data(tmp_path):
    assert done_shards(storage.at(str(tmp_path)), ".parquet") == set()
    commit(tmp_path, 2, [pictures([8, 9])])
    (tmp_path / "data" / "123456.parquet").touch()
    (tmp_path / "data" / "notes.txt").touch()
    (tmp_path / "data" / "00007.parquet.partial").touch()
    (tmp_path / "data" / "00008.parquet~").touch()
    (tmp_path / "data" / "00009").touch()
    (tmp_path / "data" / "00010.png").touch()
    (tmp_path / "data" / "11.parquet").touch()
    (tmp_path / "data" / "0000012.parquet").touch()
    (tmp_path / "data" / "00001 (1).parquet").touch()
    (tmp_path / "data" / "._00001.parquet").touch()
    (tmp_path / "data" / ".00001.parquet.swp").touch()
    assert done_shards(storage.at(str(tmp_path)), ".parquet") == {2, 123456}


class Forgetful(Parquet):
    """Loses the last row."""

    def write(self, path, shard, metadata):
        super().write(path, shard.slice(0, len(shard) - 1), metadata)


class Damaging(Parquet):
    """Writes a file with a damaged page, as a bad disk would."""

    def write(self, path, shard, metadata):
        super().write(path, shard, metadata)
        place = pq.read_metadata(path).row_group(0).column(0).data_page_offset + 20
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("sink", [Forgetful(), Damaging()])
def test_what_does_not_read_back_is_never_published(tmp_path, sink):
    write = writing(sink, storage.at(str(tmp_path)), Plan())
    with pytest.raises((RuntimeError, ValueError)):
        write.commit(0, [write(pictures([0, 1, 2, 3]), None)], [])
    assert shown(tmp_path) == []


def test_of_racing_threads_one_commits_and_its_errors_are_the_errors(tmp_path):
    barrier, outcomes = threading.Barrier(4), {}

    def race(me):
        write = writing(Parquet(), storage.at(str(tmp_path)), Plan())
        packed = [write(pictures([row for row in range(4) if row != me]), None)]
        barrier.wait()
        outcomes[me] = write.commit(0, packed, [failed(me, f"driver {me}")])

    threads = [threading.Thread(target=race, args=[me]) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [me for me, first in outcomes.items() if first]
    assert len(outcomes) == 4
    assert shown(tmp_path) == ["data/00000.parquet", "errors/00000.jsonl"]
    ids = pq.read_table(tmp_path / "data" / "00000.parquet").column("row_id").to_pylist()
    assert ids == [f"{row:09d}" for row in range(4) if row != winner]
    assert [(e["row"], e["reason"]) for e in errors_of(tmp_path, 0)] == [(winner, f"driver {winner}")]


class Long(Plan):
    """Twenty shards."""

    def shard_rows(self, shard):
        return range(shard * 4, shard * 4 + 4)


def drive(output, me, go, outcomes):
    write = writing(Parquet(), storage.at(output), Long())
    go.wait()
    for shard in range(20):
        numbers = list(Long().shard_rows(shard))
        bad = numbers.pop(me)
        outcomes.send((shard, write.commit(shard, [write(pictures(numbers), None)], [failed(bad, f"driver {me}")])))


def received(pipe, most=20):
    """What has come, until its sender is no more."""
    found = {}
    with suppress(EOFError):
        while len(found) < most:
            found.update([pipe.recv()])
    return found


def test_of_racing_processes_one_commits_each_shard_and_one_killed_does_no_harm(tmp_path):
    fork = multiprocessing.get_context("fork")
    go, drivers, outcomes = fork.Barrier(2), [], []
    for me in range(2):
        receiving, sending = fork.Pipe(duplex=False)
        drivers.append(fork.Process(target=drive, args=(str(tmp_path), me, go, sending)))
        drivers[-1].start()
        sending.close()
        outcomes.append(receiving)
    before = received(outcomes[1], 5)
    drivers[1].kill()
    first, second = (received(pipe) for pipe in outcomes)
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0, -signal.SIGKILL]
    assert done_shards(storage.at(str(tmp_path)), ".parquet") == set(range(20)) == first.keys()
    for shard in range(20):
        Dataset(storage.at(str(tmp_path)), Plan(), Parquet()).make_copies(shard)
        [error] = errors_of(tmp_path, shard)
        winner = error["row"] - shard * 4
        assert error["reason"] == f"driver {winner}"
        for me, found in enumerate((first, before | second)):
            assert found.get(shard) in (None, me == winner)
        ids = pq.read_table(tmp_path / "data" / f"{shard:05d}.parquet").column("row_id").to_pylist()
        assert ids == [f"{row:09d}" for row in range(shard * 4, shard * 4 + 4) if row - shard * 4 != winner]


def test_a_full_disk_leaves_nothing_but_the_error(tmp_path):
    """A limit on the size of files stands for it."""
    noise = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write = writing(Parquet(), storage.at(str(tmp_path)), Plan())
    packed = [write(tensors.with_tensor(scalars([0, 1, 2, 3]), "image", noise), None)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write.commit(0, packed, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert shown(tmp_path) == []
    assert write.commit(0, packed, []) is True

"""Which rows go in a call of the network: calls are full, rows take turns, and one that fails costs its batch alone."""

import importlib.util
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tests.denoising import SCHEDULERS, Gaussian, batch, denoise, denoise_with

from latentmill.batch import FixedShape
from latentmill.plugin import tensors
from latentmill.schedulers.euler import Euler
from latentmill.stages.denoise import MAX_WAIT
from latentmill.workers.worker import StageWork, Worker


def test_of_a_batch_that_can_t_be_taken_in_no_row_goes_on():
    """Memory may run out at its last row."""
    asked = []

    def schedulers(name):
        asked.append(name)
        if len(asked) == 2 * 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SCHEDULERS[name]

    stage = denoise_with(Gaussian(), schedulers, "trailing", 16)
    stage.load(torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        stage.take(batch([0, 1, 3, 4]), lambda i, reason: pytest.fail(reason))
    assert len(asked) == 8 and stage.moving == {}


def test_a_row_without_guidance_costs_one_evaluation_and_a_finished_one_none():
    denoiser = Gaussian()
    table = pa.concat_tables(
        [
            batch([0], steps=3, guidance_scale=2.0, strength=1.0, scheduler="euler"),
            batch([1], steps=1, guidance_scale=1.0, strength=1.0, scheduler="euler"),
        ]
    )
    denoise(table, denoiser=denoiser)
    assert denoiser.evaluated == [3, 2, 2]


def test_a_finished_row_s_place_is_taken_at_once_and_a_call_is_counted_in_evaluations():
    """Four places: a guided row takes two, one that doesn't fit lets a smaller one behind it go first."""
    denoiser = Gaussian()
    stage = denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", 4)
    plain = {"strength": 1.0, "scheduler": "euler"}
    first = stage.take(batch([1], steps=5, guidance_scale=1.0, **plain), pytest.fail)
    second = stage.take(batch([0, 2, 3], steps=2, guidance_scale=2.0, **plain), pytest.fail)
    third = stage.take(batch([5], steps=3, guidance_scale=1.0, **plain), pytest.fail)
    order = []
    while not (first.done and second.done and third.done):
        stage.advance()
        order.append([row.at for visit in (first, second, third) for row in visit.rows])
    assert order == [
        [1, 1, 0, 0, 1], [2, 2, 0, 0, 2], [3, 2, 1, 0, 3], [4, 2, 2, 0, 3], [5, 2, 2, 1, 3], [5, 2, 2, 2, 3],
    ]  # fmt: skip
    assert denoiser.evaluated == [4, 4, 4, 3, 3, 2]
    assert stage.moving == {} and stage.running == {}


def test_whoever_goes_when_a_row_is_the_same():
    """Rows that wait in the middle, in calls of every size, end as if they had been alone."""
    alone = {n: denoise(batch([n]))[n] for n in range(12)}
    for places in (1, 2, 3, 5, 8, 100):
        stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", places)
        visits = [stage.take(batch(numbers), pytest.fail) for numbers in ([0, 1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11])]
        while not all(visit.done for visit in visits):
            stage.advance()
        found = {
            number: tensors.from_arrow(part, "latents")[i]
            for visit in visits
            for part in stage.finish(visit)
            for i, number in enumerate(part.column("row").to_pylist())
        }
        assert found.keys() == alone.keys()
        for n, latents in found.items():
            assert torch.allclose(latents, alone[n], rtol=1e-5, atol=1e-6), (places, n)


def test_calls_are_full(monkeypatch):
    """700 rows of 8 to 50 steps, half of them with guidance, through the flow: evaluations / (calls x places); of more rows it is more."""
    path = Path(__file__).parents[1] / "benchmarks" / "denoise.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("bench_denoise", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert bench.fullness(bench.mixed(700, ["euler"])) >= 0.97


def test_batches_of_several_threads_are_moved_together():
    """As Ray calls a worker: the second batch comes while the first is in the network, and joins it at the next step."""
    second_is_there = threading.Event()

    class Waiting(Gaussian):
        def predict(self, x, t, conditioning):
            assert second_is_there.wait(60)
            return super().predict(x, t, conditioning)

    denoiser, plain = Waiting(), {"strength": 1.0, "steps": 4, "guidance_scale": 1.0, "scheduler": "euler"}
    worker = Worker([StageWork("denoise", lambda: denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", 16))])
    tables = [batch([0, 1, 2], **plain), batch([3, 4], **plain)]
    found = {}

    def call(k):
        outcome, [part] = worker.batch("denoise", [(0, 0, 0, len(tables[k]))], [tables[k]])
        found.update(zip(outcome.parts[0][1], tensors.from_arrow(part, "latents")))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(2)]
    threads[0].start()
    while not worker.stages["denoise"].inside:  # the first is in the stage
        threads[0].join(0.001)
    threads[1].start()
    while not worker.waiting:
        threads[1].join(0.001)
    second_is_there.set()
    for thread in threads:
        thread.join(60)
    assert denoiser.evaluated == [3, 5, 5, 5, 2]
    wanted = denoise(batch(range(5), **plain))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-6) for n in wanted)


class Broken(Gaussian):
    """Refuses a row, told by its conditioning, and more rows at a time than there is memory for."""

    def __init__(self, refuses=None, memory=10**9):
        super().__init__()
        self.refuses, self.memory = refuses, memory

    def predict(self, x, t, conditioning):
        if len(x) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.refuses in conditioning["mean"].flatten().tolist():
            raise ValueError("no such mean")
        return super().predict(x, t, conditioning)


def test_rows_of_a_kind_that_others_are_always_added_to_do_not_keep_the_rest_waiting():
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 8)
    plain = {"guidance_scale": 1.0, "strength": 1.0, "steps": 4}
    few = stage.take(batch([1, 2], scheduler="dpmpp_2m", **plain), pytest.fail)
    many = [stage.take(batch(range(n, n + 8), scheduler="euler", **plain), pytest.fail) for n in (10, 20)]
    turns = 0
    while not few.done and turns < 4 * (MAX_WAIT + 2):
        turns += 1
        stage.advance()
        if many[0].done:
            many = [many[1], stage.take(batch(range(30, 38), scheduler="euler", **plain), pytest.fail)]
    assert few.done and turns > 4 * MAX_WAIT - 8  # it waits, and not for ever
    while stage.moving:
        stage.advance()
    assert stage.moved_at == {}


def test_kinds_of_which_as_many_can_go_take_turns():
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 8)
    plain = {"guidance_scale": 1.0, "strength": 1.0, "steps": 4}
    visits = [
        stage.take(batch(range(8), scheduler=name, **plain), pytest.fail) for name in ("euler", "euler_ancestral")
    ]
    at = []
    while stage.moving:
        stage.advance()
        at.append([visit.rows[0].at for visit in visits])
    assert at == [[1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3], [4, 3], [4, 4]]


class Recalls(Euler):
    """Its state begins with the network's first answer; a step adds it to what comes."""

    def init(self, field, x, t):
        return {"first": field.clean(x, t)}


class Placed(Gaussian):
    """What it answers depends on the place in the batch, as a matrix product's last bits do."""

    def predict(self, x, t, conditioning):
        return super().predict(x, t, conditioning) + torch.arange(len(x)).reshape(-1, 1, 1, 1) / 64


def test_a_state_begins_in_the_row_s_own_slot():
    """Idle slots repeat a row: what the scheduler's init says of it there is not the row's."""
    fixed = FixedShape(batch_size=8, rows_per_shard=8)

    def first(numbers):
        stage = denoise_with(Placed(), {"recalls": Recalls()}.__getitem__, "trailing", 8, fixed, until=0.5)
        table = batch(numbers, scheduler="recalls", strength=1.0, steps=4)
        [part] = stage(table, lambda i, reason: pytest.fail(reason))
        return dict(zip(part["row"].to_pylist(), tensors.from_arrow(part, "state:first")))

    company = first(range(8))
    for numbers in ([5], [5, 7], [2, 5]):
        for n, state in first(numbers).items():
            assert torch.equal(state, company[n]), n


def test_a_row_that_raises_fails_its_batch_and_no_other():
    stage = denoise_with(Broken(refuses=6.5), SCHEDULERS.__getitem__, "trailing", 100)
    visits = [stage.take(batch(numbers, strength=1.0), pytest.fail) for numbers in ([0, 1, 2], [5, 6, 7], [8, 9])]
    while not all(visit.done for visit in visits):
        stage.advance()
    assert [str(visit.error or "") for visit in visits] == ["", "no such mean", ""]
    with pytest.raises(ValueError, match="no such mean"):
        list(stage.finish(visits[1]))
    for visit, numbers in ((visits[0], [0, 1, 2]), (visits[2], [8, 9])):
        wanted = denoise(batch(numbers, strength=1.0))
        for part in stage.finish(visit):
            for i, n in enumerate(part.column("row").to_pylist()):
                assert torch.allclose(tensors.from_arrow(part, "latents")[i], wanted[n], rtol=1e-5, atol=1e-6)
    assert stage.moving == {}


def test_out_of_memory_halves_the_calls_and_loses_nothing(caplog):
    denoiser = Broken(memory=5)
    stage = denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", 16)
    table = batch(range(12), strength=1.0, guidance_scale=1.0, scheduler="euler", steps=4)
    [part] = stage(table, pytest.fail)
    assert set(denoiser.evaluated) <= {1, 2, 3} and sum(denoiser.evaluated) == 48
    assert [record.message for record in caplog.records] == [
        "out of memory: from now on 6 evaluations a call",
        "out of memory: from now on 3 evaluations a call",
    ]
    wanted = denoise(table)
    for i, n in enumerate(part.column("row").to_pylist()):
        assert torch.allclose(tensors.from_arrow(part, "latents")[i], wanted[n], rtol=1e-5, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):  # one row alone: it can't be helped here
        list(denoise_with(Broken(memory=0), SCHEDULERS.__getitem__, "trailing", 16)(table, pytest.fail))

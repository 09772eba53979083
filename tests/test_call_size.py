"""batch_size: auto of denoise: calls grow for as long as that makes them faster, or memory ends."""

import time
from types import SimpleNamespace

import pytest
import torch
from tests.denoising import SCHEDULERS, SPEC, Gaussian, batch, denoise, denoise_with, latents_of

from latentmill.batch import with_latents
from latentmill.config import load_job
from latentmill.plugin import Declaration, FixedShape
from latentmill.workers.pools import stage_spec


class Timed(Gaussian):
    """A call takes ``seconds(evaluations)`` of a clock that nothing else moves; ``memory`` is how many it has room for."""

    def __init__(self, clock, seconds, memory=10**9):
        super().__init__()
        self.clock, self.seconds, self.memory = clock, seconds, memory

    def predict(self, x, t, conditioning):
        if len(x) > self.memory:
            self.evaluated.append(len(x))
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        self.clock.now += self.seconds(len(x))
        return super().predict(x, t, conditioning)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def sizes(denoiser, rows=64, steps=40, fixed=None, finds=True, first=8, **changes):
    """The sizes of the calls, in their order, each once for each time that it came up; and the latents."""
    stage = denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", first, fixed, finds_batch_size=finds)
    stage.load(torch.device("cpu"))
    table = batch(range(rows), strength=1.0, guidance_scale=1.0, scheduler="euler", steps=steps, **changes)
    made = latents_of(stage(table, lambda i, reason: pytest.fail(reason)))
    evaluated = denoiser.evaluated
    return [n for k, n in enumerate(evaluated) if k == 0 or n != evaluated[k - 1]], made


def test_calls_grow_for_as_long_as_that_is_faster(clock):
    """Up to 32 a call costs as much as one of 1, and from there on each evaluation costs its own."""
    found, made = sizes(Timed(clock, lambda n: max(32, n)))
    assert found[:5] == [8, 16, 32, 64, 32] and max(found[5:]) <= 32, "fewer are what is left at the end"
    wanted = denoise(batch(range(64), strength=1.0, guidance_scale=1.0, scheduler="euler", steps=40))
    assert made.keys() == wanted.keys()
    for row, latents in made.items():
        assert torch.allclose(latents, wanted[row], rtol=1e-5, atol=1e-6)


def test_calls_stay_as_they_are_where_larger_ones_gain_nothing(clock):
    assert sizes(Timed(clock, float))[0] == [8, 16, 8]
    assert sizes(Timed(clock, lambda n: n**0.96))[0] == [8, 16, 8], "3% is no gain"


def test_a_size_is_tried_for_no_more_calls_than_it_takes_to_know(clock):
    denoiser = Timed(clock, float)
    sizes(denoiser)
    assert denoiser.evaluated[:5] == [8] * 5 and denoiser.evaluated[5:10] == [16] * 5
    assert set(denoiser.evaluated[10:]) == {8}


def test_calls_grow_no_further_where_memory_ends(clock):
    denoiser = Timed(clock, lambda n: 1.0, memory=20)
    found, made = sizes(denoiser)
    assert found[:4] == [8, 16, 32, 16] and max(found[4:]) <= 16 and len(made) == 64
    assert denoiser.evaluated.count(32) == 1 and denoiser.evaluated[100] == 16, "it was tried once"


def test_a_size_that_nothing_would_fill_is_not_tried(clock):
    assert max(sizes(Timed(clock, lambda n: 1.0), rows=31)[0]) == 16


def test_calls_that_are_not_full_say_nothing(clock):
    """Four rows alone cost as much as eight: that is not what calls of 8 cost."""
    denoiser = Timed(clock, lambda n: max(8, n))
    stage = denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", 8, finds_batch_size=True)
    stage.load(torch.device("cpu"))
    same = {"strength": 1.0, "guidance_scale": 1.0, "scheduler": "euler", "steps": 20}
    first = stage.take(batch(range(4), **same), pytest.fail)
    for _ in range(10):
        stage.advance()
    second = stage.take(batch(range(4, 68), **same), pytest.fail)
    while not (first.done and second.done):
        stage.advance()
    assert denoiser.evaluated[:10] == [4] * 10 and denoiser.evaluated.count(16) == 5
    assert denoiser.evaluated[30] == 8, "16 were no faster"


def test_a_number_by_hand_and_a_deterministic_job_stay_as_they_are(clock):
    assert sizes(Timed(clock, lambda n: 1.0), finds=False)[0] == [8]
    denoiser = Timed(clock, lambda n: 1.0)
    sizes(denoiser, rows=8, steps=40, fixed=FixedShape(batch_size=8, rows_per_shard=8), finds=False)
    assert set(denoiser.evaluated) == {8}


def test_each_shape_of_latents_has_its_own_size(clock):
    """A call for large pictures has no room for as many as one for small ones."""
    denoiser = Timed(clock, lambda n: 1.0)
    stage = denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", 8, finds_batch_size=True)
    stage.load(torch.device("cpu"))
    same = {"strength": 1.0, "guidance_scale": 1.0, "scheduler": "euler", "steps": 40}
    latents_of(stage(batch(range(64), **same), pytest.fail))
    assert max(denoiser.evaluated) == 64
    wide = batch(range(64), **same).drop_columns(["latents"])
    wide = with_latents(wide, torch.zeros(64, 2, 4, 6), SPEC)
    denoiser.evaluated.clear()
    latents_of(stage(wide, pytest.fail))
    assert denoiser.evaluated[0] == 8


def test_a_worker_holds_rows_for_the_calls_that_are_tried():
    """Four batches where the size is found, two where it is given; one after another in a deterministic job."""
    stage = Declaration("denoise", continuous=True)
    for words, held in (([], 4), (["stages.denoise.batch_size=16"], 2), (["deterministic=true"], 2)):
        assert stage_spec(load_job("txt2img", words), stage).batches_per_worker == held

"""Denoising: each row as if it were alone, guidance as diffusers means it, strength, prediction types."""

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from latentmill import registry
from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX, FixedShape, concat, from_dicts, with_latents
from latentmill.plugin import Declaration, Denoiser, FollowsAuthors, LatentSpec, Scheduler, StageContext, Start, tensors
from latentmill.schedulers import grids, noise
from latentmill.schedulers.dpmpp import DPMpp2M
from latentmill.schedulers.euler import Euler, EulerAncestral
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.stages.denoise import MAX_WAIT, Denoise
from latentmill.stages.encode import Encode
from latentmill.workers.worker import Worker

SPEC = LatentSpec(channels=2, downscale=8, scale=1.0, shift=0.0, dtype="float32", fingerprint="test")
SCHEDULERS = {"euler": Euler(), "euler_ancestral": EulerAncestral(), "dpmpp_2m": DPMpp2M()}


def denoise_with(denoiser, schedulers, grid, batch_size, fixed=None, first_noise="latentmill", until=0.0):
    stage = Denoise()
    context = StageContext.of(
        {"denoiser": denoiser, "scheduler": None},
        batch_size=batch_size,
        fixed=fixed,
        sampling={"until": until, "first_noise": first_noise},
        choices={"scheduler": {"name": "euler", "grid": grid}},
        scheduler_of=schedulers,
    )
    stage.prepare(context)
    return stage


def encode_with(vae, text):
    stage = Encode()
    later = [Declaration("denoise", needs=("denoiser",))]
    stage.prepare(StageContext.of({"vae": vae, "text_encoder": text}, after=later))
    return stage


class Gaussian(Denoiser):
    """The exact denoiser of x0 ~ N(mean, 0.25), with the mean as conditioning; counts what it evaluates."""

    contract = 2

    prediction = "sample"
    noise_schedule = VariancePreserving()

    def __init__(self):
        self.evaluated = []

    def predict(self, x, t, conditioning):
        self.evaluated.append(len(x))
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in self.noise_schedule.scale(t))
        mean = conditioning["mean"].reshape(-1, 1, 1, 1)
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return (mean + gain * (x - alpha * mean)).float()


def batch(numbers, **changes):
    """Rows that differ in everything; each by its number alone."""
    per_row = [
        {
            "row": n, "row_id": str(n), "prompt": "", "negative_prompt": "", "seed": 1000 + n, "steps": 3 + n % 5,
            "guidance_scale": 1.0 if n % 2 else 1.5 + n, "strength": [1.0, 0.4, 0.0][n % 3], "width": 24, "height": 32,
            "scheduler": ["dpmpp_2m", "euler", "euler_ancestral"][n % 3], **changes,
        }
        for n in numbers
    ]  # fmt: skip
    table = from_dicts(per_row)
    start = torch.stack([torch.full((2, 4, 3), float(n)) for n in numbers])
    table = with_latents(table, start, SPEC)
    table = tensors.with_tensor(table, "prompt:mean", torch.tensor([0.5 + n for n in numbers]))
    return tensors.with_tensor(table, "negative:mean", torch.tensor([-1.0 - n for n in numbers]))


def denoise(table, fixed=None, denoiser=None):
    stage = denoise_with(denoiser or Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, fixed)
    stage.load(torch.device("cpu"))
    parts = list(stage(table, lambda i, reason: pytest.fail(reason)))
    return {
        number: tensors.from_arrow(part, "latents")[i]
        for part in parts
        for i, number in enumerate(part.column("row").to_pylist())
    }


def test_a_row_does_not_depend_on_its_company():
    together = denoise(batch(range(12)))
    for n in range(12):
        assert torch.allclose(together[n], denoise(batch([n]))[n], rtol=1e-5, atol=1e-6), n


def test_with_fixed_shapes_a_row_s_bits_do_not_depend_on_its_company():
    fixed = FixedShape(batch_size=12, rows_per_shard=12)
    together = denoise(batch(range(12)), fixed)
    for numbers in ([3], [0, 5, 11], [1, 2, 4, 6, 7]):
        for n, latents in denoise(batch(numbers), fixed).items():
            assert torch.equal(latents, together[n]), n


def test_the_first_noise_may_be_that_of_diffusers():
    """One Euler step from pure noise, from each."""
    table = batch([2], steps=1, scheduler="euler", guidance_scale=1.0, strength=1.0)
    found = {}
    for name, draw in (("latentmill", noise.start), ("diffusers", noise.start_of_diffusers)):
        stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, first_noise=name)
        [part] = stage(table, lambda i, reason: pytest.fail(reason))
        alpha, sigma = (float(a) for a in VariancePreserving().scale(torch.tensor(1.0, dtype=torch.float64)))
        x = alpha * 2.0 + sigma * draw(1002, (2, 4, 3)).double()
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        found[name] = tensors.from_arrow(part, "latents")[0]
        np.testing.assert_allclose(found[name], 2.5 + gain * (x - alpha * 2.5), rtol=1e-5)
    assert not torch.equal(found["latentmill"], found["diffusers"])


class Halves(Scheduler):
    """On a grid of its own: two steps, of which each keeps what its row's state says, and no network."""

    contract = 2

    def start(self, noise_schedule, steps, kept, shape):
        if steps != 2:
            raise ValueError("two steps, not more")
        times = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)[2 - kept :]
        return Start(times, {"keep": torch.tensor(0.5)}, alpha=0.1 * kept, sigma=3.0, scale=5.0)

    def step(self, field, x, t, s, state):
        return x * state["keep"].reshape(-1, 1, 1, 1), {"keep": state["keep"] / 2}


def test_a_scheduler_may_have_a_grid_of_its_own(monkeypatch):
    """It says where a row begins, in times, state and scale; a row that it can't begin is rejected, and the others go on."""
    monkeypatch.setitem(SCHEDULERS, "halves", Halves())
    table = pa.concat_tables(
        [
            batch([0, 2], steps=2, scheduler="halves", strength=1.0),
            batch([3], steps=2, scheduler="halves", strength=0.5),
            batch([5], steps=3, scheduler="halves", strength=1.0),
            batch([6], steps=2, scheduler="halves", strength=0.0),
        ]
    )
    table = table.append_column("from_noise", pa.array([number == 0 for number in table.column("row").to_pylist()]))
    stage, rejected = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16), {}
    [part] = stage(table, rejected.__setitem__)
    assert rejected == {3: "two steps, not more"} and part.column("row").to_pylist() == [0, 2, 3, 6]
    found = tensors.from_arrow(part, "latents")
    for n, at, kept in ((0, 0, 2), (2, 1, 2), (3, 2, 1)):
        x = (0.1 * kept * n + (3.0 if n else 5.0) * noise.start(1000 + n, (2, 4, 3)).double()) * (
            0.5 * 0.25 if kept == 2 else 0.5
        )
        np.testing.assert_allclose(found[at], x, rtol=1e-6)
    assert torch.equal(found[3], torch.full((2, 4, 3), 6.0))


def test_half_way_latents_of_another_scheduler_can_not_begin_on_such_a_grid(monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "halves", Halves())
    plain = {"strength": 1.0, "guidance_scale": 1.0, "steps": 2}
    for name in ("euler", "halves"):
        stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, until=0.6)
        [half] = stage(batch([1], **plain, scheduler=name), lambda i, reason: pytest.fail(reason))
        half = half.set_column(half.column_names.index("scheduler"), "scheduler", [["halves"]])
        for column in ("prompt:mean", "negative:mean"):
            half = tensors.with_tensor(half, column, torch.ones(1))
        rejected = {}
        [*parts] = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)(half, rejected.__setitem__)
        said = "the latents are half-way by another scheduler, and halves can begin only on its own grid"
        assert rejected == ({0: said} if name == "euler" else {}) and len(parts) == (name == "halves")
    whole = denoise(batch([1], **plain, scheduler="halves"))[1]
    assert torch.equal(tensors.from_arrow(parts[0], "latents")[0], whole)


def test_the_seed_decides():
    same = denoise(batch([0], seed=7))[0]
    assert torch.equal(same, denoise(batch([0], seed=7))[0])
    assert not torch.equal(same, denoise(batch([0], seed=8))[0])


def test_strength_zero_leaves_the_latent_alone_and_one_starts_from_noise():
    assert torch.equal(denoise(batch([4], strength=0.0))[4], torch.full((2, 4, 3), 4.0))
    plain = {"strength": 1.0, "guidance_scale": 1.0, "steps": 40, "scheduler": "dpmpp_2m"}
    # From pure noise the exact denoiser arrives near the conditioning's mean (std 0.5), wherever it started.
    assert denoise(batch([0], **plain))[0].mean() == pytest.approx(0.5, abs=0.4)


def test_one_euler_step_is_the_formula():
    table = batch([2], steps=1, scheduler="euler", guidance_scale=3.0, strength=1.0)
    [t, s] = grids.times("trailing", VariancePreserving(), 1)
    alpha, sigma = (float(a) for a in VariancePreserving().scale(t))
    x = alpha * 2.0 + sigma * noise.start(1002, (2, 4, 3)).double()
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    prompt, negative = 2.5 + gain * (x - alpha * 2.5), -3.0 + gain * (x + alpha * 3.0)
    assert float(s) == 0.0
    np.testing.assert_allclose(denoise(table)[2], negative + 3.0 * (prompt - negative), rtol=1e-5)


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


def test_calls_are_full():
    """2,000 rows of 8 to 50 steps, half of them with guidance, through the flow: evaluations / (calls x places)."""
    path = Path(__file__).parents[1] / "benchmarks" / "denoise.py"
    spec = importlib.util.spec_from_file_location("bench_denoise", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert bench.fullness(bench.mixed(2000, ["euler"])) >= 0.97


def test_batches_of_several_threads_are_moved_together():
    """As Ray calls a worker: the second batch comes while the first is in the network, and joins it at the next step."""
    second_is_there = threading.Event()

    class Waiting(Gaussian):
        def predict(self, x, t, conditioning):
            assert second_is_there.wait(60)
            return super().predict(x, t, conditioning)

    denoiser, plain = Waiting(), {"strength": 1.0, "steps": 4, "guidance_scale": 1.0, "scheduler": "euler"}
    worker = Worker(lambda: denoise_with(denoiser, SCHEDULERS.__getitem__, "trailing", 16), gpu=False, threads=None)
    tables = [batch([0, 1, 2], **plain), batch([3, 4], **plain)]
    found = {}

    def call(k):
        outcome, [part] = worker.batch([(0, 0, 0, len(tables[k]))], [tables[k]])
        found.update(zip(outcome.parts[0][1], tensors.from_arrow(part, "latents")))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(2)]
    threads[0].start()
    while not worker.inside:  # the first is in the stage
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
    assert set(denoiser.evaluated) <= {1, 2, 3} and sum(denoiser.evaluated) == 48 and stage.batch_size == 3
    assert [record.message for record in caplog.records] == [
        "out of memory: from now on 6 evaluations a call",
        "out of memory: from now on 3 evaluations a call",
    ]
    wanted = denoise(table)
    for i, n in enumerate(part.column("row").to_pylist()):
        assert torch.allclose(tensors.from_arrow(part, "latents")[i], wanted[n], rtol=1e-5, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):  # one row alone: it can't be helped here
        list(denoise_with(Broken(memory=0), SCHEDULERS.__getitem__, "trailing", 16)(table, pytest.fail))


def test_a_row_whose_steps_cannot_be_is_rejected_alone():
    table = pa.concat_tables([batch([0], steps=3), batch([1], steps=1500), batch([2], steps=3)])
    rejected = {}
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)
    parts = list(stage(table, rejected.__setitem__))
    assert sorted(row for part in parts for row in part.column("row").to_pylist()) == [0, 2]
    assert rejected == {1: "1500 steps are more than the 1000 timesteps of the noise schedule"}


def test_latents_that_are_not_finite_are_rejected():
    table = batch([0, 1, 2], strength=1.0, scheduler="euler", steps=2)
    broken = table.set_column(
        table.column_names.index("prompt:mean"),
        table.schema.field("prompt:mean"),
        tensors.to_arrow(torch.tensor([0.0, float("nan"), 0.0])),
    )
    rejected = {}
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)
    [part] = stage(broken, rejected.__setitem__)
    assert part.column("row").to_pylist() == [0, 2]
    assert rejected == {1: "the denoised latents are not finite (nor was a prediction of denoiser Gaussian)"}


def test_clean_latents_have_the_space_s_dtype_wherever_they_began():
    half = LatentSpec(**{**vars(SPEC), "dtype": "float16"})
    table = batch([1, 2], strength=1.0)
    table = with_latents(table, tensors.from_arrow(table, "latents").float(), half)
    parts = list(denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)(table, pytest.fail))
    assert {tensors.from_arrow(part, "latents").dtype for part in parts} == {torch.float16}


@pytest.fixture(scope="module")
def mixed():
    """64 rows of the shapes model that differ in everything: 4 schedulers, 8 to 50 steps, guidance or none, strengths."""
    choose = np.random.default_rng(0)
    names = ["dpmpp_2m", "euler_ancestral", "heun", "unipc"]
    per_row = [
        {
            "row": n, "row_id": str(n), "prompt": "a red star above a blue ring on a yellow background",
            "negative_prompt": "", "seed": 1000 + n, "steps": int(choose.integers(8, 51)),
            "guidance_scale": [1.0, 4.0, 7.5][n % 3], "strength": float(choose.uniform(0.3, 1.0)), "width": 64,
            "height": 64, "scheduler": names[n % 4],
        }
        for n in range(64)
    ]  # fmt: skip
    vae, text, denoiser = (registry.build(kind, {"name": "shapes"}) for kind in ("vae", "text_encoder", "denoiser"))
    schedulers = {name: registry.build("scheduler", {"name": name}) for name in names}
    encode = encode_with(vae, text)
    encode.load(torch.device("cpu"))
    of_each_scheduler = encode(from_dicts(per_row), lambda i, reason: pytest.fail(reason))
    table = concat([part.replace_schema_metadata(None) for part in of_each_scheduler])
    denoiser.load(torch.device("cpu"))

    def parts(given, fixed=None, until=0.0):
        stage = denoise_with(denoiser, schedulers.__getitem__, "trailing", 16, fixed, until=until)
        return list(stage(given, lambda i, reason: pytest.fail(reason)))

    def run(numbers, fixed=None):
        return latents_of(parts(table.take(numbers), fixed))

    run.table, run.parts = table, parts
    return run


def latents_of(parts):
    return {
        number: tensors.from_arrow(part, "latents")[i]
        for part in parts
        for i, number in enumerate(part.column("row").to_pylist())
    }


def test_sixty_four_mixed_rows_each_as_if_alone(mixed):
    together = mixed(list(range(64)))
    worst = max(float((together[n] - mixed([n])[n]).abs().max() / together[n].abs().max()) for n in range(64))
    assert worst < 1e-5, f"{worst:.1e}"


def test_mixed_rows_bit_for_bit_where_the_shape_is_fixed(mixed):
    """A slot that is idle, or has arrived before the others, must not stand in a solver's way either."""
    fixed = FixedShape(batch_size=16, rows_per_shard=64)
    together = mixed(list(range(16)), fixed)
    for n, latents in mixed([14, 3, 7, 0, 9], fixed).items():
        assert torch.equal(latents, together[n]), n


def test_mixed_rows_saved_in_the_middle_reordered_and_resumed(mixed):
    """Half-way rows are values: in Arrow, in another order, with what their scheduler remembers, they go on as if never stopped."""
    fixed = FixedShape(batch_size=8, rows_per_shard=64)
    together = mixed(list(range(8)), fixed)
    halves = mixed.parts(mixed.table.take(list(range(8))), fixed, until=0.5)
    told = [name for name in mixed.table.column_names if name.startswith((PROMPT_PREFIX, NEGATIVE_PREFIX))]
    shuffled = []
    for half in halves:
        assert min(half["time"].to_pylist()) > 0 and max(half["time"].to_pylist()) < 0.5
        half = half.take(list(range(len(half)))[::-1])
        again = mixed.table.take(half["row"].to_pylist())  # the row of number n stands at n
        for name in told:
            half = half.append_column(again.schema.field(name), again.column(name))
        shuffled.append(half.combine_chunks())
    found = latents_of(part for half in shuffled[::-1] for part in mixed.parts(half, fixed))
    assert found.keys() == together.keys()
    for n, latents in found.items():
        assert torch.equal(latents, together[n]), n


class Particular(FollowsAuthors, Gaussian):
    """Has a grid of its own, starts with unit variance, and guides itself; remembers what it was told."""

    guidance_embedded = True

    def times(self, steps, shape):
        return torch.linspace(0.8, 0.0, steps + 1, dtype=torch.float64) * (1.0 if shape == (2, 4, 3) else torch.nan)

    def start_scale(self, t):
        return torch.ones_like(t)

    def predict(self, x, t, conditioning):
        self.told = conditioning["guidance_scale"].tolist(), t.tolist(), x
        return super().predict(x, t, conditioning)


def test_a_denoiser_may_say_its_grid_its_start_and_that_it_guides_itself():
    """Grid model is ``times``, after which strength counts; an empty latent starts from noise of ``start_scale``."""
    stage = denoise_with(Particular(), SCHEDULERS.__getitem__, "model", 16)
    table = batch([0], steps=4, guidance_scale=3.5, strength=1.0, scheduler="euler")
    table = with_latents(table, torch.zeros(1, 2, 4, 3), SPEC).append_column("from_noise", pa.array([True]))
    visit = stage.take(table, lambda i, reason: pytest.fail(reason))
    assert visit.rows[0].times == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    stage.advance()
    scale, times, x = stage.denoiser.told
    assert (scale, times) == ([3.5], [pytest.approx(0.8)]) and stage.denoiser.evaluated == [1]
    torch.testing.assert_close(x[0], noise.start(1000, (2, 4, 3)), rtol=1e-6, atol=1e-6)
    half = stage.take(batch([3], steps=4, strength=0.5, scheduler="euler"), lambda i, reason: pytest.fail(reason))
    assert half.rows[0].times == pytest.approx([0.4, 0.2, 0.0])
    alpha, sigma = (float(a) for a in VariancePreserving().scale(torch.tensor(0.4, dtype=torch.float64)))
    torch.testing.assert_close(half.rows[0].x, alpha * 3.0 + sigma * noise.start(1003, (2, 4, 3)))


def test_a_denoiser_without_a_grid_says_so():
    reasons = []
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "model", 16)
    list(stage(batch([0]), lambda i, reason: reasons.append(reason)))
    assert reasons == ["this denoiser has no grid of its own: choose one by its name"]


def test_a_mask_keeps_the_picture_where_it_is_dark():
    """At every step the picture's latents with the row's first noise; at the end the latents themselves."""
    mask = torch.tensor([1, 0], dtype=torch.uint8).repeat(2, 1, 4, 6)[..., :3]  # light in the first and third column
    table = tensors.with_tensor(batch([3, 5], strength=0.8, steps=5, scheduler="dpmpp_2m"), "mask", mask)
    found, plain = denoise(table), denoise(batch([3, 5], strength=0.8, steps=5, scheduler="dpmpp_2m"))
    for n in (3, 5):
        assert torch.equal(found[n][..., 1], torch.full((2, 4), float(n)))
        assert torch.equal(found[n][..., 0], plain[n][..., 0])  # this denoiser looks at each number alone
    stage = denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16)
    visit = stage.take(table, lambda i, reason: pytest.fail(reason))
    stage.advance()
    [running] = stage.running.values()
    for row, x in zip(running.rows, running.x):
        alpha, sigma = VariancePreserving().scale(torch.tensor(row.times[1], dtype=torch.float64))
        wanted = float(alpha) * float(row.seed - 1000) + float(sigma) * noise.start(row.seed, (2, 4, 3))
        torch.testing.assert_close(x[..., 1], wanted[..., 1])
    assert not visit.done
    reasons = []
    list(
        denoise_with(Gaussian(), SCHEDULERS.__getitem__, "trailing", 16, until=0.5)(
            table, lambda i, reason: reasons.append(reason)
        )
    )
    assert reasons == ["a row with a mask can't stop half-way: its picture would be lost"] * 2


class Painter(Gaussian):
    """Was trained for inpainting. Answers what it is told: the masked picture, and 9 where to paint."""

    inpaints = True

    def predict(self, x, t, conditioning):
        return (conditioning["masked"] + 9 * conditioning["mask"]).float()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_network_that_was_trained_for_inpainting_is_told_mask_and_masked_picture(guidance):
    mask = torch.zeros(2, 1, 4, 3, dtype=torch.uint8)
    mask[0, 0, 1], mask[1, 0, :, 2] = 1, 1
    masked = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    table = batch([3, 5], strength=0.8, steps=5, scheduler="euler", guidance_scale=guidance)
    reasons = []
    assert not list(
        denoise_with(Painter(), SCHEDULERS.__getitem__, "trailing", 16)(table, lambda i, said: reasons.append(said))
    )
    assert reasons == ["the network paints a part of a picture anew: image and mask are expected"] * 2
    table = tensors.with_tensor(tensors.with_tensor(table, "mask", mask), "masked", masked)
    found = denoise(table, denoiser=Painter())
    for number, told in zip((3, 5), masked + 9 * mask):
        torch.testing.assert_close(found[number], told)
    [part] = denoise_with(Painter(), SCHEDULERS.__getitem__, "trailing", 16)(
        table, lambda i, reason: pytest.fail(reason)
    )
    assert not {"mask", "masked"} & set(part.column_names)


def test_what_is_painted_anew_at_strength_1_has_nothing_of_the_picture_in_it():
    mask = torch.ones(2, 1, 4, 3, dtype=torch.uint8)
    settings = {"strength": 1.0, "steps": 3, "scheduler": "euler", "seed": 7, "guidance_scale": 1.0}
    table = batch([3, 5], **settings)
    same = tensors.with_tensor(table, "prompt:mean", torch.zeros(2))
    found = denoise(tensors.with_tensor(same, "mask", mask))
    assert torch.equal(found[3], found[5]) and not torch.equal(*denoise(same).values())

"""What a step costs a GPU, counted on a device that is pretended: it starts no more for more rows, and nobody waits for it."""

from contextlib import nullcontext
from functools import cache

import pyarrow as pa
import pytest
import torch

from latentmill.batch import FixedShape, from_dicts, with_latents
from latentmill.plugin import Denoiser, LatentSpec, StageContext, tensors
from latentmill.registry import build, entries
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving
from latentmill.stages.denoise import Denoise
from latentmill.testing.pretend import DEVICE, Counted, pretended

SPEC = LatentSpec(channels=4, downscale=8, scale=1.0, shift=0.0, dtype="float32", fingerprint="test")
ROW = 4 * 6 * 8
"""Numbers in a row's latents."""


class Half(Denoiser):
    """Predicts half of what it sees, less its conditioning: three operations."""

    contract = 2

    def __init__(self, noise_schedule=None, inpaints=False):
        self.noise_schedule, self.inpaints = noise_schedule or VariancePreserving(), inpaints
        self.prediction = "flow" if noise_schedule else "epsilon"
        self.calls = []

    def predict(self, x, t, conditioning):
        self.calls.append(len(x))
        return 0.5 * x - conditioning["embeds"][:, :1, :1, None]


@cache
def scheduler(name):
    return build("scheduler", {"name": name})


def rows(count, scheduler, masks=False, **changes):
    """A batch of latents and prompts, whose odd rows are guided."""
    each = [
        {
            "row": n, "row_id": str(n), "prompt": "", "negative_prompt": "", "seed": n, "steps": 7 + n % 2,
            "guidance_scale": 4.0 if n % 2 else 1.0, "strength": 1.0,
            "width": 64, "height": 48, "scheduler": scheduler, **changes,
        }
        for n in range(count)
    ]  # fmt: skip
    batch = with_latents(from_dicts(each), torch.zeros(count, 4, 6, 8), SPEC)
    for name in ("prompt:embeds", "negative:embeds"):
        batch = tensors.with_tensor(batch, name, torch.full((count, 5, 3), 0.1))
    for name, channels in (("mask", 1), ("masked", 4)) if masks else ():
        batch = tensors.with_tensor(batch, name, torch.ones(count, channels, 6, 8, dtype=torch.uint8))
    return batch


def moving(batch, denoiser, device=DEVICE, until=0.0, fixed=None):
    """A stage with these rows on their way, and their request."""
    stage = Denoise()
    context = StageContext.of(
        {"denoiser": denoiser, "scheduler": None},
        batch_size=1000,
        fixed=fixed,
        sampling={"until": until, "first_noise": "latentmill"},
        choices={"scheduler": {"grid": "trailing"}},
        scheduler_of=scheduler,
    )
    stage.prepare(context)
    stage.load(device)
    return stage, stage.take(batch, lambda i, reason: pytest.fail(reason))


def on(device):
    """What is done on the CPU alone needs no other."""
    return pretended() if device == DEVICE else nullcontext(Counted())


def step(batch, denoiser=None, steps=3, **more):
    """What a step of these rows costs when they have made some."""
    with pretended() as counted:
        stage, request = moving(batch, denoiser or Half(), **more)
        for _ in range(steps):
            stage.advance()
        counted.clear()
        stage.advance()
        assert request.error is None
    return counted


OPERATIONS = {
    "comfy": (38, 0),
    "deis": (51, 0),
    "dpm2": (96, 0),
    "dpm2_ancestral": (98, 1),
    "dpmpp_2m": (49, 0),
    "dpmpp_2m_sde": (66, 1),
    "dpmpp_2m_sde_heun": (75, 1),
    "dpmpp_2s_ancestral": (92, 1),
    "dpmpp_3m_sde": (103, 1),
    "dpmpp_sde": (121, 2),
    "edm_euler": (60, 1),
    "er_sde": (85, 1),
    "euler": (34, 0),
    "euler_ancestral": (50, 1),
    "gradient_estimation": (48, 0),
    "heun": (73, 0),
    "heunpp2": (135, 0),
    "ipndm": (54, 0),
    "lcm": (29, 1),
    "lms": (54, 0),
    "pndm": (54, 0),
    "res_multistep": (40, 0),
    "sa_solver": (99, 2),
    "seeds_2": (167, 2),
    "seeds_3": (265, 3),
    "tcd": (49, 1),
    "unipc": (61, 0),
}
"""Operations of a step, and pieces of noise that it draws, by scheduler, on a VP path."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_step_of_more_rows_starts_no_more_and_waits_for_nothing(name):
    """One copy of 15 numbers a row at most; and each draw of noise in one piece."""
    operations, draws = OPERATIONS[name]
    for count in (2, 32):
        counted = step(rows(count, name))
        *noise, small = sorted(counted.copies, reverse=True)
        assert counted.waits == []
        assert noise == [count * ROW * 4] * draws and small <= count * 8 * 15, counted.copies
        assert sum(counted.operations.values()) == operations, counted.operations


def test_all_of_ours_are_in_the_table():
    ours = {entry.name for entry in entries("scheduler") if entry.distribution == "latentmill"}
    assert ours - {"ddim", "ddpm"} == set(OPERATIONS)  # which are Euler's


def test_where_guidance_ends_for_some_the_host_waits_for_nothing_either():
    """Who is guided goes there once, with what they are told, and is kept."""
    guided, ends = rows(8, "euler"), rows(8, "euler", guidance_until=0.45, guidance_scale=4.0)
    at = [len(step(ends, steps=k).copies) for k in range(7)]
    assert at == [2, 1, 1, 1, 2, 1, 1] and step(ends, steps=4).waits == [], at
    assert [len(step(guided, steps=k).copies) for k in range(7)] == [3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rows_that_are_all_or_none_guided_are_one_call(scale):
    denoiser = Half()
    counted = step(rows(6, "euler", guidance_scale=scale), denoiser)
    assert denoiser.calls == [12 if scale > 1 else 6] * 4
    assert counted.operations["index"] == counted.operations["index_copy"] == counted.operations["where"] == 0


def test_masks_are_blended_in_one_piece():
    """As many operations for 32 rows with masks as for two, and nothing more to send."""
    for denoiser in (Half(), Half(inpaints=True)):
        each = [step(rows(count, "euler", masks=True), denoiser) for count in (2, 32)]
        assert each[0].operations == each[1].operations
        assert [counted.waits for counted in each] == [[], []] and [len(counted.copies) for counted in each] == [1, 1]


def test_rows_are_taken_in_and_handed_back_in_one_piece():
    """Nothing waits when a batch comes; when it leaves, once for all of it."""
    costs = []
    for count in (2, 32):
        with pretended() as counted:
            stage, request = moving(rows(count, "dpmpp_2m", steps=3), Half())
            costs.append((sum(counted.operations.values()), len(counted.copies)))
            assert counted.waits == []
            while not request.done:
                stage.advance()
            counted.clear()
            assert sum(map(len, stage.finish(request))) == count and counted.waits == ["_to_copy back"]
    assert costs == [(0, 3)] * 2


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("schedule", [None, RectifiedFlow()], ids=["VP", "flow"])
def test_what_is_computed_there_is_what_the_cpu_computes(name, schedule):
    """From the first step, with nothing before it, to the last, which ends at 0."""
    given, found = rows(4, name, masks=name == "heun", steps=5), []
    for device in (torch.device("cpu"), DEVICE):
        with on(device):
            stage, request = moving(given, Half(schedule), device)
            while not request.done:
                stage.advance()
            found.append([tensors.from_arrow(table, "latents").clone() for table in stage.finish(request)])
    assert torch.equal(found[0][0], found[1][0]) and bool(found[0][0].isfinite().all())


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde"])
def test_so_it_is_in_a_deterministic_job(name):
    """Where idle slots repeat a row, and a call is two, of the prompts and of the negatives."""
    given, found = rows(4, name, steps=5), []
    for device in (torch.device("cpu"), DEVICE):
        with on(device) as counted:
            stage, request = moving(given, Half(), device, fixed=FixedShape(batch_size=6, rows_per_shard=12))
            while not request.done:
                stage.advance()
            assert counted.waits == []
            found.append([tensors.from_arrow(table, "latents").clone() for table in stage.finish(request)])
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_half_way_rows_that_had_no_step_to_make_leave_beside_those_that_had(name):
    """What their scheduler remembers begins where theirs are that moved."""
    given = rows(4, name, steps=5)
    at = given.schema.get_field_index("strength")
    given = given.set_column(at, given.schema.field(at), pa.array([1.0, 0.0, 0.7, 0.0]))
    found = []
    for device in (torch.device("cpu"), DEVICE):
        with on(device):
            stage, request = moving(given, Half(), device, until=0.5)
            while not request.done:
                stage.advance()
            [table] = stage.finish(request)
            names = [name for name in table.column_names if name == "latents" or name.startswith("state:")]
            found.append({name: tensors.from_arrow(table, name).clone() for name in names})
    assert len(found[0]) > 1 and found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        assert torch.equal(wanted.nan_to_num(), found[1][name].nan_to_num()), name


def test_a_row_that_breaks_is_blamed_on_the_network_without_a_look_on_the_way():
    class Breaks(Half):
        def predict(self, x, t, conditioning):
            broken = torch.arange(len(x)) == 1 if len(self.calls) == 2 else torch.zeros(len(x), dtype=torch.bool)
            found = super().predict(x, t, conditioning)
            return torch.where(tensors.send(broken, x.device)[:, None, None, None], torch.nan, found)

    rejected = {}
    with pretended() as counted:
        stage, request = moving(rows(4, "dpmpp_2m", guidance_scale=1.0), Breaks())
        request.reject = rejected.__setitem__
        while not request.done:
            stage.advance()
        assert counted.waits == []
        [table] = stage.finish(request)
    assert table.column("row").to_pylist() == [0, 2, 3] and list(rejected) == [1]
    assert rejected[1].startswith("the denoised latents are not finite (nor was a prediction of ")
    assert rejected[1].endswith("Breaks)")


def test_a_look_is_counted_and_so_is_a_copy_that_waits():
    with pretended() as counted:
        x = torch.zeros(3).to(DEVICE)
        assert bool((x + 1 > 0).all()) and x.tolist() == [0, 0, 0] and x[0].item() == 0
        assert torch.tensor([1.0, 2.0], device=DEVICE).shape == x[x == 1].repeat(2).new_tensor([0, 0]).shape
        with pytest.raises(RuntimeError, match=r"expected all tensors on lazy:0, and there is one \[3\] on the CPU"):
            x + torch.zeros(3)
    assert counted.waits == [
        "_to_copy there", "_local_scalar_dense", "_to_copy back", "_local_scalar_dense", "_to_copy there", "index",
        "_to_copy there",
    ]  # fmt: skip
    assert counted.copies == [12, 8, 8]

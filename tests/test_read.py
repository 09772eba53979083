"""Row numbers to rows: the job's values, the row's own over them, and pictures of the size that was asked for."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch

from latentmill.batch import require_spec
from latentmill.columns import Columns
from latentmill.fields import BATCH_SCHEMA
from latentmill.identity import row_seed
from latentmill.pixels import cover, crop
from latentmill.plugin import Declaration, Fragment, LatentSpec, RowError, Source, StageContext, tensors
from latentmill.stages.read import Read

SPEC = LatentSpec(channels=4, downscale=4, scale=0.5, shift=0.25, dtype="float16", fingerprint="abc")


def Sampling(**given):
    return {"width": 64, "height": 32, "max_pixels": 1 << 24, "prompt": "the job's", "negative_prompt": "ugly", **given}


@dataclass
class Plan:
    """Fragments of three rows each, named after their number."""

    samples: int = 1

    def locate(self, row):
        source_row, sample = divmod(row, self.samples)
        return str(source_row // 3), source_row % 3, sample

    def row_id(self, row):
        return f"{row:09d}"

    seed = 0
    columns = Columns()


class Given(Source):
    """A source of rows that a test gives, which remembers what it was asked."""

    contract = 2

    def __init__(self, *given, spec=None):
        self.given, self.spec, self.asked = given, spec, []

    def fragments(self):
        return [Fragment(str(at), 3) for at in range(len(self.given) // 3)]

    def read(self, fragment, start, stop):
        self.asked.append((fragment, start, stop))
        yield from self.given[int(fragment) * 3 :][start:stop]

    def latent_spec(self):
        return self.spec


def reading(source, plan, sampling, multiple_of=1):
    plan.spec = LatentSpec(4, multiple_of, 1.0, 0.0, "float32", "")
    stage = Read()
    stage.prepare(
        StageContext.of(
            {"source": source},
            plan=plan,
            sampling=sampling,
            choices={"scheduler": {"name": "euler"}},
            after=[Declaration("denoise", needs=("denoiser",))],
        )
    )
    return stage


def test_rows_of_prompts_take_no_torch():
    def made_tensors(*rows):
        stage = reading(Given(*rows), Plan(), Sampling())
        assert [len(table) for table in stage(pa.table({"row": [0, 1, 2]}), pytest.fail)] == [3]
        return "row_tensors" in vars(stage)

    prompts = [{"prompt": f"{at}"} for at in range(3)]
    assert not made_tensors(*prompts)
    assert made_tensors(*({**row, "image": gradient(32, 64)} for row in prompts))


def read(source, numbers=None, samples=1, sampling=None, multiple_of=1):
    """The rows of all tables by number, the reasons by number, and the tables."""
    numbers = list(range(len(source.given) * samples)) if numbers is None else numbers
    rejected = {}
    stage = reading(source, Plan(samples), sampling or Sampling(), multiple_of)
    batch = pa.table({"row": pa.array(numbers, pa.int64())})
    tables = list(stage(batch, lambda i, reason: rejected.setdefault(numbers[i], reason)))
    found = {row["row"]: row for table in tables for row in table.select(BATCH_SCHEMA.names).to_pylist()}
    assert sorted([*found, *rejected]) == sorted(numbers)
    return found, rejected, tables


def gradient(height, width):
    """Red is the line's number and green the column's."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)
    return image


def test_the_row_s_values_stand_over_the_job_s():
    own = {
        "prompt": "own",
        "negative_prompt": "",
        "seed": 7,
        "steps": 5,
        "guidance_scale": 1,
        "guidance_rescale": 0.7,
        "guidance_from": 0.9,
        "guidance_until": 0.25,
        "strength": 1.0,
        "scheduler": "dpmpp_2m",
        "width": 8,
        "height": 16,
        "something else": object(),
    }
    found, rejected, [table] = read(Given({}, {"prompt": None, "steps": None, "seed": None}, own))
    assert not rejected
    assert table.schema == BATCH_SCHEMA
    job = {
        "prompt": "the job's",
        "negative_prompt": "ugly",
        "steps": 20,
        "guidance_scale": 4.0,
        "guidance_rescale": 0.0,
        "guidance_from": 1.0,
        "guidance_until": 0.0,
        "strength": 1.0,
        "scheduler": "euler",
        "width": 64,
        "height": 32,
        "warning": "",
    }
    assert found[0] == {"row": 0, "row_id": "000000000", "seed": row_seed(0, "000000000", 0), **job}
    assert found[1] == {"row": 1, "row_id": "000000001", "seed": row_seed(0, "000000001", 0), **job}
    del own["something else"]
    assert found[2] == {"row": 2, "row_id": "000000002", **own, "guidance_scale": 1.0, "warning": ""}


def test_numbers_may_come_as_tables_make_them():
    found, _, _ = read(
        Given({"seed": 3.0, "steps": np.int32(5), "width": np.float64(8), "guidance_scale": np.float32(2)})
    )
    assert (found[0]["seed"], found[0]["steps"], found[0]["width"], found[0]["guidance_scale"]) == (3, 5, 8, 2.0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"steps": 0}, "steps must be from 1 to 100000, not 0"),
        ({"steps": 10**30}, "steps must be from 1 to 100000, not 1000000000000000000000000000000"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"steps": "20"}, "steps must be a whole number, not '20'"),
        ({"seed": math.nan}, "seed must be a whole number, not nan"),
        ({"seed": 1e300}, "seed must be a whole number, not 1e+300"),
        ({"seed": -2}, "seed must be from 0 to 2^64 - 1, or -1 for the row's own, not -2"),
        ({"seed": 2**64}, "seed must be from 0 to 2^64 - 1, or -1 for the row's own, not 18446744073709551616"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number, not nan"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number, not inf"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number, not '4'"),
        ({"strength": 1.5}, "strength must be from 0 to 1, not 1.5"),
        ({"strength": -0.1}, "strength must be from 0 to 1, not -0.1"),
        ({"width": -8}, "width must be from 1 to 65536, not -8"),
        ({"prompt": 5}, "prompt must be text, not 5"),
        ({"prompt": "\0a\0b"}, "prompt holds a NUL, at character 0: is it text in UTF-8?"),
        ({"negative_prompt": "ab\0"}, "negative_prompt holds a NUL, at character 2: is it text in UTF-8?"),
        ({"prompt": "a" * 1_000_001}, "prompt has 1000001 characters, and 1000000 are the most"),
        ({"negative_prompt": ["a"]}, "negative_prompt must be text, not ['a']"),
        ({"prompt": "a \ud800"}, "prompt holds half a surrogate pair, at character 2"),
        ({"scheduler": 1}, "scheduler must be text, not 1"),
        ({"image": "a.png"}, "a picture must be a uint8 array [H, W, 3]"),
        ({"image": np.zeros((2, 2, 4), np.uint8)}, "a picture must be a uint8 array [H, W, 3]"),
        ({"image": np.zeros((0, 2, 3), np.uint8)}, "the picture has no pixels"),
        ({"latents": np.zeros((4, 2, 2))}, "latents from a source that doesn't say of which space they are"),
        (RowError("the source says no"), "the source says no"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason_and_its_neighbours_are_not(row, reason):
    found, rejected, _ = read(Given({"prompt": "before"}, row, {"prompt": "after"}), samples=2)
    assert rejected == {2: reason, 3: reason}
    assert [found[n]["prompt"] for n in (0, 1, 4, 5)] == ["before", "before", "after", "after"]


@pytest.mark.parametrize(
    "prompt", ["", " ", "a " * 50_000, "a\x1b[2J\r\n\x7f\u202e\ufeff", "a" * 1_000_000, "\U0001f999"]
)
def test_prompts_of_any_text_pass_as_they_are(prompt):
    """What a model makes of them its text encoder says."""
    found, rejected, _ = read(Given({"prompt": prompt}, {}, {}))
    assert found[0]["prompt"] == prompt and not rejected


def test_samples_share_their_source_row_and_differ_in_seed():
    source = Given({"prompt": "a"}, {"prompt": "b", "seed": 2**64 - 2}, {"prompt": "c", "seed": -1})
    found, _, _ = read(source, samples=3)
    assert [found[n]["prompt"] for n in range(9)] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert [found[n]["seed"] for n in range(9)] == [
        *[row_seed(0, f"{n:09d}", n) for n in range(3)],
        *[2**64 - 2, 12345672033774617821, 1848412668411221896],  # hashes of seed and sample
        *[row_seed(0, f"{n:09d}", n - 6) for n in (6, 7, 8)],  # -1 is the row's own, as null is
    ]
    assert source.asked == [("0", 0, 3), ("0", 2, 3)]  # and one again, to compare


def test_a_declared_id_travels_and_the_seed_hangs_on_it_unless_there_is_one():
    class Declaring(Given):
        id_column = "name"

    source = Declaring({"id": "cat", "prompt": "a"}, {"id": "horse", "seed": 7}, {"prompt": "no id"})
    found, rejected, [table] = read(source, samples=2)
    assert table.schema.names == [*BATCH_SCHEMA.names, "id"]
    assert table.column("id").to_pylist() == ["cat", "cat", "horse", "horse"]
    assert [found[n]["seed"] for n in range(4)] == [
        *[row_seed(0, "", sample, id="cat") for sample in (0, 1)],
        *[7, 2174948161648732372],
    ]
    assert rejected == {4: "id must be text, not None", 5: "id must be text, not None"}
    assert read(Given({"id": "cat"}, {}, {}))[2][0].schema == BATCH_SCHEMA  # not declared: any other column


def test_runs_of_rows_are_read_in_one_call_each_and_any_order_will_do():
    source = Given(*({"prompt": str(i)} for i in range(12)))
    found, _, _ = read(source, [11, 4, 0, 1, 5, 8, 3])
    assert {n: row["prompt"] for n, row in found.items()} == {n: str(n) for n in (0, 1, 3, 4, 5, 8, 11)}
    runs, again = (
        [("0", 0, 2), ("1", 0, 3), ("2", 2, 3), ("3", 2, 3)],
        [("0", 1, 2), ("1", 2, 3), ("2", 1, 3), ("3", 1, 3)],
    )
    assert source.asked == [each for pair in zip(runs, again) for each in pair]
    stage, batch = reading(source, Plan(), Sampling()), pa.table({"row": pa.array([0, 1], pa.int64())})
    for _ in range(3):
        list(stage(batch, {}.__setitem__))
    assert source.asked[8:] == [("0", 0, 2), ("0", 1, 2), ("0", 0, 2), ("0", 0, 2)]  # of a fragment once


@pytest.mark.parametrize("extra", [1, -1])
def test_a_source_that_gives_too_few_or_too_many_rows_is_not_believed(extra):
    class Wrong(Given):
        def read(self, fragment, start, stop):
            return super().read(fragment, start, stop + extra)

    said = rf"source Wrong: read was asked for rows 0 to 1 of 0, 2 of them, and gave {'more' if extra > 0 else 1}"
    with pytest.raises(RuntimeError, match=said):
        read(Wrong({}, {}, {}), [0, 1])


def test_an_error_of_the_source_stays_what_it_is():
    class Broken(Given):
        def read(self, fragment, start, stop):
            yield {}
            raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        read(Broken({}, {}, {}))


def test_nothing_but_bad_rows_gives_no_table():
    _, rejected, tables = read(Given({"steps": 0}))
    assert tables == [] and list(rejected) == [0]


def test_a_row_without_a_picture_needs_a_size():
    source = Given({}, {"width": 8}, {"width": 8, "height": 8}, {"image": gradient(4, 4), "height": 8})
    found, rejected, _ = read(source, sampling=Sampling(width=None, height=None))
    assert rejected == {
        0: "a row without a picture needs width and height",
        1: "width and height must be given together, or neither",
        3: "width and height must be given together, or neither",
    }
    assert list(found) == [2]


def test_pictures_of_one_size_share_a_table():
    source = Given(
        {"image": gradient(9, 8)},
        {"image": gradient(5, 5)},
        {"image": gradient(8, 8)},
        {"prompt": "none", "width": 4, "height": 4},
    )
    found, rejected, tables = read(source, sampling=Sampling(width=None, height=None), multiple_of=4)
    assert not rejected
    assert [table.column("row").to_pylist() for table in tables] == [[0, 2], [1], [3]]
    assert tables[0].column_names == [*BATCH_SCHEMA.names, "image"]
    images = tensors.from_arrow(tables[0], "image")
    assert images.dtype == torch.uint8 and images.shape == (2, 8, 8, 3)
    assert images[0, :, 0, 0].tolist() == list(range(8)) and images[1, 0, :, 1].tolist() == list(range(8))
    assert [(found[n]["width"], found[n]["height"]) for n in range(4)] == [(8, 8), (4, 4), (8, 8), (4, 4)]
    assert tables[2].column_names == BATCH_SCHEMA.names


def test_a_picture_keeps_its_own_size_less_the_remainder_from_both_edges():
    assert crop(gradient(13, 22), 8)[:, :, 0].tolist() == [[line] * 16 for line in range(2, 10)]
    assert crop(gradient(13, 22), 8)[0, :, 1].tolist() == list(range(3, 19))
    with pytest.raises(RowError, match="a picture of 20x3 pixels, and the VAE needs 8"):
        crop(gradient(3, 20), 8)


def test_a_picture_covers_the_size_asked_for_and_the_middle_stays():
    wide = gradient(10, 40)
    assert np.array_equal(cover(wide, 40, 10), wide)
    assert np.array_equal(cover(wide, 20, 10), wide[:, 10:30])  # the same scale: pixels are cut, not touched
    assert np.array_equal(cover(gradient(40, 10), 10, 20), gradient(40, 10)[10:30])
    half = cover(gradient(80, 80), 40, 20)  # half the size, the middle half of the lines
    assert half.shape == (20, 40, 3)
    assert np.abs(half[2:-2, 0, 0] - (20.5 + 2 * np.arange(2, 18))).max() <= 1
    assert np.abs(half[0, 2:-2, 1] - (0.5 + 2 * np.arange(2, 38))).max() <= 1
    assert (cover(np.full((7, 3, 3), 9, np.uint8), 64, 64) == 9).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_pictures_can_be_covered(shape):
    assert cover(np.full((*shape, 3), 7, np.uint8), 64, 64).tolist() == [[[7, 7, 7]] * 64] * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_latents_keep_their_dtype_and_give_the_row_its_size(dtype):
    tensor = torch.arange(24).reshape(4, 2, 3).to(dtype)
    given = tensor if dtype == torch.bfloat16 else tensor.numpy()
    found, rejected, [table] = read(Given({"latents": given, "prompt": "a"}, spec=SPEC), samples=2)
    assert not rejected
    assert (found[1]["width"], found[1]["height"], found[1]["prompt"]) == (12, 8, "a")
    got = tensors.from_arrow(table, "latents")
    assert got.dtype == dtype and torch.equal(got, torch.stack([tensor, tensor]))
    require_spec(table, SPEC)


def test_latents_that_can_t_be_are_rejected():
    good = np.ones((4, 2, 3), np.float16)
    bad = good.copy()
    bad[0, 0, 0] = math.nan
    source = Given({"latents": good}, {"latents": bad}, {"latents": good[:3]}, {"latents": good.astype(int)}, spec=SPEC)
    found, rejected, _ = read(source)
    assert list(found) == [0]
    assert rejected == {
        1: "the latents are not finite numbers",
        2: "latents of shape (3, 2, 3), and 4 channels were expected",
        3: "the latents are not finite numbers",
    }


def test_strength_needs_something_to_begin_from():
    """Of an empty latent and half the noise nothing comes."""
    picture = np.zeros((16, 16, 3), np.uint8)
    found, rejected, _ = read(Given({"strength": 0.5}, {"strength": 0.5, "image": picture}, {}))
    assert rejected == {0: "strength 0.5 is for rows with a picture or latents, and there are none"}
    assert sorted(found) == [1, 2]


def test_a_mask_is_cut_as_its_picture_is_and_becomes_ones_and_zeros():
    mask = np.zeros((40, 64, 3), np.uint8)
    mask[:, 32:] = 200
    image = {"image": gradient(40, 64)}
    source = Given({**image, "mask": mask}, image, {**image, "mask": mask[:, 1:]})
    found, rejected, tables = read(source, sampling=Sampling(width=16, height=16))
    assert found.keys() == {0, 1} and rejected == {2: "the mask is of another size than the picture"}
    [masked] = [table for table in tables if "mask" in table.column_names]
    wanted = [[0] * 8 + [1] * 8] * 16
    assert masked["row"].to_pylist() == [0] and tensors.from_arrow(masked, "mask").tolist() == [wanted]

"""Rows of the shapes model that differ in everything: each as if it were alone, stopped in the middle and gone on with."""

import numpy as np
import pytest
import torch
from tests.denoising import denoise_with, latents_of

from latentmill import registry
from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX, FixedShape, concat, from_dicts
from latentmill.plugin import Declaration, StageContext
from latentmill.stages.encode import Encode

FIXED = FixedShape(batch_size=8, rows_per_shard=64)


def encode_with(vae, text):
    stage = Encode()
    later = [Declaration("denoise", needs=("denoiser",))]
    stage.prepare(StageContext.of({"vae": vae, "text_encoder": text}, after=later))
    return stage


@pytest.fixture(scope="module")
def mixed():
    """64 rows of the shapes model that differ in everything: 4 schedulers, 4 to 13 steps, guidance or none, strengths."""
    choose = np.random.default_rng(0)
    names = ["dpmpp_2m", "euler_ancestral", "heun", "unipc"]
    per_row = [
        {
            "row": n, "row_id": str(n), "prompt": "a red star above a blue ring on a yellow background",
            "negative_prompt": "", "seed": 1000 + n, "steps": int(choose.integers(4, 14)),
            "guidance_scale": [1.0, 4.0, 7.5][n % 3], "strength": float(choose.uniform(0.3, 1.0)), "width": 32,
            "height": 32, "scheduler": names[n % 4],
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


def test_sixty_four_mixed_rows_each_as_if_alone(mixed):
    """Every fifth is asked for alone: all schedulers with all guidance."""
    together, asked = mixed(list(range(64))), range(0, 64, 5)
    worst = max(float((together[n] - mixed([n])[n]).abs().max() / together[n].abs().max()) for n in asked)
    assert worst < 1e-5, f"{worst:.1e}"


@pytest.fixture(scope="module")
def eight(mixed):
    return mixed(list(range(8)), FIXED)


def test_mixed_rows_bit_for_bit_where_the_shape_is_fixed(mixed, eight):
    """A slot that is idle, or has arrived before the others, must not stand in a solver's way either."""
    for n, latents in mixed([5, 3, 7, 0, 2], FIXED).items():
        assert torch.equal(latents, eight[n]), n


def test_mixed_rows_saved_in_the_middle_reordered_and_resumed(mixed, eight):
    """Half-way rows are values: in Arrow, in another order, with what their scheduler remembers, they go on as if never stopped."""
    halves = mixed.parts(mixed.table.take(list(range(8))), FIXED, until=0.5)
    told = [name for name in mixed.table.column_names if name.startswith((PROMPT_PREFIX, NEGATIVE_PREFIX))]
    shuffled = []
    for half in halves:
        assert min(half["time"].to_pylist()) > 0 and max(half["time"].to_pylist()) < 0.5
        half = half.take(list(range(len(half)))[::-1])
        again = mixed.table.take(half["row"].to_pylist())  # the row of number n stands at n
        for name in told:
            half = half.append_column(again.schema.field(name), again.column(name))
        shuffled.append(half.combine_chunks())
    found = latents_of(part for half in shuffled[::-1] for part in mixed.parts(half, FIXED))
    assert found.keys() == eight.keys()
    for n, latents in found.items():
        assert torch.equal(latents, eight[n]), n

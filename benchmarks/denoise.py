"""How full the network's calls are, and what it costs to think in steps.

    python benchmarks/denoise.py

*Full*: 2,000 rows with 8 to 50 steps each, half of them with guidance, through the flow in one process, 16 evaluations a
call, with a network that does nothing: evaluations / (calls x 16), for one scheduler and for four mixed. Beside it the same
rows in plain batches, which last as long as their longest row.

*Overhead*: rows that are all alike, on the shapes model: the stage against a loop that does no more than stack a batch and
step it, taking turns, the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from printed import begin, table
from torch import Tensor

from latentmill import registry
from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX, SCHEDULER_KEY, from_dicts, with_latents
from latentmill.driver.loop import drive
from latentmill.driver.messages import StageSpec
from latentmill.driver.state import DriverState
from latentmill.plugin import Declaration, Denoiser, LatentSpec, Reject, Stage, StageContext, tensors
from latentmill.schedulers import grids, noise
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill.stages.denoise import Denoise
from latentmill.stages.encode import Encode
from latentmill.stages.guidance import Guidance, ModelField
from latentmill.workers.inline import InlinePool
from latentmill.workers.pools import RUNNING_BATCHES
from latentmill.workers.worker import StageWork, WorkerSetup

CALL = 16
SPEC = LatentSpec(channels=1, downscale=8, scale=1.0, shift=0.0, dtype="float32", fingerprint="nothing")


class Idle(Denoiser):
    """Predicts what it sees; counts calls and evaluations."""

    contract = 2

    prediction = "sample"
    noise_schedule = VariancePreserving()

    def __init__(self) -> None:
        self.calls: list[int] = []

    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(len(x))
        return x


class Start(Stage):
    """Latents for rows that have only a number."""

    contract = 2

    def __init__(self, given: Sequence[Mapping[str, Any]]) -> None:
        self.given = given

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        by_scheduler: dict[str, list[Mapping[str, Any]]] = {}
        for number in batch.column("row").to_pylist():
            by_scheduler.setdefault(self.given[number]["scheduler"], []).append(self.given[number])
        for name, members in by_scheduler.items():
            table = with_latents(from_dicts(members), torch.zeros(len(members), 1, 2, 2), SPEC)
            yield table.replace_schema_metadata({SCHEDULER_KEY: name})


class End(Stage):
    """Takes rows, and commits nothing."""

    contract = 2

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        return batch

    def commit(self, shard: int, packed: list[pa.Table], errors: list[dict[str, object]]) -> bool:
        return True


def mixed(count: int, schedulers: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Rows with 8 to 50 steps, every other one, by chance, with guidance."""
    choose = np.random.default_rng(seed)
    return [
        {
            "row": n, "row_id": str(n), "prompt": "", "negative_prompt": "", "seed": n, "steps": int(choose.integers(8, 51)),
            "guidance_scale": float(choose.choice([1.0, 4.0])), "strength": 1.0, "width": 16, "height": 16,
            "scheduler": str(choose.choice(schedulers)),
        }
        for n in range(count)
    ]  # fmt: skip


def _denoise(denoiser: Denoiser, schedulers: Mapping[str, Any]) -> Denoise:
    stage = Denoise()
    context = StageContext.of(
        {"denoiser": denoiser, "scheduler": None},
        batch_size=CALL,
        sampling={"until": 0.0, "first_noise": "latentmill"},
        choices={"scheduler": {"grid": "trailing"}},
        scheduler_of=schedulers.__getitem__,
    )
    stage.prepare(context)
    return stage


def fullness(given: Sequence[Mapping[str, Any]]) -> float:
    """Evaluations done / (calls x places), when the rows go through the driver."""
    denoiser = Idle()
    schedulers = {name: registry.build("scheduler", {"name": name}) for name in {row["scheduler"] for row in given}}
    makers = {
        "read": lambda: Start(given),
        "denoise": lambda: _denoise(denoiser, schedulers),
        "write": End,
    }
    specs = [StageSpec(name, CALL, running_batches=RUNNING_BATCHES if name == "denoise" else 1) for name in makers]
    pool = InlinePool([WorkerSetup((StageWork(name, make),)) for name, make in makers.items()])
    drive(DriverState(tuple(specs), len(given), rows_per_shard=256), pool, lambda: None)
    return sum(denoiser.calls) / (len(denoiser.calls) * CALL)


def plain_fullness(given: Sequence[Mapping[str, Any]]) -> float:
    """The same for plain batches: each of as many rows as fit if all are guided, until its longest is done."""
    done = calls = 0
    for start in range(0, len(given), CALL // 2):
        batch = given[start : start + CALL // 2]
        done += sum(row["steps"] * (2 if row["guidance_scale"] > 1 else 1) for row in batch)
        calls += max(row["steps"] for row in batch)
    return done / (calls * CALL)


def overhead(repeats: int) -> list[float]:
    """Time of the stage / time of a plain loop over the same batches of 8 guided rows, 20 steps, on the shapes model."""
    vae, text, denoiser = (registry.build(kind, {"name": "shapes"}) for kind in ("vae", "text_encoder", "denoiser"))
    scheduler, cpu = registry.build("scheduler", {"name": "dpmpp_2m"}), torch.device("cpu")
    encode, stage = Encode(), _denoise(denoiser, {"dpmpp_2m": scheduler})
    later = [Declaration("denoise", needs=("denoiser",))]
    encode.prepare(StageContext.of({"vae": vae, "text_encoder": text}, after=later))
    encode.load(cpu)
    stage.load(cpu)
    prompt = "a red star above a blue ring on a yellow background"
    alike = {"prompt": prompt, "steps": 20, "guidance_scale": 4.0, "width": 64, "height": 64, "scheduler": "dpmpp_2m"}
    given = from_dicts([{**row, **alike} for row in mixed(CALL, ["dpmpp_2m"])])

    def refuse(i: int, reason: str) -> None:
        raise ValueError(reason)

    [table] = encode(given, refuse)
    times = grids.times("trailing", denoiser.noise_schedule, 20).repeat(CALL // 2, 1)

    @torch.inference_mode()
    def loop() -> Tensor:
        out = []
        for start in (0, CALL // 2):
            batch = table.slice(start, CALL // 2)
            x, prompts, negatives = (
                {
                    name[len(prefix) :]: tensors.from_arrow(batch, name)
                    for name in batch.column_names
                    if name.startswith(prefix)
                }
                for prefix in ("latents", PROMPT_PREFIX, NEGATIVE_PREFIX)
            )
            seeds = batch.column("seed").to_pylist()
            shape = x[""].shape[1:]
            field = ModelField(denoiser, prompts, negatives, [Guidance(4.0)] * len(seeds), seeds, shape, cpu, False)
            (alpha, sigma), start_noise = (
                field.scale(times[:, 0]),
                torch.stack([noise.start(s, tuple(shape)) for s in seeds]),
            )
            moved = (alpha * x[""] + sigma * start_noise).float()
            state = scheduler.init(field, moved, times[:, 0])
            for i in range(20):
                moved, state = scheduler.step(field, moved, times[:, i], times[:, i + 1], state)
                moved = moved.float()
            out.append(moved)
        return torch.cat(out)

    ratios = []
    for _ in range(repeats):
        began = time.perf_counter()
        plain = loop()
        middle = time.perf_counter()
        [part] = stage(table, refuse)
        ratios.append((time.perf_counter() - middle) / (middle - began))
        assert torch.equal(tensors.from_arrow(part, "latents"), plain)
    return ratios


def main() -> None:
    """Print the shares and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin(__doc__)
    found = []
    for names in (["euler"], ["euler", "dpmpp_2m", "unipc", "ddpm"]):
        given = mixed(options.rows, names)
        share, plain = fullness(given), plain_fullness(given)
        found.append((len(names), f"{share:.3f}", f"{plain:.3f}", f"{share / plain:.2f}"))
    table(("schedulers", "of the places used (at most 1)", "by plain batches", "ratio"), found)
    ratios = sorted(overhead(options.repeats))
    print()
    row = (f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}")
    table(("rows that are alike: the stage's time / a plain loop's", "from to"), [row])


if __name__ == "__main__":
    main()

"""The denoise stage: latents, plus noise, to clean latents, every row with its own steps, guidance, strength and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import rows, tensors
from latentmill.plugin import Conditioning, Denoiser, Field, Prediction, Reject, RowError, Scheduler, Stage
from latentmill.schedulers import grids, noise


class Denoise(Stage):
    """Replaces ``latents`` by clean ones and drops the conditioning."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Callable[[str], Scheduler],
        grid: str | Mapping[str, Any],
        fixed: rows.FixedShape | None = None,
        first_noise: str = "latentmill",
    ) -> None:
        self.denoiser, self.scheduler, self.grid, self.fixed = denoiser, scheduler, grid, fixed
        self.first_noise = noise.start_of_diffusers if first_noise == "diffusers" else noise.start
        self.device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        self.device = device
        self.denoiser.load(device)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        by_scheduler = defaultdict(list)
        times = {}
        shape = batch.schema.field("latents").type.shape
        for i, row in enumerate(batch.select(["scheduler", "steps", "strength"]).to_pylist()):
            try:
                times[i] = grids.times(self.grid, self.denoiser.path, row["steps"], row["strength"], shape)
                by_scheduler[row["scheduler"]].append(i)
            except ValueError as error:
                reject(i, str(error))
        for name, members in by_scheduler.items():
            try:
                scheduler = self.scheduler(name)
            except RowError as error:
                for i in members:
                    reject(i, str(error))
                continue
            part = batch if len(members) == len(batch) else batch.take(members)
            latents = self._denoise(part, scheduler, [times[i] for i in members])
            good = latents.isfinite().flatten(1).all(1)
            for i, fine in zip(members, good.tolist()):
                if not fine:
                    reject(i, f"the denoised latents are not finite (scheduler {name})")
            spec = rows.spec_from_json(part.schema.field("latents").metadata[rows.SPEC_KEY])
            part = part.select([name for name in part.column_names if not is_conditioning(name)])
            part = rows.with_latents(part, latents.to(tensors.from_arrow(part, "latents").dtype), spec)
            yield part if bool(good.all()) else part.filter(pa.array(good.tolist()))

    def _denoise(self, part: pa.Table, scheduler: Scheduler, grid: Sequence[Tensor]) -> Tensor:
        """Clean latents ``[B, ...]``, float32, on the CPU; ``grid`` holds each row's times.

        Computed in the slots of the fixed shape, where there is one.
        """
        slots, size = rows.slots(part, self.fixed)
        seeds = [0] * size
        for slot, seed in zip(slots.tolist(), part.column("seed").to_pylist()):
            seeds[slot] = seed
        # A row's times, its last one repeated: a row that has arrived, or an empty slot, makes no more steps.
        longest = max(len(times) for times in grid)
        times = torch.zeros(size, longest, dtype=torch.float64)
        steps = torch.zeros(size, dtype=torch.int64)
        for slot, row_times in zip(slots.tolist(), grid):
            times[slot, : len(row_times)] = row_times
            steps[slot] = len(row_times) - 1

        x = tensors.spread(tensors.from_arrow(part, "latents"), slots, size).to(self.device, torch.float32)
        prompt, negative = (
            {
                name.removeprefix(prefix): tensors.spread(tensors.from_arrow(part, name), slots, size).to(self.device)
                for name in part.column_names
                if name.startswith(prefix)
            }
            for prefix in (rows.PROMPT, rows.NEGATIVE)
        )
        guidance = tensors.spread(torch.tensor(part.column("guidance_scale").to_pylist()).double(), slots, size)
        field = ModelField(
            self.denoiser, prompt, negative, guidance, seeds, x.shape[1:], self.device, self.fixed is not None
        )

        moving = steps > 0
        alpha, sigma = field.scale(times[:, 0])
        start = torch.stack([self.first_noise(seed, tuple(x.shape[1:])) for seed in seeds]).to(self.device)
        x = torch.where(field.column(moving), alpha * x + sigma * start, x.double()).float()

        out = x.clone()
        state: dict[str, Tensor] = {}
        alive = torch.arange(size)  # the slots that are computed: all for ever if the shape is fixed
        for i in range(longest - 1):
            going = steps > i
            if self.fixed is None and not bool(going[alive].all()):
                keep = going[alive]
                alive, x = alive[keep], x[keep.to(self.device)]
                state = {name: value[keep.to(value.device)] for name, value in state.items()}
                field = field.take(keep)
            t, s = times[alive, i], times[alive, i + 1]
            if self.fixed is not None:  # idle slots repeat some row's step, so that nothing in them is out of range
                anyone = int(going.nonzero()[0])
                t, s = (torch.where(going, time, time[anyone]) for time in (t, s))
            if i == 0:
                state = scheduler.init(field, x, t)
            moved, state = scheduler.step(field, x, t, s, state)
            x = moved.to(torch.float32)
            arrived = (steps[alive] == i + 1).nonzero()[:, 0]
            out[alive[arrived].to(self.device)] = x[arrived.to(self.device)]
        return out[slots.to(self.device)].cpu()


class ModelField(Field):
    """What a scheduler asks, answered by a denoiser: hides prediction type, conditioning and guidance.

    Classifier-free guidance (Ho and Salimans 2022, eq. 6, in diffusers' form): ``negative + guidance_scale * (prompt -
    negative)``. As in diffusers, a scale of 1 or less turns it off, and such a row costs one evaluation instead of two.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompt: Conditioning,
        negative: Conditioning,
        guidance: Tensor,
        seeds: list[int],
        shape: torch.Size,
        device: torch.device,
        fixed: bool,
    ) -> None:
        self.denoiser, self.prompt, self.negative = denoiser, prompt, negative
        self.guidance, self.seeds, self.shape, self.device, self.fixed = guidance, seeds, shape, device, fixed

    def take(self, keep: Tensor) -> ModelField:
        """The field of some of the rows."""
        on_device = keep.to(self.device)
        prompt, negative = ({n: v[on_device] for n, v in c.items()} for c in (self.prompt, self.negative))
        seeds = [seed for seed, kept in zip(self.seeds, keep.tolist()) if kept]
        return ModelField(
            self.denoiser, prompt, negative, self.guidance[keep], seeds, self.shape, self.device, self.fixed
        )

    def column(self, values: Tensor) -> Tensor:
        """``values[B]``, shaped to broadcast against the latents, where they are."""
        return values.to(self.device).reshape(-1, *(1 for _ in self.shape))

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.denoiser.path.scale(t)
        return self.column(alpha), self.column(sigma)

    def time(self, ratio: Tensor) -> Tensor:
        return self.denoiser.path.time(ratio.flatten().cpu())

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.to(torch.float32)
        guided = self.guidance > 1.0
        if self.fixed:  # two evaluations of the one shape; neither's bits depend on who else is guided
            predicted = self.denoiser.predict(x, t, self.prompt)
            if bool(guided.any()):
                predicted = self._guide(predicted, self.denoiser.predict(x, t, self.negative), guided)
        elif not bool(guided.any()):
            predicted = self.denoiser.predict(x, t, self.prompt)
        else:
            also = guided.nonzero()[:, 0].to(self.device)
            both = {name: torch.cat([value, self.negative[name][also]]) for name, value in self.prompt.items()}
            evaluated = self.denoiser.predict(torch.cat([x, x[also]]), torch.cat([t, t[also.cpu()]]), both)
            predicted, negative = evaluated[: len(x)], evaluated[: len(x)].clone()
            negative[also] = evaluated[len(x) :]
            predicted = self._guide(predicted, negative, guided)
        alpha, sigma = self.scale(t)
        return to_clean(self.denoiser.prediction, predicted, x, alpha, sigma)

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        shape = tuple(self.shape)
        drawn = [noise.between(seed, a, b, shape) for seed, a, b in zip(self.seeds, t.tolist(), s.tolist())]
        return torch.stack(drawn).to(self.device)

    def _guide(self, prompt: Tensor, negative: Tensor, guided: Tensor) -> Tensor:
        scale = torch.where(self.column(guided), self.column(self.guidance), 1.0).to(prompt.dtype)
        return torch.where(self.column(guided), negative + scale * (prompt - negative), prompt)


def to_clean(prediction: Prediction, predicted: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a prediction stands for, given ``x = alpha * x0 + sigma * noise``. Shapes broadcast.

    epsilon: ``(x - sigma * noise) / alpha`` · sample: itself · v (Salimans and Ho 2022, ``alpha * noise - sigma * x0``):
    ``(alpha * x - sigma * v) / (alpha² + sigma²)`` · flow (``noise - x0``): ``(x - sigma * flow) / (alpha + sigma)``.
    """
    if prediction == "epsilon":
        return (x - sigma * predicted) / alpha
    if prediction == "v":
        return (alpha * x - sigma * predicted) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * predicted) / (alpha + sigma)
    if prediction == "sample":
        return predicted
    raise ValueError(f"prediction {prediction!r}: expected epsilon, v, sample or flow")


def is_conditioning(name: str) -> bool:
    """Whether a column holds conditioning."""
    return name.startswith((rows.PROMPT, rows.NEGATIVE))

"""Where a row of the denoise stage begins: at which times, with how much of which noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from latentmill.fields import FROM_COMFY, NOISE_INDEX
from latentmill.identity import row_seed
from latentmill.plugin import Denoiser, FollowsAuthors, RowError, Scheduler, State
from latentmill.schedulers import grids, noise
from latentmill.stages.carried import schedule_hash

DRAWN_FOR: Mapping[str, Callable[[int, tuple[int, ...], int], Tensor]] = {
    "latentmill": lambda seed, shape, _: noise.start(seed, shape),
    "diffusers": lambda seed, shape, _: noise.start_of_diffusers(seed, shape),
    "comfy": noise.start_of_comfy,
    "comfy_each": noise.each_of_comfy,
    "none": lambda seed, shape, _: torch.zeros(shape),
}
"""By ``sampling.first_noise``, of a row's seed, its latents' shape, and its picture's place in a batch."""


class Beginning:
    """Begins rows on the CPU."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler_of: Callable[[str], Scheduler],
        grid: grids.Choice,
        sampling: Mapping[str, Any],
        downscale: int,
    ) -> None:
        self.downscale = downscale
        self.denoiser, self.scheduler_of, self.grid = denoiser, scheduler_of, grids.choose(grid)
        self.authors, self.until = FollowsAuthors.of(denoiser), float(sampling["until"])
        self.draw = DRAWN_FOR[sampling["first_noise"]]
        self.adds = sampling["first_noise"] != "none"
        self.of_batches = sampling["first_noise"] in FROM_COMFY
        """Whether a row may be a picture of a batch: elsewhere ``noise_index`` is any column that a source has."""

    def noise(self, row: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
        """A row's first noise, float32, of ``shape``."""
        return self.draw(row["seed"], shape, self._index(row))

    def seed(self, row: Mapping[str, Any]) -> int:
        """What the noise of its steps hangs on: pictures of one batch, which have one seed, have not the same."""
        return row_seed(0, "", self._index(row), row["seed"])

    def _index(self, row: Mapping[str, Any]) -> int:
        return row.get(NOISE_INDEX.name, 0) if self.of_batches else 0

    def of(
        self, row: Mapping[str, Any], latents: Tensor, goes_on: bool, from_noise: bool
    ) -> tuple[list[float], Tensor, State | None, float]:
        """A row's times, its latents, float32, at the first of them, its state if it is said how it begins, and what divides them at the end.

        Raises ValueError, RowError among them.
        """
        schedule, shape = self.denoiser.noise_schedule, tuple(latents.shape)
        if any(side % self.denoiser.multiple_of for side in shape[-2:]):
            sides, pixels = f"{shape[-1]}x{shape[-2]}", self.denoiser.multiple_of * self.downscale
            raise RowError(
                f"latents of {sides}: the network takes sides that are multiples of {self.denoiser.multiple_of}, of pictures multiples of {pixels}"
            )
        halfway = row.get("time")
        strength = row["strength"] if halfway is None else 1.0
        kept, scheduler = grids.kept(schedule, row["steps"], strength), self.scheduler_of(row["scheduler"])
        if self.until and scheduler.looks_ahead:
            raise RowError(
                f"{row['scheduler']} makes its steps by those behind them, so a row of it can't stop half-way"
            )
        of_scheduler = scheduler.start(schedule, row["steps"], kept, shape) if kept else None
        own = of_scheduler or self.grid.start(schedule, row["steps"], strength, shape)
        grid = (
            own.times if own else grids.times(self.grid, schedule, row["steps"], strength, shape, self.authors.times)
        ).tolist()
        if halfway is not None:
            if row["trajectory"].partition("/")[0] != schedule_hash(schedule):
                raise RowError("the latents are half-way on a noise schedule that is not this denoiser's")
            if of_scheduler and not goes_on:
                raise RowError(
                    f"the latents are half-way by another scheduler, and {row['scheduler']} can begin only on its own grid"
                )
            grid = [halfway, *(t for t in grid if t < halfway)]
        times = grid[: next((k + 1 for k, t in enumerate(grid) if t < self.until), len(grid))]
        leaves = own.leaves if own and len(times) == len(grid) > 1 else 1.0
        if own and own.sigma and halfway is None and len(grid) == 1 and self.adds:
            raise RowError(
                f"the grid is one sigma, {own.sigma:g}: noise is added there and no step made, which is not supported"
            )
        if halfway is not None or len(grid) == 1:
            return times, latents.to(torch.float32), None, leaves
        first = torch.tensor(times[0], dtype=torch.float64)
        alpha, sigma = (own.alpha, own.sigma) if own else schedule.scale(first)
        if from_noise:
            sigma = own.scale if own else self.authors.start_scale(first)
        x = (alpha * latents.double() + sigma * self.noise(row, shape).double()).to(torch.float32)
        return times, x, of_scheduler.state if of_scheduler else None, leaves

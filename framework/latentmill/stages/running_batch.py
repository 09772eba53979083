"""The rows that a network call takes together: stacked tensors, one solver step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import checks
from latentmill.plugin import Conditioning, Denoiser, FixedShape, Reject, Scheduler, State
from latentmill.stages.guidance import Guidance, ModelField

Kind: TypeAlias = tuple[Any, ...]
"""What rows must have in common to be stacked: schema, scheduler and, in a deterministic job, their request."""


@dataclass(eq=False)
class DenoiseRequest:
    """A batch in the denoise stage. Its rows leave together, when the last of them has arrived."""

    batch: pa.Table
    reject: Reject
    rows: list[Trajectory] = field(default_factory=list)
    moving: int = 0
    """Rows that have not arrived yet."""
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it can leave, with its rows or with the error."""
        return self.moving == 0 or self.error is not None


@dataclass(frozen=True, eq=False)
class InpaintingMask:
    """A row's mask, and the picture that stays where the mask is 0: at every time the clean latents with the row's first noise.

    As in diffusers' inpainting with a model that was not trained for it.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor

    def blend(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``x`` where the mask is 1, and the picture elsewhere."""
        return torch.where(self.mask.bool(), x, alpha * self.clean + sigma * self.noise)


@dataclass(eq=False)
class Trajectory:
    """A row that is being denoised. Tensors are without the batch axis."""

    request: DenoiseRequest
    index: int
    """Of the row in its batch."""
    kind: Kind
    slot: int
    """Its slot in a batch of fixed shape."""
    times: list[float]
    seed: int
    guidance: Guidance
    prompt: Conditioning
    negative: Conditioning
    x: Tensor
    state: State | None
    """None before the first step."""
    at: int = 0
    """Steps done."""
    inpainting: InpaintingMask | None = None
    unsound: Tensor | bool = False
    """Whether the network predicted something for it that is not finite, of latents that were."""

    @property
    def arrived(self) -> bool:
        return self.at == len(self.times) - 1

    @property
    def evaluations(self) -> int:
        """What its next step costs in a call."""
        return 2 if self.guidance.guides(self.times[self.at], self.times[self.at + 1]) else 1


class RunningBatch:
    """Rows that make their steps together, stacked for as long as they are the same rows."""

    def __init__(
        self,
        members: Sequence[Trajectory],
        denoiser: Denoiser,
        scheduler: Scheduler,
        device: torch.device,
        fixed: FixedShape | None,
    ) -> None:
        self.denoiser, self.device, self.fixed = denoiser, device, fixed
        self.rows = list(members)
        self.slots, self.row_slots = self.rows, list(range(len(members)))
        if fixed is not None:  # idle slots repeat a row, so that nothing in them is out of range
            by_slot = {row.slot: row for row in self.rows}
            self.slots = [by_slot.get(slot, self.rows[0]) for slot in range(fixed.batch_size)]
            self.row_slots = [row.slot for row in self.rows]
        fresh = [row for row in self.slots if row.state is None]
        if fresh:
            if fixed is not None:
                fresh = self.slots
            x = torch.stack([row.x for row in fresh])
            with checks.inside(scheduler):
                state = scheduler.init(self._field(fresh), x, _times(fresh))
            checks.state(scheduler, "init", state, len(fresh))
            for row in {id(row): row for row in fresh}.values():
                if row.state is None:  # a row that idle slots repeat gets its own slot's
                    k = row.slot if fixed is not None else fresh.index(row)
                    row.state = {name: value[k] for name, value in state.items()}
        states = [row.state or {} for row in self.slots]
        self.state = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.x = torch.stack([row.x for row in self.slots])
        self.field = self._field(self.slots)

    def _field(self, slots: Sequence[Trajectory]) -> ModelField:
        return ModelField(
            self.denoiser,
            prompt={name: torch.stack([row.prompt[name] for row in slots]) for name in slots[0].prompt},
            negative={name: torch.stack([row.negative[name] for row in slots]) for name in slots[0].negative},
            guidance=[row.guidance for row in slots],
            seeds=[row.seed for row in slots],
            shape=slots[0].x.shape,
            device=self.device,
            fixed=self.fixed is not None,
        )

    def step(self, scheduler: Scheduler) -> None:
        """Move all by one step."""
        with checks.inside(scheduler):
            x, state = scheduler.step(self.field, self.x, _times(self.slots), _times(self.slots, 1), self.state)
        checks.tensor(scheduler, "step", x, self.x.shape, "the shape of x")
        self.x, self.state = x.to(torch.float32), checks.state(scheduler, "step", state, len(x))
        if any(row.inpainting is not None for row in self.slots):
            alpha, sigma = self.denoiser.noise_schedule.scale(_times(self.slots, 1))
            for k, row in enumerate(self.slots):
                if row.at + 2 == len(row.times):  # some grids end a little before t = 0, and the picture is clean
                    alpha[k], sigma[k] = 1.0, 0.0
            each = zip(self.slots, self.x, alpha.tolist(), sigma.tolist())
            self.x = torch.stack(
                [row.inpainting.blend(x, a, s) if row.inpainting is not None else x for row, x, a, s in each]
            )
        for row in self.rows:
            row.at += 1

    def unstack(self) -> None:
        """Give each row its latents and its state."""
        for row, k in zip(self.rows, self.row_slots):
            row.x, row.state = self.x[k], {name: value[k] for name, value in self.state.items()}
            row.unsound = row.unsound | self.field.unsound[k]


def _times(slots: Sequence[Trajectory], ahead: int = 0) -> Tensor:
    return torch.tensor([row.times[row.at + ahead] for row in slots], dtype=torch.float64)

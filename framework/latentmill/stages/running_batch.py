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
from latentmill.stages.inpainting import InpaintingMask

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
    leaves: float = 1.0
    """What its latents are divided by when it has arrived."""
    unsound: Tensor | None = None
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
        self.field = self._field(self.slots)
        fresh = [row for row in self.slots if row.state is None]
        if fresh:
            if fixed is not None:
                fresh = self.slots
            x = torch.stack([row.x for row in fresh])
            with checks.inside(scheduler):
                field = self.field if fresh == self.slots else self._field(fresh)
                state = scheduler.init(field, x, _times(fresh))
            checks.state(scheduler, "init", state, len(fresh))
            for row in {id(row): row for row in fresh}.values():
                if row.state is None:  # a row that idle slots repeat gets its own slot's
                    k = row.slot if fixed is not None else fresh.index(row)
                    row.state = {name: value[k] for name, value in state.items()}
        states = [row.state or {} for row in self.slots]
        self.state = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.x = torch.stack([row.x for row in self.slots])
        if any(row.unsound is not None for row in self.slots):
            sound = torch.zeros_like(self.field.unsound[0])
            self.field.unsound = torch.stack([sound if row.unsound is None else row.unsound for row in self.slots])
        masks = _inpainting(self.slots)
        self.inpainting = None if masks is not None and masks.soft else masks

    def _field(self, slots: Sequence[Trajectory]) -> ModelField:
        masks = _inpainting(slots)
        return ModelField(
            self.denoiser,
            prompt={name: torch.stack([row.prompt[name] for row in slots]) for name in slots[0].prompt},
            negative={name: torch.stack([row.negative[name] for row in slots]) for name in slots[0].negative},
            guidance=[row.guidance for row in slots],
            seeds=[row.seed for row in slots],
            shape=slots[0].x.shape,
            device=self.device,
            fixed=self.fixed is not None,
            inpainting=masks if masks is not None and masks.soft else None,
        )

    def step(self, scheduler: Scheduler) -> None:
        """Move all by one step."""
        t, s = _times(self.slots), _times(self.slots, 1)
        self.field.begin(t, s, self._blend(s))
        self.field.ahead = [row.times[row.at + 2 : row.at + 6] for row in self.slots]
        with checks.inside(scheduler):
            x, state = scheduler.step(self.field, self.x, t, s, self.state)
        checks.tensor(scheduler, "step", x, self.x.shape, "the shape of x")
        x, state = x.to(torch.float32), checks.state(scheduler, "step", state, len(x))
        if self.inpainting is not None:
            x = self.inpainting.blend(x, *self.field.blend())
        self.x, self.state = x, state  # all of it, or nothing: a step that fails is made again
        for row in self.rows:
            row.at += 1

    def _blend(self, s: Tensor) -> tuple[Tensor, ...]:
        """How much of picture and noise stands beside the masks at ``s``.

        Some grids end a little before t = 0, where the picture is clean, unless a row leaves with the noise that is left.
        """
        if self.inpainting is None:
            return ()
        alpha, sigma = self.denoiser.noise_schedule.scale(s)
        last = torch.tensor([row.at + 2 == len(row.times) and row.leaves == 1.0 for row in self.slots])
        return torch.where(last, 1.0, alpha), torch.where(last, 0.0, sigma)

    def unstack(self) -> None:
        """Give each row its latents and its state."""
        xs, unsound = self.x.unbind(), self.field.unsound.unbind()
        states = {name: value.unbind() for name, value in self.state.items()}
        for row, k in zip(self.rows, self.row_slots):
            row.x, row.unsound = xs[k], unsound[k]
            row.state = {name: values[k] for name, values in states.items()}


def _inpainting(slots: Sequence[Trajectory]) -> InpaintingMask | None:
    masks = [row.inpainting for row in slots if row.inpainting is not None]
    return InpaintingMask.stacked(masks) if masks else None


def _times(slots: Sequence[Trajectory], ahead: int = 0) -> Tensor:
    return torch.tensor([row.times[row.at + ahead] for row in slots], dtype=torch.float64)

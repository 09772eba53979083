"""The denoise stage: latents, plus noise, to clean latents, every row with its own steps, guidance, strength and seed.

The unit is a step. Rows of several batches are on their way at a time; each call of the network takes as many of one kind
as it has places, a row that has arrived leaves, and the next one that waits takes its place. What a call takes is counted
in evaluations: a row with guidance needs two. Rows don't touch each other, so who goes when changes none of them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentmill import checks, registry, tensors, weights
from latentmill.batch import (
    NEGATIVE_PREFIX,
    PROMPT_PREFIX,
    SPEC_KEY,
    STATE_PREFIX,
    FixedShape,
    fixed_slots,
    shape_key,
    spec_from_json,
    with_latents,
)
from latentmill.errors import ContractError, NoRowError
from latentmill.fields import BATCH_SCHEMA, HALFWAY
from latentmill.plugin import (
    Conditioning,
    Denoiser,
    FollowsAuthors,
    NoiseSchedule,
    Reject,
    RowError,
    Scheduler,
    Stage,
    State,
)
from latentmill.schedulers import grids, noise
from latentmill.stages.guidance import Guidance, ModelField

logger = logging.getLogger("latentmill")

PATIENCE = 64
"""Steps of others for which rows of a kind may have to wait."""

Kind: TypeAlias = tuple[Any, ...]
"""What rows must have in common to be moved together."""


@dataclass(eq=False)
class Visit:
    """A batch in the stage. Its rows leave together, when the last of them has arrived."""

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
class Kept:
    """What a row keeps of its picture where its mask is 0: at every time the clean latents with the row's first noise.

    The latents of a masked row stay those of its picture there, as in diffusers' inpainting with a model that was not trained for it.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor

    def around(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``x`` where the mask is 1, and the picture elsewhere."""
        return torch.where(self.mask.bool(), x, alpha * self.clean + sigma * self.noise)


@dataclass(eq=False)
class Trajectory:
    """A row on its way. Tensors are without the batch axis."""

    visit: Visit
    index: int
    """Of the row in its batch."""
    kind: Kind
    slot: int
    """Its place in a batch of fixed shape."""
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
    kept: Kept | None = None
    unsound: Tensor | bool = False
    """Whether the network predicted something for it that is not finite, of latents that were."""

    @property
    def arrived(self) -> bool:
        return self.at == len(self.times) - 1

    @property
    def evaluations(self) -> int:
        """What its next step costs in a call."""
        return 2 if self.guidance.guides(self.times[self.at], self.times[self.at + 1]) else 1


class Denoise(Stage):
    """Replaces ``latents`` by clean ones and drops the conditioning.

    ``batch_size`` is the evaluations of a call. With ``fixed``, batches are computed one after another, each row in its
    slot. With ``until`` above 0 rows stop at the first of their times below it: see ``HALFWAY``.
    """

    contract = 2

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Callable[[str], Scheduler],
        grid: str | Mapping[str, Any],
        batch_size: int,
        fixed: FixedShape | None = None,
        first_noise: str = "latentmill",
        until: float = 0.0,
    ) -> None:
        self.denoiser, self.scheduler, self.batch_size = denoiser, scheduler, batch_size
        self.grid, self.authors = grids.choose(grid), FollowsAuthors.of(denoiser)
        self.fixed, self.until = fixed, until
        self.first_noise = noise.start_of_diffusers if first_noise == "diffusers" else noise.start
        self.device = torch.device("cpu")
        self.moving: dict[Kind, list[Trajectory]] = {}
        """Rows on their way, by kind, the first that came first."""
        self.companies: dict[Kind, Company] = {}
        self.turn = 0
        self.moved_at: dict[Kind, int] = {}
        """The turn at which a kind was last moved, or came."""

    def load(self, device: torch.device) -> None:
        self.device = device
        with weights.reading("denoiser"):
            checks.load(self.denoiser, device)

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        visit = self.enter(batch, reject)
        while not visit.done:
            self.advance()
        yield from self.leave(visit)

    @torch.inference_mode()
    def enter(self, batch: pa.Table, reject: Reject) -> Visit:
        """Take in a batch. Its rows are moved by ``advance``, until the visit is done."""
        visit = Visit(batch, reject)
        x = tensors.from_arrow(batch, "latents").to(self.device)
        prompt, negative, states = (
            {
                name.removeprefix(prefix): tensors.from_arrow(batch, name).to(self.device)
                for name in batch.column_names
                if name.startswith(prefix) and not (prefix == NEGATIVE_PREFIX and self.denoiser.guidance_embedded)
            }
            for prefix in (PROMPT_PREFIX, NEGATIVE_PREFIX, STATE_PREFIX)
        )
        masks, masked = (
            tensors.from_arrow(batch, name).to(self.device) if name in batch.column_names else None
            for name in ("mask", "masked")
        )
        slots, _ = fixed_slots(batch, self.fixed)
        fields = {field.name: field.type.to_pandas_dtype() for field in self.denoiser.row_fields}
        columns = [n for n in batch.column_names if n in (*BATCH_SCHEMA.names, *HALFWAY.names, *fields)]
        key, identity = shape_key(batch), cache(self._identity)
        for i, row in enumerate(batch.select(columns).to_pylist()):
            try:
                goes_on = "trajectory" in row and row["trajectory"] == identity(row["scheduler"])
                if self.denoiser.inpaints and masks is None:
                    raise RowError("the network paints a part of a picture anew: image and mask are expected")
                # What is painted anew from noise alone has nothing of the picture in it.
                begins = x[i] if masks is None or row["strength"] < 1 else torch.zeros_like(x[i])
                times, start, state = self._start(row, begins, goes_on)
                if masks is not None and self.until:
                    raise RowError("a row with a mask can't stop half-way: its picture would be lost")
            except ValueError as error:
                reject(i, str(error))
                continue
            kind = (key, row["scheduler"], id(visit) if self.fixed else 0)
            scale = row["guidance_scale"]
            own = {n: torch.as_tensor(np.asarray(row[n], dtype), device=self.device) for n, dtype in fields.items()}
            told = own
            on = self.authors.guides(scale, row["negative_prompt"])
            if self.denoiser.guidance_embedded:
                told, on = {**own, "guidance_scale": torch.tensor(scale, device=self.device)}, False
            both = {}
            if self.denoiser.inpaints and masks is not None and masked is not None:
                both = {"mask": masks[i].to(torch.float32), "masked": masked[i].to(torch.float32)}
            visit.rows.append(
                Trajectory(
                    visit=visit,
                    index=i,
                    kind=kind,
                    slot=int(slots[i]),
                    times=times,
                    seed=row["seed"],
                    guidance=Guidance(scale, row["guidance_rescale"], row["guidance_from"], row["guidance_until"], on),
                    prompt={**{name: value[i] for name, value in prompt.items()}, **both, **told},
                    negative={**{name: value[i] for name, value in negative.items()}, **both, **own},
                    x=start,
                    state={name: value[i] for name, value in states.items()} if goes_on else state,
                    kept=None if masks is None or both else self._kept(masks[i], x[i], row["seed"]),
                )
            )
            if not visit.rows[-1].arrived:
                self.moving.setdefault(kind, []).append(visit.rows[-1])
                self.moved_at.setdefault(kind, self.turn)
                visit.moving += 1
        return visit

    def _kept(self, mask: Tensor, latents: Tensor, seed: int) -> Kept:
        noise = self.first_noise(seed, tuple(latents.shape)).to(self.device)
        return Kept(mask, latents.to(torch.float32), noise)

    def _start(
        self, row: Mapping[str, Any], latents: Tensor, goes_on: bool
    ) -> tuple[list[float], Tensor, State | None]:
        """A row's times, its latents, float32, at the first of them, and its state if the scheduler says how it begins.

        Raises ValueError, RowError among them.
        """
        schedule, shape = self.denoiser.noise_schedule, tuple(latents.shape)
        halfway = row.get("time")
        strength = row["strength"] if halfway is None else 1.0
        kept, scheduler = grids.kept(schedule, row["steps"], strength), self.scheduler(row["scheduler"])
        own = scheduler.start(schedule, row["steps"], kept, shape) if kept else None
        grid = (
            own.times if own else grids.times(self.grid, schedule, row["steps"], strength, shape, self.authors.times)
        ).tolist()
        if halfway is not None:
            if row["trajectory"].partition("/")[0] != schedule_hash(schedule):
                raise RowError("the latents are half-way on a noise schedule that is not this denoiser's")
            if own and not goes_on:
                raise RowError(
                    f"the latents are half-way by another scheduler, and {row['scheduler']} can begin only on its own grid"
                )
            grid = [halfway, *(t for t in grid if t < halfway)]
        times = grid[: next((k + 1 for k, t in enumerate(grid) if t < self.until), len(grid))]
        if halfway is not None or len(grid) == 1:
            return times, latents.to(torch.float32), None
        first = torch.tensor(times[0], dtype=torch.float64)
        alpha, sigma = (own.alpha, own.sigma) if own else schedule.scale(first)
        if not bool(latents.any()):  # of a row without picture and latents
            sigma = own.scale if own else self.authors.start_scale(first)
        start = self.first_noise(row["seed"], shape).to(self.device)
        x = (alpha * latents.double() + sigma * start.double()).to(torch.float32)
        return times, x, {name: value.to(self.device) for name, value in own.state.items()} if own else None

    @torch.inference_mode()
    def advance(self) -> None:
        """Move rows of one kind, as many as a call takes, by one step.

        The kind of which most can go goes, of equals the one that has waited longest; and any that has waited too long, or
        one that others are always added to would keep it waiting for ever.
        """
        if not self.moving:
            return
        self.turn += 1

        def urgency(going: Sequence[Trajectory]) -> tuple[bool, int, int]:
            waited = self.turn - self.moved_at[going[0].kind]
            return waited > PATIENCE, sum(row.evaluations for row in going), waited

        going = max((self._choose(kind) for kind in self.moving), key=urgency)
        self.moved_at[going[0].kind] = self.turn
        self._move(going)

    def _choose(self, kind: Kind) -> list[Trajectory]:
        if self.fixed is not None:
            return self.moving[kind]
        room, chosen = self.batch_size, []
        for row in self.moving[kind]:
            if row.evaluations <= room:
                chosen.append(row)
                room -= row.evaluations
            if not room:
                break
        return chosen or self.moving[kind][:1]

    def _move(self, going: Sequence[Trajectory]) -> None:
        """Move these rows by one step; if that fails, find the row that it fails for. A step changes nothing until it is done."""
        one = self.fixed is not None or len(going) == 1
        try:
            self._step(going)
        except torch.OutOfMemoryError as error:
            if one:
                self._fail(going, error)
                return
            self.batch_size = max(1, sum(row.evaluations for row in going) // 2)
            logger.warning(f"out of memory: from now on {self.batch_size} evaluations a call")
        except ContractError as error:
            self._fail(going, error)
        except Exception as error:
            if one:
                self._fail(going, error)
                return
            for half in (going[: len(going) // 2], going[len(going) // 2 :]):
                if left := [row for row in half if row.visit.error is None]:
                    self._move(left)

    def _step(self, going: Sequence[Trajectory]) -> None:
        kind = going[0].kind
        scheduler = self.scheduler(kind[1])
        company = self.companies.get(kind)
        if company is None or company.rows != going:
            if company is not None:
                company.part()
                del self.companies[kind]
            company = Company(going, self.denoiser, scheduler, self.device, self.fixed)
        company.step(scheduler)
        self.companies[kind] = company
        if any(row.arrived for row in going):
            company.part()
            del self.companies[kind]
            for row in going:
                row.visit.moving -= row.arrived
            self._keep(kind, lambda row: not row.arrived)

    def _fail(self, going: Sequence[Trajectory], error: Exception) -> None:
        """The batches of these rows can't be done."""
        for row in going:
            row.visit.error = error
        for kind in list(self.moving):
            self._keep(kind, lambda row: row.visit.error is None)

    def _keep(self, kind: Kind, stays: Callable[[Trajectory], bool]) -> None:
        self.moving[kind] = [row for row in self.moving[kind] if stays(row)]
        if not self.moving[kind]:
            del self.moving[kind], self.moved_at[kind]
            self.companies.pop(kind, None)

    @torch.inference_mode()
    def leave(self, visit: Visit) -> Iterator[pa.Table]:
        """The rows of a visit that is done, a table for each scheduler. Raises what went wrong, if something did."""
        if visit.error is not None:
            raise visit.error
        by_scheduler: dict[str, list[Trajectory]] = {}
        wrong: dict[int, str] = {}
        for row in visit.rows:
            if bool(row.x.isfinite().all()):
                by_scheduler.setdefault(row.kind[1], []).append(row)
            else:
                wrong[row.index] = f"the denoised latents are not finite ({self._culprit(row)})"
        if wrong and not by_scheduler:
            raise NoRowError(next(iter(wrong.values())))
        for i, reason in wrong.items():
            visit.reject(i, reason)
        for name, members in by_scheduler.items():
            stays = [name for name in visit.batch.column_names if not is_passing(name)]
            part = visit.batch.select(stays).take([row.index for row in members]).replace_schema_metadata(None)
            about = part.schema.field("latents").metadata
            latents, spec = torch.stack([row.x for row in members]).cpu(), spec_from_json(about[SPEC_KEY])
            if not self.until:  # of one dtype, wherever the rows began
                latents = latents.to(getattr(torch, spec.dtype))
            part = with_latents(part, latents, spec)
            yield self._halfway(part, name, members) if self.until else part

    def _culprit(self, row: Trajectory) -> str:
        if bool(row.unsound):
            return f"nor was a prediction of {registry.called(self.denoiser)}"
        return f"scheduler {row.kind[1]}"

    def _halfway(self, part: pa.Table, name: str, members: Sequence[Trajectory]) -> pa.Table:
        for row in members:
            if row.state is None:  # it had no step to make
                Company([row], self.denoiser, self.scheduler(name), self.device, self.fixed).part()
        values = ([row.times[-1] for row in members], [self._identity(name)] * len(members))
        for column, each in zip(HALFWAY, values):
            part = part.append_column(column, pa.array(each, column.type))
        for key in members[0].state or {}:
            part = tensors.with_tensor(
                part, STATE_PREFIX + key, torch.stack([(row.state or {})[key] for row in members])
            )
        return part

    def _identity(self, name: str) -> str:
        """Of a trajectory: its noise schedule, without which its latents mean nothing, and what its state is of."""
        scheduler = self.scheduler(name)
        solver = type(scheduler).__qualname__, sorted(vars(scheduler).items()), scheduler.fingerprint()
        text = repr((type(self.denoiser).__qualname__, self.denoiser.fingerprint(), solver))
        return (
            f"{schedule_hash(self.denoiser.noise_schedule)}/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        )


class Company:
    """Rows that are moved together, stacked, for as long as the same rows go."""

    def __init__(
        self,
        going: Sequence[Trajectory],
        denoiser: Denoiser,
        scheduler: Scheduler,
        device: torch.device,
        fixed: FixedShape | None,
    ) -> None:
        self.denoiser, self.device, self.fixed = denoiser, device, fixed
        self.rows = list(going)
        self.seats, self.places = self.rows, list(range(len(going)))
        if fixed is not None:  # idle slots repeat some row, so that nothing in them is out of range
            by_slot = {row.slot: row for row in self.rows}
            self.seats = [by_slot.get(slot, self.rows[0]) for slot in range(fixed.batch_size)]
            self.places = [row.slot for row in self.rows]
        fresh = [row for row in self.seats if row.state is None]
        if fresh:
            if fixed is not None:
                fresh = self.seats
            x = torch.stack([row.x for row in fresh])
            with checks.inside(scheduler):
                state = scheduler.init(self._field(fresh), x, _times(fresh))
            checks.state(scheduler, "init", state, len(fresh))
            for row in {id(row): row for row in fresh}.values():
                if row.state is None:  # of a row that stands in idle slots, too, its own slot's
                    k = row.slot if fixed is not None else fresh.index(row)
                    row.state = {name: value[k] for name, value in state.items()}
        states = [row.state or {} for row in self.seats]
        self.state = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.x = torch.stack([row.x for row in self.seats])
        self.field = self._field(self.seats)

    def _field(self, seats: Sequence[Trajectory]) -> ModelField:
        return ModelField(
            self.denoiser,
            prompt={name: torch.stack([row.prompt[name] for row in seats]) for name in seats[0].prompt},
            negative={name: torch.stack([row.negative[name] for row in seats]) for name in seats[0].negative},
            guidance=[row.guidance for row in seats],
            seeds=[row.seed for row in seats],
            shape=seats[0].x.shape,
            device=self.device,
            fixed=self.fixed is not None,
        )

    def step(self, scheduler: Scheduler) -> None:
        """Move all by one step."""
        with checks.inside(scheduler):
            x, state = scheduler.step(self.field, self.x, _times(self.seats), _times(self.seats, 1), self.state)
        checks.tensor(scheduler, "step", x, self.x.shape, "the shape of x")
        self.x, self.state = x.to(torch.float32), checks.state(scheduler, "step", state, len(x))
        if any(row.kept is not None for row in self.seats):
            alpha, sigma = self.denoiser.noise_schedule.scale(_times(self.seats, 1))
            for k, row in enumerate(self.seats):
                if row.at + 2 == len(row.times):  # some grids end a little before t = 0, and the picture is clean
                    alpha[k], sigma[k] = 1.0, 0.0
            each = zip(self.seats, self.x, alpha.tolist(), sigma.tolist())
            self.x = torch.stack([row.kept.around(x, a, s) if row.kept is not None else x for row, x, a, s in each])
        for row in self.rows:
            row.at += 1

    def part(self) -> None:
        """Give the rows back what is theirs."""
        for row, k in zip(self.rows, self.places):
            row.x, row.state = self.x[k], {name: value[k] for name, value in self.state.items()}
            row.unsound = row.unsound | self.field.unsound[k]


def _times(seats: Sequence[Trajectory], ahead: int = 0) -> Tensor:
    return torch.tensor([row.times[row.at + ahead] for row in seats], dtype=torch.float64)


def is_passing(name: str) -> bool:
    """Whether a column is only for the way: conditioning, masks, and the state of half-way latents."""
    return (
        name in ("mask", "masked")
        or name.startswith((PROMPT_PREFIX, NEGATIVE_PREFIX, STATE_PREFIX))
        or name in HALFWAY.names
    )


def schedule_hash(schedule: NoiseSchedule) -> str:
    """Tells noise schedules apart by their values."""
    alpha, sigma = schedule.scale(torch.linspace(0.0, 1.0, 65, dtype=torch.float64))
    values = [f"{value:.9g}" for value in (*alpha.tolist(), *sigma.tolist())]
    return hashlib.blake2b(",".join(values).encode(), digest_size=8).hexdigest()

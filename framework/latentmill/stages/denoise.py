"""The denoise stage: latents, plus noise, to clean latents, every row with its own steps, guidance, strength and seed.

Continuous batching: the unit is a step. The stage holds rows of several requests; each call of the network takes as many of
one kind as it has slots, a row that is done leaves, and the next one takes its slot. A call's size is counted in evaluations: a
row with guidance needs two. Rows don't touch each other, so the order in which they are moved changes none of them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latentmill import checks, registry, tally, weights
from latentmill.batch import (
    NEGATIVE_PREFIX,
    PROMPT_PREFIX,
    SPEC_KEY,
    STATE_PREFIX,
    fixed_slots,
    shape_key,
    spec_from_json,
    with_latents,
)
from latentmill.errors import ContractError, NoRowError
from latentmill.fields import BATCH_SCHEMA, HALFWAY, NOISE_INDEX
from latentmill.plugin import (
    Conditioning,
    ContinuousStage,
    Declaration,
    Denoiser,
    FollowsAuthors,
    Reject,
    RowError,
    StageContext,
    tensors,
)
from latentmill.plugin.stage import named
from latentmill.stages import passing
from latentmill.stages.beginning import Beginning
from latentmill.stages.call_size import CallSize
from latentmill.stages.carried import Carried, carried_rows, trajectory_name
from latentmill.stages.guidance import Guidance
from latentmill.stages.inpainting import InpaintingMask
from latentmill.stages.running_batch import DenoiseRequest, Kind, RunningBatch, Trajectory

logger = logging.getLogger("latentmill")

MAX_WAIT = 64
"""Steps of other kinds after which rows of a kind are moved first."""


class Denoise(ContinuousStage):
    """Replaces ``latents`` by clean ones and drops the conditioning, unless a later stage takes it.

    ``batch_size`` is the evaluations of a call, or those of the first ones if the job leaves it to us. With ``fixed``, batches are computed one after another, each row in its
    slot. With ``until`` above 0 rows stop at the first of their times below it: see ``HALFWAY``.
    """

    contract = 2
    needs = ("denoiser", "scheduler")
    takes = ("latents", PROMPT_PREFIX)
    adds = ("latents",)
    drops = ("latents", *passing.FOR_DENOISERS)
    shares_tensors = True

    def declare(self, context: StageContext) -> Declaration:
        found = replace(super().declare(context), drops=("latents", *passing.ending(context.after)))
        if "denoiser" in context.choices:
            denoiser: Denoiser = context.plugin("denoiser")
            unread = [NEGATIVE_PREFIX] * denoiser.guidance_embedded + ["masked"] * (not denoiser.inpaints)
            found = replace(found, ignores=tuple(unread), multiple_of=denoiser.multiple_of)
        return replace(found, adds=("latents", *HALFWAY.names)) if context.sampling["until"] else found

    def prepare(self, context: StageContext) -> None:
        sampling, self.place = context.sampling, context.place("denoiser")
        self.drops = context.declaration.drops or self.drops
        self.denoiser: Denoiser = context.plugin("denoiser")
        context.plugin("scheduler")  # is held against the plan before any row asks for it
        assert context.scheduler_of is not None
        self.scheduler = context.scheduler_of
        grid = context.choices["scheduler"].get("grid", "trailing")
        self.beginning = Beginning(self.denoiser, self.scheduler, grid, sampling, context.downscale)
        self.authors = FollowsAuthors.of(self.denoiser)
        self.fixed, self.until = context.fixed, float(sampling["until"])
        self.call_sizes = defaultdict[str, CallSize](lambda: CallSize(context.batch_size, context.finds_batch_size))
        """By the shape of the latents."""
        self.device = torch.device("cpu")
        self.moving: dict[Kind, list[Trajectory]] = {}
        """Rows that have steps to make, by kind, in the order in which they came."""
        self.running: dict[Kind, RunningBatch] = {}
        self.turn = 0
        self.moved_at: dict[Kind, int] = {}
        """The turn at which a kind was last moved, or came."""

    def load(self, device: torch.device) -> None:
        self.device = device
        with weights.reading(self.place):
            checks.load(self.denoiser, device)

    @torch.inference_mode()
    def take(self, batch: pa.Table, reject: Reject) -> DenoiseRequest:
        """Take in a batch. Its rows are moved by ``advance``, until the request is done."""
        carried = Carried(batch)
        batch = carried.batch
        request = DenoiseRequest(batch, reject)
        x = tensors.from_arrow(batch, "latents")
        prompt, negative = (
            {
                name.removeprefix(prefix): self._told(batch, name, name.removeprefix(prefix))
                for name in batch.column_names
                if name.startswith(prefix) and not (prefix == NEGATIVE_PREFIX and self.denoiser.guidance_embedded)
            }
            for prefix in (PROMPT_PREFIX, NEGATIVE_PREFIX)
        )
        states = {
            name.removeprefix(STATE_PREFIX): tensors.from_arrow(batch, name)
            for name in batch.column_names
            if name.startswith(STATE_PREFIX)
        }
        masks = tensors.from_arrow(batch, "mask") if "mask" in batch.column_names else None
        slots, _ = fixed_slots(batch, self.fixed)
        fields = {field.name: field.type.to_pandas_dtype() for field in self.denoiser.row_fields}
        known = {*BATCH_SCHEMA.names, *HALFWAY.names, "from_noise", NOISE_INDEX.name, *fields}
        columns = [name for name in batch.column_names if name in known]
        key, identity = shape_key(batch), cache(self._identity)
        begun = []
        for i, row in enumerate(batch.select(columns).to_pylist()):
            try:
                goes_on = "trajectory" in row and row["trajectory"] == identity(row["scheduler"])
                if self.denoiser.inpaints and masks is None:
                    raise RowError("the network paints a part of a picture anew: image and mask are expected")
                # An inpainted row of full strength has nothing of the picture where its mask is 1.
                from_noise = row.get("from_noise", False)
                from_noise = from_noise or (
                    masks is not None and not masks.is_floating_point() and row["strength"] >= 1
                )
                begins = torch.zeros_like(x[i]) if from_noise else x[i]
                times, start, state, leaves = self.beginning.of(row, begins, goes_on, from_noise)
                if masks is not None and self.until:
                    raise RowError("a row with a mask can't stop half-way: its picture would be lost")
            except ValueError as error:
                reject(i, str(error))
                continue
            state = {name: value[i] for name, value in states.items()} if goes_on else state
            begun.append((i, row, times, start, state, leaves))
        if not begun:
            return request
        rows, starts = [row for _, row, *_ in begun], self._send(torch.stack([start for *_, start, _, _ in begun]))
        own = {
            n: self._send(torch.as_tensor(np.asarray([row[n] for row in rows], dtype))) for n, dtype in fields.items()
        }
        inpainted, inpaintings = self._masked(batch, masks, x, {i: row for i, row, *_ in begun})
        embedded = {}
        if self.denoiser.guidance_embedded:
            embedded = {"guidance_scale": self._send(torch.tensor([row["guidance_scale"] for row in rows]))}
        for k, (i, row, times, _, state, leaves) in enumerate(begun):
            kind = (key, row["scheduler"], id(request) if self.fixed else 0)
            scale, scheduler = row["guidance_scale"], self.scheduler(row["scheduler"])
            on = scheduler.guides_all or self.authors.guides(scale, row["negative_prompt"])
            on, on_cpu = on and not self.denoiser.guidance_embedded, scheduler.on_cpu
            told = {name: value[k] for name, value in own.items()} | {n: value[i] for n, value in inpainted.items()}
            request.rows.append(
                Trajectory(
                    request=request,
                    index=i,
                    kind=kind,
                    slot=int(slots[i]),
                    times=times,
                    seed=self.beginning.seed(row),
                    leaves=leaves,
                    guidance=Guidance(scale, row["guidance_rescale"], row["guidance_from"], row["guidance_until"], on),
                    prompt={
                        **{name: value[i] for name, value in prompt.items()},
                        **told,
                        **{name: value[k] for name, value in embedded.items()},
                    },
                    negative={**{name: value[i] for name, value in negative.items()}, **told},
                    x=starts[k],
                    state=state and {n: v if n in on_cpu else self._send(v) for n, v in state.items()},
                    inpainting=inpaintings.get(i),
                )
            )
            carried.go_on(request.rows[-1], identity, on_cpu, self._send)
        for taken in request.rows:  # now that nothing can fail any more: of a batch that fails no row goes on
            if not taken.arrived:
                self.moving.setdefault(taken.kind, []).append(taken)
                self.moved_at.setdefault(taken.kind, self.turn)
                request.moving += 1
        return request

    def _send(self, tensor: Tensor) -> Tensor:
        return tensors.send(tensor, self.device)

    def _told(self, batch: pa.Table, column: str, name: str) -> Sequence[Tensor]:
        """Conditioning of each row, where the network wants it."""
        return tensors.by_row(batch, column, torch.device("cpu") if name in self.denoiser.parted_by else self.device)

    def _masked(
        self, batch: pa.Table, masks: Tensor | None, x: Tensor, rows: Mapping[int, Mapping[str, Any]]
    ) -> tuple[Conditioning, dict[int, InpaintingMask]]:
        """Of rows with a mask: what the network is told or, if it takes none, what blends each, by its index."""
        if masks is None:
            return {}, {}
        if not self.denoiser.inpaints or "masked" not in batch.column_names:
            soft = masks.is_floating_point()
            painted = self._send(interpolate(masks, x.shape[-2:], mode="bilinear") if soft else masks.bool())
            clean = self._send(x.to(torch.float32))
            first = self._send(torch.stack([self.beginning.noise(row, tuple(x.shape[1:])) for row in rows.values()]))
            return {}, {i: InpaintingMask(painted[i], clean[i], first[k]) for k, i in enumerate(rows)}
        masked = tensors.from_arrow(batch, "masked")
        return {"mask": self._send(masks.to(torch.float32)), "masked": self._send(masked.to(torch.float32))}, {}

    @torch.inference_mode()
    def advance(self) -> None:
        """Move rows of one kind, as many as a call takes, by one step.

        The kind with the most evaluations to make is moved, of equals the one that has waited longest. A kind that has waited
        for more than MAX_WAIT steps goes first: new rows of another kind would keep it waiting for ever.
        """
        if not self.moving:
            return
        self.turn += 1

        def urgency(going: Sequence[Trajectory]) -> tuple[bool, int, int]:
            waited = self.turn - self.moved_at[going[0].kind]
            return waited > MAX_WAIT, sum(row.evaluations for row in going), waited

        going = max((self._choose(kind) for kind in self.moving), key=urgency)
        self.moved_at[going[0].kind] = self.turn
        self._move(going)

    def _choose(self, kind: Kind) -> list[Trajectory]:
        if self.fixed is not None:
            return self.moving[kind]
        waiting = sum(row.evaluations for row in self.moving[kind])
        room, chosen = self.call_sizes[kind[0]].room(waiting), []
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
            size = self.call_sizes[going[0].kind[0]]
            size.was_too_large(sum(row.evaluations for row in going))
            tally.count(tally.HALVINGS)
            logger.warning(f"out of memory: from now on {size.size} evaluations a call")
        except ContractError as error:
            self._fail(going, error)
        except Exception as error:
            if one:
                self._fail(going, error)
                return
            for half in (going[: len(going) // 2], going[len(going) // 2 :]):
                if left := [row for row in half if row.request.error is None]:
                    self._move(left)

    def _step(self, going: Sequence[Trajectory]) -> None:
        kind = going[0].kind
        scheduler = self.scheduler(kind[1])
        batch = self.running.get(kind)
        if batch is None or batch.rows != going:
            if batch is not None:
                batch.unstack()
                del self.running[kind]
            batch = RunningBatch(going, self.denoiser, scheduler, self.device, self.fixed)
        evaluations = sum(row.evaluations for row in going)
        with self.call_sizes[kind[0]].timing(evaluations, self.device):
            batch.step(scheduler)
        tally.count(tally.EVALUATIONS, evaluations)
        self.running[kind] = batch
        if any(row.arrived for row in going):
            batch.unstack()
            del self.running[kind]
            for row in going:
                row.request.moving -= row.arrived
            self._keep(kind, lambda row: not row.arrived)

    def _fail(self, going: Sequence[Trajectory], error: Exception) -> None:
        """Give the requests of these rows up."""
        for row in going:
            row.request.error = error
        for kind in list(self.moving):
            self._keep(kind, lambda row: row.request.error is None)

    def _keep(self, kind: Kind, stays: Callable[[Trajectory], bool]) -> None:
        self.moving[kind] = [row for row in self.moving[kind] if stays(row)]
        if not self.moving[kind]:
            del self.moving[kind], self.moved_at[kind]
            self.running.pop(kind, None)

    @torch.inference_mode()
    def hand_over(self, request: DenoiseRequest) -> list[pa.Table]:
        """The rows of a request as far as they are: ``carried``."""
        for kind in list(self.moving):
            if any(row.request is request for row in self.moving[kind]):
                if running := self.running.pop(kind, None):
                    running.unstack()
                self._keep(kind, lambda row: row.request is not request)
        return list(carried_rows(request, self._identity))

    @torch.inference_mode()
    def finish(self, request: DenoiseRequest) -> Iterator[pa.Table]:
        """The rows of a request that is done, a table for each scheduler. Raises what went wrong, if something did."""
        if request.error is not None:
            raise request.error
        by_scheduler: dict[str, list[tuple[Trajectory, Tensor]]] = {}
        wrong: dict[int, str] = {}
        xs = torch.stack([row.x for row in request.rows]).cpu() if request.rows else torch.empty(0, 1)
        for row, x, finite in zip(request.rows, xs, xs.flatten(1).isfinite().all(1).tolist()):
            if finite:  # its own latents stay where they are: what its state begins with is made of them
                x = x if self.until or row.leaves == 1.0 else (x.double() / row.leaves).float()
                by_scheduler.setdefault(row.kind[1], []).append((row, x))
            else:
                wrong[row.index] = f"the denoised latents are not finite ({self._cause(row)})"
        if wrong and not by_scheduler:
            raise NoRowError(next(iter(wrong.values())))
        for i, reason in wrong.items():
            request.reject(i, reason)
        for name, members in by_scheduler.items():
            stays = [n for n in request.batch.column_names if not any(named(n, each) for each in self.drops[1:])]
            part = request.batch.select(stays).take([row.index for row, _ in members]).replace_schema_metadata(None)
            about = part.schema.field("latents").metadata
            latents, spec = torch.stack([x for _, x in members]), spec_from_json(about[SPEC_KEY])
            if not self.until:  # of one dtype, wherever the rows began
                latents = latents.to(getattr(torch, spec.dtype))
            part = with_latents(part, latents, spec)
            yield self._halfway(part, name, [row for row, _ in members]) if self.until else part

    def _cause(self, row: Trajectory) -> str:
        if bool(row.unsound):
            return f"nor was a prediction of {registry.called(self.denoiser)}"
        return f"scheduler {row.kind[1]}"

    def _halfway(self, part: pa.Table, name: str, members: Sequence[Trajectory]) -> pa.Table:
        for row in members:
            if row.state is None:  # it had no step to make
                RunningBatch([row], self.denoiser, self.scheduler(name), self.device, self.fixed).unstack()
        values = ([row.times[-1] for row in members], [self._identity(name)] * len(members))
        for column, each in zip(HALFWAY, values):
            part = part.append_column(column, pa.array(each, column.type))
        for key in members[0].state or {}:
            part = tensors.with_tensor(
                part, STATE_PREFIX + key, torch.stack([(row.state or {})[key] for row in members])
            )
        return part

    def _identity(self, name: str) -> str:
        return trajectory_name(self.denoiser, self.scheduler(name))

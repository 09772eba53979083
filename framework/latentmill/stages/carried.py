"""Rows that leave the denoise stage before their end, as its driver stops, and go on in another process: to the bit where they were.

A row begins there as it began here, of the batch that it came in; then it has the latents and the state of its last step. Which trajectory
they are of is said beside: if anything has become another meanwhile, the row begins anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator

import pyarrow as pa
import torch
from torch import Tensor

from latentmill.batch import CARRIED
from latentmill.plugin import Denoiser, NoiseSchedule, Scheduler, tensors
from latentmill.stages.running_batch import DenoiseRequest, Trajectory

AT, TIME, OF = (
    pa.field(f"{CARRIED}at", pa.int32()),
    pa.field(f"{CARRIED}time", pa.float64()),
    pa.field(f"{CARRIED}trajectory", pa.string()),
)
"""Steps that a row has made, the time that it has come to, and the trajectory's name."""
LATENTS, UNSOUND, STATE = f"{CARRIED}latents", f"{CARRIED}unsound", f"{CARRIED}state:"


def carried_rows(request: DenoiseRequest, name: Callable[[str], str]) -> Iterator[pa.Table]:
    """The rows of a request as far as they are, a table for each scheduler, and one of those that have made no step.

    ``name`` gives a scheduler's trajectories their name. No row is in a running batch.
    """
    groups: dict[str | None, list[Trajectory]] = {}
    for row in request.rows:
        groups.setdefault(row.kind[1] if row.at else None, []).append(row)
    for scheduler, rows in groups.items():
        part = request.batch.take([row.index for row in rows])
        if scheduler is None:
            yield part
            continue
        values = [row.at for row in rows], [row.times[row.at] for row in rows], [name(scheduler)] * len(rows)
        for field, each in zip((AT, TIME, OF), values):
            part = part.append_column(field, pa.array(each, field.type))
        part = tensors.with_tensor(part, LATENTS, torch.stack([row.x for row in rows]))
        unsound = [torch.tensor(False) if row.unsound is None else row.unsound.cpu() for row in rows]
        part = tensors.with_tensor(part, UNSOUND, torch.stack(unsound))
        states = [row.state or {} for row in rows]
        for key in states[0]:
            part = tensors.with_tensor(part, STATE + key, torch.stack([state[key] for state in states]))
        yield part


class Carried:
    """What a batch brings of steps that its rows have made."""

    def __init__(self, batch: pa.Table) -> None:
        own = [name for name in batch.column_names if name.startswith(CARRIED)]
        self.batch = batch.drop_columns(own) if own else batch
        """The batch without it."""
        self.tensors = {
            name: tensors.from_arrow(batch, name).clone() for name in own if tensors.is_tensor(batch.schema.field(name))
        }
        self.marks = list(zip(*(batch.column(field.name).to_pylist() for field in (AT, TIME, OF)))) if own else []

    def go_on(
        self, row: Trajectory, name: Callable[[str], str], on_cpu: Collection[str], send: Callable[[Tensor], Tensor]
    ) -> None:
        """Put a row that has just begun where it was, unless its trajectory is another now. ``on_cpu``: what of its state stays there."""
        if not self.marks:
            return
        at, time, of = self.marks[row.index]
        if at >= len(row.times) or row.times[at] != time or of != name(row.kind[1]):
            return
        values = {key: value[row.index] for key, value in self.tensors.items()}
        row.at, row.x, row.unsound = at, send(values.pop(LATENTS)), send(values.pop(UNSOUND))
        state = {key.removeprefix(STATE): value for key, value in values.items()}
        row.state = {key: value if key in on_cpu else send(value) for key, value in state.items()}


def trajectory_name(denoiser: Denoiser, scheduler: Scheduler) -> str:
    """Of a trajectory: its noise schedule, without which its latents mean nothing, and what its state is of."""
    solver = type(scheduler).__qualname__, sorted(vars(scheduler).items()), scheduler.fingerprint()
    text = repr((type(denoiser).__qualname__, denoiser.fingerprint(), solver))
    return f"{schedule_hash(denoiser.noise_schedule)}/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def schedule_hash(schedule: NoiseSchedule) -> str:
    """Tells noise schedules apart by their values."""
    alpha, sigma = schedule.scale(torch.linspace(0.0, 1.0, 65, dtype=torch.float64))
    values = [f"{value:.9g}" for value in (*alpha.tolist(), *sigma.tolist())]
    return hashlib.blake2b(",".join(values).encode(), digest_size=8).hexdigest()

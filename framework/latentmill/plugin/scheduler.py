"""Schedulers, the grids of times that they walk along, and the noise schedules that both are told of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from latentmill.plugin.contract import Plugin

if TYPE_CHECKING:  # to list plugins takes none of them
    from torch import Tensor


State: TypeAlias = "dict[str, Tensor]"
"""What a scheduler remembers of each row between two steps: every tensor has the batch axis first."""


class NoiseSchedule(ABC):
    """``alpha(t)`` and ``sigma(t)``: how much of the clean latent and how much noise is in a latent at time t.

    No plugin kind: a denoiser brings its own, as an object. Tensors are float64 on the CPU and are the caller's.
    """

    timesteps: int | None = None
    """Of a discrete one, how many timesteps the network was trained at: times ``1 / timesteps``, ... 1, to which grids round,
    and as many steps at most. None: any time is as good."""

    shiftable: bool = False
    """Whether a grid's ``shift`` may move times towards noise, as in flow models. Betas have their shift in themselves."""

    sigma_is_time: bool = False
    """What grids over sigmas (karras, say) mean by sigma: the time itself, as in flow models, and not ``sigma / alpha``."""

    strength_rounds_up: bool = False
    """Whether ``steps * strength`` is rounded up to whole steps: up in diffusers' pipelines of flow models, down in all others."""

    @abstractmethod
    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` at times ``t``: float64 in [0, 1], any shape; both results are new, float64, of that shape.

        ``sigma`` is 0 at t = 0 and grows with t; ``alpha`` may reach 0 at t = 1.
        """

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The time, float64, at which ``sigma / alpha`` equals ``ratio`` (0 to infinity): the inverse that a grid over sigmas asks for."""

    def timestep(self, t: Tensor) -> Tensor:
        """What a network trained on discrete steps is told of times ``t[B]``: 0 to ``timesteps - 1``; 1000 t where there are none."""
        return 1000.0 * t if self.timesteps is None else self.timesteps * t - 1.0


@dataclass(frozen=True)
class Start:
    """Where a row begins, as a grid or a scheduler says that doesn't leave it to others."""

    times: Tensor
    """Float64, descending, ``[n + 1]`` for n steps."""
    state: State
    """Of this row alone: without the batch axis. A grid's has none."""
    alpha: float
    sigma: float
    """The row's latent at its first time is ``alpha * x0 + sigma * noise``."""
    scale: float
    """Standard deviation of the noise that a row without picture or latents starts from."""
    grid: str = "trailing"
    """What a job's ``scheduler.grid`` may be: its default, or the name of the grid that these times are."""
    leaves: float = 1.0
    """What the row's latents are divided by at its last time."""


class Grid(Plugin, ABC):
    """At which times a row is computed: a job's ``scheduler.grid``, by name or as ``{name: ..., setting: ...}``.

    Its settings are the constructor's. ``end`` and ``shift`` are settings of every grid, and the framework's. A grid is its
    settings: no ``fingerprint`` and no ``load`` is asked of it. Another version of its distribution is another dataset.
    """

    @abstractmethod
    def times(self, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        """The time at which each step begins, float64 on the CPU, ``[steps]``, descending from 1 at most. The last step leads to 0.

        Raises ValueError, saying why, if it can't be made on this noise schedule or of so many steps.
        """

    def start(self, noise_schedule: NoiseSchedule, steps: int, strength: float, shape: Sequence[int]) -> Start | None:
        """The whole row of latents of ``shape``, where a grid counts ``steps`` and ``strength`` in its own way: any number of steps.

        It may end before 0; one time alone is no step. None: it begins as ``times`` says, of which the framework keeps those that
        strength leaves, and the noise schedule says how much noise there is. Raises ValueError as ``times`` does.
        """
        return None


class Field(ABC):
    """What a scheduler may ask about the rows it moves. Prediction type, guidance and conditioning are hidden behind it.

    Every result broadcasts against the latents ``x[B, ...]``, is on their device and is the scheduler's own.

    Where that is a GPU, a step should not wait for it: what it has to know before it goes on (at which time a midpoint lies)
    is made of times, and reckoned on the CPU by ``numbers``. And it should send little: what it ``expect``s goes at once.
    """

    noise_schedule: NoiseSchedule
    """The denoiser's."""

    @abstractmethod
    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` of the noise schedule at times ``t[B]``, float64, shaped ``[B, 1, ...]`` to multiply with x."""

    def numbers(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What ``scale`` gives, on the CPU; read only."""
        alpha, sigma = self.scale(t)
        return alpha.cpu(), sigma.cpu()

    def expect(self, *times: Tensor) -> None:  # noqa: B027 - a field on the CPU has nothing to send
        """Say which ``times[B]``, besides its own, the step will ask for, before it asks for the first."""

    def send(self, *numbers: Tensor) -> Sequence[Tensor]:
        """Tensors on the CPU, float64, to the device; what is expected goes along."""
        return numbers

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The times ``[B]``, float64, on the CPU, at which ``sigma / alpha`` is ``ratio``, ``[B]`` or ``[B, 1, ...]``: where a midpoint lies."""

    @abstractmethod
    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of the clean latents x0, shaped as ``x[B, ...]``, for latents x at times ``t[B]``: one evaluation."""

    def guided(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``clean``, and beside it what it would be of the negative prompt alone: of a row that isn't guided, the same. One evaluation."""
        clean = self.clean(x, t)
        return clean, clean

    def following(self, s: Tensor) -> Tensor:
        """Where each row's next steps lead to after this one, which leads to ``s[B]``: four times, ``[B, 4]``, on the CPU, NaN for those
        that there won't be. As if this step were the last, where the field doesn't know.
        """
        return s.new_full((len(s), 4), math.nan)

    @abstractmethod
    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        """Unit normal noise shaped as x, fixed for each row by (the row's seed, t, s): asked twice, the same twice."""


class Scheduler(Plugin, ABC):
    """Moves latents ``x[B, ...]``, float32, from times ``t[B]`` to earlier times ``s[B]``, float64 on the CPU.

    A scheduler is a value: it holds settings and nothing else. No grid, no counter, no seed, no history; what a multistep
    solver remembers is the ``State`` that it returns. Rows at different times stand in one batch and must not touch each
    other. What it is given is read only; latents and state that it returns are the framework's, on x's device (of the state, what is not ``on_cpu``) and, of the state, of
    the dtypes that it chose. (The same split as a diffrax solver's; what diffusers fuses into one class is noise schedule, grid, solver and prediction.)
    """

    evaluations: ClassVar[int] = 1
    """Calls of ``field.clean`` in one step."""

    stochastic: ClassVar[bool] = False
    """Whether a step draws noise with its default settings."""

    order: ClassVar[int] = 1
    """Order of convergence with its default settings; of a stochastic one, that of its drift."""

    looks_ahead: ClassVar[bool] = False
    """Whether a step hangs on the row's later ones (``Field.following``): such a row can't stop half-way."""

    guides_all: ClassVar[bool] = False
    """Whether a row of scale 1 is guided, too: its steps ask for the negative prompt's estimate beside it (``Field.guided``)."""

    on_cpu: ClassVar[Collection[str]] = ()
    """Names of state that stays on the CPU, as times do; there need not be all of them."""

    def init(self, field: Field, x: Tensor, t: Tensor) -> State:
        """The state before the first step from ``x[B, ...]`` at ``t[B]``."""
        return {}

    def start(self, noise_schedule: NoiseSchedule, steps: int, kept: int, shape: Sequence[int]) -> Start | None:
        """How a row of latents of ``shape`` begins that makes the last ``kept`` (1 or more) of ``steps`` steps.

        None: at the job's grid's times, with the state of ``init``, as all do that can move latents between any two times.
        Raises ValueError, saying why, if the row can't be made: it ends in the error table.
        """
        return None

    @abstractmethod
    def step(self, field: Field, x: Tensor, t: Tensor, s: Tensor, state: State) -> tuple[Tensor, State]:
        """Latents at ``s[B] < t[B]`` and the state that the next step needs. ``s`` may be 0, where sigma is 0."""

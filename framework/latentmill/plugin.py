"""The contract between latentmill and its plugins: all that a plugin author imports.

A plugin is a class below, subclassed, and one line in a ``pyproject.toml``::

    [project.entry-points."latentmill.vaes"]
    my_vae = "my_package:MyVAE"

The class is built from the job's YAML, one keyword argument a key (``vae: {name: my_vae, tile: 64}`` calls
``MyVAE(tile=64)``), once in the driver and once in every worker. Building must be cheap and must not touch a device: the
driver builds plugins only to ask them what they are. ``load(device)`` is called in workers alone, before first use.

Words. ``B`` is the batch axis and always comes first; a row is one sample. Time ``t`` is float64 in [0, 1]: 0 is
clean, 1 is noise. A latent at time t is ``x = alpha(t) * x0 + sigma(t) * noise``; ``alpha`` and ``sigma`` are the noise schedule.

Tensors that a plugin is given may lie in memory that other processes share: read them, never write into them.

What a plugin gives back is held against what is said here: shapes, counts, row ids. A plugin that breaks its contract, can't be
loaded, or fails for every row ends the job with its name; ``RowError``, and ``reject``, are for a row that can't be used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, Protocol, TypeAlias

from latentmill.errors import RowError

if TYPE_CHECKING:  # to list plugins takes none of them
    import pyarrow as pa
    import torch
    from torch import Tensor

__all__ = [
    "CONTRACT",
    "CommittingStage",
    "Conditioning",
    "ContinuousStage",
    "Declaration",
    "Denoiser",
    "Field",
    "FollowsAuthors",
    "FixedShape",
    "Fragment",
    "Grid",
    "LatentSpec",
    "NoiseSchedule",
    "OpenSideFile",
    "Plugin",
    "Prediction",
    "Reject",
    "Request",
    "RowError",
    "RowField",
    "Scheduler",
    "Sink",
    "Source",
    "Stage",
    "StageContext",
    "Start",
    "State",
    "StoredShard",
    "TextEncoder",
    "VAE",
]

CONTRACT = 2
"""Version of this module's promises. A plugin written for another one, or for none, is refused when it is selected."""

State: TypeAlias = "dict[str, Tensor]"
"""What a scheduler remembers of each row between two steps: every tensor has the batch axis first."""

Conditioning: TypeAlias = "dict[str, Tensor]"
"""What a text encoder hands to a denoiser, by name: every tensor has the batch axis first and one shape for all rows."""

Prediction: TypeAlias = Literal["epsilon", "v", "sample", "flow"]
"""What a network predicts: the noise; ``alpha * noise - sigma * x0``; the clean sample; ``noise - x0``."""

Reject: TypeAlias = Callable[[int, str], None]
"""``reject(i, reason)``: row ``i`` of the batch ends in the error table, with the reason."""


@dataclass(frozen=True)
class RowField:
    """A value that each row has: a column of every batch, a key of the job's ``sampling``, a column that a source may have."""

    name: str
    type: pa.DataType
    """Of the column: text, a whole number, a floating-point number or a bool. A value that doesn't fit makes its row an error."""
    meaning: str
    """In a few words, for the dataset's card."""
    default: Any = None
    """The value of rows for which neither job nor source says one. None: they must, unless the field is nullable."""
    least: float | None = None
    most: float | None = None
    """The range of a number, ends included."""
    nullable: bool = False
    stored: bool = True
    """Whether it is a column of the dataset."""


class Plugin:
    """What all plugins have in common."""

    contract: ClassVar[int]
    """The version of the contract that the class was written for. Each class says it, or a parent that is a plugin, too: write the
    number, not ``CONTRACT``."""

    row_fields: Sequence[RowField] = ()
    """Fields of its own that it reads of each row. A denoiser is given them as ``conditioning[name]``, ``[B]``, a text encoder as
    keyword arguments of ``encode`` and ``encode_negative``, a stage and a sink in the batch. Known once it is built."""

    libraries: Sequence[str] = ()
    """Distributions whose versions change its numbers, as pip names them, beside latentmill, numpy, pillow, scipy and torch.

    A worker that has other versions than the driver is refused.
    """

    fingerprinted: Sequence[str] = ()
    """Settings that its fingerprint stands for, or a source's fragments': paths, above all, whose contents are hashed there.

    They may change, as when a model is moved, and the dataset goes on.
    """

    def fingerprint(self) -> str:
        """Identify everything outside the settings that changes results, weights above all.

        Becomes part of the plan: a dataset begun with one fingerprint is not continued with another, and a worker that finds
        another than the driver is refused. ``latentmill.weights.digest(path)`` hashes a file whole, and only once.
        """
        return ""

    def notices(self) -> Sequence[str]:
        """What people should know before a job starts, a line each: columns that nothing reads, say.

        Asked once, in the driver, by ``plan`` and ``run``; of a source, after its ``fragments``.
        """
        return ()

    def load(self, device: torch.device) -> None:
        """Make ready for use on ``device``. Called once in each worker, never in the driver."""


# ---------------------------------------------------------------------------------------------------- schedulers


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


class Field(ABC):
    """What a scheduler may ask about the rows it moves. Prediction type, guidance and conditioning are hidden behind it.

    Every result broadcasts against the latents ``x[B, ...]``, is on their device and is the scheduler's own.
    """

    @abstractmethod
    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` of the noise schedule at times ``t[B]``, float64, shaped ``[B, 1, ...]`` to multiply with x."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The times ``[B]``, float64, at which ``sigma / alpha`` is ``ratio``, ``[B]`` or ``[B, 1, ...]``: where a midpoint lies."""

    @abstractmethod
    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of the clean latents x0, shaped as ``x[B, ...]``, for latents x at times ``t[B]``: one evaluation."""

    @abstractmethod
    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        """Unit normal noise shaped as x, fixed for each row by (the row's seed, t, s): asked twice, the same twice."""


@dataclass(frozen=True)
class Start:
    """Where a row begins, as a scheduler that has a grid of its own says."""

    times: Tensor
    """Float64, descending, ``[n + 1]`` for n steps."""
    state: State
    """Of this row alone: without the batch axis."""
    alpha: float
    sigma: float
    """The row's latent at its first time is ``alpha * x0 + sigma * noise``."""
    scale: float
    """Standard deviation of the noise that a row without picture or latents starts from."""
    grid: str = "trailing"
    """What a job's ``scheduler.grid`` may be: its default, or the name of the grid that these times are."""


class Scheduler(Plugin, ABC):
    """Moves latents ``x[B, ...]``, float32, from times ``t[B]`` to earlier times ``s[B]``, float64 on the CPU.

    A scheduler is a value: it holds settings and nothing else. No grid, no counter, no seed, no history; what a multistep
    solver remembers is the ``State`` that it returns. Rows at different times stand in one batch and must not touch each
    other. What it is given is read only; latents and state that it returns are the framework's, on x's device and, of the state, of
    the dtypes that it chose. (The same split as a diffrax solver's; what diffusers fuses into one class is noise schedule, grid, solver and prediction.)
    """

    evaluations: ClassVar[int] = 1
    """Calls of ``field.clean`` in one step."""

    stochastic: ClassVar[bool] = False
    """Whether a step draws noise with its default settings."""

    order: ClassVar[int] = 1
    """Order of convergence with its default settings; of a stochastic one, that of its drift."""

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


# -------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class LatentSpec:
    """What a VAE's latents are; travels with stored latents, and a VAE with another spec refuses them.

    Stored and travelling latents are *scaled*: ``(z - shift) * scale``, about unit variance, as a denoiser sees them
    (``scaling_factor`` and ``shift_factor`` of diffusers' VAE configs).
    """

    channels: int
    downscale: int
    """Pixels of the picture per latent pixel, on each side."""
    scale: float
    shift: float
    dtype: str
    """Logical dtype of stored latents: ``float32``, ``float16`` or ``bfloat16``."""
    fingerprint: str
    """Hash of the weights that define the latent space."""
    time_downscale: int = 0
    """0: latents of pictures, ``[C, h, w]``. From 1 on: of clips, ``[C, t, h, w]``, with that many frames a latent frame
    behind the first, which has its own, as causal video VAEs have it: ``t = 1 + (frames - 1) / time_downscale``."""

    def shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Latent shape, ``(C, h, w)`` or ``(C, t, h, w)``, of ``height`` x ``width`` pixels, and of a clip's ``frames``.

        Raises RowError if it doesn't divide, or a space of pictures is asked for a clip or the other way round.
        """
        if height < 1 or width < 1 or height % self.downscale or width % self.downscale:
            raise RowError(f"size {width}x{height} is not a multiple of {self.downscale}, as the VAE needs")
        sides = height // self.downscale, width // self.downscale
        if not self.time_downscale:
            if frames is not None:
                raise RowError("a clip, and the VAE is one of pictures")
            return self.channels, *sides
        if frames is None:
            raise RowError("no clip and no latents, and the VAE is one of clips")
        if frames < 1 or (frames - 1) % self.time_downscale:
            raise RowError(
                f"{frames} frames are not one more than a multiple of {self.time_downscale}, as the VAE needs"
            )
        return self.channels, 1 + (frames - 1) // self.time_downscale, *sides

    def pixels(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``(height, width)`` of what latents of ``shape``, without the batch axis, decode to; of clips ``(frames, height, width)``."""
        sides = shape[-2] * self.downscale, shape[-1] * self.downscale
        return (1 + (shape[-3] - 1) * self.time_downscale, *sides) if self.time_downscale else sides

    @property
    def decoded(self) -> str:
        """The column that latents are decoded to: ``image``, uint8 ``[H, W, 3]``, or ``video``, uint8 ``[T, H, W, 3]``."""
        return "video" if self.time_downscale else "image"

    def about(self) -> dict[str, Any]:
        """What is stored of it, for JSON: all values, less those that only clips have."""
        return {name: value for name, value in vars(self).items() if name != "time_downscale" or value}


class VAE(Plugin, ABC):
    """Pictures to latents and back. ``latents`` here are scaled (see LatentSpec).

    Of a VAE of clips read ``[B, 3, T, H, W]`` for pictures and ``[B, C, t, h, w]`` for latents. What it is given is float32, on
    the device of ``load``, and is read only. What it returns may be of any floating dtype and on any device, and is the
    framework's: nothing that the VAE keeps or returns again.
    """

    @property
    @abstractmethod
    def spec(self) -> LatentSpec:
        """The latent space. Known before ``load``."""

    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]``, RGB in [-1, 1], to the posterior's mean ``[B, C, h, w]``, scaled."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, both as ``encode``'s result and scaled. Without one, 0 is the latter."""
        mean = self.encode(images)
        return mean, mean.new_zeros(mean.shape)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents ``[B, C, h, w]`` to pictures ``[B, 3, H, W]`` in [-1, 1]; what lies outside is clipped later."""


class TextEncoder(Plugin, ABC):
    """Prompts to conditioning: tensors of any dtype, on any device, which are the framework's; what is not finite is an error."""

    reads: Mapping[str, str | None] = {}
    """What it does with other tools' syntax, by the names in ``latentmill.syntax.SYNTAXES``: None for a kind that it reads as it is
    meant, else what a person should do instead. Kinds that are not here are read as words."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], *_: Any, **fields: Any) -> Conditioning:
        """Conditioning of B prompts. ``""`` is the unconditional prompt. ``fields``: its ``row_fields``, of one value for all.

        Called for prompts that ``check`` has passed. Shapes behind the batch axis are the same for all prompts.
        """

    def encode_negative(self, prompts: Sequence[str | None], *_: Any, **fields: Any) -> Conditioning:
        """Conditioning of what a picture is guided away from: ``encode``'s, unless the model treats it otherwise.

        None is a row that gives no negative prompt, which is encoded as an empty one, unless the model has something else for it.
        """
        return self.encode([prompt or "" for prompt in prompts], **fields)

    def check(self, prompt: str) -> None:
        """Raise RowError, naming the cause, for a prompt that can't be encoded. Needs no weights."""

    def warn(self, prompt: str) -> str:
        """What of a prompt that ``check`` has passed will not be read, or "": it stands in the row's ``warning``.

        The same words for all prompts of a kind, so that rows can be counted by them. Needs no weights.
        """
        return ""


class Denoiser(Plugin, ABC):
    """The network: predicts, from noisy latents, what ``prediction`` says.

    Tensors that it is given are read only and on the device of ``load``, but for ``t``, which is on the CPU; what it returns is
    the framework's, on that device. Nothing may be kept from one call to the next: the next one's rows are others.

    Conditioning, by name: what the text encoder makes; ``guidance_scale``, ``mask`` and ``masked``, if asked for below; and what
    a stage before it adds as tensor columns ``prompt:NAME`` and ``negative:NAME`` ``[B, ...]``, of one shape for all rows that
    are to be moved together: a control picture, say, raw or encoded by the VAE. Both or, with
    ``guidance_embedded``, ``prompt:NAME`` alone. Dtypes are kept; float conditioning must be finite.
    """

    prediction: Prediction
    noise_schedule: NoiseSchedule
    guidance_embedded: bool = False
    """Whether the network is told a row's guidance scale, as conditioning ``guidance_scale[B]``, and so guides itself: one
    evaluation, without the negative prompt."""
    inpaints: bool = False
    """Whether the network was trained for inpainting: it is told, in both conditionings, ``mask[B, 1, h, w]``, 1 where to paint,
    and ``masked[B, C, h, w]``, the latents of the picture with gray there. Rows without a mask are errors."""

    def check(self, spec: LatentSpec) -> None:
        """Raise ValueError, saying what was expected, if the network was not trained on latents of this space."""

    def guide(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """The guided prediction out of two ``[B, ...]``; ``scale`` broadcasts against them (Ho and Salimans 2022, eq. 6)."""
        return negative + scale * (prompt - negative)

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The prediction, shaped as latents ``x[B, C, h, w]`` (``[B, C, t, h, w]`` of clips), float32, at times ``t[B]``, float64 in [0, 1].

        One evaluation; guidance calls it with rows of both conditionings in one batch. The result is of any floating dtype.
        """


class FollowsAuthors:
    """What a denoiser may add that repeats its authors' pipeline: ``class Mine(FollowsAuthors, Denoiser)``.

    As it stands it is what is done for a denoiser without it.
    """

    noise_schedule: NoiseSchedule

    def times(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The grid that the model's authors intended, which ``scheduler.grid: model`` asks for.

        Float64 on the CPU, descending, ``[steps + 1]``, for latents of ``shape``. Raises ValueError where there is none.
        """
        raise ValueError("this denoiser has no grid of its own: choose one by its name")

    def start_scale(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise that a row without picture or latents starts from, at times ``t``, float64: sigma."""
        return self.noise_schedule.scale(t)[1]

    def guides(self, scale: float, negative_prompt: str | None) -> bool:
        """Whether a row of this guidance scale is guided, and so costs two evaluations a step; None: it gives no negative prompt."""
        return scale > 1.0

    @staticmethod
    def of(denoiser: Denoiser) -> FollowsAuthors:
        """The denoiser itself, if it follows its authors, else what is done for it."""
        if isinstance(denoiser, FollowsAuthors):
            return denoiser
        plain = FollowsAuthors()
        plain.noise_schedule = denoiser.noise_schedule
        return plain


# ---------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Fragment:
    """A run of a source's rows that can be read on its own: a file, as a rule."""

    name: str
    """Stable, relative to the source: part of the plan."""
    rows: int
    fingerprint: str = ""
    """Changes when the content does: size and modification time, an ETag, a checksum."""


class Source(Plugin, ABC):
    """Where rows come from."""

    job_fields: Sequence[RowField] = ()
    """The fields of the job's plugins: a column of such a name gives them, as ours. The framework sets this first of all."""

    @cached_property
    def kept(self) -> pa.Schema:
        """The columns that the job keeps. The framework sets this before ``fragments``."""
        import pyarrow as pa

        return pa.schema([])

    id_column: str | None = None
    """The column with the rows' own ids, if the job declares one (by a setting of this name, as a rule)."""

    @abstractmethod
    def fragments(self) -> Sequence[Fragment]:
        """All fragments, in an order that never changes. Called once, in the driver, before anything starts."""

    @abstractmethod
    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """Rows ``start`` to ``stop`` of a fragment, in order: exactly one item for each, a RowError for a bad one.

        The same rows whenever and in whatever company they are asked for: some are read twice, and compared.

        Keys that mean something: the fields of ``docs/fields.md`` and ``job_fields``; ``image``, a uint8 RGB array
        ``[H, W, 3]``; ``mask``, one of its size, light where the picture is to be painted anew; ``latents``, a float array
        ``[C, h, w]`` of the space that ``latent_spec`` names, and with half-way ones ``time``, ``trajectory`` and ``state`` as our
        own job stored them; with ``id_column``, ``id``, text that no other row has, from which the row's seed is hashed;
        ``kept``, a dict of the columns in ``self.kept``: Python values or ``pa.Scalar``, text for any type that Arrow reads from
        text. None stands for the job's value, and for null in ``kept``; other keys are left out.
        """

    def columns(self) -> Sequence[str]:
        """The columns that no field is read from: what ``keep: all`` keeps. Asked in the driver, before ``fragments``.

        Those that the job doesn't keep are to be named by ``notices``.
        """
        return ()

    def column_types(self, names: Sequence[str]) -> pa.Schema:
        """The Arrow types of some columns, over all fragments, without those that are nowhere. Raises ValueError.

        Asked after ``columns``, and only of sources that a job keeps columns of.
        """
        import pyarrow as pa

        return pa.schema([])

    def changed(self, fragment: Fragment) -> bool:
        """Whether a fragment is another than when the job was planned, or on this machine: then the job ends.

        Asked in each worker that reads, once, before the first of the fragment's rows.
        """
        return False

    def ids(self, fragment: Fragment) -> Iterator[str | None]:
        """The ids of a fragment's rows, in order; None for a row that will be an error.

        Asked in the driver, of sources with an ``id_column``, to find ids that are there twice. Better than to read whole rows.
        """
        for row in self.read(fragment.name, 0, fragment.rows):
            yield None if isinstance(row, RowError) else row["id"]

    def reads_from(self, folder: str) -> bool:
        """Whether files that come into this local folder, or below it, would be the source's: no job may write there."""
        return False

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        """Prompt and negative prompt of a fragment's rows, in order; None for one that a row doesn't have or that is bad.

        Asked by ``plan``, to look for what no text encoder reads. No picture may be decoded for it. Without, it doesn't look.
        """
        return iter(())

    def latent_spec(self) -> LatentSpec | None:
        """The space of the latents that this source reads, or None if it reads none."""
        return None


@dataclass(frozen=True)
class FixedShape:
    """How a deterministic job computes: every batch has ``batch_size`` slots, and a row's slot follows from its number.

    What a matrix product gives for a row may depend on the batch's size and on the row's place in it, never on what
    stands in the other places. So with both fixed a row's bits are the same alone, in company, and after a resume.
    """

    batch_size: int
    rows_per_shard: int


@dataclass(frozen=True)
class Declaration:
    """What a stage is in a job. Plain values: they travel with the plan, so that no worker imports another's stage."""

    name: str
    """The stage's name in the job."""
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    adds: tuple[str | pa.Field, ...] = ()
    drops: tuple[str, ...] = ()
    position: Literal["first", "between", "last"] = "between"
    continuous: bool = False

    def added(self) -> list[str]:
        """The names of the columns that it adds."""
        return [column if isinstance(column, str) else column.name for column in self.adds]


@dataclass
class StageContext:
    """What a stage is given before it works: its place in the job, and the plugins that it needs."""

    declaration: Declaration
    before: Sequence[Declaration] = ()
    after: Sequence[Declaration] = ()
    """The other stages of the flow, in their order. ``declare`` is asked from the last stage to the first, and sees ``after`` alone."""
    batch_size: int = 16
    fixed: FixedShape | None = None
    """Of a deterministic job."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The job's ``sampling``: what a row is made with that doesn't say otherwise."""
    latents_std: bool = False
    """Whether the job asks for the standard deviation of encoded latents."""
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the job says of each kind of plugin: ``choices["scheduler"]["name"]``. Nothing is built for it."""
    plan: Any = None
    """The plan's arithmetic: ``locate``, ``row_id``, ``row_seed``, ``id_seed``, ``shard_rows``; its ``spec``, ``hash`` and ``config``."""
    build: Callable[[str], Any] | None = None
    """Builds a plugin of the job by its kind, and holds it against the plan."""
    scheduler_of: Callable[[str], Scheduler] | None = None
    """A scheduler by the name that a row gives it. Raises RowError if there is none."""
    require_fragment: Callable[[str], None] = lambda name: None
    """Raises if a fragment of the source is not what was planned."""
    open_output: Callable[[], Any] | None = None
    """The storage of the job's output."""

    def plugin(self, kind: str) -> Any:
        """The job's plugin of a kind that the stage says it needs, built and not yet loaded. Built when first asked for."""
        if kind not in self.declaration.needs:
            raise ValueError(f"stage {self.declaration.name} asks for a {kind}, which is not in its needs")
        if kind not in self._built:
            assert self.build is not None
            self._built[kind] = self.build(kind)
        return self._built[kind]

    def __post_init__(self) -> None:
        self._built: dict[str, Any] = {}

    def needed_later(self, kind: str) -> bool:
        """Whether a later stage needs a plugin of this kind: a denoiser, say."""
        return any(kind in stage.needs for stage in self.after)

    @classmethod
    def of(cls, plugins: Mapping[str, Any], adds: Sequence[str] = (), **more: Any) -> StageContext:
        """A context with these plugins, by kind: for tests, and for a stage that is used alone."""
        declaration = Declaration("stage", needs=tuple(plugins), adds=tuple(adds))
        return cls(declaration, build=plugins.__getitem__, **more)


class Stage(Plugin, ABC):
    """Work on a batch on its way: a filter, an upscaler, a scorer. Put into a job by its name in ``flow``.

    The class says what it is: other stages, the plan and the pools ask its declaration and never its name.
    """

    reads: Mapping[str, str | None] | None = None
    """Of a stage that encodes prompts: as TextEncoder's."""
    needs: Sequence[str] = ()
    """Kinds of the job's plugins that it works with: ``source``, ``sink``, ``vae``, ``text_encoder``, ``denoiser``, ``scheduler``."""
    takes: Sequence[str] = ()
    """Columns that it can't work without, and that a source doesn't give: a job in which no stage before it adds them is refused.

    Here and below a name that ends in ``:`` stands for all columns that begin so, as ``prompt:``."""
    adds: Sequence[str | pa.Field] = ()
    """Columns of its results that it was not given, by name if they are in the table of ``latentmill.rows``, else as Arrow
    fields. A shard in which all rows failed has the columns that its stages declare."""
    drops: Sequence[str] = ()
    """Columns that are not in its results."""
    resources: Mapping[str, Any] = {}
    """What of ``stages.NAME`` a job need not say: ``batch_size``, ``replicas``, ``num_cpus``, ``num_gpus`` and the like."""
    position: ClassVar[Literal["first", "between", "last"]] = "between"
    """``first``: is given tables of the column ``row`` alone, row numbers, and makes rows of them. ``last``: see CommittingStage."""
    continuous: ClassVar[bool] = False
    """Whether it works on several batches at a time: see ContinuousStage."""
    fixed: FixedShape | None = None
    """Set, in ``prepare``, by a stage that computes in the slots of a deterministic job: its batches are then never split."""

    def declare(self, context: StageContext) -> Declaration:
        """What it is in this job: by default what its class says. Asked in the driver alone, before there is a plan."""
        return replace(
            context.declaration,
            needs=tuple(self.needs),
            takes=tuple(self.takes),
            adds=tuple(self.adds),
            drops=tuple(self.drops),
            position=self.position,
            continuous=self.continuous,
        )

    def prepare(self, context: StageContext) -> None:
        """Take what it needs from the context. Called once in each worker, before ``load``; never in the driver."""

    @abstractmethod
    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table | Iterable[pa.Table]:
        """The batch's rows, changed. See ``latentmill.batch`` for the columns.

        Keep ``row`` and ``row_id`` as they are; leave out the rows that were rejected, and only those: a row that
        disappears without a reason is an error. Return several tables if rows part into several tensor shapes.
        """


@dataclass(frozen=True)
class StoredShard:
    """A shard that is committed, as ``Sink.finish`` is told of it."""

    name: str
    """Of its file, relative to the dataset: ``data/00007.tar``."""
    rows: int
    """Those that are ok, and so in the file."""
    metadata: Mapping[str, str]
    """As ``Sink.metadata`` reads it."""


OpenSideFile: TypeAlias = Callable[[str], BinaryIO]
"""Opens one of a shard's side files, by the name that ``Sink.write_side_files`` gave it, at position 0."""


class Request(Protocol):
    """A batch in a continuous stage."""

    @property
    def done(self) -> bool:
        """Whether it can be finished: all its rows are ready, or it has failed."""
        ...


class ContinuousStage(Stage):
    """A stage that works on the rows of several batches at a time, a step at a time: a batch joins while others are on their way.

    A worker takes in all batches that it has been given, makes one step, and hands back the requests that are done.
    """

    continuous: ClassVar[bool] = True

    @abstractmethod
    def take(self, batch: pa.Table, reject: Reject) -> Request:
        """Take in a batch. An exception is this batch's."""

    @abstractmethod
    def advance(self) -> None:
        """Make one step. What goes wrong is kept for the requests that it goes wrong for, and raised by ``finish``."""

    @abstractmethod
    def finish(self, request: Any) -> Iterable[pa.Table]:
        """The rows of a request that is done, as ``__call__`` returns them. Raises what went wrong with it, if something did."""

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        request = self.take(batch, reject)
        while not request.done:
            self.advance()
        yield from self.finish(request)


class CommittingStage(Stage):
    """The last stage of a flow: packs batches, and publishes whole shards."""

    position: ClassVar[Literal["first", "between", "last"]] = "last"

    @abstractmethod
    def commit(self, shard: int, packed: Sequence[pa.Table], errors: Sequence[Mapping[str, Any]]) -> bool:
        """Publish a shard; False if another driver had, whose rows and errors then stand.

        ``packed``: the rows that are ok, in any order; ``errors``: ``row``, ``stage`` and ``reason`` of the others.
        """

    @abstractmethod
    def probe(self) -> str:
        """The name of a file that it has just made where shards go, for the driver to look for."""


class Sink(Plugin, ABC):
    """How a shard is stored. When and under which name it appears is the framework's: it commits each shard once.

    A shard is one file, which holds all that there is to know of it. Beside it a sink may store *side files*: the framework
    puts them into ``files/``, under names that no other driver uses, before the create of the shard's own file commits all.

    Whatever reads is given an open file at position 0, of a local disk or an object store, and leaves it open. It remembers
    nothing of what was written: another process may have.
    """

    suffix: ClassVar[str]
    """Of the shard's file name, with the dot: one, as ``.parquet``."""

    @abstractmethod
    def pack(self, batch: pa.Table) -> pa.Table:
        """Turn tensors into what is stored (pictures into PNG bytes, say); keep the other columns. Runs in parallel.

        ``batch`` is of one tensor shape; packed tables of several shapes are put together to a shard.
        """

    @abstractmethod
    def write(self, path: str, shard: pa.Table, metadata: Mapping[str, str]) -> None:
        """Write all packed rows of a shard, in order, and ``metadata`` into the new file ``path``, and close it.

        The same rows give the same bytes: no clock, no name of a machine. A shard may have no rows. What the schema's
        metadata of ``shard`` says is kept, too: the space of latents.
        """

    def write_side_files(self, folder: str, shard: pa.Table) -> None:
        """Write what of the shard does not stand in its own file into plain files of the empty local ``folder``, if anything.

        Their names are the sink's; the framework keeps their sizes and hashes, and looks at them when the dataset is verified.
        """

    @abstractmethod
    def row_ids(self, file: BinaryIO) -> Sequence[str]:
        """Read a written file back whole and list its row ids, in order. Raise if a byte of it is not as it was written."""

    @abstractmethod
    def metadata(self, file: BinaryIO) -> Mapping[str, str]:
        """What ``write`` was given as metadata, and what the shard's schema said; there may be more. Reads no rows.

        A shard's error rows are in it.
        """

    @abstractmethod
    def count(self, file: BinaryIO) -> int:
        """How many rows are in the file. Reads no rows."""

    @abstractmethod
    def schema(self, file: BinaryIO) -> pa.Schema:
        """The columns that ``read`` gives. Reads no rows.

        A tensor's column is a list of its numbers here, since shapes may differ from row to row, with the metadata that it
        travels with; ``state:`` stands for all that a scheduler remembers. Raises ValueError, saying
        why, if the file is none that ``read`` can read.
        """

    @abstractmethod
    def read(
        self, file: BinaryIO, columns: Sequence[str] | None, rows: Sequence[int], side_file: OpenSideFile
    ) -> Iterator[pa.Table | RowError]:
        """Rows of the file as they travelled: tables of one tensor shape each, with the metadata that tensors had.

        ``columns``: those that are wanted, as ``schema`` names them, None for all; what is not there is left out. ``rows``: their numbers in the file,
        ascending. The tables hold them in order; a RowError stands for one that can't be read.
        """

    def layout(self, schema: pa.Schema) -> Mapping[str, str]:
        """What people find in a file of these columns (``schema``'s), by name, and what it means: for the dataset card.

        "" stands for a column of the batch that is stored as it is.
        """
        return dict.fromkeys(schema.names, "")

    def finish(self, shards: Sequence[StoredShard]) -> Mapping[str, bytes]:
        """Files for the whole dataset, by name, once all its shards are there: an index, say. They are put at its top.

        Called in each driver that ends, so at least once, and again when shards were made anew: it gives the same for the same.
        """
        return {}

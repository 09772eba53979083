"""Stages: what they declare, and what they are given.

A batch is a ``pyarrow.Table`` of rows of one tensor shape. Its columns are the row's fields (``docs/fields.md``), the source's
columns that the job keeps, and those in ``BATCH_COLUMNS``. ``latentmill.plugin.tensors`` turns a tensor's column into a tensor and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from latentmill.plugin.contract import Plugin, Reject
from latentmill.plugin.scheduler import Scheduler

if TYPE_CHECKING:  # to list plugins takes none of them
    import pyarrow as pa


@dataclass(frozen=True)
class BatchColumn:
    """A column of batches that is no field of a row."""

    name: str
    """One that ends in ``:`` stands for all that begin so."""
    type: str
    way: str
    """From which stage to which."""
    meaning: str
    reserved: bool = True
    """Whether no job may keep a column of its source under this name; if not, none in which a stage adds it."""


BATCH_COLUMNS = (
    BatchColumn(
        "image",
        "tensor uint8 [H, W, 3], RGB; with float_pictures float32, see takes_floats",
        "read to encode; decode to write",
        "the picture",
    ),
    BatchColumn("video", "tensor as image, [T, H, W, 3], RGB", "as image, of a row that is a clip", "the clip"),
    BatchColumn(
        "mask",
        "tensor uint8 [H, W], [1, h, w]; with ComfyUI's first noise float32 [H, W], [1, H, W]",
        "read to encode, encode to denoise: 1 where to paint",
        "inpainting mask: light where the picture was made anew",
    ),
    BatchColumn(
        "masked", "tensor as latents", "encode to denoise", "the latents of the picture, gray under the inpainting mask"
    ),
    BatchColumn("from_noise", "bool", "encode to denoise", "whether the row has no picture and no latents"),
    BatchColumn(
        "latents",
        "tensor [C, h, w], of clips [C, t, h, w], scaled",
        "encode to denoise to decode or write",
        "the latents, channels first, flattened",
    ),
    BatchColumn(
        "latents_std",
        "tensor as latents",
        "encode to write, where the job asks for it",
        "the standard deviation of the latents' posterior",
    ),
    BatchColumn(
        "latents_flipped",
        "tensor as latents",
        "encode to write, where size.flip asks for it",
        "the latents of the mirrored picture",
    ),
    BatchColumn(
        "latents_std_flipped",
        "tensor as latents",
        "as latents_flipped, with latents_std",
        "the standard deviation of latents_flipped's posterior",
    ),
    BatchColumn(
        "original_size",
        "list of 2 int32",
        "read to the dataset, where the job has size",
        "width and height of the picture as it was opened",
        reserved=False,
    ),
    BatchColumn(
        "crop_ltrb",
        "list of 4 float64",
        "as original_size",
        "left, top, right and bottom of what was cut out of the scaled picture, in its pixels; with size.pixels=kohya what kohya calls so",
        reserved=False,
    ),
    BatchColumn(
        "bucket",
        "list of 2 int32",
        "as original_size",
        "width and height that the picture was brought to",
        reserved=False,
    ),
    BatchColumn(
        "attempt",
        "int32",
        "read to the dataset, where the job has accept",
        "which of the row's samples was accepted, from 0: those before it were filtered",
        reserved=False,
    ),
    BatchColumn("state:", "tensor", "beside half-way latents only", "half-way latents: what the scheduler remembers"),
    BatchColumn(
        "source_image",
        "tensor as image or video",
        "encode to decode, where a job has no denoise",
        "the picture that a reconstruction is of",
    ),
    BatchColumn(
        "psnr",
        "float64, dB",
        "decode to the dataset, where there is a source_image",
        "PSNR of the reconstruction against the source picture, in dB",
    ),
    BatchColumn(
        "prompt:",
        "tensor, a conditioning",
        "encode to denoise, or to write in a job without denoise; see shares_tensors",
        "what the text encoder made of the prompt",
    ),
    BatchColumn("negative:", "tensor, the same of the negative", "as prompt:", "what it made of the negative prompt"),
)
"""Tensors, and what is measured on the way. The type is the stages'; what a sink makes of it is the sink's."""


def named(name: str, declared: str) -> bool:
    """Whether a stage that says ``declared`` means the column ``name``: itself, or, with a colon at the end, how it begins."""
    return name.startswith(declared) if declared.endswith(":") else name == declared


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
    ignores: tuple[str, ...] = ()
    cuts: bool = False
    takes_floats: bool = False
    multiple_of: int = 1
    """What the stage's denoiser says; 1: it has none."""

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
    finds_batch_size: bool = False
    """``batch_size`` is the first to be tried, and the stage may find a better one."""
    fixed: FixedShape | None = None
    """Of a deterministic job."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The job's ``sampling``, or what it has for this stage: what a row is made with that doesn't say otherwise."""
    latents_std: bool = False
    """Whether the job asks for the standard deviation of encoded latents."""
    float_pictures: bool = False
    """Whether the job asks for pictures that stay floats between stages that take them so."""
    size: Mapping[str, Any] | None = None
    """The job's ``size``: how each picture is brought to a size of its own; None: to ``sampling``'s, or it keeps its own."""
    attempts: int | None = None
    """Of a job with ``accept``: how many samples of a row are drawn at most, until one is not filtered."""
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the job says of each kind of plugin, for this stage or for all: ``choices["scheduler"]["name"]``. Nothing is built for it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where in the plan these plugins stand: ``denoiser``, or, of a stage with one of its own, ``refine.denoiser``."""
    plan: Any = None
    """The plan's arithmetic: ``locate``, ``row_id``, ``row_seed``, ``id_seed``, ``shard_rows`` and ``hash_of`` a shard; its ``spec`` and ``config``."""
    build: Callable[[str], Any] | None = None
    """Builds a plugin of the job by its kind, and holds it against the plan."""
    scheduler_of: Callable[[str], Scheduler] | None = None
    """A scheduler by the name that a row gives it. Raises RowError if there is none."""
    require_fragment: Callable[[str], None] = lambda name: None
    """Raises if a fragment of the source is not what was planned."""
    open_output: Callable[[], Any] | None = None
    """The storage of the job's output."""
    open_prompt_cache: Callable[[], Any] | None = None
    """The storage of the job's prompt cache; None: the job has none."""

    def plugin(self, kind: str) -> Any:
        """The job's plugin of a kind that the stage says it needs, built and not yet loaded. Built when first asked for."""
        if kind not in self.declaration.needs:
            raise ValueError(f"stage {self.declaration.name} asks for a {kind}, which is not in its needs")
        if kind not in self._built:
            assert self.build is not None
            self._built[kind] = self.build(kind)
        return self._built[kind]

    def place(self, kind: str) -> str:
        """Where in the plan the stage's plugin of a kind stands."""
        return self.places.get(kind, kind)

    def __post_init__(self) -> None:
        self._built: dict[str, Any] = {}

    def needed_later(self, kind: str) -> bool:
        """Whether a later stage needs a plugin of this kind: a denoiser, say."""
        return any(kind in stage.needs for stage in self.after)

    @property
    def downscale(self) -> int:
        """Pixels for one of the job's latents, on each side; 1: it has none."""
        spec = self.plan.spec if self.plan is not None else None
        return 1 if spec is None else int(spec.downscale)

    @property
    def multiple_of(self) -> int:
        """What the sides of pictures must be multiples of for the VAE that encodes them, and the denoisers of later stages."""
        return self.downscale * lcm(*(stage.multiple_of for stage in self.after))

    @property
    def gives_floats(self) -> bool:
        """Whether the pictures that it makes stay floats: the job asks for them, and all stages take them so up to the one that makes something else of them."""
        at = next((k for k, stage in enumerate(self.after, 1) if {"image", "video"} & {*stage.drops}), 0)
        return self.float_pictures and at > 0 and all(stage.takes_floats for stage in self.after[:at])

    def is_read(self, column: str) -> bool:
        """Whether a column of ``BATCH_COLUMNS`` that is made for denoisers is made for any: a later stage takes it, or none ignores it.

        Of several denoisers one that doesn't ignore it will do; a stage that makes the like anew is the last that may take it.
        """
        of = [column, "prompt:"] if column == "negative:" else [column]
        anew = next((k for k, stage in enumerate(self.after, 1) if {*of} & {*stage.added()}), None)
        after = self.after[:anew]
        taken = any(named(each, column) or named(column, each) for stage in after for each in stage.takes)
        ignore = [any(named(column, each) for each in stage.ignores) for stage in after]
        denoise = [ignores for stage, ignores in zip(after, ignore) if "denoiser" in stage.needs]
        return taken or not any(ignore) or (len(denoise) > 1 and not all(denoise))

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
    """Columns of its results that it was not given, by name if they are in ``BATCH_COLUMNS``, else as Arrow
    fields. A shard of which no row is stored has the columns that its stages declare: one that is there already stays in
    its place, unless it is in ``drops``, too."""
    drops: Sequence[str] = ()
    """Columns that are not in its results."""
    ignores: Sequence[str] = ()
    """Columns of ``BATCH_COLUMNS`` that it doesn't read, though others of its kind do: no stage before it makes them for its sake."""
    cuts: bool = False
    """Whether the pictures of its results have sides that the VAE can encode, whatever it was given: then it is given them whole, and no
    stage before it cuts them."""
    takes_floats: bool = False
    """Whether it takes ``image`` and ``video`` as float32 as well, 0 for black and 1 for white, or passes them on unread: in a job with
    ``float_pictures`` they may come so. If not, the stage that makes them rounds them to bytes."""
    shares_tensors: ClassVar[bool] = False
    """Whether it takes columns of tensors that rows share as they are (``latentmill.plugin.tensors.shared``). If not, each row of
    its batches has its own."""
    resources: Mapping[str, Any] = {}
    """What of ``stages.NAME`` a job need not say: ``batch_size``, ``replicas``, ``num_cpus``, ``num_gpus`` and the like."""
    position: ClassVar[Literal["first", "between", "last"]] = "between"
    """``first``: is given tables of the column ``row`` alone, row numbers, and makes rows of them; in a job with ``accept`` there is
    ``attempt`` beside it, by which it goes, and which it declares in ``adds``, or it is refused. ``last``: see CommittingStage."""
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
            ignores=tuple(self.ignores),
            cuts=self.cuts,
            takes_floats=self.takes_floats,
            position=self.position,
            continuous=self.continuous,
        )

    def prepare(self, context: StageContext) -> None:
        """Take what it needs from the context. Called once in each worker, before ``load``; never in the driver."""

    @abstractmethod
    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table | Iterable[pa.Table]:
        """The batch's rows, changed. The columns are those in ``BATCH_COLUMNS``.

        Keep ``row`` and ``row_id`` as they are; leave out the rows that were rejected, failed or filtered, and only those: a row that
        disappears without a reason is an error. Return several tables if rows part into several tensor shapes.
        """


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

    def hand_over(self, request: Any) -> Iterable[pa.Table] | None:
        """The rows of a request that is not done, as far as they are, for ``take`` to go on with in another process: every row that
        was not rejected, once. The stage gives the request up. They are batches as ``take`` was given them, with columns of its own beside,
        whose names begin with ``half_done:``. None, as here, if it can't: then the request's batch begins anew.
        """
        return None

    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        request = self.take(batch, reject)
        while not request.done:
            self.advance()
        yield from self.finish(request)


class CommittingStage(Stage):
    """The last stage of a flow: packs batches, and publishes whole shards."""

    position: ClassVar[Literal["first", "between", "last"]] = "last"

    @abstractmethod
    def commit(
        self,
        shard: int,
        packed: Sequence[pa.Table],
        errors: Sequence[Mapping[str, Any]],
        filtered: Sequence[Mapping[str, Any]] = (),
        not_needed: int = 0,
    ) -> bool:
        """Publish a shard; False if another driver had, whose rows and errors then stand.

        ``packed``: the rows that are ok, in any order; ``errors``: ``row``, ``stage`` and ``reason`` of those that failed, and ``attempt``, if
        that was not their first; ``filtered``: ``row``, ``stage``, ``reason``, ``scores`` and, in a job with ``accept``, ``attempts``. It is
        given ``filtered`` only if there are any. ``not_needed``, in a job with ``accept.rows`` alone: of so many rows at the shard's end
        nothing is published, whatever became of them, and only how many they are is said.
        """

    @abstractmethod
    def probe(self) -> str:
        """The name of a file that it has just made where shards go, for the driver to look for."""

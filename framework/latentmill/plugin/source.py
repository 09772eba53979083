"""Sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from latentmill.errors import RowError
from latentmill.plugin.contract import Plugin, RowField
from latentmill.plugin.vae import LatentSpec

if TYPE_CHECKING:  # to list plugins takes none of them
    import pyarrow as pa


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

    pixel_ways: ClassVar[Sequence[str]] = ("ours",)
    """The ways in which it can open a picture: ``ours`` is upright and on white; ``kohya`` and ``musubi`` are those trainers' own."""
    pixels: str = "ours"
    """The way in which the job wants them opened, one of ``pixel_ways``. The framework sets this before ``fragments``."""

    wants_conditioning: bool = False
    """Whether the job takes stored conditioning from here, since none of its stages encodes text. The framework sets this before ``fragments``."""

    id_column: str | None = None
    """The column with the rows' own ids, if the job declares one (by a setting of this name, as a rule)."""

    knows_rows: ClassVar[bool] = False
    """Whether ``ids`` tells rows apart where the job declares no ``id_column``, too: by their files' names, say."""

    @abstractmethod
    def fragments(self) -> Sequence[Fragment]:
        """All fragments, in an order that never changes. Called once, in the driver, before anything starts."""

    @abstractmethod
    def read(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """Rows ``start`` to ``stop`` of a fragment, in order: exactly one item for each, a RowError for a bad one.

        The same rows whenever and in whatever company they are asked for: some are read twice, and compared.

        Keys that mean something: the fields of ``docs/fields.md`` and ``job_fields``; ``image``, a uint8 RGB array
        ``[H, W, 3]`` (with ``pixels`` of musubi ``[H, W, 4]`` of one with alpha); ``mask``, one of its size, light where the picture is to be inpainted; ``latents``, a float array
        ``[C, h, w]`` of the space that ``latent_spec`` names, ``denoised``, whether a network made them of noise of the row's seed, and with
        half-way ones ``time``, ``trajectory`` and ``state`` as our own job stored them; if ``wants_conditioning``, ``conditioning``, tensors by the names of ``conditioning()``, where rows of one
        prompt have best one tensor; with ``id_column``, ``id``, text that no other row has, from which the row's seed is hashed;
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

    def expect(self, fragment: Fragment) -> None:
        """What is asked from here on is of the source as it was when this fragment of it was planned.

        Told in each worker, before anything is asked; all fragments of a plan were planned at once.
        """

    def changed(self, fragment: Fragment) -> bool:
        """Whether a fragment is another than when the job was planned, or on this machine: then the job ends.

        Asked in each worker that reads, before the first of the fragment's rows, and where its ``stamp`` is another than then.
        """
        return False

    def stamp(self, fragment: Fragment) -> str:
        """What can be said at once of a fragment's files as they are now: their sizes and times. Where that is another, it may have changed.

        Asked once the rows of a batch are read. "" of a source whose reads are held against the plan themselves.
        """
        return ""

    def ids(self, fragment: Fragment) -> Iterator[str | None]:
        """The ids of a fragment's rows, in order; None for a row that has none. One that will be an error may have one.

        Asked in the driver, of sources with an ``id_column``, to find ids that are there twice. Better than to read whole rows.
        """
        for row in self.read(fragment.name, 0, fragment.rows):
            yield None if isinstance(row, RowError) else row["id"]

    def still(self, fragment: Fragment, runs: Sequence[tuple[str, int, int]]) -> bool | None:
        """Whether what a fragment held when it was planned lies there now, to the last byte: ``runs`` of fragment, first row, rows.

        None if it can't be known. Asked in a worker of a fragment whose ``stamp`` is another once rows of it were read, and
        in the driver, after ``fragments``, where a dataset is to grow with its source: of fragments that are not as they were, about rows of the same ids or, where the source knows none, about the first rows of what has the fragment's name.
        """
        return None

    def reads_from(self, folder: str) -> bool:
        """Whether files that come into this folder or URL of a store, or below it, would be the source's: no job may write there."""
        return False

    def texts(self, fragment: Fragment) -> Iterator[tuple[str | None, str | None]]:
        """Prompt and negative prompt of a fragment's rows, in order; None for one that a row doesn't have or that is bad.

        Asked by ``plan``, to look for what no text encoder reads. No picture may be decoded for it. Without, it doesn't look.
        """
        return iter(())

    def sizes(self, fragment: str, start: int, stop: int) -> Iterator[Mapping[str, Any] | RowError]:
        """As ``read``, but of ``image`` the width and height that it would have, and of other keys ``width`` and ``height`` alone.

        Asked by ``plan`` of a job with ``size``, to count its buckets. No picture may be decoded for it. Without, it doesn't count.
        """
        return iter(())

    def conditioning(self) -> Mapping[str, str]:
        """The columns of conditioning that are stored beside the rows, as ``prompt:context``, each with the fingerprint of the text
        encoder that made it, "" if that has none.
        """
        return {}

    def latent_spec(self) -> LatentSpec | None:
        """The space of the latents that this source reads, or None if it reads none."""
        return None

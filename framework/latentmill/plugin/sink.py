"""Sinks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, ClassVar, TypeAlias

from latentmill.errors import RowError
from latentmill.plugin.contract import Plugin
from latentmill.plugin.text_encoder import TensorSpec

if TYPE_CHECKING:  # to list plugins takes none of them
    import pyarrow as pa


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


class Sink(Plugin, ABC):
    """How a shard is stored. When and under which name it appears is the framework's: it commits each shard once.

    A shard is one file, which holds all that there is to know of it. Beside it a sink may store *side files*: the framework
    puts them into ``files/``, under names that no other driver uses, before the create of the shard's own file commits all.

    Whatever reads is given an open file at position 0, of a local disk or an object store, and leaves it open. It remembers
    nothing of what was written: another process may have. Several threads read with one sink at a time, each a file of its own.
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

    def stored_bytes(self, tensor: TensorSpec, rows: int, distinct: int) -> int:
        """About how many bytes a column of conditioning takes, at most, of whose ``rows`` tensors so many differ within their shards.

        For ``plan``. As it stands each row has its own.
        """
        return rows * tensor.bytes

    def finish(self, shards: Sequence[StoredShard]) -> Mapping[str, bytes]:
        """Files for the whole dataset, by name, once all its shards are there: an index, say. They are put at its top.

        Called in each driver that ends, so at least once, and again when shards were made anew: it gives the same for the same.
        """
        return {}

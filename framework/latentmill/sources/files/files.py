"""What all places that a source's files lie in have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from latentmill.sources.files.ranges import SourceFile
from latentmill.storage import Storage
from latentmill.storage.store import Found


class FolderEntry(NamedTuple):
    """What is right in a folder, but for what is hidden."""

    name: str
    is_folder: bool
    """A folder, or a link to one that is to be followed."""
    is_link: bool = False
    """A link to a folder."""


class Files(ABC):
    """The files that ``source.path`` means. Their names are relative to one root, with slashes."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def local(self) -> Path | None:
        """What the path stands for on this machine; None in a store."""
        return None

    # --------------------------------------------------------------------------------------------------- which there are

    @abstractmethod
    def find(self, suffixes: Collection[str]) -> list[str]:
        """Names of the files that the path means, sorted. Raises ValueError if there are none.

        Of a folder, the files right in it with one of the ``suffixes``; of a glob, all that match and have one. Hidden ones
        are passed over by both.
        """

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether the path is a folder."""

    @abstractmethod
    def below(self, output: str) -> str | None:
        """Where a folder or a store's URL lies below the path, "" if it is the path; None if it lies elsewhere."""

    @abstractmethod
    def child(self, name: str) -> Files | None:
        """The folder ``name`` in the folder that the path is; None if there is none."""

    @abstractmethod
    def look_everywhere(self) -> None:
        """Whoever calls it will ask for the entries of all folders."""

    @abstractmethod
    def entries(self, folder: str, follow_links: bool = False) -> Iterable[FolderEntry]:
        """What is right in a folder below the root, in any order."""

    @abstractmethod
    def identity(self, folder: str) -> Hashable:
        """The same for two names of one folder."""

    # ------------------------------------------------------------------------------------------------------ what they hold

    @abstractmethod
    def file(self, name: str) -> SourceFile:
        """One of the files that were found."""

    @abstractmethod
    def open(self, name: str, follow_links: bool = False, folder: str = "") -> BinaryIO:
        """Open the plain file ``name`` below a folder. Raises RowError if there is none, or it would lie outside.

        With ``follow_links`` a symbolic link may lead out of the folder.
        """

    @abstractmethod
    def ahead(self, names: Iterable[str], folder: str = "", heads: bool = False) -> None:
        """Files with these names will be opened, as a rule in this order. ``heads``: little more than their beginning is wanted."""

    def each(self, ask: Callable[[str], Found], names: Sequence[str]) -> Iterator[Found]:
        """What ``ask`` says of each name, in their order; in a store of many at a time."""
        return map(ask, names)

    @abstractmethod
    def storage(self) -> Storage:
        """The root, as a place where a dataset may lie."""

    # -------------------------------------------------------------------------------------------- whether they are the same

    @abstractmethod
    def known_by_contents(self, names: Iterable[str]) -> bool:
        """Whether the fingerprints of these files will say what they hold, wherever they lie. Tells people if that was too much to read."""

    @property
    def knows_neighbours(self) -> bool:
        """Whether a file's fingerprint stands for all files beside it, too."""
        return False

    @abstractmethod
    def fingerprint(self, names: Iterable[str], contents: bool) -> str:
        """One for all the files; ``contents`` is what ``known_by_contents`` said."""

    @abstractmethod
    def expect(self, fingerprint: str) -> None:
        """What is asked from here on is of the files as they were planned with this fingerprint."""

    @abstractmethod
    def changed(self, names: Iterable[str], before: str) -> bool:
        """Whether the files have another fingerprint than ``before``, now, or here."""

    def stamp(self, names: Iterable[str]) -> str:
        """Of files that may change while they are read: what shows it at once. "" where each read is held against the plan."""
        return ""

    @abstractmethod
    def still(self, names: Iterable[str], before: str) -> bool:
        """Whether the files hold what they did when ``before`` was their fingerprint, of whichever version of all files that was."""

    def began_as(self, name: str, ends: Sequence[int], before: str) -> bool:
        """Whether a file's fingerprint would be ``before`` if it ended behind so many bytes, which ascend; False where nobody can tell."""
        return False

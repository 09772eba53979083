"""What all plugins have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:  # to list plugins takes none of them
    import pyarrow as pa
    import torch


CONTRACT = 2
"""Version of this module's promises. A plugin written for another one, or for none, is refused when it is selected."""


@dataclass(frozen=True)
class Filtered:
    """Why a row is not wanted, though nothing is wrong with it: ``reject(i, Filtered("black picture", {"brightness": 0.0}))``.

    The row is filtered: it is no error and counts towards no limit of errors, and it is not in the dataset. In a job with ``accept``
    the row's next sample is drawn.
    """

    reason: str
    """In a few words, for people: they read it in ``filtered/``."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Numbers by which it was found, by name. One that is not finite is stored as null."""


Reason: TypeAlias = str | Filtered
"""Why a row goes no further: words, of one that can't be used, or Filtered, of one that is not wanted."""

Reject: TypeAlias = Callable[[int, Reason], None]
"""``reject(i, reason)``: row ``i`` of the batch goes no further. With words it has failed, and ends in the error table; with Filtered it
is filtered."""


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


OTHER_FORMATS = frozenset(
    {
        ".bin",
        ".ckpt",
        ".pt",
        ".pth",
        ".h5",
        ".msgpack",
        ".ot",
        ".pb",
        ".onnx",
        ".onnx_data",
        ".tflite",
        ".mlmodel",
        ".xml",
    }
)
"""How files of weights end that a folder with .safetensors has once more, for others."""
NO_MODEL = frozenset({".md", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".pdf"})
"""How files end that tell people of a model."""


def one_format(names: Sequence[str]) -> list[str]:
    """Which files of a model's folder are wanted, as a rule: no weights in other formats where .safetensors lie beside, no pictures."""
    paths = [PurePosixPath(name) for name in names]
    converted = {path.parent for path in paths if path.suffix == ".safetensors"}
    return [
        str(path)
        for path in paths
        if path.suffix.lower() not in NO_MODEL
        and not path.name.startswith(".")
        and not (path.suffix in OTHER_FORMATS and path.parent in converted)
    ]


@dataclass(frozen=True)
class WeightsPath:
    """Marks a setting that says where weights lie: ``def __init__(self, path: Annotated[str, WeightsPath()] = "")``.

    In a job it may be a URL then: ``hf://OWNER/NAME@REVISION``, or a folder or file in it, or of an object store, ``s3://BUCKET/FOLDER``.
    The plugin is always given a path of its own machine: it is fetched once a node, before the plugin is built there. Of a setting that is
    a list or a mapping each ``path`` in it is meant. Put it into ``fingerprinted``: then a model may be moved and the dataset goes on.
    """

    files: Callable[[Sequence[str]], Iterable[str]] = one_format
    """Which files of a folder are wanted, of all that it has, by name, with slashes. It may be asked again of its own answer and more."""
    loads_late: bool = False
    """Whether nothing but ``load`` opens a folder's .safetensors. Then the driver, which loads nothing, need not fetch them: there they are
    links that lead nowhere, which can be listed, and whose digests ``latentmill.weights`` knows."""
    revision: str = "revision"
    """The setting that says the revision where a URL of the Hub doesn't; in a mapping it stands beside ``path``."""


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

    def setup_node(self) -> None:
        """Do what is to be done once a node, as compiling into a cache that its workers share: called in one of them, before ``load`` in any.

        Once in each run, and again if that worker ended before it was through. Workers that come later find it done.
        """

    def load(self, device: torch.device) -> None:
        """Make ready for use on ``device``. Called once in each worker, never in the driver.

        A VAE, a text encoder or a denoiser then serves all jobs of a sweep for which it is the same.
        """

"""What a format is, and the row that its functions are given."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from latentmill.errors import ExportError
from latentmill.exports.spaces import VAEFamily
from latentmill.exports.texts import TextFamily

if TYPE_CHECKING:  # to list formats takes none of them
    import numpy.typing as npt
    from torch import Tensor


Finish = Callable[[Iterable[Any], str], Iterable[tuple[str, Iterable[str]]]]


@dataclass(frozen=True)
class ExportRow:
    """A row of the dataset, for one that writes its files."""

    number: int
    """In the plan, from 0 on; rows that are not stored leave gaps."""
    row_id: str
    name: str
    """The picture's path below its folder, with slashes and without suffix: ``cats/tom``. ``row_id`` where nothing says it."""
    picture: str
    """The same as the dataset says it, with its suffix."""
    columns: Mapping[str, Any]
    """The plain ones, as Python values."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Those that the format needs or takes, as far as the dataset has them."""
    family: VAEFamily | None = None
    resolution: int = 0
    """Of a dataset with several of each picture: the side of a square of the row's area; else 0."""
    text: TextFamily | None = None
    """Whose encodings of the prompt the dataset has, of those that are known."""
    of_size: Container[str] = ()
    """Which columns say what a job's ``size`` did, SIZE_COLUMNS; others of these names are the source's own."""

    @property
    def prompt(self) -> str:
        return self.columns.get("prompt") or ""

    @property
    def bucket(self) -> tuple[int, int]:
        """Width and height of the pixels that were encoded."""
        return self.columns["width"], self.columns["height"]

    @property
    def original_size(self) -> tuple[int, int]:
        """Width and height of the picture's file; where the dataset doesn't say it, of what was encoded."""
        width, height = self._said("original_size") or self.bucket
        return width, height

    @property
    def crop_offset(self) -> tuple[int, int]:
        """Left and top of the bucket in the picture that was scaled to cover it: as the dataset says it, or in the middle."""
        (width, height), original = self.bucket, self.original_size
        left, top, right, bottom = self._said("crop_ltrb") or (0, 0, 0, 0)
        across, down = self._said("bucket") or (width, height)  # as it was read: it may have been made larger since
        if math.isclose(right - left, across, abs_tol=1e-6) and math.isclose(bottom - top, down, abs_tol=1e-6):
            return int(left * width / across), int(top * height / down)
        # Else it is kohya's, which isn't what was cut out.
        scale = max(width / original[0], height / original[1])
        return max(0, int(original[0] * scale) - width) // 2, max(0, int(original[1] * scale) - height) // 2

    def _said(self, name: str) -> Sequence[Any] | None:
        """The numbers of a column that a job with ``size`` writes; None of one that a source has under this name."""
        return self.columns.get(name) if name in self.of_size else None

    def scaled(self, column: str = "latents") -> npt.NDArray[Any]:
        """A column's tensor as a denoiser sees it, float32 ``[C, h, w]``: ``(z - shift) * scale``, as it is stored."""
        return self.tensors[column].float().numpy()

    def half(self) -> Tensor:
        """The latents, scaled, in float16. Raises ExportError if that doesn't hold one of them."""
        found = self.tensors["latents"].half()
        if not bool(found.isfinite().all()):
            most = float(self.tensors["latents"].abs().max())
            raise ExportError(
                f"row {self.row_id}: a latent of {most:g} is more than float16 holds, as which the format stores them"
            )
        return found

    def raw(self, column: str = "latents") -> npt.NDArray[Any]:
        """The same as the VAE gave it, neither shifted nor scaled, float32."""
        assert self.family is not None, "a format that wants raw latents names its families"
        return self.family.raw(self.scaled(column), spread="_std" in column)

    @property
    def embeds(self) -> Tensor:
        """The prompt's encoding ``[tokens, width]`` as it is stored, without padding where the dataset knows it."""
        embeds, length = self.tensors["prompt:embeds"], self.tensors.get("prompt:length")
        return embeds if length is None else embeds[: int(length)]


class ShardWriter(Protocol):
    """Writes one of our shards as files that hold many rows. The same rows give the same bytes."""

    notes: list[Any]
    """What ``ExportFormat.finish`` is to know of the shard, JSON; complete once it is closed."""

    def add(self, row: ExportRow) -> None:
        """Take a row, in order."""
        ...

    def close(self) -> Mapping[str, Path]:
        """End the files, and say where they are, by the names that they are to have in the export. Of no rows there may be none."""
        ...


@dataclass(frozen=True)
class ExportFormat:
    """An entry of the table."""

    name: str
    reader: str
    """Who reads it, and at which commit its loader was read."""
    layout: str
    """The names of its files, and what is in them: for people."""
    checked: str
    """With what our tests read it back."""
    families: tuple[str, ...] = ()
    """Of VAEs whose latents it takes, names in VAE_FAMILIES; none: it holds no latents, or any."""
    needs: tuple[str, ...] = ("latents",)
    """Columns that the dataset must have."""
    takes: tuple[str, ...] = ()
    """Tensors that it stores, too, where the dataset has them."""
    texts: tuple[TextFamily, ...] = ()
    """Whose encodings of prompts it takes; it needs some, if they are among ``needs``."""
    beside: str = ""
    """The format of the same trainer in whose folder its files belong."""
    names: Literal["needed", "used", ""] = ""
    """Whether its files are called as the pictures are: the trainer finds them by it, or people do."""
    apart: bool = False
    """Whether several resolutions of a picture would be one file. Each has a folder then, called by the side of its square."""
    of_prompts: bool = False
    """Whether its files are of prompts: the first row of each writes it, whoever has written others. What rows have of one may differ in its
    last bits."""
    sized: bool = False
    """Whether its trainer finds them by the picture's own size, too."""
    crops: bool = False
    """Whether its trainer is told where a picture was cut."""
    one_size: bool = False
    """Whether its trainer takes latents of one size alone."""
    files: Callable[[ExportRow], Mapping[str, bytes]] | None = None
    """A row's files by name. The same row gives the same bytes."""
    path: Callable[[ExportRow], str] | None = None
    """The name of the first of them, from the plain columns alone: no two rows may have one."""
    note: Callable[[ExportRow], Any] | None = None
    """What ``finish`` is to know of a row, JSON."""
    shard: Callable[[int, Path], ShardWriter] | None = None
    """Instead of ``files``: begins the files of our shard of that number, in an empty local folder."""
    finish: Finish | None = None
    """Files for the whole export, name and text in pieces, from the notes of all rows, or shards, in order, and the path or URL of its folder.
    The notes may be gone through again."""

    @property
    def folder(self) -> str:
        """The name of the folder that its files have among those of other trainers."""
        return self.beside or self.name

    def below(self, row: ExportRow) -> str:
        """The folder that a row's files are in, with a slash behind, or "": what ``path`` and ``files`` don't say."""
        return f"{row.resolution}/" if self.apart and row.resolution else ""

    def whole_path(self, row: ExportRow) -> str:
        """Where the file of a row goes, of a format whose files are called by ``path``."""
        assert self.path is not None
        return self.below(row) + self.path(row)

    @property
    def of(self) -> str:
        """Whose latents it takes, for people; or whose encodings of prompts, if it holds those alone."""
        texts = f"(text of {', '.join(text.name for text in self.texts)})" if self.texts else ""
        return ", ".join(self.families) or texts or "any"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that it reads."""
        return tuple(name for name in (*self.needs, *self.takes) if name in TENSORS)


TEXTS = ("prompt:embeds", "prompt:pooled", "prompt:length", "prompt:mask")
"""Columns of what a text encoder made of the prompt."""
TENSORS = ("image", "latents", "latents_std", "latents_flipped", "latents_std_flipped", *TEXTS)
"""Columns of a dataset that an export may read as tensors. Others that are none travel as they are."""


def npy(array: npt.NDArray[Any]) -> bytes:
    """A ``.npy`` file."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def safetensors_file(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file. Its own writer puts ``about`` in another order each time."""
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(about) if about else None)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def pt(content: Any) -> bytes:
    """What ``torch.load(weights_only=True)`` reads: a tensor, or a dict of tensors, numbers, text and lists of them."""
    import torch

    def alone(value: Any) -> Any:  # of a view all that it is a view of would be stored
        return value.clone() if isinstance(value, torch.Tensor) else value

    buffer = io.BytesIO()
    torch.save({k: alone(v) for k, v in content.items()} if isinstance(content, dict) else alone(content), buffer)
    return buffer.getvalue()


def jsonable(value: Any) -> Any:
    """A column's value as JSON has it: null for numbers that JSON lacks, text for dates and the like, base64 for bytes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(name): jsonable(inside) for name, inside in value.items()}
    if isinstance(value, (list, tuple)):  # of a map pairs
        return [jsonable(inside) for inside in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def json_list(items: Iterator[str], before: str, after: str) -> Iterator[str]:
    """A JSON list, an item a line, piece by piece: it may be longer than what memory holds."""
    yield before
    for at, item in enumerate(items):
        yield (",\n" if at else "\n") + item
    yield f"\n{after}"

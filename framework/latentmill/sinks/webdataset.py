"""Shards as tar files that the library ``webdataset`` streams, and Hugging Face ``datasets``: a file a row and kind of content.

The first member, ``__latentmill__``, is an Arrow stream: the shard's metadata, all columns that are no tensors with their
types, and where in the tar a row's files are, with their hashes. ``webdataset`` passes over names that begin and end with two
underscores, ``datasets`` over those without a dot; to both a shard whose rows all failed is a tar without samples.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa

from latentmill import failpoints
from latentmill.batch import CONDITIONING, ENCODER_KEY, LATENTS, SPACED, SPEC_KEY, STATE_PREFIX, plain_rows
from latentmill.fields import meaning
from latentmill.plugin import OpenSideFile, RowError, Sink, TensorSpec, tensors
from latentmill.sinks.picture_files import PictureFiles, decode
from latentmill.sinks.rebuild import batches

if TYPE_CHECKING:  # who reads no tensors takes no torch
    from torch import Tensor

INDEX_MEMBER = "__latentmill__"
FILES = "webdataset:files"
"""The column of packed rows that holds their files, and of the index that says where they are."""
PACKED = pa.large_list(
    pa.struct(
        [("column", pa.string()), ("suffix", pa.string()), ("dtype", pa.string()), ("content", pa.large_binary())]
    )
)
PLACES = pa.list_(
    pa.struct(
        [
            ("column", pa.string()),  # the tensor that the file holds; "" for text
            ("suffix", pa.string()),
            ("dtype", pa.string()),
            ("at", pa.int64()),  # of its header, counted from the end of the index
            ("bytes", pa.int64()),
            ("digest", pa.binary(16)),
        ]
    )
)
COUNT_KEY, TENSORS_KEY = b"webdataset.rows", b"webdataset.tensors"
"""Metadata keys of the index: how many rows, and the dtypes of tensors by column."""
NPY_HEADER = 128
"""Bytes of a ``.npy`` before its numbers."""
BLOCK, RECORD = 512, 20 * 512
"""Bytes: members begin at multiples of the one, and a tar ends at one of the other."""


class WebDataset(Sink):
    """A tar a shard. Of the row ``000000007-000`` it holds ``000000007-000.png`` (or ``.webp``, ``.jpg``), ``.txt`` and ``.json``.

    ``.txt`` is the prompt, ``.json`` all other columns (numbers that JSON lacks are null there), ``.latents.npy``,
    ``.latents_std.npy``, ``.latents_flipped.npy`` and ``.latents_std_flipped.npy`` latents, ``.video.npy`` a clip, uint8 [T, H, W, 3], ``.state.NAME.npy`` what a scheduler remembers, ``.prompt.NAME.npy`` and ``.negative.NAME.npy`` conditioning, of each row its own. bfloat16 is stored as float32, and the index
    remembers. Other tensors are left out. The same rows give the same bytes.
    """

    contract = 2
    suffix = ".tar"

    def __init__(
        self, image_format: str = "png", quality: int = 90, picture_text: Mapping[str, Any] | None = None
    ) -> None:
        """``quality``, 1 to 100, is that of webp and jpeg; png is without loss, and can carry ``picture_text``: see ``PictureFiles``."""
        self.pictures = PictureFiles(image_format, quality, picture_text)

    def pack(self, batch: pa.Table) -> pa.Table:
        plain = [field.name for field in batch.schema if not tensors.is_tensor(field)]
        table = batch.select(plain).replace_schema_metadata()
        files = [self._texts(row) for row in plain_rows(table)]
        for field in batch.schema:
            if not tensors.is_tensor(field):
                continue
            if field.name == "latents" and SPEC_KEY in (field.metadata or {}):
                about = {**(table.schema.metadata or {}), SPEC_KEY: field.metadata[SPEC_KEY]}
                table = table.replace_schema_metadata(about)
            if ENCODER_KEY in (field.metadata or {}):
                about = {**(table.schema.metadata or {}), ENCODER_KEY: field.metadata[ENCODER_KEY]}
                table = table.replace_schema_metadata(about)
            if field.name == "image":
                suffix = self.pictures.extension.removeprefix(".")
                contents = self.pictures.encode(tensors.pictures_of(batch, "image"), batch)
                found = [{"column": "image", "suffix": suffix, "dtype": "uint8", "content": c} for c in contents]
            elif field.name in (*LATENTS, "video") or field.name.startswith((STATE_PREFIX, *CONDITIONING)):
                found = _arrays(field.name, tensors.from_arrow(batch, field.name))
            else:
                continue
            for of_row, file in zip(files, found):
                of_row.append(file)
        return table.append_column(FILES, pa.array(files, PACKED))

    def _texts(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        about = {name: value for name, value in row.items() if name not in ("row", "prompt")}
        text = json.dumps(_finite(about), ensure_ascii=False, default=_as_text)
        return [
            {"column": "", "suffix": "txt", "dtype": "", "content": row["prompt"].encode("utf-8", "backslashreplace")},
            {"column": "", "suffix": "json", "dtype": "", "content": text.encode("utf-8", "backslashreplace")},
        ]

    def write(self, path: str, shard: pa.Table, metadata: Mapping[str, str]) -> None:
        names, files = shard.column("row_id").to_pylist(), shard.column(FILES)
        places: list[list[dict[str, Any]]] = []
        dtypes: dict[str, str] = {}
        at = 0
        for name, of_row in zip(names, files):
            places.append([])
            for file in of_row.as_py():
                content = file.pop("content")
                dtypes |= {file["column"]: file["dtype"]} if file["column"] else {}
                places[-1].append({**file, "at": at, "bytes": len(content), "digest": _digest(content)})
                at += len(_header(f"{name}.{file['suffix']}", len(content))) + len(content) + _padding(len(content))
        about: dict[Any, Any] = {**(shard.schema.metadata or {}), **metadata}
        about |= {COUNT_KEY: str(len(shard)), TENSORS_KEY: json.dumps(dtypes, sort_keys=True)}
        index = shard.drop_columns([FILES]).append_column(FILES, pa.array(places, PLACES))
        index = index.take(
            pa.array(range(len(index)), pa.int64())
        ).combine_chunks()  # its bytes don't hang on the batches
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, index.schema.with_metadata(about)) as stream:
            stream.write_table(index.replace_schema_metadata(about))
        with open(path, "wb") as out:
            _add(out, INDEX_MEMBER, buffer.getvalue() + _digest(buffer.getvalue()))
            for name, of_row in zip(names, files):
                for file in of_row.as_py():
                    _add(out, f"{name}.{file['suffix']}", file["content"])
                failpoints.reach("writing")
            end = out.tell() + 2 * BLOCK
            out.write(bytes(2 * BLOCK + -end % RECORD))

    def row_ids(self, file: BinaryIO) -> list[str]:
        index = _index(file)
        names: list[str] = index.column("row_id").to_pylist()
        for name, of_row in zip(names, index.column(FILES).to_pylist()):
            for place in of_row:
                header = _header(f"{name}.{place['suffix']}", place["bytes"])
                if file.read(len(header)) != header or _digest(content := file.read(place["bytes"])) != place["digest"]:
                    raise ValueError(f"{name}.{place['suffix']} is not as it was written")
                if file.read(_padding(len(content))).strip(b"\0"):
                    raise ValueError(f"there is something behind {name}.{place['suffix']}")
        end = file.tell()
        rest = file.read()
        if rest.strip(b"\0") or len(rest) != 2 * BLOCK + -(end + 2 * BLOCK) % RECORD:
            raise ValueError("its end is not as it was written")
        return names

    def metadata(self, file: BinaryIO) -> dict[str, str]:
        found = _schema(file).metadata or {}
        return {k.decode(): v.decode() for k, v in found.items() if k not in (COUNT_KEY, TENSORS_KEY)}

    def count(self, file: BinaryIO) -> int:
        return int(_schema(file).metadata[COUNT_KEY])

    def schema(self, file: BinaryIO) -> pa.Schema:
        stored = _schema(file)
        fields = [field for field in stored if field.name != FILES]
        dtypes: dict[str, str] = json.loads(stored.metadata[TENSORS_KEY])
        for column in dict.fromkeys(STATE_PREFIX if c.startswith(STATE_PREFIX) else c for c in dtypes):
            dtype = dtypes.get(column, "float64")
            about = {tensors.DTYPE_KEY: dtype.encode()}
            if column in SPACED and SPEC_KEY in stored.metadata:
                about[SPEC_KEY] = stored.metadata[SPEC_KEY]
            if column.startswith(CONDITIONING) and ENCODER_KEY in stored.metadata:
                about[ENCODER_KEY] = stored.metadata[ENCODER_KEY]
            number = pa.float32() if dtype == "bfloat16" else pa.from_numpy_dtype(dtype)
            fields.append(pa.field(column, pa.list_(number), nullable=False, metadata=about))
        return pa.schema(fields)

    def layout(self, schema: pa.Schema) -> dict[str, str]:
        found = {"txt": "what was asked for", "json": "all other columns"}
        for name in schema.names:
            if name == "image":
                found[self.pictures.extension.removeprefix(".")] = "the picture"
            elif name == "latents":
                found["latents.npy"] = "the latents, channels first"
            elif name == "video":
                found["video.npy"] = "the clip, uint8 [frames, height, width, 3]"
            elif name in LATENTS:
                found[f"{name}.npy"] = meaning(name)
            elif name.startswith(CONDITIONING):
                found[f"{suffix_of(name)}"] = meaning(name)
            elif name == STATE_PREFIX:
                found["state.NAME.npy"] = "half-way latents: what the scheduler remembers"
            elif name != "prompt":
                found[f"json: {name}"] = ""
        return found

    def stored_bytes(self, tensor: TensorSpec, rows: int, distinct: int) -> int:
        file = NPY_HEADER + tensor.bytes * (2 if tensor.dtype == "bfloat16" else 1)
        return rows * (BLOCK + file + _padding(file))

    def read(
        self, file: BinaryIO, columns: Sequence[str] | None, rows: Sequence[int], side_file: OpenSideFile
    ) -> Iterator[pa.Table | RowError]:
        index = _index(file)
        start = file.tell()
        spec = index.schema.metadata.get(SPEC_KEY)
        index = index.take(pa.array(rows, pa.int64())).replace_schema_metadata()
        wanted = [n for n in index.column_names if n != FILES and (columns is None or n in columns)]

        def tensors_of(name: str, of_row: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | RowError:
            found = {}
            for place in of_row:
                column = place["column"]
                kind = STATE_PREFIX if column.startswith(STATE_PREFIX) else column
                if not column or (columns is not None and kind not in columns):
                    continue
                member = f"{name}.{place['suffix']}"
                file.seek(start + place["at"] + len(_header(member, place["bytes"])))
                content = file.read(place["bytes"])
                if _digest(content) != place["digest"]:
                    return RowError(f"{member} is damaged")
                try:
                    found[column] = decode(content) if column == "image" else _tensor(content, place["dtype"])
                except RowError as error:
                    return error
            return found

        places = zip(index.column("row_id").to_pylist(), index.column(FILES).to_pylist())
        yield from batches(index.select(wanted), (tensors_of(*place) for place in places), spec)


def _arrays(column: str, values: Tensor) -> list[dict[str, Any]]:
    """Each of ``values[B, ...]`` as a ``.npy`` file; bfloat16 as float32."""
    dtype = str(values.dtype).removeprefix("torch.")
    suffix, found = suffix_of(column), []
    for value in (values.float() if dtype == "bfloat16" else values).numpy():
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        found.append({"column": column, "suffix": suffix, "dtype": dtype, "content": buffer.getvalue()})
    return found


def suffix_of(column: str) -> str:
    """Of the file that a row's tensor of a column is in: ``latents.npy``, ``state.NAME.npy``, ``prompt.NAME.npy``."""
    prefix, colon, name = column.rpartition(":")
    name = re.sub(r"[^a-z0-9_]", lambda c: f"%{ord(c[0]):x}", name)
    return f"{prefix}.{name}.npy" if colon else f"{name}.npy"


def _tensor(content: bytes, dtype: str) -> Tensor:
    import torch

    value = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    return value.bfloat16() if dtype == "bfloat16" else value


def _index(file: BinaryIO) -> pa.Table:
    """The index, whole; the file stands behind it. Raises ValueError if it is not as it was written."""
    size = _index_size(file)
    content = file.read(size)
    if _digest(content[:-16]) != content[-16:]:
        raise ValueError(f"{INDEX_MEMBER} is not as it was written")
    if file.read(_padding(size)).strip(b"\0"):
        raise ValueError(f"there is something behind {INDEX_MEMBER}")
    return pa.ipc.open_stream(content[:-16]).read_all()


def _schema(file: BinaryIO) -> pa.Schema:
    _index_size(file)
    return pa.ipc.read_schema(pa.PythonFile(_Unclosed(file), mode="r"))


def _index_size(file: BinaryIO) -> int:
    """Reads the header of the index. Raises ValueError if it is none."""
    try:
        info = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"no tar: {error}") from error
    if info.name != INDEX_MEMBER or _header(INDEX_MEMBER, info.size) != info.tobuf(tarfile.PAX_FORMAT):
        raise ValueError(f"a tar that does not begin with {INDEX_MEMBER}")
    return info.size


class _Unclosed:
    """A file that Arrow may read, and does not close."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read

    def close(self) -> None:
        pass


def _add(out: BinaryIO, name: str, content: bytes) -> None:
    out.write(_header(name, len(content)))
    out.write(content)
    out.write(bytes(_padding(len(content))))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # of 1970, by nobody, readable for all
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % BLOCK


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inside) for name, inside in value.items()}
    return [_finite(inside) for inside in value] if isinstance(value, (list, tuple)) else value


def _as_text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)

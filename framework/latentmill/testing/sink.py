"""What every sink must hold."""

from __future__ import annotations

import datetime
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa

from latentmill.plugin import RowError, Sink, StoredShard, tensors
from latentmill.testing import batches
from latentmill.testing.behaviour import GENERATORS, seed_all
from latentmill.testing.suite import PluginSuite, identity

SHARD_METADATA = {"latentmill.errors": '[{"row": 3, "reason": "ein Bär\\n"}]', "plan": "0123"}


class SinkSuite(PluginSuite):
    """What every sink must hold: a shard is written, and read back by another instance, as the framework does."""

    kind = "sink"
    sink: ClassVar[type[Sink]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    lossless: ClassVar[bool] = True
    """Whether pictures and clips come back as they were."""

    def batches(self) -> Mapping[str, pa.Table]:
        """What it is tried on: rows with pictures, rows with clips, and rows with latents."""
        return {
            "pictures": batches.with_pictures(),
            "clips": batches.with_clips(),
            "latents": batches.with_stored_latents(),
        }

    def test_packing_keeps_rows_and_their_columns(self) -> None:
        """In order; nothing but tensors becomes something else."""
        for batch in self.batches().values():
            packed = self.sink().pack(batch)
            for name in [field.name for field in batch.schema if not tensors.is_tensor(field)]:
                assert name in packed.column_names and packed.column(name).equals(batch.column(name)), (
                    f"pack changes the column {name!r}: all columns but tensors stay, with their rows in order"
                )

    def test_rows_come_back_in_order(self) -> None:
        """Read by another instance than wrote them; a shard may have no rows."""
        for what, batch in self.batches().items():
            for rows in (batch, batch.slice(0, 0)):
                file = self._written(rows)
                ids, wanted = list(self.sink().row_ids(file)), rows.column("row_id").to_pylist()
                assert sorted(ids) == sorted(wanted), (
                    f"row_ids gives {len(ids)} rows of a shard of {len(wanted)} with {what}: each row is stored once"
                )
                assert ids == wanted, (
                    "row_ids gives the rows in another order than they were written in: a shard is not sorted anew"
                )
                assert not file.closed, "row_ids closes the file that it is given: who opened it closes it"
                assert self.sink().count(self._again(file)) == len(rows), (
                    "count gives another number than there are rows"
                )

    def test_it_reads_and_remembers_nothing(self) -> None:
        """A sink that has written another shard since reads what is in the file that it is given."""
        assert not self._blind(), (
            "row_ids or metadata tells of the shard that was written last, not of the file: it must read what it is given, since "
            "another process may have written it"
        )

    def test_metadata_comes_back(self) -> None:
        """What a shard's error rows are kept in."""
        for batch in self.batches().values():
            file = self._written(batch)
            found = self.sink().metadata(file)
            lost = [name for name, value in SHARD_METADATA.items() if found.get(name) != value]
            assert not lost or self._blind(), f"metadata loses or changes what write was given: {', '.join(lost)}"
            assert not file.closed, "metadata closes the file that it is given: who opened it closes it"

    def test_rows_are_read_as_they_travelled(self) -> None:
        """Tensors with their shapes, dtypes and metadata; some rows and columns, too."""
        for batch in self.batches().values():
            tensor = next((field for field in batch.schema if tensors.is_tensor(field)), None)
            schema = self.sink().schema(self._written(batch))
            for name in (None, ["row_id", *([tensor.name] if tensor else [])]):
                for rows in (range(len(batch)), [1, 3]):
                    found = self._read(batch, name, rows)
                    wanted = batch.take(list(rows))
                    assert [i for table in found for i in table.column("row_id").to_pylist()] == wanted.column(
                        "row_id"
                    ).to_pylist(), "read gives other rows than it was asked for: their numbers in the file, in order"
                    if tensor is None:
                        continue
                    for table in found:
                        assert tensor.name in table.column_names, f"read loses the {tensor.name}"
                        assert tensors.is_tensor(table.schema.field(tensor.name)), (
                            f"read gives {tensor.name} as no tensor: use tensors.with_tensor"
                        )
                        about = dict(tensor.metadata or {})
                        kept = table.schema.field(tensor.name).metadata or {}
                        assert about.items() <= dict(kept).items(), (
                            f"read loses the metadata of {tensor.name}: its dtype, and the space of latents"
                        )
                    shown = tensor.name in ("image", "video")
                    if shown and not self.lossless:
                        continue
                    at = 0
                    for table in found:
                        one = tensors.from_arrow(table, tensor.name)
                        two = tensors.from_arrow(wanted, tensor.name)[at : at + len(table)]
                        at += len(table)
                        assert one.shape == two.shape and one.dtype == two.dtype and bool((one == two).all()), (
                            f"read gives other {'pixels' if shown else tensor.name} than were packed"
                        )
            missing = [n for n in ("row_id", "prompt", *([tensor.name] if tensor else [])) if n not in schema.names]
            assert not missing, f"schema lacks the columns {', '.join(missing)}, which read gives"

    def test_a_damaged_file_is_noticed(self) -> None:
        """One that is cut off, or in which a byte is another."""
        if self._blind():
            return
        for batch in self.batches().values():
            content = self._written(batch).getvalue()
            cuts = (len(content) - 1, len(content) * 3 // 4, len(content) // 2, 10, 0)
            for length in cuts:
                assert self._raises(content[:length]), (
                    f"row_ids does not notice a cut file: {'one byte' if length == len(content) - 1 else 'a part'} is missing at its end; "
                    "read it whole, and hold it against a length or a checksum"
                )
            for part in range(1, 8):
                at = len(content) * part // 8
                damaged = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
                assert self._raises(damaged) or self._ignores(damaged, batch), (
                    "row_ids does not notice a changed byte: hold the file against a checksum"
                )

    def test_the_same_rows_give_the_same_bytes(self) -> None:
        """At another time, by another instance, however the rows came in batches."""
        for batch in self.batches().values():
            first = self._bytes(batch)
            assert self._bytes(batch) == first, (
                "write gives other bytes for the same rows: no clock, no random number or address may be in a file"
            )
            with tomorrow(self._class()):
                later = self._bytes(batch)
            assert later == first, (
                "write stores the clock: the same rows must give the same bytes whenever they are written"
            )
            assert self._bytes(batch, parts=1) == first, (
                "write gives other bytes when rows come in other batches: how they came must not show"
            )

    def test_no_global_random_generator_is_used(self) -> None:
        """Of torch, numpy and random, seeded two ways."""
        batch = next(iter(self.batches().values()))
        wanted = self._bytes(batch)
        for at, name in enumerate(GENERATORS):
            found = self._bytes(batch, seeds=[int(i == at) for i in range(3)])
            assert found == wanted or self._explained(), (
                f"the file hangs on the global random generator of {name}: the same rows must give the same bytes"
            )

    def test_finish_gives_the_same_for_the_same(self) -> None:
        """It is called in each driver that ends."""
        shards = [
            StoredShard(
                f"data/{at:05d}{self.sink.suffix if isinstance(self.sink, type) else self.sink().suffix}",
                3,
                SHARD_METADATA,
            )
            for at in range(2)
        ]
        first, second = dict(self.sink().finish(shards)), dict(self.sink().finish(shards))
        assert all(isinstance(content, bytes) for content in first.values()), "finish gives files that are no bytes"
        assert first == second, (
            "finish gives other files for the same shards: no clock, no random number may be in them"
        )

    def _written(self, batch: pa.Table) -> io.BytesIO:
        return io.BytesIO(write(self.sink(), batch)[""])

    def _again(self, file: io.BytesIO) -> io.BytesIO:
        return io.BytesIO(file.getvalue())

    def _bytes(self, batch: pa.Table, parts: int = 2, seeds: list[int] | None = None) -> dict[str, bytes]:
        seed_all(seeds or (0, 0, 0))
        return write(self.sink(), batch, parts)

    def _blind(self) -> bool:
        """Whether it tells of what it wrote instead of what it reads."""
        sink, batch = self.sink(), next(iter(self.batches().values()))
        first = write(sink, batch)[""]

        def told(reader: Sink) -> Any:
            return list(reader.row_ids(io.BytesIO(first))), dict(reader.metadata(io.BytesIO(first)))

        try:
            before = told(self.sink())
            write(sink, batch.slice(0, 2), metadata={**SHARD_METADATA, "plan": "another"})
            return bool(before != told(sink) or before != told(self.sink()))
        except (AttributeError, TypeError):
            return True  # one that never wrote a shard knows of none

    def _read(self, batch: pa.Table, columns: list[str] | None, rows: Sequence[int]) -> list[pa.Table]:
        written = write(self.sink(), batch)

        def side_file(name: str) -> BinaryIO:
            return io.BytesIO(written[name])

        found = list(self.sink().read(io.BytesIO(written[""]), columns, rows, side_file))
        bad = next((item for item in found if isinstance(item, RowError)), None)
        assert bad is None, f"read can't read a row of a sound file\n{bad}"
        return found

    def _raises(self, content: bytes) -> bool:
        try:
            self.sink().row_ids(io.BytesIO(content))
        except Exception:
            return True
        return False

    def _ignores(self, content: bytes, batch: pa.Table) -> bool:
        """Whether the byte is one that means nothing: all is read as it was."""
        file = io.BytesIO(content)
        try:
            found = list(self.sink().read(file, None, range(len(batch)), lambda name: io.BytesIO()))
        except Exception:
            return False
        wanted = self._read(batch, None, range(len(batch)))
        return (
            len(found) == len(wanted)
            and all(isinstance(a, pa.Table) and a.equals(b, check_metadata=True) for a, b in zip(found, wanted))
            and SHARD_METADATA.items() <= dict(self.sink().metadata(io.BytesIO(content))).items()
        )

    def _explained(self) -> bool:
        batch = next(iter(self.batches().values()))
        return self._bytes(batch) != self._bytes(batch)

    def _question(self) -> Callable[[Any], Mapping[str, Any]]:
        return asked

    def _work(self) -> Callable[[Any], Mapping[str, Any]]:
        return partial(write_all, batches=dict(self.batches()))


def asked(sink: Sink) -> dict[str, Any]:
    """What the driver asks a sink."""
    return {**identity(sink), "suffix": sink.suffix}


def write_all(sink: Sink, batches: Mapping[str, pa.Table]) -> dict[str, Any]:
    """The files of shards of these batches."""
    seed_all((0, 0, 0))
    return {f"write.{name}": write(sink, batch) for name, batch in batches.items()}


def write(
    sink: Sink, batch: pa.Table, parts: int = 2, metadata: Mapping[str, str] = SHARD_METADATA
) -> dict[str, bytes]:
    """A shard of the batch, packed in parts, as the framework writes it: its file under "", and its side files."""
    size = max(1, -(-len(batch) // parts))
    packed = [sink.pack(batch.slice(start, size)) for start in range(0, max(1, len(batch)), size)]
    shard = pa.concat_tables(packed, promote_options="default").drop_columns(["row"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"shard{sink.suffix}"
        sink.write(str(path), shard, dict(metadata))
        beside = Path(folder) / "beside"
        beside.mkdir()
        sink.write_side_files(str(beside), shard)
        return {"": path.read_bytes(), **{file.name: file.read_bytes() for file in sorted(beside.iterdir())}}


@contextmanager
def tomorrow(plugin: type) -> Iterator[None]:
    """A day later, for ``time``, and for what the plugin's module calls so."""
    day = 86_400

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=1)

    real = {name: getattr(time, name) for name in ("time", "time_ns", "localtime", "gmtime", "strftime")}
    put: dict[str, Callable[..., Any]] = {
        "time": lambda: real["time"]() + day,
        "time_ns": lambda: real["time_ns"]() + day * 10**9,
        "localtime": lambda seconds=None: real["localtime"](real["time"]() + day if seconds is None else seconds),
        "gmtime": lambda seconds=None: real["gmtime"](real["time"]() + day if seconds is None else seconds),
        "strftime": lambda form, at=None: real["strftime"](
            form, real["localtime"](real["time"]() + day) if at is None else at
        ),
    }
    module = vars(sys.modules[plugin.__module__])
    named = {
        name: value
        for name, value in module.items()
        if any(value is one for one in (*real.values(), datetime.datetime))
    }
    for name, value in named.items():
        module[name] = Later if value is datetime.datetime else put[value.__name__]
    before, datetime.datetime = datetime.datetime, Later  # type: ignore[misc]
    for name, value in put.items():
        setattr(time, name, value)
    try:
        yield
    finally:
        datetime.datetime = before  # type: ignore[misc]
        for name, value in real.items():
            setattr(time, name, value)
        module.update(named)

"""Sinks, each with one mistake."""

import hashlib
import io
import random
import time
import uuid
from datetime import datetime

import pyarrow as pa
import torch
from tests.suites.mistakes import Mistake, suite_of

from latentmill.plugin import Sink, tensors
from latentmill.testing import SinkSuite
from latentmill_example.arrow_stream import ArrowStream


class Sorts(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard.sort_by("row_id"), metadata)


class SortsIds(ArrowStream):
    def row_ids(self, file):
        return sorted(super().row_ids(file))


class LosesARow(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard.take([*range(len(shard) - 1)]) if len(shard) else shard, metadata)


class Blind(ArrowStream):
    """Remembers what it wrote."""

    last = None

    def write(self, path, shard, metadata):
        super().write(path, shard, metadata)
        type(self).last = shard.column("row_id").to_pylist()

    def row_ids(self, file):
        return self.last


class BlindMetadata(ArrowStream):
    last = None

    def write(self, path, shard, metadata):
        super().write(path, shard, metadata)
        self.last = metadata

    def metadata(self, file):
        return self.last or super().metadata(file)


class LosesMetadata(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard, {name: value for name, value in metadata.items() if name == "plan"})


class AsciiMetadata(ArrowStream):
    def metadata(self, file):
        return {n: v.encode("ascii", "replace").decode() for n, v in super().metadata(file).items()}


class LosesTheSpace(ArrowStream):
    def read(self, file, columns, rows, side_file):
        for table in super().read(file, columns, rows, side_file):
            yield pa.Table.from_arrays(table.columns, schema=pa.schema([f.remove_metadata() for f in table.schema]))


class Day(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard, {**metadata, "written": time.strftime("%Y-%m-%d")})


class Clock(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard, {**metadata, "written": datetime.now().strftime("%Y-%m-%d")})


class Unique(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard, {**metadata, "file": uuid.uuid4().hex})


class Draws(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard, {**metadata, "file": str(random.random())})


class Chunks(ArrowStream):
    def write(self, path, shard, metadata):
        super().write(path, shard, {**metadata, "chunks": str(shard.column("row_id").num_chunks)})


class SwapsColours(ArrowStream):
    def pack(self, batch):
        if "image" in batch.column_names:
            batch = tensors.with_tensor(batch, "image", tensors.from_arrow(batch, "image").flip(3))
        return super().pack(batch)


class HalvesLatents(ArrowStream):
    def pack(self, batch):
        found = super().pack(batch)
        if "latents" in batch.column_names:
            at = batch.schema.get_field_index("latents")
            half = tensors.with_tensor(batch, "latents", tensors.from_arrow(batch, "latents").half().float())
            found = found.set_column(at, found.schema.field(at), super().pack(half).column("latents"))
        return found


class NoChecksum(ArrowStream):
    def row_ids(self, file):
        return pa.ipc.open_stream(file).read_all().column("row_id").to_pylist()


class LengthOnly(ArrowStream):
    """Notices what is cut off, and no changed byte."""

    def row_ids(self, file):
        whole = file.read()
        ids = pa.ipc.open_stream(whole).read_all().column("row_id").to_pylist()
        end = io.BytesIO(whole)
        pa.ipc.open_stream(end).read_all()
        if len(whole) - end.tell() != hashlib.sha256().digest_size:
            raise ValueError("the file is cut off")
        return ids


class Closes(ArrowStream):
    def row_ids(self, file):
        with file:
            return super().row_ids(file)


class LosesPrompts(ArrowStream):
    def pack(self, batch):
        return super().pack(batch).drop_columns(["negative_prompt"])


class AllRows(ArrowStream):
    def read(self, file, columns, rows, side_file):
        return super().read(file, columns, [*range(self.count(file))] if len(rows) == 2 else rows, side_file)

    def count(self, file):
        found = super().count(file)
        file.seek(0)
        return found


class WrongCount(ArrowStream):
    def count(self, file):
        return 5


class OrderOfASet(ArrowStream):
    def pack(self, batch):
        found = super().pack(batch)
        return found.select([*{*found.column_names}])


class Cuda(ArrowStream):
    def __init__(self):
        torch.cuda.is_available()


class FinishesWithTheClock(ArrowStream):
    def finish(self, shards):
        return {"index.txt": str(time.perf_counter_ns()).encode()}


class NoContract(Sink):
    suffix = ".arrow"
    pack, write, row_ids, metadata = ArrowStream.pack, ArrowStream.write, ArrowStream.row_ids, ArrowStream.metadata
    count, schema, read = ArrowStream.count, ArrowStream.schema, ArrowStream.read


def sink(what, plugin, caught_by, says):
    return Mistake(what, suite_of(SinkSuite, plugin), set(caught_by.split()), says)


PACK, ORDER, BLIND = (
    "packing_keeps_rows_and_their_columns", "rows_come_back_in_order", "it_reads_and_remembers_nothing",
)  # fmt: skip
METADATA, READ, DAMAGE = "metadata_comes_back", "rows_are_read_as_they_travelled", "a_damaged_file_is_noticed"
BYTES, RANDOM, FINISH = (
    "the_same_rows_give_the_same_bytes", "no_global_random_generator_is_used", "finish_gives_the_same_for_the_same",
)  # fmt: skip
PROCESS, GPU, PLUGIN = (
    "another_process_finds_the_same", "building_and_asking_touch_no_gpu", "it_is_a_plugin_of_this_contract",
)  # fmt: skip

MISTAKES = [
    sink("sorts the rows", Sorts, f"{ORDER} {READ}", "row_ids gives the rows in another order"),
    sink("sorts the ids that it reads", SortsIds, ORDER, "row_ids gives the rows in another order"),
    sink("loses the last row", LosesARow, f"{ORDER} {READ}", "each row is stored once"),
    sink("remembers the rows instead of reading", Blind, BLIND, "tells of the shard that was written last"),
    sink("remembers the metadata instead of reading", BlindMetadata, BLIND, "tells of the shard that was written last"),
    sink("loses metadata", LosesMetadata, METADATA, "metadata loses or changes what write was given"),
    sink("metadata in ASCII", AsciiMetadata, METADATA, "metadata loses or changes what write was given"),
    sink("loses the space of latents", LosesTheSpace, READ, "read loses the metadata"),
    sink("stores the day", Day, BYTES, "write stores the clock"),
    sink("stores the day, by a name of its own for the clock", Clock, BYTES, "write stores the clock"),
    sink("stores a random id", Unique, BYTES, "write gives other bytes for the same rows"),
    sink("a number of the module random", Draws, RANDOM, "the global random generator of random"),
    sink("bytes that hang on the batches", Chunks, BYTES, "write gives other bytes when rows come in other batches"),
    sink("swaps red and blue", SwapsColours, READ, "read gives other pixels than were packed"),
    sink("rounds latents", HalvesLatents, READ, "read gives other latents than were packed"),
    sink("does not notice a cut file", NoChecksum, DAMAGE, "row_ids does not notice a cut file"),
    sink("does not notice a changed byte", LengthOnly, DAMAGE, "row_ids does not notice a changed byte"),
    sink("closes the file", Closes, ORDER, "row_ids closes the file"),
    sink("loses a column", LosesPrompts, PACK, "pack changes the column 'negative_prompt'"),
    sink("reads all rows when some are asked for", AllRows, READ, "read gives other rows than it was asked for"),
    sink("a count that is none", WrongCount, ORDER, "count gives another number than there are rows"),
    sink("columns in the order of a set", OrderOfASet, PROCESS, "write gives other results in another process"),
    sink("asks for a GPU in `__init__`", Cuda, GPU, "Cuda.__init__ calls torch.cuda.is_available before load(device)"),
    sink("the clock in a file of the whole dataset", FinishesWithTheClock, FINISH, "finish gives other files for the same shards"),
    sink("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
]  # fmt: skip

RIGHT = [suite_of(SinkSuite, ArrowStream)]

"""Our own sources, sinks and grids by the suites that plugins inherit."""

import io
import json
import tarfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentmill import registry
from latentmill.plugin import tensors
from latentmill.schedulers import grids
from latentmill.sinks.parquet import Parquet
from latentmill.sinks.webdataset import WebDataset
from latentmill.sources.images import Images
from latentmill.sources.latents import Latents
from latentmill.sources.prompts import Prompts
from latentmill.testing import GridSuite, SinkSuite, SourceSuite
from latentmill.testing.batches import with_stored_latents

ROWS = [
    {"id": "a", "prompt": "a fox", "negative_prompt": None, "seed": 7, "steps": 3},
    {"id": "b", "prompt": 'two "houses", by the sea', "negative_prompt": "grey", "seed": None, "steps": None},
    {"id": "ü", "prompt": "лиса 狐 🦊", "negative_prompt": "", "seed": 2**64 - 1, "steps": 4},
    {"id": "d", "prompt": "a hen", "negative_prompt": None, "seed": 0, "steps": 100},
]


def as_csv(rows):
    def cell(value):
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    return "\n".join([",".join(rows[0]), *(",".join(map(cell, row.values())) for row in rows)])


def as_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"id": "string", "prompt": "string", "negative_prompt": "string",
                                                         "seed": "uint64", "steps": "int32"}.items())), path)  # fmt: skip


def as_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            member, content = tarfile.TarInfo(f"{number:05d}.json"), json.dumps(row).encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


WRITERS = {
    "txt": lambda path, rows: path.write_text("\n\n".join(row["prompt"] for row in rows), encoding="utf-8"),
    "csv": lambda path, rows: path.write_text(as_csv(rows), encoding="utf-8"),
    "jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8"),
    "json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "parquet": as_parquet,
    "tar": as_tar,
}


class TestPrompts(SourceSuite):
    """A file of every kind, and another in the same folder: two fragments."""

    name = "prompts"

    @pytest.fixture(autouse=True, params=WRITERS)
    def _of(self, request, tmp_path):
        type(self).file, type(self).kind_of_file = tmp_path / f"rows.{request.param}", request.param
        self._write(ROWS)
        ids = {} if request.param == "txt" else {"id_column": "id"}
        type(self).source = staticmethod(partial(Prompts, str(tmp_path), **ids))

    def _write(self, rows):
        WRITERS[self.kind_of_file](self.file, rows)
        others = [{**row, "id": f"2{row['id']}", "prompt": row["prompt"] + "!"} for row in rows]
        WRITERS[self.kind_of_file](self.file.with_stem("second"), others)

    def expected(self):
        first = [{"prompt": row["prompt"]} if self.kind_of_file == "txt" else row for row in ROWS]
        if self.kind_of_file == "csv":  # an empty cell is the job's value
            first = [{**row, "negative_prompt": row["negative_prompt"] or None} for row in first]
        return [*first, *({"prompt": row["prompt"] + "!"} for row in ROWS)]

    def changed(self):
        self._write([{**row, "prompt": row["prompt"] + "?"} for row in ROWS])
        return self.source()


class TestImages(SourceSuite):
    """Four pictures, one of them damaged; two have captions."""

    name = "images"

    @pytest.fixture(autouse=True, params=[None, "path"])
    def _of(self, request, tmp_path):
        for number in range(4):
            Image.new("RGB", (3 + number, 2), (60 * number, 30, 200)).save(tmp_path / f"{number}.png")
        (tmp_path / "1.txt").write_text("a fox", encoding="utf-8")
        (tmp_path / "3.txt").write_text("лиса 狐", encoding="utf-8")
        (tmp_path / "2.png").write_bytes(b"no picture")
        type(self).folder = tmp_path
        type(self).source = staticmethod(partial(Images, str(tmp_path), id_column=request.param))

    def expected(self):
        return [
            None if n == 2 else {"image": np.full((2, 3 + n, 3), (60 * n, 30, 200), np.uint8), "prompt": prompt}
            for n, prompt in enumerate([None, "a fox", None, "лиса 狐"])
        ]

    def changed(self):
        (self.folder / "1.txt").write_text("a hen", encoding="utf-8")
        return self.source()


class TestLatents(SourceSuite):
    """Two files as a job of ours writes them."""

    name = "latents"

    @pytest.fixture(autouse=True, params=[None, "row_id"])
    def _of(self, request, tmp_path):
        type(self).folder = tmp_path
        self._write(with_stored_latents())
        type(self).source = staticmethod(partial(Latents, str(tmp_path), id_column=request.param))

    def _write(self, rows):
        sink = Parquet()
        for name, part in (("00000", rows.slice(0, 3)), ("00001", rows.slice(3))):
            sink.write(str(self.folder / f"{name}.parquet"), sink.pack(part).drop_columns(["row"]), {})

    def expected(self):
        rows = with_stored_latents()
        latents = tensors.from_arrow(rows, "latents").numpy()
        return [
            {"prompt": row["prompt"], "seed": row["seed"], "latents": latents[at]}
            for at, row in enumerate(rows.select(["prompt", "seed"]).to_pylist())
        ]

    def changed(self):
        self._write(with_stored_latents().take([1, 0, 2, 3, 4]))
        return self.source()


class TestParquet(SinkSuite):
    sink = Parquet
    name = "parquet"


class TestParquetOfJPEG(SinkSuite):
    sink = partial(Parquet, "jpeg", 80)
    lossless = False


class TestWebDataset(SinkSuite):
    sink = WebDataset
    name = "webdataset"


class TestWebDatasetOfWebP(SinkSuite):
    sink = partial(WebDataset, "webp", 80)
    lossless = False


class TestGrids(GridSuite):
    """All of ours, by the names that jobs give them."""

    @pytest.fixture(
        autouse=True,
        params=sorted(e.name for e in registry.entries("grid") if e.distribution == "latentmill" and e.name != "times"),
    )
    def _of(self, request):
        type(self).name = request.param
        type(self).grid = registry.load("grid", f"latentmill:{request.param}")
        type(self).made_on = ("VP", "VE") if self.grid is grids.AlignYourSteps else GridSuite.made_on


class TestListOfTimes(GridSuite):
    grid = partial(grids.Own, [1.0, 0.5, 0.25])
    name = "times"
    steps = (3,)

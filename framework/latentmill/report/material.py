"""What contact sheet, card and report are made of, read back from a dataset where it lies."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

from PIL import Image

from latentmill.dataset import Dataset, data_name, errors_name
from latentmill.sinks.parquet import opened


@dataclass(frozen=True)
class Tile:
    """A picture to be shown."""

    image: Image.Image
    caption: str


@dataclass
class Material:
    """A dataset read back from where it lies."""

    there: Dataset
    most: int = 24
    """Pictures drawn from it at most."""
    errors: list[dict[str, Any]] = field(init=False, default_factory=list)
    """The first failed rows."""
    failed_in: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.store = self.there.store
        self.plan: Mapping[str, Any] = json.loads(self.there.plan.to_json())
        names = [data_name(shard, self.there.sink) for shard in sorted(self.there.done())]
        self.files = [name.removeprefix("data/") for name in names if name.endswith(".parquet")]
        self.columns: list[str] = []
        if self.files:
            with self.store.open(f"data/{self.files[0]}") as file:
                self.columns = opened(file).schema_arrow.names
        self.ok, self.failed = self.there.counts()
        self.warnings = self.there.warnings()
        for shard in self.there.failed_shards():
            for line in self.store.read(errors_name(shard)).splitlines():
                error = json.loads(line)
                self.failed_in[error["stage"]] += 1
                if len(self.errors) < 200:
                    self.errors.append(error)

    @property
    def name(self) -> str:
        """The job's."""
        return str(self.plan["name"])

    @cached_property
    def tiles(self) -> list[Tile]:
        """Pictures from all over the dataset; first of all one of each prompt."""
        if "image" not in self.columns:
            return []
        files = [self.files[at] for at in _evenly(len(self.files), self.most)]
        places: dict[str, list[tuple[str, int]]] = {}
        for name in files:
            with self.store.open(f"data/{name}") as file:
                prompts = opened(file).read(["prompt"], use_threads=False).column("prompt").to_pylist()
            for at, prompt in enumerate(prompts):
                places.setdefault(prompt, []).append((name, at))
        chosen = sorted(place for group in _choose(list(places.values()), self.most) for place in group)
        found = []
        for name in files:
            with self.store.open(f"data/{name}") as file:
                found += [_tile(row) for row in _read(file, [at for other, at in chosen if other == name])]
        return found


def _evenly(count: int, most: int) -> list[int]:
    """``most`` indices, or all, evenly drawn from ``range(count)``."""
    most = min(count, most)
    return [at * count // most for at in range(most)]


def _choose(groups: Sequence[list[Any]], most: int) -> Iterator[list[Any]]:
    """``most`` items of groups, or all: one of each group before two of any, evenly drawn among groups and within."""
    counts = [0] * len(groups)
    while most:
        open_groups = [at for at, group in enumerate(groups) if counts[at] < len(group)]
        if not open_groups:
            break
        for at in _evenly(len(open_groups), most):
            counts[open_groups[at]] += 1
            most -= 1
    for group, count in zip(groups, counts):
        yield [group[at] for at in _evenly(len(group), count)]


def _read(file: BinaryIO, wanted: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows ``wanted`` of a file, of which no other row group is read."""
    stored = opened(file)
    columns = [name for name in ("image", "prompt", "row_id", "psnr") if name in stored.schema_arrow.names]
    start = 0
    for group in range(stored.num_row_groups):
        stop = start + stored.metadata.row_group(group).num_rows
        here = [at - start for at in wanted if start <= at < stop]
        if here:
            yield from stored.read_row_group(group, columns=columns, use_threads=False).take(here).to_pylist()
        start = stop


def _tile(row: Mapping[str, Any]) -> Tile:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        caption = row["prompt"] or row["row_id"]
        if row.get("psnr") is not None:
            caption += f" ({row['psnr']:.1f} dB)"
        return Tile(image.convert("RGB"), caption)


def identity(plugin: Mapping[str, Any]) -> list[str]:
    """A plugin of the plan: its name, where it comes from, its weights."""
    return [plugin["name"], f"{plugin['distribution']} {plugin['version']}", plugin["fingerprint"]]

"""What contact sheet, card and report are made of, read back from a dataset where it lies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from PIL import Image

from latentmill.dataset import Dataset
from latentmill.plugin import RowError, tensors
from latentmill.shards import ToldRows, error_rows, filtered_rows


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
    errors: list[dict[str, Any]] = field(init=False)
    """The first failed rows."""
    failed_in: Counter[str] = field(init=False)
    left_out: list[dict[str, Any]] = field(init=False)
    """The first filtered rows."""
    filtered_in: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.there.store
        self.plan: Mapping[str, Any] = json.loads(self.there.plan.to_json())
        seen = self.there.look()
        self.rows = seen.rows()
        self.columns: Mapping[str, str] = {}
        """What is found in a shard's file, by name, and what it means if that is the sink's alone to know."""
        self.has_pictures = False
        if self.rows:
            telling = next((shard for shard, rows in self.rows.items() if rows), next(iter(self.rows)))
            _, schema, _ = self.there.shard(telling).about()  # one without rows may name no tensors
            self.columns = self.there.sink.layout(schema)
            self.has_pictures = "image" in schema.names
        now = self.there.status(seen)
        self.ok, self.failed, self.warnings = now["ok"], now["failed"], now["warnings"]
        self.filtered, self.not_needed = now.get("filtered", 0), now.get("not_needed", 0)
        self.failed_in, self.filtered_in = seen.failed_in(), seen.filtered_in()
        self.errors = self._first(200, error_rows, {shard: said.failed for shard, said in seen.readable.items()})
        self.left_out = self._first(200, filtered_rows, {shard: said.filtered for shard, said in seen.readable.items()})

    def _first(self, most: int, rows: ToldRows, counts: Mapping[int, Mapping[str, int]]) -> list[dict[str, Any]]:
        """The first ``most`` of the rows that shards don't store, of one kind."""
        shards, counted = [], 0
        for shard, by_stage in counts.items():
            if by_stage and counted < most:
                shards.append(shard)
                counted += sum(by_stage.values())
        return [row for _, found in self.there.told(shards, rows) for row in found][:most]

    @property
    def name(self) -> str:
        """The job's."""
        return str(self.plan["name"])

    @cached_property
    def tiles(self) -> list[Tile]:
        """Pictures from all over the dataset; first of all one of each prompt."""
        if not self.has_pictures:
            return []
        shards = list(self.rows)
        shards = [shards[at] for at in evenly(len(shards), self.most)]
        places: dict[str, list[tuple[int, int]]] = {}
        for shard, prompts in zip(shards, self.store.each(self._prompts, shards)):
            for number, prompt in enumerate(prompts):
                if prompt is not None:
                    places.setdefault(prompt, []).append((shard, number))
        chosen = sorted(place for group in _choose(list(places.values()), self.most) for place in group)
        rows = [(shard, [at for other, at in chosen if other == shard]) for shard in shards]
        return [tile for found in self.store.each(self._tiles, rows) for tile in found]

    def _prompts(self, shard: int) -> list[str | None]:
        found: list[str | None] = []
        for piece in self.there.shard(shard).read(["prompt"], range(self.rows[shard])):
            found += [None] if isinstance(piece, RowError) else piece.column("prompt").to_pylist()
        return found

    def _tiles(self, of: tuple[int, list[int]]) -> list[Tile]:
        shard, rows = of
        found: list[Tile] = []
        for piece in self.there.shard(shard).read(["image", "prompt", "row_id", "psnr"], rows):
            if not isinstance(piece, RowError):
                found += tiles(piece)
        return found


def evenly(count: int, most: int) -> list[int]:
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
        for at in evenly(len(open_groups), most):
            counts[open_groups[at]] += 1
            most -= 1
    for group, count in zip(groups, counts):
        yield [group[at] for at in evenly(len(group), count)]


CAPTION_COLUMNS = "row_id", "prompt", "psnr"
"""Columns that stand below a picture."""


def tiles(table: pa.Table) -> Iterator[Tile]:
    """The pictures of a table of rows, with what is written below them."""
    images = tensors.from_arrow(table, "image").numpy()
    told = table.select([name for name in CAPTION_COLUMNS if name in table.column_names]).to_pylist()
    for pixels, row in zip(images, told):
        caption = row["prompt"] or row["row_id"]
        if row.get("psnr") is not None:
            caption += f" ({row['psnr']:.1f} dB)"
        yield Tile(Image.fromarray(pixels), caption)


def identity(plugin: Mapping[str, Any]) -> list[str]:
    """A plugin of the plan: its name, where it comes from, its weights."""
    return [plugin["name"], f"{plugin['distribution']} {plugin['version']}", plugin["fingerprint"]]

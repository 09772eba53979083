"""Bounds on a picture's size and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa

from latentmill.plugin import RowError
from latentmill_filters.scorer import Scorer, written


class SizeBounds(Scorer):
    """Scores a picture's shorter side and its aspect, and filters what is too small or too long.

    ``short_side`` is in pixels. ``aspect`` is the longer side over the shorter, from 1 for a square. In a job with ``size`` both are of
    the picture as it was opened, ``original_size``; else of what the row is made in, its ``width`` and ``height``. A bound of None lets
    all pass. Clips have sizes, too.
    """

    contract = 2
    adds = (pa.field("short_side", pa.int32(), nullable=False), pa.field("aspect", pa.float64(), nullable=False))

    def __init__(self, min_side: int | None = None, max_aspect: float | None = None) -> None:
        self.min_side, self.max_aspect = min_side, max_aspect

    def scores(self, batch: pa.Table) -> Iterator[Mapping[str, float] | RowError]:
        names = [name for name in ("width", "height", "original_size") if name in batch.column_names]
        for row in batch.select(names).to_pylist():
            short, long = sorted(row.get("original_size") or (row["width"], row["height"]))
            if short:
                yield {"short_side": short, "aspect": long / short}
            else:
                yield RowError("the row has no size: only its prompt was encoded")

    def reason(self, scores: Mapping[str, float]) -> str:
        if self.min_side is not None and scores["short_side"] < self.min_side:
            return f"the shorter side, {scores['short_side']} pixels, is below {self.min_side}"
        if self.max_aspect is not None and scores["aspect"] > self.max_aspect:
            return f"aspect {written(scores['aspect'], self.max_aspect)} is above {self.max_aspect:g}"
        return ""

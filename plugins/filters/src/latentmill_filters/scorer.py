"""What the stages here have in common: scores are columns, and rows are filtered by them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import pyarrow as pa

from latentmill.fields import meaning
from latentmill.plugin import Declaration, Filtered, Reject, RowError, Stage, StageContext


class Scorer(Stage):
    """Stores a row's scores in the columns that ``adds`` names, and filters the row if ``reason`` has one.

    A subclass gives its columns and these two methods. Scores are stored of every row that goes on, whether there are bounds or
    not; those of a filtered row stand in ``filtered/``, numbers alone.
    """

    contract = 2
    adds: Sequence[pa.Field] = ()

    def declare(self, context: StageContext) -> Declaration:
        """As its class says. Raises ValueError if a column of its is there already: one of both would be lost."""
        for column in self.adds:
            if what := meaning(column.name):
                raise ValueError(f"no score can be the column {column.name}, which is another thing: {what}")
            if other := next((stage for stage in context.before if column.name in stage.added()), None):
                raise ValueError(
                    f"stage {other.name} before it adds the column {column.name}, too: give one another `column`, or leave it out"
                )
        return super().declare(context)

    @abstractmethod
    def scores(self, batch: pa.Table) -> Iterable[Mapping[str, Any] | RowError]:
        """Of each row its scores, by name: those in ``adds``, and others that ``reason`` goes by. RowError for a row that has none."""

    @abstractmethod
    def reason(self, scores: Mapping[str, Any]) -> str:
        """Why a row of these scores is filtered, in a few words; "" if it is not."""

    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        rows = dict[int, Mapping[str, Any]]()
        for i, found in enumerate(self.scores(batch)):
            if isinstance(found, RowError):
                reject(i, str(found))
                continue
            numbers = {name: float(score) for name, score in found.items() if isinstance(score, (int, float))}
            wrong = [name for name, score in numbers.items() if not isfinite(score)]
            if wrong:  # no bound would catch it: each comparison with what is no number is false
                reject(i, f"its {wrong[0]} is not finite")
            elif reason := self.reason(found):
                reject(i, Filtered(reason, numbers))
            else:
                rows[i] = found
        if len(rows) < len(batch):
            batch = batch.take(pa.array(rows, pa.int64()))
        for field in self.adds:
            column = pa.array([row[field.name] for row in rows.values()], field.type)
            batch = batch.append_column(field, column)
        return batch


def written(score: float, bound: float, digits: int = 2) -> str:
    """A score in a few digits, or in all if it would read as its bound."""
    short = f"{score:.{digits}f}"
    return short if float(short) != bound else repr(score)


def no_pictures(batch: pa.Table) -> list[RowError]:
    """An error for each row of a batch that has no column ``image``; none if it has one."""
    if "image" in batch.column_names:
        return []
    if "video" in batch.column_names:
        why = "it is a clip, and only pictures are scored here"
    else:
        why = "there is no picture here: put the stage behind decode or, where the source has pictures, before encode"
    return [RowError(why) for _ in range(len(batch))]

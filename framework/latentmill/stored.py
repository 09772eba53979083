"""The rows of a finished dataset, wherever it lies and whatever its sink is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from latentmill import storage
from latentmill.dataset import load
from latentmill.errors import PlanError
from latentmill.plugin import RowError


def read(output: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of all rows of a finished dataset, in the order of its plan, a table or several for each shard.

    ``output`` is its folder, or its address in a store. Columns are as stages are given them; one that isn't there is left out. Raises
    PlanError if there is no dataset, it is not finished, or a row can't be read.
    """
    there = load(storage.at(output))
    status = there.status()
    if not status["success"]:
        done, of = status["shards_done"], status["shards"]
        raise PlanError(f"{output} is not finished: {done} of {of} shards are there; its job goes on with the others")
    for number in range(there.plan.shards):
        shard = there.shard(number)
        _, _, count = shard.about()
        for piece in shard.read(columns, range(count)):
            if isinstance(piece, RowError):
                raise PlanError(f"{output}: shard {number}: {piece}")
            yield piece

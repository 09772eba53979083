"""What every stage must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import torch

from latentmill import checks
from latentmill.errors import ContractError, NoRowError
from latentmill.plugin import Filtered, Reason, RowError, Stage, StageContext, tensors
from latentmill.testing import batches
from latentmill.testing.behaviour import GENERATORS, alike, seed_all
from latentmill.testing.suite import PluginSuite, identity


class StageSuite(PluginSuite):
    """What every stage must hold that stands between two others. Runs on the CPU."""

    kind = "stage"
    stage: ClassVar[type[Stage]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    context: ClassVar[Callable[[], StageContext] | None] = None
    """A function at the top of a module that makes the ``StageContext`` of a stage that needs one."""

    def batch(self) -> pa.Table:
        """What it is tried on: five rows with pictures of 5 x 7 pixels, one black, one white."""
        return batches.with_pictures()

    def test_each_row_comes_back_once_or_is_rejected(self) -> None:
        """As itself."""
        batch = self.batch()
        given = dict(zip(batch.column("row").to_pylist(), batch.column("row_id").to_pylist()))
        stage = self._ready()
        tables, rejected = run(stage, batch, strict=False)
        for table in tables:
            assert isinstance(table, pa.Table), (
                f"the stage gives a {type(table).__name__}: it gives a table, or several"
            )
            for name in ("row", "row_id"):
                assert name in table.column_names, f"the stage loses the column {name!r}, by which a row is known"
        found = [row for table in tables for row in table.select(["row", "row_id"]).to_pylist()]
        numbers = [row["row"] for row in found]
        for at, reason in rejected:
            assert isinstance(at, int) and 0 <= at < len(batch), (
                f"reject names row {at} of a batch of {len(batch)}: it is a row's place in the batch"
            )
            assert isinstance(reason, Filtered) or (isinstance(reason, str) and reason.strip()), (
                "reject is given no reason: people read it in the error table"
            )
            try:
                checks.reason(stage, reason)
            except ContractError as error:
                raise AssertionError(str(error)) from error
        gone = [batch.column("row")[at].as_py() for at, _ in rejected]
        for number in numbers:
            assert number in given, f"the stage invents row {number}, which it was not given"
            assert numbers.count(number) == 1, f"the stage gives row {number} twice: each row comes back once"
            assert number not in gone, (
                f"the stage rejects row {number} and gives it back: leave out the rows that are rejected"
            )
        for row in found:
            assert row["row_id"] == given[row["row"]], (
                f"the stage swaps rows: row {row['row']} comes back under the row_id of another"
            )
        for number in given:
            assert number in numbers or number in gone, (
                f"the stage drops row {number} without a word: call reject(i, reason)"
            )

    def test_columns_are_those_that_it_declares(self) -> None:
        """Those that it was given, less ``drops``, and ``adds``; and those that all stages need, of their types."""
        batch, stage = self.batch(), self._ready()
        tables, _ = run(stage, batch)
        declared = stage.declare(context_of(type(self).context))
        adds, drops = declared.added(), list(declared.drops)
        for table in tables:
            lost = [name for name in batch.column_names if name not in table.column_names and not _among(name, drops)]
            assert not lost, f"the stage loses the column {lost[0]!r}: keep it, or name it in `drops`"
            more = [name for name in table.column_names if name not in batch.column_names and not _among(name, adds)]
            assert not more, f"the stage adds the column {more[0]!r}: name it in `adds`, so that all shards have it"
            for column in declared.adds:
                name = column if isinstance(column, str) else column.name
                assert name.endswith(":") or name in table.column_names, (
                    f"the stage adds no column {name!r}, which `adds` names"
                )
                if isinstance(column, pa.Field):
                    found = table.schema.field(name).type
                    assert found == column.type, f"the stage adds {name!r} as {found}, and `adds` says {column.type}"
        try:
            checks.same_columns(stage, batch, tables)
        except ContractError as error:
            raise AssertionError(str(error)) from error

    def test_arguments_are_left_as_they_were(self) -> None:
        """A batch may lie in memory that other processes read."""
        batch = self.batch()
        given, kept = fresh(batch), fresh(batch)
        run(self._ready(), given)
        for name in batch.column_names:
            assert stream(given.select([name])).equals(stream(kept.select([name]))), (
                f"the stage writes into the column {name!r} of its batch: other processes read the same memory; change a copy"
            )

    def test_nothing_is_remembered_between_calls(self) -> None:
        """A row's result is the same whatever came before."""
        assert not self._remembers(), (
            "the stage gives rows otherwise after an earlier batch: it remembers what it was given, or has a generator of its own; "
            "a row's result must follow from the row alone"
        )

    def test_no_global_random_generator_is_used(self) -> None:
        """Of torch, numpy and random, seeded two ways."""
        name = self._draws()
        assert not name, (
            f"the stage draws from the global random generator of {name}: a row's result must follow from the row; take a "
            "torch.Generator with the row's seed"
        )

    def test_rows_do_not_touch_each_other(self) -> None:
        """Each row in a batch against the row alone."""
        batch = self.batch()
        together = outcome(self._ready(), batch)
        alone: dict[int, Any] = {}
        for at in range(len(batch)):
            alone |= outcome(self._ready(), batch.slice(at, 1))
        for number, found in together.items():
            if number not in alone or alike(found, alone[number]) or self._remembers() or self._draws():
                continue
            for other, result in alone.items():
                assert other == number or not alike(_nameless(found), _nameless(result)), (
                    f"the stage swaps rows: row {number} comes back with the content of row {other}"
                )
            raise AssertionError(
                f"the stage gives row {number} otherwise in a batch than alone: rows of a batch must not touch each other; take no "
                "mean, maximum or rank over the batch"
            )

    def _ready(self) -> Stage:
        return ready(self._make()(), type(self).context)

    def _remembers(self) -> bool:
        batch = self.batch()
        other = batch.take(list(reversed(range(len(batch)))))
        first, second = self._ready(), self._ready()
        one = outcome(first, batch), outcome(first, other), outcome(first, batch)
        two = outcome(second, other), outcome(second, batch)
        return not (alike(one[0], two[1]) and alike(one[1], two[0]) and alike(one[0], one[2]))

    def _draws(self) -> str:
        wanted = outcome(self._ready(), self.batch())
        for at, name in enumerate(GENERATORS):
            if not alike(outcome(self._ready(), self.batch(), [int(i == at) for i in range(3)]), wanted):
                return name
        return ""

    def _explained(self) -> bool:
        return self._remembers() or bool(self._draws())

    def _question(self) -> Callable[[Any], Mapping[str, Any]]:
        return asked

    def _work(self) -> Callable[[Any], Mapping[str, Any]]:
        return partial(work, batch=self.batch(), context=type(self).context)


def context_of(make: Callable[[], StageContext] | None) -> StageContext:
    """What a stage is given to say what it is in a job."""
    return StageContext.of({}) if make is None else make()


def asked(stage: Stage) -> dict[str, Any]:
    """What the driver asks a stage."""
    return {**identity(stage), "adds": [str(column) for column in stage.adds]}


def work(stage: Stage, batch: pa.Table, context: Callable[[], StageContext] | None) -> dict[str, Any]:
    """What becomes of the batch's rows."""
    return {"the stage": outcome(ready(stage, context), batch)}


def ready(stage: Stage, context: Callable[[], StageContext] | None) -> Stage:
    """The stage, prepared and loaded as in a worker, with what another instance declares."""
    if context is not None:
        given = context()
        given.declaration = copy(stage).declare(given)
        stage.prepare(given)
    stage.load(torch.device("cpu"))
    return stage


def run(
    stage: Stage, batch: pa.Table, seeds: Sequence[int] = (0, 0, 0), strict: bool = True
) -> tuple[list[pa.Table], list[tuple[int, Reason]]]:
    """The tables that a batch becomes, and the rows that are rejected, failed or filtered."""
    rejected: list[tuple[int, Reason]] = []
    seed_all(seeds)
    try:
        with torch.no_grad():
            found = stage(batch, lambda at, reason: rejected.append((at, reason)))
            tables = [found] if isinstance(found, pa.Table) or not isinstance(found, Iterable) else list(found)
    except (RowError, NoRowError) as error:
        if len(batch) > 1:
            raise
        return [], [(0, str(error))]  # as a worker takes it, of a row alone
    return [table for table in tables if isinstance(table, pa.Table)] if strict else tables, rejected


def outcome(stage: Stage, batch: pa.Table, seeds: Sequence[int] = (0, 0, 0)) -> dict[int, Any]:
    """What becomes of each row, by its number: its columns, or why it was rejected."""
    given = fresh(batch)
    tables, rejected = run(stage, given, seeds)
    numbers = batch.column("row").to_pylist()
    found: dict[int, Any] = {numbers[at]: _plain(why) for at, why in rejected if 0 <= at < len(numbers)}
    for table in tables:
        plain = [field.name for field in table.schema if not tensors.is_tensor(field)]
        rows: list[dict[str, Any]] = [
            {name: _as_tensor(value) for name, value in row.items()} for row in table.select(plain).to_pylist()
        ]
        for name in table.column_names:
            if name not in plain:
                for row, tensor in zip(rows, tensors.from_arrow(table, name)):
                    row[name] = tensor.clone()
        found |= {row["row"]: row for row in rows if "row" in row}
    return found


def fresh(batch: pa.Table) -> pa.Table:
    """The batch in memory of its own, as it is when it has travelled."""
    return pa.ipc.open_stream(stream(batch).to_pybytes()).read_all().combine_chunks()


def stream(batch: pa.Table) -> pa.Buffer:
    """The batch as an Arrow stream: equal bytes for equal batches, NaN included."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)
    return sink.getvalue()


def _plain(why: Reason) -> Any:
    if not isinstance(why, Filtered):
        return why
    return {"filtered": why.reason, "scores": {name: _as_tensor(score) for name, score in why.scores.items()}}


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, float) else value


def _nameless(result: Any) -> Any:
    if not isinstance(result, dict):
        return result
    told = batches.rows(1).column_names
    return {name: value for name, value in result.items() if name not in told}


def _among(name: str, names: Sequence[str]) -> bool:
    return any(name == one or (one.endswith(":") and name.startswith(one)) for one in names)

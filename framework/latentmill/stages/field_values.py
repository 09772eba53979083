"""What a row's fields are: as the source says, or else the job; those that a stage has for itself, as ``refine.steps``, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from latentmill.columns import OF_ROW, Columns
from latentmill.fields import BY_NAME, FROM_COMFY, NOISE_INDEX, parse
from latentmill.identity import row_seed, stage_seed
from latentmill.plugin import RowError, RowField, StageContext


class FieldValues:
    """Of the rows of a job."""

    def __init__(self, columns: Columns, context: StageContext) -> None:
        self.columns, self.sampling = columns, context.sampling
        denoise = [stage.name for stage in context.after if "denoiser" in stage.needs]
        first = columns.of_stage(denoise[0]) if denoise else {}
        self.strength = first["strength"].name if first else "strength"
        """The field that says how much of the first noise a row begins with."""
        choice = context.choices.get("scheduler") or {"name": first["scheduler"].default if first else ""}
        self.scheduler = str(choice["name"]) if denoise else ""
        """Of rows that name none."""
        self.seeds: list[tuple[int, str, bool, bool]] = []
        """Of each stage with a seed where that stands among ``columns``, whether it is hashed from the row's, and whether its noise must
        be other than that of the pictures of its batch."""
        names, halfway = [field.name for field in columns.fields], False
        self.indices = [at for at, name in enumerate(names) if name.rpartition(".")[2] == NOISE_INDEX.name]
        for stage in context.after:
            if f"{stage.name}.seed" in names:
                anew = stage.name in denoise[1:] and not halfway
                alone = anew and self._said(context, stage.name, "first_noise") not in FROM_COMFY
                hashed = anew and ("seed", self._said(context, stage.name, "seed")) != OF_ROW
                self.seeds.append((names.index(f"{stage.name}.seed"), stage.name, hashed, alone))
            halfway = "time" in stage.added() or (halfway and "time" not in stage.drops)

    @staticmethod
    def _said(context: StageContext, stage: str, key: str) -> Any:
        """What a stage's ``sampling`` says, or else the job's."""
        stages = context.plan.config.get("stages", {}) if context.plan is not None else {}
        own = stages.get(stage, {}).get("sampling", {}).get(key)
        return context.sampling.get(key) if own is None else own

    def of(self, field: RowField, found: Mapping[str, Any]) -> Any:
        """A row's own value, or else the job's, or else the field's. None where it may be. Raises RowError."""
        value = found.get(field.name)
        if value is None:
            value = self.scheduler if field.name == "scheduler" else self.sampling.get(field.name, field.default)
        return None if value is None else parse(field, value)

    def _of_stage(self, field: RowField, found: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """As ``of``, of a field that a stage has for itself: where nobody says it, what the row has instead."""
        name = field.name.rpartition(".")[2]
        value = next((each for each in (found.get(field.name), field.default) if each is not None), None)
        if value is None and name != "seed":
            value = values.get(name)
        return None if value is None else parse(BY_NAME.get(name, field), value, field.name)

    def beside(self, found: Mapping[str, Any], values: dict[str, Any]) -> Iterator[pa.Array]:
        """The fields beside ours, an array of one each, and, in ``values``, by their names. Raises RowError."""
        for field in self.columns.fields:
            stage, _, name = field.name.rpartition(".")
            value = self._of_stage(field, found, values) if stage else self.of(field, found)
            values[field.name] = value
            if stage and name == "seed":
                value = value or 0  # until ``of_sample`` knows which sample it is of
            if value is None and not field.nullable:
                at = f"stages.{stage}.sampling.{name}" if stage else f"sampling.{name}"
                raise RowError(f"the row has no {field.name}: a column of the source or {at} gives it")
            yield pa.array([value], field.type)

    def of_batch(self, values: Mapping[str, Any]) -> bool:
        """Whether a row's samples are the pictures of one batch, which have one seed."""
        return NOISE_INDEX.name in values and values["seed"] is not None

    def of_sample(
        self, values: Mapping[str, Any], index: int, seed: int, drawn: Callable[[int], int]
    ) -> list[pa.Array]:
        """``beside``, of a sample: ``index`` is its place in a batch, and ``seed`` the row's.

        A stage's seed that was given is as it is ``drawn``; else it is the row's, or one hashed from that. Pictures of one batch have one,
        unless the stage's own noise would be the same for all of them.
        """
        found = list(values["beside"])
        for at in self.indices if index else ():
            found[at] = pa.array([parse(NOISE_INDEX, found[at][0].as_py() + index)], NOISE_INDEX.type)
        for at, stage, hashed, alone in self.seeds:
            given = values[f"{stage}.seed"]
            own = drawn(given) if given is not None else stage_seed(seed, stage) if hashed else seed
            own = row_seed(0, "", index, own) if alone else own
            found[at] = pa.array([own], pa.uint64())
        return found

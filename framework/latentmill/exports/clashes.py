"""Rows whose files would have one name, found before they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from latentmill import ids
from latentmill.errors import ExportError
from latentmill.exports.formats import ExportFormat, ExportRow
from latentmill.exports.rows import picture_name, require_short, resolutions_of
from latentmill.plan import Plan
from latentmill.plugin import Source
from latentmill.text import escaped, unescaped

ANY_SIDE = 64
"""The size of a picture that stands for all where none is read."""


def look_for_clashes(
    chosen: Sequence[ExportFormat],
    names: str | None,
    plan: Plan,
    source: Source,
    on_disk: bool,
    tell: Callable[[str], None],
) -> None:
    """Tell of two pictures of the source that would be one file; ``names``: the column that says what they are called.

    Raises ExportError if all samples of a row would be one, or the name of a file on a disk would be too long for it.
    """
    by_name = [each for each in chosen if each.names and each.path is not None]
    if not by_name or names in (None, "row_id"):
        return
    sides = resolutions_of(plan.config)
    samples = min(plan.samples_per_row, len(sides) + 1)
    for each in by_name:
        if len({_path(each, number, sides[number % len(sides)]) for number in range(samples)}) < samples:
            raise ExportError(
                f"{each.name}: the {plan.samples_per_row} samples of a row would be one file, called by {names}: "
                "export.names=row_id tells them apart"
            )
    if source.id_column is not None if names == "id" else names == "file" and source.knows_rows:
        _look_for_twice(by_name, plan, source, on_disk, tell)


def _path(format: ExportFormat, number: int, side: int, name: str = "picture") -> str:
    """Where a sample's file goes."""
    size = side or ANY_SIDE
    row = ExportRow(number, str(number), name, name, {"width": size, "height": size}, resolution=side)
    return format.whole_path(row)


def _look_for_twice(
    by_name: Sequence[ExportFormat], plan: Plan, source: Source, on_disk: bool, tell: Callable[[str], None]
) -> None:
    side = min(resolutions_of(plan.config))

    def called(id: str) -> str:
        name = picture_name(id) or id
        for each in by_name if on_disk else ():
            require_short(_path(each, 0, side, unescaped(name)), escaped(id))
        return name

    twice = ids.find_twice(source, plan.fragments, called)
    if twice is None:
        return
    fragments = {fragment.name: fragment for fragment in plan.fragments}
    both = [next(islice(source.ids(fragments[name]), at, None)) for name, at in (twice.first, twice.second)]
    first, second = (escaped(each or "") for each in both)
    of_one_size = ", if they are of one size" * all(each.sized for each in by_name)
    tell(
        f"{first} and {second} would be one file of {', '.join(each.name for each in by_name)}{of_one_size}, and then there is no "
        "export: rename one, or give export.names another column"
    )

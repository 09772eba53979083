"""The export that a job asks for: looked at before anything is made, and written once the dataset is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from latentmill import registry, storage
from latentmill.batch import PROMPT_PREFIX, empty
from latentmill.errors import ExportError
from latentmill.exports import table
from latentmill.exports.clashes import look_for_clashes
from latentmill.exports.export import (
    Exported,
    about_export,
    export,
    ledgers,
    require_apart,
    require_crops,
    require_names,
    require_whole,
)
from latentmill.exports.formats import ExportFormat, ExportRow
from latentmill.exports.rows import named_by
from latentmill.exports.texts import stored_text
from latentmill.fields import OWN_FIELDS
from latentmill.parts import Parts, discreet
from latentmill.plan import Plan
from latentmill.survey import EncodedText, encoded_text
from latentmill.text import in_units, plural

if TYPE_CHECKING:
    from latentmill.config import Job

PICTURE_NAME = "0" * 32
"""Stands for a picture's name where a file's size is reckoned."""


@discreet
def require(job: Job, built: Parts, plan: Plan, tell: Callable[[str], None]) -> list[ExportFormat]:
    """The formats that the job asks for; ``plan``: of the dataset as it may have grown; ``tell`` is given lines of what will be left out.

    Raises ExportError if its dataset will not be one for a format, as far as that is known before it is made.
    """
    if job.export is None:
        return []
    text, output, folder = encoded_text(job, built), job.output, storage.place(job.export["folder"])
    unstored = {*(of.name for of in OWN_FIELDS if not of.stored), *plan.columns.unstored()}
    rows = empty(plan.stages, plan.spec, job.sampling, plan.columns.schema())
    columns = [name for name in rows.column_names if name not in unstored]
    with registry.asking(built.source):
        inside = built.source.reads_from(folder)
        columns += built.source.conditioning() if built.source.wants_conditioning else ()
    if text is not None:  # names that nobody says are taken for right, and looked at in the end
        columns += [PROMPT_PREFIX + name for name in text.spec or ("embeds",)]
    require_whole(columns, output)
    chosen = table.chosen(job.export["to"], columns, plan.spec, output)
    if text is not None and text.spec is not None:
        shapes = {name: of.shape for name, of in text.spec.items()}
        for line in table.require_texts(chosen, stored_text(shapes, plan.config), output):
            tell(line)
    names = named_by(job.export.get("names"), columns, output)
    require_names(names, chosen, output)
    require_crops(plan, chosen)
    look_for_clashes(chosen, names, plan, built.source, "://" not in folder, tell)
    require_apart(output, folder)
    for ledger in ledgers(chosen, storage.at(folder)):
        ledger.require_free(about_export(plan, names))
    for each in chosen:
        if inside and (each.names != "needed" or each.finish is not None):
            raise ExportError(
                f"export.folder {folder} lies in what the source reads, so that it would read what {each.name} writes: choose another"
            )
    return chosen


def lines(
    job: Job, formats: Sequence[ExportFormat], rows: int, text: EncodedText | None, prompts: int
) -> Iterator[str]:
    """What will be written where, and how large encoded prompts will be there, of so many rows and distinct prompts."""
    if job.export is None:
        return
    yield f"{', '.join(each.name for each in formats)} in {storage.place(job.export['folder'])}"
    for each in formats:
        if text is None or text.spec is None or each.files is None or PROMPT_PREFIX + "embeds" not in each.needs:
            continue
        size = sum(map(len, each.files(_longest(text)).values()))
        files = prompts if each.of_prompts else rows
        yield f"{each.name}: at most {plural(files, 'file')} of {in_units(size)}, {in_units(files * size)}"


def _longest(text: EncodedText) -> ExportRow:
    """A row whose prompt has as many tokens as there can be."""
    import torch

    assert text.spec is not None
    tokens = text.spec["embeds"].shape[0]
    values = {name: torch.full(of.shape, tokens, dtype=getattr(torch, of.dtype)) for name, of in text.spec.items()}
    return ExportRow(
        0, PICTURE_NAME, PICTURE_NAME, PICTURE_NAME, {}, {PROMPT_PREFIX + name: value for name, value in values.items()}
    )


@discreet
def write(job: Job, tell: Callable[[str], None]) -> Exported:
    """See that the export is there, of the job's finished dataset. Raises ExportError, RunError or StorageError."""
    assert job.export is not None
    return export(job.output, job.export["to"], storage.place(job.export["folder"]), job.export.get("names"), tell)

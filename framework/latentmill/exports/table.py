"""The table of formats, and which of them fit a dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from latentmill.errors import ExportError
from latentmill.exports.automodel import AUTOMODEL_CACHE
from latentmill.exports.comfyui import COMFYUI
from latentmill.exports.energon import ENERGON
from latentmill.exports.fastvideo import FASTVIDEO
from latentmill.exports.folder import PICTURE_FOLDER
from latentmill.exports.formats import TEXTS, ExportFormat
from latentmill.exports.kohya import KOHYA, KOHYA_TEXTS
from latentmill.exports.mds import MDS
from latentmill.exports.musubi import MUSUBI, MUSUBI_TEXTS
from latentmill.exports.research import EDM2, PIXART, REPA
from latentmill.exports.simpletuner import SIMPLETUNER, SIMPLETUNER_TEXT
from latentmill.exports.spaces import family_of, space_in_words
from latentmill.exports.texts import StoredText, shapes_in_words
from latentmill.text import near

if TYPE_CHECKING:  # to list formats takes none of them
    from latentmill.plugin import LatentSpec

EXPORT_FORMATS: dict[str, ExportFormat] = {
    each.name: each
    for each in (
        EDM2,
        REPA,
        PIXART,
        COMFYUI,
        PICTURE_FOLDER,
        *KOHYA,
        *KOHYA_TEXTS,
        *MUSUBI,
        *MUSUBI_TEXTS,
        SIMPLETUNER,
        SIMPLETUNER_TEXT,
        AUTOMODEL_CACHE,
        MDS,
        ENERGON,
        FASTVIDEO,
    )
}
"""By name. ``musubi-qwen`` may be called ``musubi`` where it is the only one of musubi's that takes a dataset's latents."""

MADE_BY = {
    "latents": "a job that ends with encode stores them (latentmill run encode)",
    "latents_std": "run the job again with latents_std=true, into another output",
    "image": "it holds pictures if its job ends with decode (latentmill run decode source.path=OUT)",
    "label": "source.keep=[label] keeps such a column of the source",
    "prompt:embeds": "a job with encode_text in its flow stores what a model's text encoders make (latentmill run encode_text)",
}
"""How a dataset comes by a column."""

NOT_MADE = {
    "simpletuner-flux-text": "SimpleTuner caches T5's attention mask, too, and trains with it if told to; a dataset of ours has none",
    "musubi-krea2-text": "no text encoder of ours makes what Krea 2's does",
    "musubi-wan-text": "no text encoder of ours makes what Wan's does",
}
"""Encodings of prompts that trainers cache and that would have to be guessed, and why."""


def chosen(names: Sequence[str], columns: Collection[str], spec: LatentSpec | None, where: str) -> list[ExportFormat]:
    """The formats of these names, each once. Raises ExportError, which says why, if the dataset at ``where`` is not for one."""
    formats = [_named(name, spec, where) for name in dict.fromkeys(names)]
    if not formats:
        raise ExportError(f"--to names no format; there are: {', '.join(EXPORT_FORMATS)}")
    for each in formats:
        for column in each.needs:
            if column not in columns:
                raise ExportError(f"{each.name} needs {column}, and {where} has none: {MADE_BY[column]}")
        if spec is not None and not _takes(each, spec):
            raise ExportError(
                f"{each.name} takes latents of {', '.join(each.families)}, and those of {where} are {space_in_words(spec)}"
            )
    return list(dict.fromkeys(formats))


def require_texts(formats: Sequence[ExportFormat], stored: StoredText | None, where: str) -> Iterator[str]:
    """Lines of what is left out. Raises ExportError if the encodings of prompts at ``where`` are not those that a format needs."""
    for each in formats:
        if stored is None or not each.texts or stored.family in each.texts:
            continue
        wanted = " or ".join(f"{text.about} ({shapes_in_words(text.shapes)})" for text in each.texts)
        line = f"{each.name} takes encodings of prompts of {wanted}, and those of {where} are {stored}"
        if set(each.needs).isdisjoint(TEXTS):
            yield f"{line}: they are left out"
            continue
        made_with = " ".join(text.made_with for text in each.texts)
        raise ExportError(line + (f": make them with {made_with}" if made_with else ""))


def _takes(each: ExportFormat, spec: LatentSpec) -> bool:
    family = family_of(spec)
    return not each.families or (family is not None and family.name in each.families)


def _named(name: str, spec: LatentSpec | None, where: str) -> ExportFormat:
    if name in EXPORT_FORMATS:
        return EXPORT_FORMATS[name]
    if name in NOT_MADE:
        raise ExportError(f"{name} is not made: {NOT_MADE[name]}")
    known = [each for each in EXPORT_FORMATS.values() if each.name.startswith(f"{name}-") and not each.beside]
    if not known:
        raise ExportError(
            f"there is no format {name!r}{near(name, EXPORT_FORMATS)}; there are: {', '.join(EXPORT_FORMATS)}"
        )
    fitting = [each for each in known if spec is None or _takes(each, spec)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ExportError(f"{name} is {' or '.join(each.name for each in fitting)}: write which")
    assert spec is not None
    takes = ", ".join(f"{each.name} of {' or '.join(each.families)}" for each in known)
    raise ExportError(f"{name} takes latents ({takes}), and those of {where} are {space_in_words(spec)}")

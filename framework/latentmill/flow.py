"""Whether a job's stages can stand in their order: by what each declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from latentmill.plugin import Declaration
from latentmill.plugin.stage import named

if TYPE_CHECKING:
    from latentmill.config import Job


def wrong_in(flow: Sequence[Declaration], job: Job) -> Iterator[str]:
    """What is wrong with the order of the stages, one line each."""
    names = list(job.flow)
    positions = [stage.position for stage in flow]
    if positions != ["first", *["between"] * (len(flow) - 2), "last"]:
        yield f"flow must begin with read and end with write, or stages that do the same, and have no other of them, not {names}"
    there, lost = list[str](), False
    halfway = [stage.name for stage in flow if "time" in stage.added()]
    for stage in flow:
        for column in stage.takes:
            if not any(named(name, column) for name in there):
                if column.endswith(":"):
                    yield f"flow needs a stage before {stage.name} that adds {column}*, as encode does, and is {names}"
                yield (
                    f"{stage.name} needs a source of {column}; source {job.source['name']} has none, "
                    "and no stage before it adds them"
                )
        lost = lost or ("time" in there and "latents" in stage.takes and "time" not in stage.drops)
        there = [name for name in there if not any(named(name, column) for column in stage.drops)] + stage.added()
    last = flow[-2].added()
    if lost or ("time" not in last and ("time" in there or (job.sampling["until"] and not halfway))):
        said = "sampling.until" if job.sampling["until"] else f"stage {halfway[0]}"
        yield f"{said} leaves latents half-way, so flow must end with denoise, write, or go on with another denoise, not {names}"
    if job.attempts and not any("denoiser" in stage.needs for stage in flow):
        yield f"accept draws noise anew for rows that are filtered, and no stage of flow makes any, as denoise does: {names}"
    if job.attempts and "attempt" not in flow[0].added():
        yield (
            f"accept draws rows again, and {flow[0].name} would read the same: a stage that stands first must declare attempt, "
            "and go by it"
        )
    if job.latents_std and "latents_std" not in last:
        yield f"latents_std is of latents as they were encoded, so flow must end with encode, write, not {names}"
    if job.float_pictures:
        yield from _lost_floats(flow)
    if job.size and job.size.get("flip") and "latents_flipped" not in last:
        yield f"size.flip is of latents as they were encoded, so flow must end with encode, write, not {names}"


def _lost_floats(flow: Sequence[Declaration]) -> Iterator[str]:
    """Where pictures that are to stay floats could not, in a line."""
    maker, rounds, kept = "", "", False
    for stage in flow[1:]:
        makes, ends = ({"image", "video"} & {*names} for names in (stage.added(), stage.drops))
        if maker and stage.takes_floats and ends:
            if rounds:
                yield f"float_pictures: {rounds} takes pictures of bytes, so {stage.name} would be given rounded ones: float_pictures=false"
                return
            kept = True
        elif maker and not stage.takes_floats:
            rounds = rounds or stage.name
        if makes:
            maker = stage.name
        elif ends:
            maker = rounds = ""
    if not kept:
        names = [stage.name for stage in flow]
        yield f"float_pictures is of pictures that are made larger or encoded once a stage has made them, and flow is {names}"

"""Which columns of a batch end in a stage that denoises, and which a later one goes on with."""

from __future__ import annotations

from collections.abc import Sequence

from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX, STATE_PREFIX
from latentmill.fields import HALFWAY
from latentmill.plugin import Declaration
from latentmill.plugin.stage import named

INPAINTING = "mask", "masked"
FOR_DENOISERS = (*INPAINTING, "from_noise", PROMPT_PREFIX, NEGATIVE_PREFIX, STATE_PREFIX, *HALFWAY.names)
"""What is made for a stage that denoises, by name or by how it begins."""


def ending(after: Sequence[Declaration]) -> tuple[str, ...]:
    """Those of FOR_DENOISERS that no later stage takes as they are: masks last as long as the latents, conditioning until there is other."""
    return tuple(name for name in FOR_DENOISERS if not _goes_on(name, after))


def _goes_on(column: str, after: Sequence[Declaration]) -> bool:
    for stage in after:
        if column in INPAINTING:
            takes, anew = "denoiser" in stage.needs, "latents" in stage.drops and "latents" not in stage.added()
        elif column in (PROMPT_PREFIX, NEGATIVE_PREFIX):
            takes, anew = PROMPT_PREFIX in stage.takes, PROMPT_PREFIX in stage.added()
        else:
            return False
        if takes and not any(named(column, each) for each in stage.ignores):
            return True
        if anew:
            return False
    return False

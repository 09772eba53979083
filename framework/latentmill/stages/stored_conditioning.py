"""Conditioning that an earlier job stored, on its way into rows; and jobs that only store some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentmill import registry
from latentmill.batch import CONDITIONING, PROMPT_PREFIX
from latentmill.plugin import RowError, Source, StageContext

if TYPE_CHECKING:
    from torch import Tensor


def texts_alone(context: StageContext) -> bool:
    """Whether all stages between this one and the last encode prompts, and nothing else: rows need no size and no picture."""
    between = [{*stage.adds} for stage in context.after if stage.position == "between"]
    return bool(between) and all(PROMPT_PREFIX in adds and adds <= {*CONDITIONING} for adds in between)


def wanted(context: StageContext, source: Source) -> bool:
    """Whether the conditioning that a source has is taken from it: a later stage wants some, and none makes any."""
    first = next((stage for stage in context.after if PROMPT_PREFIX in (*stage.takes, *stage.adds)), None)
    if first is None or PROMPT_PREFIX in first.adds:
        return False
    with registry.asking(source):
        return any(name.startswith(PROMPT_PREFIX) for name in source.conditioning())


def of_row(given: Any) -> dict[str, Tensor]:
    """A row's stored conditioning, by column. Raises RowError."""
    import torch

    found = {name: torch.as_tensor(value) for name, value in (given or {}).items() if name.startswith(CONDITIONING)}
    if not any(name.startswith(PROMPT_PREFIX) for name in found):
        raise RowError("the row has no stored conditioning, and no stage of the job encodes prompts")
    for name, value in found.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RowError(f"the stored {name} is not finite")
    return found

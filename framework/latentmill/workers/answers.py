"""What the driver hears of what comes back before its end, or is taken up: the same from every pool."""

from __future__ import annotations

import logging

from latentmill.driver.messages import Dispatch, HandedOver, TakenUp
from latentmill.workers.worker import Outcome, Resumed

logger = logging.getLogger("latentmill")


def handed_over(order: Dispatch, outcome: Outcome) -> HandedOver:
    """A batch is back before its end."""
    if outcome.back == "half-way":
        return HandedOver(order.id, outcome.parts, outcome.rejected, outcome.bytes)
    return HandedOver(order.id, begun=outcome.back == "begun")


def taken_up(order: Dispatch, found: Resumed) -> TakenUp:
    """What is half done of a shard is here; or why it is not, for people."""
    if found.wrong:
        logger.warning(found.wrong)
    return TakenUp(order.id, found.tables, found.filtered, found.attempts)

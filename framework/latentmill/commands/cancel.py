"""``latentmill cancel``."""

from __future__ import annotations

import argparse
from typing import Any

from latentmill.commands.command import Command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "id", metavar="ID", help="as latentmill jobs lists it, or as much of its beginning as no other has"
    )


def _cancel(options: Any) -> int:
    from latentmill import submissions

    record = submissions.find(options.id)
    with submissions.met_again(record) as (launcher, job):
        if launcher.state(job).word == "ended":
            print(f"{record.id} has ended already")
            return 0
        launcher.cancel(job)
    print(f"{record.id} is asked to end; submitted again, it goes on with {record.output}")
    return 0


CANCEL_COMMAND = Command("cancel", "Ask a submitted job to end.", _options, _cancel, lambda options: False)

"""``latentmill logs``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from latentmill.commands.command import Command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "id", metavar="ID", help="as latentmill jobs lists it, or as much of its beginning as no other has"
    )
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended")


def _logs(options: Any) -> int:
    from latentmill import submissions

    try:
        with submissions.met_again(submissions.find(options.id)) as (launcher, job):
            for piece in launcher.log(job, options.follow):
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("the job goes on", file=sys.stderr)
        return 130
    return 0


LOGS_COMMAND = Command("logs", "Show what a submitted job's driver has said.", _options, _logs)

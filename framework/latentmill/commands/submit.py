"""``latentmill submit``."""

from __future__ import annotations

import argparse
from typing import Any

from latentmill import registry
from latentmill.commands.command import Command, add_grow, add_job


def _options(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add_grow(parser)
    there = ", ".join(sorted({entry.name for entry in registry.entries("launcher")}))
    parser.add_argument(
        "--to",
        metavar="TARGET",
        required=True,
        help=f"where it is started ({there}), or the name of a config in target/ beside the job; settings of the target are target.key=value",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written and sent, and start nothing"
    )


def _submit(options: Any) -> int:
    from latentmill import submissions

    offer = submissions.prepare(options.job, options.overrides, options.to, options.grow)
    if options.dry_run:
        for number, (name, text) in enumerate(offer.files.items()):
            print(f"{'' if number == 0 else chr(10)}# ---- {name}")
            print(text, end="" if text.endswith("\n") else "\n")
        return 0
    record = offer.submit()
    print(f"{record.id} is submitted to {options.to} ({record.handle}); output {record.output}")
    print(f"latentmill jobs; latentmill logs {record.id} --follow; latentmill cancel {record.id}")
    return 0


SUBMIT_COMMAND = Command(
    "submit",
    "Start a job somewhere else: apart from this terminal, on a cluster, by a queue.",
    _options,
    _submit,
    lambda options: bool(options.dry_run),
)

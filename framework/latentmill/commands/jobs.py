"""``latentmill jobs``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from latentmill.commands.command import Command, print_table

NEWEST = 50
"""Jobs that are asked for, unless all are: each is a question to its target, and one to its output."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help=f"not the newest {NEWEST} alone")
    parser.add_argument("--json", action="store_true")


def _jobs(options: Any) -> int:
    from latentmill import submissions

    there = submissions.records()
    older = 0 if options.all else max(0, len(there) - NEWEST)
    found = submissions.look(there[older:])
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [[job["id"], job["target"], _state(job), _progress(job), job["submitted"], job["output"]] for job in found]
    print_table(["id", "target", "state", "rows", "submitted", "output"], rows)
    if older:
        print(f"{older:,} older: latentmill jobs --all")
    return 0


def _state(job: Mapping[str, Any]) -> str:
    code = "" if job["exit_code"] is None else f" with {job['exit_code']}"
    return f"{job['state']}{code}" + (f": {job['detail']}" if job["detail"] else "")


def _progress(job: Mapping[str, Any]) -> str:
    now = job["dataset"]
    if now is None:
        return str(job["unread"])
    made: int = now["ok"] + now["failed"] + now.get("filtered", 0) + now.get("not_needed", 0)
    failed = f", {now['failed']:,} failed" if now["failed"] else ""
    return f"{made:,} of {now['planned']:,}{failed}" + (", complete" if now["success"] else "")


JOBS_COMMAND = Command(
    "jobs", "List what was submitted from this machine, and how far each output is.", _options, _jobs
)

"""``latentmill doctor``."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any

from latentmill.commands.command import Command, add_job


def _options(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--json", action="store_true")


def _doctor(options: Any) -> int:
    from latentmill import doctor
    from latentmill.config import load_job
    from latentmill.text import without_secrets

    job = load_job(options.job, options.overrides)
    with redirect_stdout(sys.stderr):  # Ray prints there when a node dies
        found = doctor.examine(job)
    print(without_secrets(found.to_json() if options.json else "\n".join(found.lines()), job.config))
    return 0 if found.ok else 2


DOCTOR_COMMAND = Command("doctor", "Say whether each node could do a job's work, and start nothing.", _options, _doctor)

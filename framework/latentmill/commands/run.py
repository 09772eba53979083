"""``latentmill run``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from latentmill import storage
from latentmill.commands.command import Command, add_grow, add_job
from latentmill.errors import NO_ROW, JobError, PlanError
from latentmill.text import near


def _options(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add_grow(parser)
    parser.add_argument("--cfg", choices=["job"], help="print the whole composed config, and run nothing")
    parser.add_argument(
        "--fork",
        metavar="OUT2",
        type=storage.place,
        help="begin anew in OUT2, for a job that has changed; nothing is reused",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="do shards with failed rows again, once what made them fail is mended",
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="a job for each choice of values, as in sampling.guidance_scale=2,4,8 scheduler=euler,dpmpp_2m",
    )
    parser.add_argument("--stage", metavar="NAME", help="with --retry-failed: only for rows that failed in this stage")
    parser.add_argument(
        "--reason", metavar="TEXT", help="with --retry-failed: only for rows whose reason has this in it"
    )


def _run(options: Any) -> int:
    from latentmill import values
    from latentmill.config import load_job
    from latentmill.runner import run

    if options.multirun:
        return _sweep(options)
    if options.cfg:
        print(load_job(options.job, options.overrides).config, end="")
        return 0
    if options.fork:
        if storage.at(options.fork).exists("plan.json"):
            raise PlanError(
                f"--fork {options.fork}: there is a dataset already; a fork begins anew, in a place of its own"
            )
        options.overrides.append(f"output={values.literal(options.fork)}")
    if options.stage:
        _require_stage(options.stage, load_job(options.job, options.overrides).flow)
    result = run(options.job, options.overrides, _retried(options), options.grow)
    print(result.text)
    if result.interrupted:
        return 130
    return NO_ROW if result.failed and not result.ok else 0


def _require_stage(name: str, flow: Sequence[str]) -> None:
    if name not in flow:
        raise JobError(f"--stage {name}: the job has no such stage{near(name, flow)}; it has: {', '.join(flow)}")


def _retried(options: Any) -> Callable[[Mapping[str, Any]], bool] | None:
    """Which failed rows are to be done again, if any are."""
    if (options.stage or options.reason) and not options.retry_failed:
        raise JobError("--stage and --reason say which failed rows --retry-failed does again: give it, too")

    def wanted(error: Mapping[str, Any]) -> bool:
        return error["stage"] == (options.stage or error["stage"]) and (options.reason or "") in error["reason"]

    return wanted if options.retry_failed else None


def _sweep(options: Any) -> int:
    from latentmill.sweep import load_sweep, run_sweep

    if options.fork:
        raise JobError("-m --fork: each job of a sweep has an output of its own; give another output")
    sweep = load_sweep(options.job, options.overrides)
    if options.cfg:
        for label, job in sweep.jobs.items():
            print(f"# {label}\n{job.config}", end="---\n")
        return 0
    if options.stage:
        for job in sweep.jobs.values():
            _require_stage(options.stage, job.flow)
    return run_sweep(sweep, partial(print, flush=True), retry_failed=_retried(options), grow=options.grow)


RUN_COMMAND = Command(
    "run",
    "Run a job to its end, or go on where an earlier run stopped.",
    _options,
    _run,
    lambda options: bool(options.cfg),
)

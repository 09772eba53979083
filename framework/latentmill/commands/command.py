"""What a command of ours is, and the words that several take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from latentmill import registry


@dataclass(frozen=True)
class Command:
    """``latentmill NAME ...``."""

    name: str
    about: str
    """A sentence for ``--help``."""
    add_options: Callable[[argparse.ArgumentParser], None]
    call: Callable[[Any], int]
    """Does it, given the options; returns the exit code. What it needs is imported when it is called."""
    is_asked_on_stdout: Callable[[Any], bool] = lambda options: True
    """Whether what it prints is what was asked for: it has failed then where that can't be written."""


def add_job(parser: argparse.ArgumentParser) -> None:
    """``JOB [key=value ...]``, as ``options.job`` and ``options.overrides``."""
    parser.add_argument(
        "job",
        metavar="JOB",
        help=f"a job that is installed ({', '.join(registry.jobs())}), the path of a YAML file, or of a workflow of ComfyUI (.json, its API format)",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a value of the job, as sampling.steps=10")


def add_grow(parser: argparse.ArgumentParser) -> None:
    """``--grow``."""
    parser.add_argument(
        "--grow",
        action="store_true",
        help="take in rows that have come to the source since; those that are there stay",
    )


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """A table for people; ``styles``: of each row, as rich has them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for row, style in zip_longest(rows, styles):
        table.add_row(*row, style=style)
    Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False).print(table)
